"""How fast a server answers: requests made up and sent, times measured, for any OpenAI-compatible address."""
