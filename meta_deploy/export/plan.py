"""What an export will do, decided and checked before any long work. Opens no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meta_deploy.calib import METHOD_NAMES
from meta_deploy.errors import InputError
from meta_deploy.export.options import Options
from meta_deploy.export.samples import MOST, MOST_CALIBRATION, find_files
from meta_deploy.export.sources import check_options
from meta_deploy.graph.precision import PRECISIONS, Precision
from meta_deploy.targets import choose_target
from meta_deploy.targets.target import BuildOptions, Target
from meta_deploy.tasks.annotations import Annotations, open_annotations


@dataclass(frozen=True)
class Plan:
    """What an export will do, decided before any long work.

    Attributes:
        reason: why this target.
        build_options: for the target's `build`.
        form: of NMS, RoIAlign and sampling.
        passes: their names, in order.
        tunes: whether others are tried.
        files: images or .npz files that were given, or the package's own.
        lowers: whether the graph itself changes its precision.
        needs_samples: whether anything is run on the files.
        folders: of the bundle, by the precision that it may come to be in.
        truth: what is true of the files, to judge 8 bits by.
    """

    options: Options
    target: Target
    reason: str
    precision: Precision
    build_options: BuildOptions
    form: str
    passes: list[str]
    tunes: bool
    files: list[Path]
    lowers: bool
    needs_samples: bool
    folders: dict[str, str | Path]
    truth: Annotations | None

    @property
    def rest(self) -> str:
        """The precision of what is not in 8 bits: the bundle's own, unless that is 8 bits."""
        return self.target.rest(self.precision.name)

    def reads(self, source: str | Path) -> list[Path]:
        """The files that the bundle must not replace."""
        others = (self.options.annotations, self.options.backbone_ckpt)
        return [Path(source), *self.files, *(Path(path) for path in others if path is not None)]


def planned(path: str | Path, options: Options) -> Plan:
    """Choose, and refuse what can be refused before any work.

    Raises:
        InputError: options that there are not, or that do not go together; images that are not there.
    """
    target, reason = choose_target(options.target, options.precision)
    precision = PRECISIONS[options.precision]
    build_options = BuildOptions(precision.name, tuple(options.gpus), options.workspace_mb)
    form = target.choose_operators(options.operators)
    passes = choose_passes(options.passes, target)
    if precision.calibrates:
        passes = [name for name in passes if name not in target.hiding]
    check_options(path, options)
    target.check(build_options)
    check_int8_options(options)
    lowers = precision.name not in ("fp32", *target.lowered_by_build)
    needed = options.check or (lowers and precision.measures)
    most = MOST_CALIBRATION if precision.calibrates else MOST
    files = find_files(options.calib_images, most) if needed or options.calib_images is not None else []
    model = str(options.model).replace(":", "-") if path == options.backbone_ckpt else Path(path).stem
    outcomes = dict.fromkeys((precision.name, target.rest(precision.name)))
    named: dict[str, str | Path] = {outcome: f"{model}-{target.name}-{outcome}" for outcome in outcomes}
    folders = named if options.out is None else dict.fromkeys(outcomes, options.out)
    truth = None
    if options.annotations is not None:
        truth = open_annotations(options.annotations)
        truth.check(truth.known([str(path) for path in files]))
    return Plan(
        options=options,
        target=target,
        reason=reason,
        precision=precision,
        build_options=build_options,
        form=form,
        passes=passes,
        tunes=options.tune and options.passes == "all",
        files=files,
        lowers=lowers,
        needs_samples=needed,
        folders=folders,
        truth=truth,
    )


def choose_passes(passes: str, target: Target) -> list[str]:
    """The passes to run, in the order of the target's pipeline.

    Raises:
        InputError: an unknown name.
    """
    if passes == "all":
        return list(target.passes)
    names = [] if passes == "none" else [name.strip() for name in passes.split(",")]
    if unknown := [name for name in names if name not in target.passes]:
        raise InputError(
            f"'{unknown[0]}' is not a graph pass of {target.name}; "
            f"choose all, none, or some of {', '.join(dict.fromkeys(target.passes))}"
        )
    return [name for name in target.passes if name in names or name in target.required_passes]


def check_int8_options(options: Options) -> None:
    """Refuse a way to calibrate that there is not, and what is for 8 bits without them.

    Raises:
        InputError: such an option.
    """
    if options.calib_method not in METHOD_NAMES:
        raise InputError(
            f"'{options.calib_method}' is not a calibration method; choose {', '.join(METHOD_NAMES)}"
        )
    fresh = Options()
    for name in ("calib_method", "max_drop", "annotations", "strict", "search"):
        if getattr(options, name) != getattr(fresh, name) and not PRECISIONS[options.precision].calibrates:
            option = {"search": "no-search"}.get(name, name).replace("_", "-")
            raise InputError(f"--{option} is for --int8 and --fp8, and the precision is {options.precision}")
    for name in ("max_drop", "annotations"):
        if getattr(options, name) is not None and not options.search:
            raise InputError(f"--{name.replace('_', '-')} is for the search; leave out --no-search")
    if options.annotations is not None and options.max_drop is None:
        raise InputError("--annotations say what 8 bits lose; give --max-drop, how much that may be")
