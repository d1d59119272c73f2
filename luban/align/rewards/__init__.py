"""What an answer is worth: reward models, functions of one's own, verifiers, HTTP endpoints."""
