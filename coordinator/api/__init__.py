"""The HTTP API: OpenAI's chat completions and completions over a Generator. Knows nothing of nodes and plans."""
