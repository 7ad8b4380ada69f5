"""Measure and describe: accuracy, latency, memory and graphs of models and bundles.

Reads what the runtime and the exporter give; changes nothing.
"""
