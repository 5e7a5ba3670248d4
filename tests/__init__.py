"""Tests and what they share; `tests.checkpoints` makes the models that they run."""
