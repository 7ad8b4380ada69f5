"""Measure and describe: accuracy, latency, memory and graphs of models and bundles.

Reads what the runtime and the exporter give; changes nothing.
"""

RUNS = 40  # timed rounds, unless asked otherwise
COUNT = 50  # images at most
