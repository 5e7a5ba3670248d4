"""GGUF files become folders that everything else reads."""
