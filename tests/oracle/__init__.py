"""Engines against the single-process libraries."""
