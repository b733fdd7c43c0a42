"""One module an API: requests in its form become a `protocol.ChatRequest`, parts of an answer become its events.

`serve.service.Service` runs them all the same way.
"""
