"""The server on several machines, with Ray Serve."""
