"""What tests of the HTTP API ask, and where."""

LOCAL = "http://localhost"
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
