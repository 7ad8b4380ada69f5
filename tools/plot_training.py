"""Draw the curves of trainings from the logs that tools/train.py keeps: losses, and accuracy on validation.

    python tools/plot_training.py runs/nuclei runs/nuclei-upernet --out curves.png

A row for each run, over steps; the minutes of training are marked above.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Curves = dict[str, tuple[list[int], list[float]]]  # steps and values by name


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `log.jsonl`, by step. What a resumed training did again counts as it did it last.

    Raises:
        FileNotFoundError: no log there.
        ValueError: the log is empty.
    """
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    last = {(line["step"], "validation" in line): line for line in lines}
    if not last:
        raise ValueError(f"{run / 'log.jsonl'} is empty; the training has logged nothing yet")
    return [last[key] for key in sorted(last)]


def curves(lines: list[dict[str, Any]], part: str) -> Curves:
    """Each value under `losses` or `validation` over the steps; the gradient's norm is not a loss."""
    found: Curves = {}
    for line in lines:
        for name, value in line.get(part, {}).items():
            if name != "gradient":
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return found


def draw(runs: list[Path]) -> Figure:
    """Losses on the left and validation on the right, a row for each run."""
    figure = Figure(figsize=(14, 4.2 * len(runs)), layout="constrained")
    for run, (left, right) in zip(runs, figure.subplots(len(runs), 2, squeeze=False), strict=True):
        lines = read(run)
        for axes, part in ((left, "losses"), (right, "validation")):
            plot(axes, curves(lines, part), marker="o" if part == "validation" else "")
            axes.set_title(f"{run.resolve().name}: {part}", fontsize=11)
            mark_minutes(axes, lines)
        left.set_ylim(bottom=0)
        right.set_ylim(0, 1)
    return figure


def plot(axes: Axes, parts: Curves, marker: str) -> None:
    """The curves with their names."""
    for name, (steps, values) in parts.items():
        axes.plot(steps, values, marker=marker, markersize=4, linewidth=1.4, label=f"{name} {values[-1]:.3g}")
    axes.set_xlabel("steps")
    axes.grid(alpha=0.3)
    if parts:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title="last", title_fontsize=8)


def mark_minutes(axes: Axes, lines: list[dict[str, Any]]) -> None:
    """A second scale, as minutes don't go evenly with steps: larger pictures take longer."""
    steps, minutes = ([line[key] for line in lines] for key in ("step", "minutes"))
    axes.set_xlim(0, max(steps))
    even = [minute for minute in MaxNLocator(6).tick_values(0, max(minutes)) if minute <= max(minutes)]
    above = axes.twiny()
    above.set_xlim(axes.get_xlim())
    above.set_xticks(np.interp(even, [0, *minutes], [0, *steps]), [f"{minute:g}" for minute in even])
    above.set_xlabel("minutes", fontsize=8)
    above.tick_params(labelsize=8)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the --out of tools/train.py")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG, PDF or SVG")
    args = parser.parse_args(argv)
    try:
        figure = draw(args.runs)
    except (OSError, ValueError) as error:
        print(f"plot_training: {error}", file=sys.stderr)
        return 2
    figure.savefig(args.out, dpi=110)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
