"""Find the objects in one image, print them and write an overlay.

python examples/predict_image.py photo.jpg [BUNDLE]
"""

import sys

from meta_deploy import Predictor


def main(image: str, bundle: str | None = None) -> None:
    with Predictor(bundle) as predictor:  # None: the nuclei model
        found = predictor(image)  # a path, a file's bytes, a Pillow image or an RGB array

    for name, score, box, segment in zip(found.names, found.scores, found.boxes, found.masks, strict=True):
        x0, y0, x1, y1 = box.round().astype(int)
        print(f"{name:<10} {score:.2f}  ({x0}, {y0}) to ({x1}, {y1}), {segment.sum()} pixels")
    found.save("overlay.jpg")
    ms = found.timings
    print(f"overlay.jpg; {ms.pre:.1f} ms preprocessing, {ms.model:.1f} model, {ms.post:.1f} postprocessing")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
