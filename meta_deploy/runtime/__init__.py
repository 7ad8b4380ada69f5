"""Run a bundle on images: one call from an image to its result. Knows neither torch nor onnx."""
