"""The package's errors. Each message is one sentence: what was wrong, the offending value, what to do.

The command line makes `InputError` exit code 2 and `VerificationError` 3; anything else is ours (1).
"""

from typing import Any


class MetaDeployError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(MetaDeployError):
    """The user's input cannot be used: a wrong option, path or value."""


class ImageError(InputError):
    """An image or video cannot be read."""


class CheckpointError(InputError):
    """A checkpoint cannot be read, or does not fit the model."""


class BundleError(InputError):
    """A bundle is incomplete, altered, or from a newer version."""


class BundleReplaced(BundleError):
    """A bundle was replaced by another between its opening and the reading of a file; open it again."""


class BackendError(InputError):
    """A back end is not installed, or cannot run this bundle on this machine."""


class EngineError(InputError):
    """TensorRT refuses a graph."""


class VerificationError(MetaDeployError):
    """An exported model does not agree with its PyTorch reference.

    Attributes:
        reason: what is off.
        figures: of the comparison; None where there was none.
    """

    def __init__(self, what: str, reason: str, figures: dict[str, Any] | None = None) -> None:
        super().__init__(f"{what}: {reason}; no bundle was written")
        self.reason, self.figures = reason, figures
