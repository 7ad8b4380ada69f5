"""A float32 graph in a lower precision."""
