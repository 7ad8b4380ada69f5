"""Find the objects in a folder of images with several threads that share one predictor.

python examples/predict_folder_threads.py photos/ [THREADS [BUNDLE]]
"""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from meta_deploy import Detections, Predictor
from meta_deploy.errors import ImageError


def main(folder: str, threads: str = "4", bundle: str | None = None) -> None:
    paths = sorted(path for path in Path(folder).iterdir() if path.is_file())

    # One core per call, so that concurrent calls do not compete for all cores.
    with Predictor(bundle, threads=1) as predictor:

        def find(path: Path) -> Detections | ImageError:
            try:
                return predictor(path)
            except ImageError as error:
                return error

        with ThreadPoolExecutor(int(threads)) as pool:
            for path, found in zip(paths, pool.map(find, paths), strict=True):
                if isinstance(found, ImageError):
                    print(f"{path.name}: {found}", file=sys.stderr)
                else:
                    print(f"{path.name}: {dict(Counter(found.names))}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
