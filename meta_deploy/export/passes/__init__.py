"""Graph passes: graph in, changes made out. They know ONNX graphs, not models."""
