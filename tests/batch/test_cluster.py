"""Starting Ray and reaching it, by a Ray that fails: nothing of that is an internal error."""

import sys
from types import SimpleNamespace

import pytest

from meta_deploy.batch.cluster import connected
from meta_deploy.errors import InputError


@pytest.fixture
def failing(monkeypatch):
    """Ray, whose start raises what it is given."""

    def install(error):
        def init(*_, **__):
            raise error

        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))

    return install


def test_a_ray_that_does_not_start_is_told_in_one_line(failing):
    failing(Exception("The current node timed out during startup.\n It is overloaded."))
    with pytest.raises(InputError) as told, connected(None):
        pass
    assert str(told.value) == (
        "Ray does not start on this machine: The current node timed out during startup. It is overloaded; "
        "try again when it is less busy"
    )


def test_a_cluster_that_is_of_another_version_is_told_with_its_address(failing):
    failing(RuntimeError("Version mismatch"))
    with (
        pytest.raises(InputError, match=r"^there is no Ray at 'auto': Version mismatch; check the address"),
        connected("auto"),
    ):
        pass
