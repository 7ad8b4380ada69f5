"""Results in parts: each image once and in order, whatever comes when, and wherever a run is stopped."""

import json
import random

import pytest

from meta_deploy.batch.parts import Parts
from meta_deploy.errors import InputError


def open_parts(folder, images=10, size=4, run=None, written=None):
    def write(path, rows):
        path.write_text(json.dumps(rows))
        if written is not None:
            written.append(rows)

    def failure(row):
        return (f"{row}.png", "bad") if row % 7 == 6 else None

    return Parts(folder, run or {"bundle": "a"}, images, size, ".json", write, failure)


def content(folder):
    return [row for path in sorted(folder.glob("part-*.json")) for row in json.loads(path.read_text())]


def test_rows_of_any_order_that_come_twice_are_written_once_and_in_order(tmp_path):
    places = [*range(10), 3, 9, 0]
    random.Random(0).shuffle(places)
    with open_parts(tmp_path) as parts:
        done = [part for place in places if (part := parts.add(place, place)) is not None]
        assert sorted(part.part for part in done) == [0, 1, 2]
        assert (parts.missing(), parts.todo()) == ([], [])
    assert content(tmp_path) == list(range(10))


def test_a_run_that_is_stopped_goes_on_with_what_is_not_in_a_finished_part(tmp_path):
    with open_parts(tmp_path) as parts:
        for place in (4, 5, 6, 7, 0, 1):
            parts.add(place, place)
        assert parts.missing() == [2, 3, 8, 9]
    written = []
    with open_parts(tmp_path, size=3, written=written) as parts:  # the size of parts stays the run's
        assert (parts.todo(), parts.resumed) == ([range(4), range(8, 10)], 4)
        for place in parts.missing():
            parts.add(place, place)
        assert [part.failed for part in parts] == [(), (("6.png", "bad"),), ()]
    assert written == [[0, 1, 2, 3], [8, 9]]
    assert content(tmp_path) == list(range(10))


@pytest.mark.parametrize("kept", range(0, 400, 37))
def test_a_list_cut_at_any_byte_is_read_up_to_its_last_whole_line(tmp_path, kept):
    with open_parts(tmp_path) as parts:
        for place in range(8):
            parts.add(place, place)
    manifest = tmp_path / "manifest.jsonl"
    lines = manifest.read_bytes()[:kept].count(b"\n")
    manifest.write_bytes(manifest.read_bytes()[:kept])
    with open_parts(tmp_path) as parts:
        assert sorted(parts.done) == list(range(max(0, lines - 1)))
        for place in parts.missing():
            parts.add(place, place)
    with open_parts(tmp_path) as parts:
        assert parts.todo() == []
    assert content(tmp_path) == list(range(10))


def test_a_part_that_is_gone_or_cut_is_done_again(tmp_path):
    with open_parts(tmp_path) as parts:
        for place in range(10):
            parts.add(place, place)
    first, second, _ = sorted(tmp_path.glob("part-*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    with open_parts(tmp_path) as parts:
        assert parts.todo() == [range(8)]


def test_a_part_whose_writing_fails_is_not_listed_and_leaves_nothing(tmp_path):
    with open_parts(tmp_path) as parts:
        parts._write = lambda path, rows: path.write_text("half") and 1 / 0
        for place in range(3):
            parts.add(place, place)
        with pytest.raises(ZeroDivisionError):
            parts.add(3, 3)
    assert not list(tmp_path.glob("part-*"))
    with open_parts(tmp_path) as parts:
        assert parts.todo() == [range(10)]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"run": {"bundle": "b"}}, "its bundle: a, now: b"),
        ({"images": 11}, "its images: 10, now: 11"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path, changed, told):
    with open_parts(tmp_path) as parts:
        parts.add(0, 0)
    before = (tmp_path / "manifest.jsonl").read_bytes()
    with pytest.raises(InputError, match=told):
        open_parts(tmp_path, **changed)
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def test_two_processes_do_not_write_one_folder(tmp_path):
    with open_parts(tmp_path), pytest.raises(InputError, match="another process writes results"):
        open_parts(tmp_path)
    with open_parts(tmp_path):  # once it is closed
        pass
