"""Calibration: which range each tensor of a graph needs in 8 bits, measured on samples."""

# How a range is found, for commands to list: `auto` takes for each tensor the best of the others.
METHOD_NAMES = ("auto", "minmax", "percentile", "entropy", "mse")
