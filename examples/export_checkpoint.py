"""Export a checkpoint and print how well it agrees with PyTorch. Needs the [export] extra.

python examples/export_checkpoint.py model.pth my-bundle
"""

import sys

from meta_deploy.errors import InputError, VerificationError
from meta_deploy.export import export


def main(checkpoint: str, out: str) -> None:
    try:
        bundle = export(checkpoint, target="onnxruntime", out=out)
    except InputError as error:  # an unusable checkpoint, an output folder that cannot be written
        sys.exit(f"bad input: {error}")
    except VerificationError as error:  # the graph does not match the model; nothing was written
        sys.exit(f"not the same model: {error}")

    manifest = bundle.manifest
    print(f"{bundle.model_name}: {manifest.parameters:,} parameters, {len(bundle.classes)} classes")
    print(f"{manifest.nodes.before} nodes became {manifest.nodes.after}")
    for name, stage in manifest.verification["stages"].items():
        print(f"{name}: {stage}")


if __name__ == "__main__":
    if len(sys.argv) not in (3,):
        sys.exit(__doc__)
    main(*sys.argv[1:])
