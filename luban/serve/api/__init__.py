"""The HTTP API, compatible with OpenAI's, and the chat page; `app.create_app` puts it together."""
