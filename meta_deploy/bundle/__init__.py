"""The bundle: a folder with a model, and a manifest that says how to feed it and what comes out."""
