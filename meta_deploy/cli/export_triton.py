"""meta-export --triton: a bundle, new or there already, becomes models in a Triton model repository."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meta_deploy.cli.common import path
from meta_deploy.errors import InputError
from meta_deploy.text import escaped

if TYPE_CHECKING:
    from meta_deploy.bundle.bundle import Bundle
    from meta_deploy.triton.repository import Written

_WITH_BUNDLE = {"bundle", "triton", "triton_name", "json"}


def add_triton(group: argparse._ArgumentGroup) -> None:
    """The options, but for --bundle, which is a source."""
    group.add_argument(
        "--triton",
        type=path,
        metavar="DIR",
        help="also write it into a Triton model repository: new models, or their next version",
    )
    group.add_argument(
        "--triton-name",
        metavar="NAME",
        help="what the model is called there (default: as the bundle's folder)",
    )


def check_triton(args: argparse.Namespace, parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Refuse before long work what cannot be written at its end, and options that have no effect.

    Raises:
        InputError: which option, and why.
    """
    if args.triton is None:
        if option := next(
            (name for name in ("bundle", "triton_name") if getattr(args, name) is not None), None
        ):
            raise InputError(
                f"--{option.replace('_', '-')} is for --triton; give that the repository's folder"
            )
        return
    from meta_deploy.triton.repository import check_name, check_place

    if args.bundle is not None:
        _check_alone(args, parser())
    name = args.triton_name
    if name is None and args.out is not None:
        name = os.path.basename(os.path.realpath(args.out))
    elif name is None and (source := args.ckpt or args.onnx):
        check_name(Path(source).stem)  # with which the bundle's name begins
    check_place(args.triton, name, None if args.target == "auto" else args.target)


def _check_alone(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise InputError where an option beside --bundle is about an export."""
    values = vars(args)
    for action in parser._actions:
        if action.dest not in values or action.dest in _WITH_BUNDLE:
            continue
        if values[action.dest] != parser.get_default(action.dest) and _given(action, args):
            option = action.option_strings[0]
            raise InputError(
                f"{option} is for an export, and --bundle is one that is done; leave one of them out"
            )


def _given(action: argparse.Action, args: argparse.Namespace) -> bool:
    """Whether it was this option that set its value, which several may (--fp16, --int8)."""
    return action.nargs != 0 or action.const == getattr(args, action.dest)


def write_triton(args: argparse.Namespace, bundle: Bundle) -> Written | None:
    """The bundle in the repository that was asked for, if any. Raises InputError."""
    if args.triton is None:
        return None
    from meta_deploy.triton.repository import write_models

    return write_models(bundle, args.triton, args.triton_name)


def triton_document(written: Written | None) -> dict[str, Any] | None:
    """What --json prints of it."""
    if written is None:
        return None
    return {
        "repository": str(written.repository),
        "models": list(written.models),
        "version": written.version,
    }


def triton_summary(written: Written) -> str:
    """What the command prints of it at its end."""
    *runs, model = written.models
    which = f"version {written.version} of {model}" + "".join(f", which runs {name}" for name in runs)
    place = escaped(str(Path(os.path.realpath(written.repository))))
    return f"Triton: {which}\nnext: tritonserver --model-repository={place}"
