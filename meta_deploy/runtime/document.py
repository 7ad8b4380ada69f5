"""What meta-infer --json and the server say beside the entries of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meta_deploy.bundle.bundle import Bundle


def head(bundle: Bundle, backend: str, score_threshold: float | None) -> dict[str, Any]:
    """The fields before `images` and `errors`; a threshold of None is the bundle's."""
    return {
        "bundle": str(bundle.path),
        "model": bundle.model_name,
        "task": bundle.task,
        "backend": backend,
        "score_threshold": bundle.shown_score if score_threshold is None else score_threshold,
    }


def entry(found: Mapping[str, Any], file: str | None = None) -> dict[str, Any]:
    """A result's `to_dict` with the file that was written of it: an overlay, or arrays."""
    return {**found, ("file" if "outputs" in found else "overlay"): file}
