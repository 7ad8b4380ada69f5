"""A model at work, without HTTP and Ray."""

import asyncio
import threading

from meta_deploy.serve.limits import room
from meta_deploy.serve.messages import Query, Settings
from meta_deploy.serve.worker import Worker


def test_few_images_are_decoded_ahead_and_the_rest_waits_as_it_came(bundles, picture, monkeypatch):
    worker = Worker(bundles / "detector", "cells", "1", threads=1)
    prepared, go = [], threading.Event()
    prepare, run = worker._prepare, worker._run
    monkeypatch.setattr(worker, "_prepare", lambda *given: prepared.append(1) or prepare(*given))
    monkeypatch.setattr(worker._batcher, "_run", lambda pieces: go.wait(20) and run(pieces))
    query = Query(picture, None, Settings(), False, 30.0)

    async def ask():
        asked = [asyncio.ensure_future(worker.predict(query)) for _ in range(20)]
        while len(prepared) < room(worker.batch):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        ahead = len(prepared)
        go.set()
        return ahead, await asyncio.gather(*asked)

    ahead, answers = asyncio.run(ask())
    assert ahead == room(worker.batch)
    assert [answer.status for answer in answers] == [200] * 20
    assert max(answer.seconds["queue"] for answer in answers) >= 0.2
    worker.close()
