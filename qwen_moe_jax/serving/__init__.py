"""A server that speaks OpenAI's HTTP API, on one engine (extra `serve`)."""
