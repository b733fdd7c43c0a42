"""One module an API: requests in its form become a `protocol.ChatRequest`, parts of an answer become its events.

Each module has a function `add_routes(app, service)`, which `serve.app` calls; `serve.service.Service` runs all
requests the same way. The form of an API's errors is chosen by path in `serve.errors.FORMS`.
"""
