"""meta-serve's command: what it refuses, what it says, how it stops. Ray is not asked for here."""

import contextlib
import os
import signal
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed (pip install 'meta-deploy[serve]')")

from meta_deploy.cli import serve
from meta_deploy.serve import on_ray
from meta_deploy.serve.models import cards_of, version_key


@pytest.fixture
def call(monkeypatch, capfd, unused_port):
    """Run the command over a server that is not there; gives exit code, standard error, and its options."""
    seen = {}

    class Server:
        def runs_on(self):
            return [f"a back end for {card.name}" for card in seen["cards"]]

        def drain(self, seconds):
            seen["drained"] = seconds
            return 0

    @contextlib.contextmanager
    def running(cards, options, address):
        seen.update(cards=cards, options=options, address=address)
        yield Server()
        seen["ended"] = True

    monkeypatch.setattr(serve, "NEEDED", ())
    monkeypatch.setattr(serve, "_reach", lambda host, port: None)
    monkeypatch.setattr(on_ray, "running", running)

    def run(*arguments, signal_=signal.SIGTERM):
        def end():
            while "cards" not in seen:
                time.sleep(0.01)
            time.sleep(0.3)
            os.kill(os.getpid(), signal_)

        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        code = serve.main([*map(str, arguments), "--port", str(unused_port)])
        return code, capfd.readouterr().err, seen

    return run


@pytest.fixture
def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_sigterm_drains_and_is_a_success(call, bundles, unused_port):
    code, told, seen = call(bundles / "detector-dynamic", f"other:2={bundles}/detector", "--timeout", 7)
    assert code == 0
    assert seen["drained"] == 7
    assert "detector-dynamic (version 1): a back end for detector-dynamic; batches of up to 4" in told
    assert "other (version 2): a back end for other; one image a run, as its bundle takes" in told
    assert f"ready at http://127.0.0.1:{unused_port} " in told


def test_ctrl_c_waits_two_seconds_at_most(call, bundles):
    code, _, seen = call(bundles / "detector", signal_=signal.SIGINT)
    assert (code, seen["drained"]) == (130, 2.0)


def test_options_become_limits(call, bundles):
    options = ["--max-body", 1.5, "--max-pixels", 2, "--queue", 3, "--batch-wait", 0, "--threads", 2]
    _, _, seen = call(bundles / "detector", *options, "--replicas", 2, "--host", "127.0.0.1")
    limits = seen["options"].limits
    assert (limits.body, limits.pixels, limits.queue, limits.seconds) == (1_572_864, 2_000_000, 3, 30)
    assert (seen["options"].wait, seen["options"].threads, seen["options"].replicas) == (0, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nowhere"], "'nowhere'"),
        (["{}/detector", "{}/detector"], "there are two models 'detector' of version 1"),
        (["a={}/detector", "a:1={}/detector"], "name them, as in a:2="),
        (["{}/detector", "--batch", "2"], "more than the 1 that bundle"),
        (["{}/detector", "--host", "nowhere.invalid"], "cannot listen at nowhere.invalid"),
        (["{}/detector", "--timeout", "0"], "not a number from 0.1"),
        (["{}/detector", "--queue", "0"], "of at least 1"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_code_2(
    bundles, unused_port, monkeypatch, capfd, arguments, why
):
    monkeypatch.setattr(serve, "NEEDED", ())
    arguments = [text.replace("{}", str(bundles)) for text in arguments]
    try:
        code = serve.main([*arguments, "--port", str(unused_port)])
    except SystemExit as error:  # argparse's
        code = error.code
    assert code == 2
    assert why in (told := capfd.readouterr().err)
    assert told.count("\n") == 1


def test_a_port_in_use_is_one_line(bundles, monkeypatch, capfd):
    monkeypatch.setattr(serve, "NEEDED", ())
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main([str(bundles / "detector"), "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in capfd.readouterr().err


def test_a_missing_extra_is_one_line(monkeypatch, capfd):
    monkeypatch.setitem(serve.sys.modules, "ray", None)
    assert serve.main([]) == 2
    assert capfd.readouterr().err == (
        "meta-serve: this needs ray, which is not installed; pip install 'meta-deploy[serve]'\n"
    )


def test_names_and_versions_are_those_that_are_given(bundles, tmp_path, monkeypatch):
    odd = tmp_path / "a=b"
    odd.symlink_to(bundles / "detector")
    monkeypatch.chdir(tmp_path)
    given = ["cells:v2=" + str(bundles / "detector"), str(bundles / "raw") + "/", "nuclei", f"odd={odd}"]
    cards = cards_of(given)
    assert [(card.name, card.version) for card in cards] == [
        ("cells", "v2"),
        ("raw", "1"),
        ("nuclei", "1"),
        ("odd", "1"),
    ]
    with pytest.raises(serve.InputError, match="'a=b' cannot be a model's name"):
        cards_of(["a=b"])
    for wrong in ("ü={}", "..={}", "a:={}", "a:1:2={}", "={}", "a="):
        with pytest.raises(serve.InputError, match="is not NAME=BUNDLE or NAME:VERSION=BUNDLE"):
            cards_of([wrong.format(odd)])
    with pytest.raises(serve.InputError, match="there is no bundle at"):
        cards_of([f"{tmp_path}/c=d/e"])


def test_versions_are_in_the_order_of_their_numbers():
    assert sorted(["10", "9", "1.10", "1.9", "v2", "v10"], key=version_key) == [
        "v2",
        "v10",
        "1.9",
        "1.10",
        "9",
        "10",
    ]
