"""One model at work: requests as bytes to answers as bytes, their images batched for the model.

Knows a bundle and what a request says; must not know HTTP or Ray. Nothing in a request is trusted.
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import os
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from PIL import Image

from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.manifest import Size
from meta_deploy.errors import ImageError, InputError
from meta_deploy.imaging.image_file import opened
from meta_deploy.imaging.images import Picture, is_large
from meta_deploy.runtime import document
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.runtime.processor import Prepared, Processor
from meta_deploy.serve import tensors
from meta_deploy.serve.batcher import Batcher, Ran
from meta_deploy.serve.limits import MOST_PIECES, batch_of, room
from meta_deploy.serve.messages import BYTES, JSON, LENGTH, PNG, Answer, Query, Settings, TensorQuery, refusal
from meta_deploy.tasks.results import ImageResult, Result, Timings

_LONGEST = 200  # characters of a summary
_Asked = TypeVar("_Asked", Query, TensorQuery)


@dataclass(frozen=True)
class Piece:
    """What the model sees of an image: of `size` (height, width) before it was resized to the input's."""

    pixels: np.ndarray
    size: Size


class Worker:
    """A bundle opened on a back end. Its coroutines are for one event loop, and may run side by side: images
    are decoded and results written in threads of their own while the model runs.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        name: str,
        version: str,
        backend: str = "auto",
        threads: int | None = None,
        batch: int | None = None,
        wait: float = 0.005,
        pixels: int = 50_000_000,
        shown: str | None = None,
    ):
        """`shown` is what documents call the bundle (None: its path); `wait` the seconds that an image may
        wait for others to share its batch of at most `batch` (None: what the bundle takes) with.

        Raises:
            BundleError, BackendError: it cannot be opened or run here.
        """
        import cv2

        cv2.setNumThreads(1)  # there are threads for the images
        warnings.filterwarnings("ignore", module="PIL")  # of what is refused, or is fine
        self.name, self.version = name, version
        self._predictor = Predictor(bundle, backend, threads=threads)
        self._bundle, self._pixels = self._predictor.bundle, pixels
        self._shown = {"bundle": shown} if shown is not None else {}
        self.batch = batch or batch_of(self._bundle)
        self._places = asyncio.Semaphore(room(self.batch))
        self._model = ThreadPoolExecutor(1, "model")
        self._hands = ThreadPoolExecutor(2, "images")
        self._batcher: Batcher[Piece, dict[str, np.ndarray]] = Batcher(
            self._run, self._model, self.batch, wait if self.batch > 1 else 0.0, self._kind
        )
        self._processor = functools.lru_cache(maxsize=64)(self._new_processor)

    @property
    def runs_on(self) -> str:
        return self._predictor.runs_on

    async def predict(self, query: Query) -> Answer:
        """An image's answer: the document of meta-infer --json, or its overlay."""
        return await _answered(self._in_turn(self._predict, query), query.seconds, 422)

    async def infer(self, query: TensorQuery) -> Answer:
        """Tensors' answer, by the v2 protocol. They are run as they came, in no batch with others."""
        return await _answered(self._in_turn(self._infer, query), query.seconds, 400)

    async def _in_turn(self, work: Callable[[_Asked], Coroutine[Any, Any, Answer]], query: _Asked) -> Answer:
        """The answer, once few enough requests are before this one; those that wait do so as they came."""
        came = perf_counter()
        async with self._places:
            waited = perf_counter() - came
            answer = await work(query)
        seconds = {**answer.seconds, "queue": waited + answer.seconds.get("queue", 0.0)}
        return replace(answer, seconds=seconds)

    async def _predict(self, query: Query) -> Answer:
        steps = self._processor(query.settings)
        picture, image = await self._in_hands(self._prepare, steps, query)
        sizes = steps.sizes(image.size)
        pieces = [Piece(pixels, size) for pixels, size in zip(image.pieces, sizes, strict=True)]
        ran: list[Ran] = await asyncio.gather(*map(self._batcher, pieces))
        model = sum(one.took / one.batch for one in ran)
        image = replace(
            image,
            pieces=(),
            outputs=[one.output for one in ran],
            timings=image.timings + Timings(model=1000 * model),
        )
        kept = picture if query.overlay else None
        answer, times = await self._in_hands(self._finish, steps, query, kept, image)
        seconds = {
            "pre": times.pre / 1000,
            "queue": max(one.waited for one in ran),
            "model": model,
            "post": times.post / 1000,
        }
        return replace(answer, seconds=seconds, batches=tuple(one.batch for one in ran if one.first))

    def _prepare(self, steps: Processor, query: Query) -> tuple[Picture, Prepared]:
        with opened(query.image, query.name) as file:
            height, width = file.size
        if height * width > self._pixels:
            raise ImageError(
                f"the image has {width}x{height} pixels, more than the limit of {self._pixels}; make it "
                "smaller first"
            )
        picture = steps.read(query.image, query.name)
        if (count := len(steps.sizes(picture.size))) > MOST_PIECES:
            raise InputError(
                f"the image would be run in {count} tiles, more than {MOST_PIECES}; take larger tiles"
            )
        return picture, steps.prepare(picture)

    def _finish(
        self, steps: Processor, query: Query, picture: Picture | None, image: Prepared
    ) -> tuple[Answer, Timings]:
        result = steps.finish(image, query.name)
        began = perf_counter()
        if picture is None:
            head = document.head(self._bundle, self._predictor.backend, steps.score_threshold) | self._shown
            found = {**head, "images": [document.entry(result.to_dict())], "errors": []}
            answer = Answer(200, json.dumps(found).encode() + b"\n")
        elif isinstance(result, ImageResult):
            drawn = result.draw(query.image if picture.reduced else picture.pixels)
            answer = Answer(200, _png(drawn), PNG, {"Meta-Summary": quote(_summary(result), safe=" :;,.()")})
        else:
            raise InputError(f"model '{self.name}' gives plain arrays, which are not drawn; ask for {JSON}")
        times = result.timings + Timings(post=1000 * (perf_counter() - began))
        told = ", ".join(f"{name};dur={getattr(times, name):.1f}" for name in ("pre", "model", "post"))
        return replace(answer, headers={**answer.headers, "Server-Timing": told}), times

    async def _infer(self, query: TensorQuery) -> Answer:
        request = await self._in_hands(tensors.Request, query.body, query.json_bytes)
        came = perf_counter()
        outputs, began, took = await self._loop.run_in_executor(self._model, self._timed, request.arrays)
        body, json_bytes = await self._in_hands(request.answer, self.name, self.version, outputs)
        headers = {} if json_bytes is None else {LENGTH: str(json_bytes)}
        kind = JSON if json_bytes is None else BYTES
        return Answer(200, body, kind, headers, {"queue": began - came, "model": took})

    def _timed(self, arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float, float]:
        began = perf_counter()
        return self._predictor.run(arrays), began, perf_counter() - began

    def _run(self, pieces: Sequence[Piece]) -> list[dict[str, np.ndarray]]:
        return self._predictor.outputs(
            [piece.pixels for piece in pieces], [piece.size for piece in pieces], self.batch
        )

    def _kind(self, piece: Piece) -> Size:
        return self._predictor.input_size(piece.size)

    def _new_processor(self, settings: Settings) -> Processor:
        return Processor(self._bundle, **asdict(settings))

    async def _in_hands(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await self._loop.run_in_executor(self._hands, call, *arguments)

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def close(self) -> None:
        """Free the model; what is in progress is given up."""
        self._batcher.close()
        self._hands.shutdown(wait=False, cancel_futures=True)
        self._model.shutdown(cancel_futures=True)
        self._predictor.close()


async def _answered(work: Awaitable[Answer], seconds: float, status: int) -> Answer:
    """The answer, or the refusal that is due: `status` for what cannot be used, 504 after `seconds`."""
    try:
        return await asyncio.wait_for(work, seconds)
    except (asyncio.TimeoutError, TimeoutError):
        return refusal(504, "it took longer than the limit; send less at a time, or a smaller image")
    except InputError as error:
        return refusal(status, str(error))
    except MemoryError:
        return refusal(status, "there is not enough memory for it; make it smaller first")


def _summary(result: Result) -> str:
    told = repr(result)
    return told if len(told) <= _LONGEST else told[: _LONGEST - 1] + "…"


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    # The least compression that pays: several times as fast, a little larger.
    level = 1 if is_large((pixels.shape[0], pixels.shape[1])) else 3
    Image.fromarray(pixels).save(stream, "PNG", compress_level=level)
    return stream.getvalue()
