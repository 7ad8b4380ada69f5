"""ONNX Runtime without its telemetry: the one place that imports it.

On import it writes a device id and a database below the home folder, and sends what it runs to its maker.
"""

import os
from collections.abc import Mapping, Sequence

# Its own call comes too late, since importing makes the folder. One that is loaded already stays as it is.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime

from meta_deploy.interrupts import interruptible

onnxruntime.disable_telemetry_events()  # on Windows, where the variable does nothing

_FATAL = 4


def run(
    session: onnxruntime.InferenceSession, outputs: Sequence[str] | None, feed: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """A run of a session that Ctrl-C and SIGTERM end, as some loops in a model do not."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = _FATAL
    return interruptible(
        lambda: session.run(outputs, dict(feed), options), lambda: setattr(options, "terminate", True)
    )
