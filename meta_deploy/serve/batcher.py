"""Items that come one by one, run in batches: filled while the model is busy, with a bound on the wait.

Knows items and a function of a list of them; must not know what either is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Ran(Generic[Out]):
    """What an item's run gave; how long it waited and ran, in seconds; and the size of its batch.

    `first` is of one item of each batch, for who counts batches.
    """

    output: Out
    waited: float
    took: float
    batch: int
    first: bool


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[In, Out]):
    item: In
    since: float
    future: asyncio.Future[Ran[Out]]


class Batcher(Generic[In, Out]):
    """Runs items in batches, one at a time, in an executor of one thread; of one event loop.

    A batch begins when it is full, or when its oldest item has waited `wait` seconds. The clock runs while
    the batch before is computed, so that a busy model is never idle for the sake of a fuller batch.
    (`serve.batch` of Ray Serve closes a batch by its clock also while the model is busy, so that a loaded
    model gets small ones.) An item whose caller has given up is not run. Where a batch fails, its items are
    run one by one, and each gets its own error.
    """

    def __init__(
        self,
        run: Callable[[Sequence[In]], Sequence[Out]],
        thread: Executor,
        most: int,
        wait: float,
        kind: Callable[[In], Hashable] = lambda item: None,
    ):
        """`run` gives an output for each item, `most` at a time; only items of one `kind` share a batch."""
        self._run, self._thread, self._most, self._wait, self._kind = run, thread, most, wait, kind
        self._queue: deque[_Waiting[In, Out]] = deque()
        self._came = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, item: In) -> Ran[Out]:
        """The item's output. Raises what its run raises."""
        waiting: _Waiting[In, Out] = _Waiting(
            item, perf_counter(), asyncio.get_running_loop().create_future()
        )
        self._queue.append(waiting)
        self._came.set()
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await waiting.future

    async def _work(self) -> None:
        while True:
            batch = await self._filled()
            began = perf_counter()
            try:
                outputs = await self._called(batch)
            except Exception as error:
                await self._alone(batch, error)
                continue
            self._give(batch, outputs, began)

    async def _filled(self) -> list[_Waiting[In, Out]]:
        """The next batch: items of the oldest one's kind, in their order."""
        while True:
            self._queue = deque(waiting for waiting in self._queue if not waiting.future.done())
            alike = self._alike()
            left = self._queue[0].since + self._wait - perf_counter() if self._queue else None
            if alike and (len(alike) == self._most or (left is not None and left <= 0)):
                taken = set(map(id, alike))
                self._queue = deque(waiting for waiting in self._queue if id(waiting) not in taken)
                return alike
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), left)
            except asyncio.TimeoutError:
                continue

    def _alike(self) -> list[_Waiting[In, Out]]:
        if not self._queue:
            return []
        kind = self._kind(self._queue[0].item)
        return [waiting for waiting in self._queue if self._kind(waiting.item) == kind][: self._most]

    async def _called(self, batch: Sequence[_Waiting[In, Out]]) -> Sequence[Out]:
        items = [waiting.item for waiting in batch]
        outputs = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, items)
        if len(outputs) != len(items):
            raise RuntimeError(f"{len(items)} items gave {len(outputs)} outputs")
        return outputs

    async def _alone(self, batch: Sequence[_Waiting[In, Out]], error: Exception) -> None:
        for waiting in batch:
            if len(batch) > 1:
                began = perf_counter()
                try:
                    outputs = await self._called([waiting])
                except Exception as own:
                    error = own
                else:
                    self._give([waiting], outputs, began)
                    continue
            if not waiting.future.done():
                waiting.future.set_exception(error)

    def _give(self, batch: Sequence[_Waiting[In, Out]], outputs: Sequence[Out], began: float) -> None:
        took = perf_counter() - began
        for place, (waiting, output) in enumerate(zip(batch, outputs, strict=True)):
            if not waiting.future.done():
                ran = Ran(output, began - waiting.since, took, len(batch), place == 0)
                waiting.future.set_result(ran)

    def close(self) -> None:
        """Run nothing more."""
        if self._worker is not None:
            self._worker.cancel()
