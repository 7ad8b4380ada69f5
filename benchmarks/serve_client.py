"""What locust runs for serve_load.py: users that post pictures and count answers by their status.

    locust -f benchmarks/serve_client.py --headless -u CLIENTS -t SECONDS --host URL --json

SERVE_RATE is how often each posts in a second (none: again as soon as it has its answer).
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from locust import FastHttpUser, constant, constant_throughput, task
from PIL import Image

SMALL = 384  # pixels; larger pictures are several runs of the nuclei model
FOLDER = Path(__file__).parents[1] / "meta_deploy" / "assets" / "images"
PICTURES = [path.read_bytes() for path in sorted(FOLDER.glob("*.png")) if max(Image.open(path).size) <= SMALL]
_next = itertools.cycle(PICTURES)


class Client(FastHttpUser):
    """Posts one picture after the other."""

    rate = float(os.environ.get("SERVE_RATE", 0))
    wait_time = constant_throughput(rate) if rate else constant(0)
    network_timeout = connection_timeout = 120.0

    @task
    def predict(self) -> None:
        with self.client.post("/predict", data=next(_next), catch_response=True) as answer:
            answer.request_meta["name"] = str(answer.status_code)
            answer.success()
