"""The PyTorch reference: what the exported graph must agree with. Knows neither ONNX nor TensorRT."""
