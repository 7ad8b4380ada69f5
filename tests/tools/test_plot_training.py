"""Training curves: what a log says is what is drawn, and a resumed training counts once."""

import json

import pytest
from PIL import Image

from tools.plot_training import curves, draw, main, read


def line(step, minutes, **what):
    return json.dumps({"step": step, "minutes": minutes, "lr": 1e-3, **what})


@pytest.fixture
def run(tmp_path):
    """A training that stopped after step 100 and did that step again."""
    (tmp_path / "log.jsonl").write_text(
        "\n".join(
            [
                line(50, 1, losses={"total": 2.0, "gradient": 9.0}),
                line(100, 2, losses={"total": 1.5, "gradient": 8.0}),
                line(100, 2, losses={"total": 1.25, "gradient": 8.0}),
                line(100, 2, validation={"mask AP": 0.4}),
                line(200, 12, losses={"total": 1.0, "gradient": 7.0}),
            ]
        )
    )
    return tmp_path


def test_curves_are_the_logs_values_and_a_step_done_again_counts_once(run):
    assert curves(read(run), "losses") == {"total": ([50, 100, 200], [2.0, 1.25, 1.0])}
    assert curves(read(run), "validation") == {"mask AP": ([100], [0.4])}


def test_minutes_stand_above_the_steps_they_were_reached_at(run):
    losses, _, minutes, _ = draw([run]).axes
    ticks = dict(zip((t.get_text() for t in minutes.get_xticklabels()), minutes.get_xticks(), strict=True))
    assert minutes.get_xlim() == losses.get_xlim() == (0, 200)
    assert ticks["2"] == 100
    assert ticks["12"] == 200
    assert ticks["4"] == 120


def test_the_command_writes_a_row_for_each_run(run, tmp_path):
    assert main([str(run), "--out", str(tmp_path / "one.png")]) == 0
    assert main([str(run), str(run), "--out", str(tmp_path / "two.png")]) == 0
    one, two = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert two.height == pytest.approx(2 * one.height, abs=2)


def test_a_run_without_a_log_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path / "log.jsonl") in capsys.readouterr().err
