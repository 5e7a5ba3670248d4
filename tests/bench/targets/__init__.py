"""The targets, each a module with a function that measures them and returns rows."""
