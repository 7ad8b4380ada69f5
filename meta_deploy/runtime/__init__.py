"""Run a bundle on images: read, preprocess, infer, postprocess, draw.

Knows neither torch nor onnx, and imports nothing of ours but the errors.
"""
