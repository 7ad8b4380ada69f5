"""Bundles over HTTP: an application of models, each batched in replicas; Ray Serve runs it."""
