"""A checkpoint file to a loaded model: read, unwrap, recognise, load."""
