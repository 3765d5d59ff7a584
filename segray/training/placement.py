"""How many training workers there can be, and whether a cluster has room for them."""

from segray.config.training import TrainSettings
from segray.runtime.autoscaling import find_capacity
from segray.runtime.capacity import Capacity, describe_wait, require_placeable

_LABEL_CHECK = {"CPU": 1}


def get_worker_needs(settings: TrainSettings) -> dict[str, float]:
    """Return the resources of a training worker: a GPU, or a CPU where there is none."""
    return {"GPU": 1} if settings.use_gpu else {"CPU": 1}


def place_workers(settings: TrainSettings, capacity: Capacity) -> int:
    """Return how many workers there will be at most; fewer than asked for only where ``min_train_workers`` allows it.

    Ray's autoscaler adds no node at all for workers of which it cannot place every one; an elastic run asks for as many
    as it may have, so it must not ask for more than there can be.

    Raises:
        ClusterError: There will never be room for as many as must be, or for a task that checks labels.
    """
    needs, num_workers = get_worker_needs(settings), settings.num_train_workers
    fewest = settings.min_train_workers
    setting = "train.min_train_workers" if fewest else "train.num_train_workers"
    require_placeable(capacity, "training worker", needs, fewest or num_workers, setting)
    require_placeable(capacity, "label check", _LABEL_CHECK, 1, "train")
    return int(min(num_workers, capacity.count(needs)))


def place_on_cluster(settings: TrainSettings) -> tuple[int, str | None]:
    """Return how many workers the connected cluster will have at most, and what they will wait for.

    Raises:
        ClusterError: There will never be room for them.
    """
    capacity = find_capacity()
    num_workers = place_workers(settings, capacity)
    return num_workers, describe_wait(capacity, "training worker", get_worker_needs(settings), num_workers)
