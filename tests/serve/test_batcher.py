"""Items in batches: full ones under load, no longer a wait than the bound, nobody's error but one's own."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from meta_deploy.serve.batcher import Batcher


def batched(main, run=None, **options):
    """`main(batcher)` on an event loop, and the batches that were run."""
    batches = []

    def recorded(items):
        batches.append(list(items))
        return run(items) if run else [10 * item for item in items]

    async def whole():
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(recorded, thread, **{"most": 4, "wait": 0.05, **options})
            try:
                return await main(batcher)
            finally:
                batcher.close()

    return asyncio.run(whole()), batches


async def of_all(batcher, items=range(6)):
    return await asyncio.gather(*map(batcher, items))


def test_items_that_come_together_share_a_batch_and_each_gets_its_own_output():
    ran, batches = batched(of_all)
    assert batches == [[0, 1, 2, 3], [4, 5]]
    assert [one.output for one in ran] == [0, 10, 20, 30, 40, 50]
    assert [one.batch for one in ran] == [4, 4, 4, 4, 2, 2]
    assert [one.first for one in ran] == [True, False, False, False, True, False]


def test_a_full_batch_waits_for_nothing_and_another_no_longer_than_the_bound():
    (full, _), rest = batched(lambda b: of_all(b, range(4)), wait=5.0), None
    assert max(one.waited for one in full) < 1
    rest, _ = batched(lambda b: of_all(b, range(2)), wait=0.2)
    assert 0.2 <= rest[0].waited < 2


def test_a_batch_is_filled_while_the_model_is_busy_and_then_waits_for_nothing():
    begun, go = threading.Event(), threading.Event()

    def slow(items):
        begun.set()
        assert go.wait(10)
        return items

    async def main(batcher):
        first = asyncio.create_task(batcher(0))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        rest = []
        for item in (1, 2, 3):  # one by one, each long after the bound
            rest.append(asyncio.create_task(batcher(item)))
            await asyncio.sleep(0.02)
        began = time.perf_counter()
        go.set()
        await asyncio.gather(first, *rest)
        return time.perf_counter() - began

    took, batches = batched(main, slow, wait=0.01)
    assert batches == [[0], [1, 2, 3]]
    assert took < 1


def test_only_items_of_one_kind_share_a_batch():
    _, batches = batched(of_all, kind=lambda item: item % 2, wait=0.0)
    assert sorted(map(tuple, batches)) == [(0, 2, 4), (1, 3, 5)]


def test_what_nobody_waits_for_is_not_run():
    async def main(batcher):
        gone, there = asyncio.create_task(batcher(1)), asyncio.create_task(batcher(2))
        await asyncio.sleep(0)
        gone.cancel()
        return (await there).output

    assert batched(main) == (20, [[2]])


def test_a_batch_that_fails_is_run_one_by_one():
    def picky(items):
        if 2 in items:
            raise ValueError(f"not 2 of {len(items)}")
        return items

    async def main(batcher):
        return await asyncio.gather(*map(batcher, range(4)), return_exceptions=True)

    found, batches = batched(main, picky)
    assert batches == [[0, 1, 2, 3], [0], [1], [2], [3]]
    assert [getattr(one, "output", None) for one in found] == [0, 1, None, 3]
    assert isinstance(found[2], ValueError)
    with pytest.raises(ValueError, match="not 2 of 1"):
        raise found[2]
