"""Measures this product against its targets; not collected by pytest."""
