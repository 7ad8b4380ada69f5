"""ONNX graphs: what passes ask of them, the passes, and precision. Knows neither torch nor models."""
