"""A report as text, in the format that a file's suffix names. Knows formats' names and no contents."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from meta_deploy.errors import InputError
from meta_deploy.report.markdown import to_markdown
from meta_deploy.report.schema import Report

SUFFIXES = (".html", ".md", ".json")


def renderer(path: str | os.PathLike[str]) -> Callable[[Report], str]:
    """What makes the text of this file.

    Raises:
        InputError: a suffix that is none of .html, .md, .json.
        ImportError: what makes pages is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".md":
        return to_markdown
    if suffix == ".json":
        return Report.to_json
    if suffix == ".html":
        from meta_deploy.report.page import to_html

        return to_html
    raise InputError(f"cannot write '{path}': a report is {', '.join(SUFFIXES)}")
