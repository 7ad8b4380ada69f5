"""Deployment and inference for ViT-adapter dense-prediction models.

`meta_deploy.export.export(...)` writes a `Bundle`; `meta_deploy.Predictor(bundle)(image)` runs one.

Importing this package imports nothing heavy; each name is loaded on first use.
"""

__version__ = "0.1.0"

_LAZY = {
    "Predictor": "meta_deploy.runtime.predictor",
    "Bundle": "meta_deploy.bundle.bundle",
    "Detections": "meta_deploy.tasks.detection",
    "Segmentation": "meta_deploy.tasks.semantic_segmentation",
    "Arrays": "meta_deploy.tasks.raw",
}
__all__ = ["Arrays", "Bundle", "Detections", "Predictor", "Segmentation", "__version__"]


def __getattr__(name: str):
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'meta_deploy' has no attribute '{name}'")
