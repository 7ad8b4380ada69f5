"""Bundles as models of NVIDIA Triton: the repository that a server reads, and the Python model in it."""
