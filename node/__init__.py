"""A node: runs one stage of a model. It knows nothing about HTTP, prompts as text, or who asked."""
