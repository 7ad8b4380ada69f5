"""What a model is for: its outputs, how they become results, and how two sets of them are compared."""

from meta_deploy.errors import BundleError
from meta_deploy.tasks.detection import Detection
from meta_deploy.tasks.instance_segmentation import InstanceSegmentation
from meta_deploy.tasks.raw import Raw
from meta_deploy.tasks.semantic_segmentation import SemanticSegmentation
from meta_deploy.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (InstanceSegmentation(), Detection(), SemanticSegmentation(), Raw())
}


def get_task(name: str) -> Task:
    """The task of a manifest or a model. Raises BundleError for an unknown one."""
    if name not in TASKS:
        raise BundleError(f"there is no task '{name}'; choose one of {', '.join(TASKS)}")
    return TASKS[name]
