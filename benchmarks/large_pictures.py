"""Peak memory of meta-infer on large pictures, with overlays, beside the size of the decoded picture.

    python benchmarks/large_pictures.py [--megapixels N] [--formats jpg png …] [--several N] [--model BUNDLE]

Memory is that of the process beyond what it takes for a picture of 64x64. `--several` runs as many JPEGs of
100 megapixels in one call.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image

from benchmarks.common import Run, machine, parser, run_command, save, table
from meta_deploy.bundle.shipped import locate


def main(argv: Sequence[str] | None = None) -> None:
    p = parser(__doc__, "large_pictures")
    p.add_argument("--megapixels", type=float, default=177, help="of each picture (default: %(default)s)")
    p.add_argument("--formats", nargs="+", default=["jpg", "png", "tif", "webp"], help="default: %(default)s")
    p.add_argument("--several", type=int, default=6, help="JPEGs in one call; 0: none (default: %(default)s)")
    p.add_argument("--model", type=Path, default=locate(None), metavar="BUNDLE")
    args = p.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = run([write(folder / "small.png", 0.004096)], args.model, folder).peak_mb
        for suffix in args.formats:
            path = write(folder / f"large.{suffix}", args.megapixels)
            rows.append(row(suffix, args.megapixels, 1, run([path], args.model, folder), base))
            path.unlink()
        if args.several:
            paths = [write(folder / f"{k}.jpg", 100) for k in range(args.several)]
            rows.append(row("jpg", 100, args.several, run(paths, args.model, folder), base))
    print(table(rows))
    save(args.json, machine=machine(), base_mb=base, rows=rows)


def write(path: Path, megapixels: float) -> Path:
    """A picture of three to two with some texture, which is quick to encode."""
    height = round((megapixels * 1e6 / 1.5) ** 0.5)
    width = round(height * 1.5)
    texture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    picture = Image.fromarray(texture).resize((width, height), Image.Resampling.BILINEAR)
    options: dict[str, Any] = {"compress_level": 1} if path.suffix == ".png" else {}
    if path.suffix == ".tif":
        options = {"compression": "tiff_lzw"}
    picture.save(path, **options)
    return path


def run(paths: Sequence[Path], model: Path, folder: Path) -> Run:
    """meta-infer in a process of its own. Raises SystemExit where it fails."""
    finished = run_command("infer", *paths, "--model", model, "--tile", "0", "--out", folder / "out")
    if finished.code:
        raise SystemExit(f"meta-infer failed with exit code {finished.code}")
    return finished


def row(suffix: str, megapixels: float, count: int, finished: Run, base: float) -> dict[str, Any]:
    """What one call took beyond `base` MB."""
    decoded = megapixels * 3 * 1e6 / (1 << 20)
    return {
        "format": suffix,
        "megapixels": megapixels,
        "pictures": count,
        "decoded, MB": decoded,
        "over base, MB": finished.peak_mb - base,
        "times decoded": (finished.peak_mb - base) / decoded,
        "seconds": finished.seconds,
    }


if __name__ == "__main__":
    main()
