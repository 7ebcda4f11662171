"""One forward pass of a base with a shadow."""
