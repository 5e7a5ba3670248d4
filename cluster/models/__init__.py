"""Models at rest: what their files hold, which tensors belong to which layers, what they cost."""
