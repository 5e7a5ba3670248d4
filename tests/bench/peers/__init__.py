"""llama.cpp in the same table: built from its Python package's sources, with the same weights on the same cores."""
