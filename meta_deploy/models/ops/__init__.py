"""Operators that PyTorch lacks, and that ONNX writes in its own way."""
