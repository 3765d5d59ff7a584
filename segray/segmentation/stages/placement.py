"""How many predictors a run has, what of a node each stage takes, and whether a cluster has room for them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from segray.config import SegmentSettings
from segray.runtime.capacity import Capacity, require_placeable

_PREDICTOR_BYTES = 2 * 2**30  # libraries, weights, and a batch of activations of a resnet18 U-Net: 1.3 GiB
_FRAGMENTS_PER_PREDICTOR = 4
# Of a predictor, and of a task that decodes, that writes. Beside GPUs there are CPUs to spare. Where predictors take
# CPUs they must not fill a node: when another dies, those that it had start again here, and nothing could decode. No
# number of 0.89 is a whole number of CPUs (below 89), so room for a hundredth is always left; how many such tasks
# there are is said beside it.
_GPU_STAGE_CPUS = (1.0, 1.0, 0.25)
_CPU_STAGE_CPUS = (0.89, 0.01, 0.01)


@dataclass(frozen=True)
class Placement:
    """The processes of a run's stages, and the CPUs that each takes.

    Args:
        num_predictors: How many hold the model.
        num_per_node: How many of these share the cores of a node.
        needs: Resources of a predictor.
        decode_cpus: CPUs of a task that decodes.
        write_cpus: CPUs of a task that writes.
        num_tasks: How many decode, and how many write, at a time; None for as many as CPUs are left.
    """

    num_predictors: int
    num_per_node: int
    needs: Mapping[str, float]
    decode_cpus: float
    write_cpus: float
    num_tasks: int | None


def place_stages(settings: SegmentSettings, num_fragments: int, capacity: Capacity) -> Placement:
    """Return as many predictors as were asked for, or as the cluster can have, nodes that it may add included.

    One for each GPU, or several that share it. On CPUs one for each but an eighth, two at least, which decode and
    write: a predictor of one thread is as fast as the thread of a larger one, and never waits for another. Each is
    allowed for 2 GiB of its node's memory, and has four fragments to make at least: it takes seconds to start.

    Raises:
        ClusterError: There will never be room for one predictor, and beside it for what decodes.
    """
    share = settings.num_gpus_per_predictor
    predict_cpus, decode_cpus, write_cpus = _GPU_STAGE_CPUS if share else _CPU_STAGE_CPUS
    needs = {"CPU": predict_cpus, **({"GPU": share} if share else {})}
    setting = "segment.num_gpus_per_predictor" if share else "segment.num_predictors"
    require_placeable(capacity, "predictor", needs, 1, setting)
    if share:
        require_placeable(capacity, "process", {"CPU": 1}, 2, "segment: to predict and to decode")
    num_fitting = capacity.count(needs) if not share else min(capacity.count(needs), capacity.count({"CPU": 1}) - 1)
    num_cpus = _count_known(capacity, {"CPU": 1})
    if settings.num_predictors:
        count = min(settings.num_predictors, num_fitting)
    elif share:
        count = min(_count_known(capacity, needs), num_fitting, num_fragments)
    else:
        num_in_memory = _count_known(capacity, {"CPU": 1, "memory": _PREDICTOR_BYTES})
        count = min(num_cpus - 2, num_cpus * 7 // 8, num_in_memory, num_fragments // _FRAGMENTS_PER_PREDICTOR)
    count = max(1, int(count))
    num_tasks = None if share else min(max(2, int(num_cpus) - count), num_fragments)
    return Placement(count, _count_per_node(count, needs, capacity), needs, decode_cpus, write_cpus, num_tasks)


def _count_known(capacity: Capacity, each: Mapping[str, float]) -> float:
    """Return how many there is room for; where nobody knows what may be added, on the nodes that are there."""
    most = capacity.count(each)
    return max(1, capacity.count(each, with_more=False)) if math.isinf(most) else most


def _count_per_node(count: int, needs: Mapping[str, float], capacity: Capacity) -> int:
    # Ray spreads work over the nodes that are there; but what has to be added it fills up, one after the other
    if count <= capacity.count(needs, with_more=False):
        return -(-count // capacity.count_nodes(needs))
    return int(min(count, capacity.count_most_on_one(needs)))
