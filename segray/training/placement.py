"""Compute how many training workers a cluster can run, and refuse requests that it can never satisfy."""

from segray.config.training import TrainSettings
from segray.runtime.autoscaling import find_capacity
from segray.runtime.capacity import Capacity, describe_wait, require_placeable

_LABEL_CHECK = {"CPU": 1}


def get_worker_needs(settings: TrainSettings) -> dict[str, float]:
    """Return the Ray resources of one training worker: one GPU, or one CPU when training without GPUs."""
    return {"GPU": 1} if settings.use_gpu else {"CPU": 1}


def place_workers(settings: TrainSettings, capacity: Capacity) -> int:
    """Return the highest number of workers that a cluster can run; fewer than requested only if the run is elastic.

    Ray's autoscaler adds no node at all unless it can place every worker of a request. An elastic run (one with
    ``min_train_workers``) requests its maximum, so that maximum must not exceed what the cluster can provide.

    Raises:
        ClusterError: The cluster can never run the required number of workers, or a task of the label check.
    """
    needs, num_workers = get_worker_needs(settings), settings.num_train_workers
    fewest = settings.min_train_workers
    setting = "train.min_train_workers" if fewest else "train.num_train_workers"
    require_placeable(capacity, "training worker", needs, fewest or num_workers, setting)
    require_placeable(capacity, "label check", _LABEL_CHECK, 1, "train")
    return int(min(num_workers, capacity.count(needs)))


def place_on_cluster(settings: TrainSettings) -> tuple[int, str | None]:
    """Return the highest number of workers for the connected cluster, and a message if they must wait for resources.

    Raises:
        ClusterError: The cluster can never run the required number of workers, or a task of the label check.
    """
    capacity = find_capacity()
    num_workers = place_workers(settings, capacity)
    return num_workers, describe_wait(capacity, "training worker", get_worker_needs(settings), num_workers)
