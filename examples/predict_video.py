"""Count the objects in a video, frame by frame; the next frame is decoded while the model runs.

python examples/predict_video.py clip.mp4 [BUNDLE]
"""

import sys
from collections import Counter

from meta_deploy import Predictor
from meta_deploy.imaging.sources import expand
from meta_deploy.runtime.stream import predict


def main(video: str, bundle: str | None = None) -> None:
    with Predictor(bundle) as predictor:
        for frame in predict(predictor, expand([video])):
            if frame.result is None:
                sys.exit(f"bad input: {frame.error}")
            print(f"{float(frame.time):7.2f} s: {dict(Counter(frame.result.names))}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
