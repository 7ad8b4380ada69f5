"""What a model is for: its outputs, how they become results, and how two sets of them are compared."""
