"""One output projection, or one layer, by everyone."""
