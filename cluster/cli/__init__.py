"""The command line: the outermost layer. It alone imports the roles, lazily, and nothing imports it."""
