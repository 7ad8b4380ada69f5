"""TensorRT and TensorRT-RTX: build an engine, keep it, run it."""
