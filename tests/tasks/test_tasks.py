"""A task is found by its name, and the manifest and the task agree on what its graph gives."""

import pytest

from meta_deploy.bundle.manifest import MANIFESTS
from meta_deploy.errors import BundleError
from meta_deploy.tasks import TASKS, get_task


def test_every_task_has_its_manifest_and_they_name_the_same_outputs():
    assert set(TASKS) == set(MANIFESTS)
    for name, task in TASKS.items():
        assert tuple(task.outputs) == getattr(MANIFESTS[name], "needs", ())


def test_an_unknown_task_is_one_line():
    with pytest.raises(BundleError, match="no task 'pose'; choose one of instance-segmentation, detection"):
        get_task("pose")
