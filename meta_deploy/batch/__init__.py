"""Many images on many machines: Ray Data runs the steps of a prediction, each with workers of its own."""
