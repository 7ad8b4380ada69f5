"""One graph pass a file, named as the pass; pipeline.py has their order."""
