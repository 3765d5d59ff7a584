"""How many predictors a run has, and whether a cluster has room for them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from segray.capacity import Capacity, require_placeable
from segray.config import SegmentSettings

_PREDICTOR_BYTES = 2 * 2**30  # libraries, weights, and a batch of activations of a resnet18 U-Net: 1.3 GiB
_FRAGMENTS_PER_PREDICTOR = 4
_CPU = {"CPU": 1}  # what decoding needs


@dataclass(frozen=True)
class Predictors:
    """The processes that hold the model.

    Args:
        count: How many.
        num_per_node: How many share the cores of a node.
        needs: Resources of each.
    """

    count: int
    num_per_node: int
    needs: Mapping[str, float]


def place_predictors(settings: SegmentSettings, num_fragments: int, capacity: Capacity) -> Predictors:
    """Return as many predictors as were asked for, or as the cluster can have, nodes that it may add included.

    One for each GPU, or several that share it. On CPUs one for each but an eighth, two at least, which decode and
    write: a predictor of one thread is as fast as the thread of a larger one, and never waits for another. Each is
    allowed for 2 GiB of the nodes' memory, and has four fragments to make at least: it takes seconds to start.

    Raises:
        ClusterError: There will never be room for one predictor, and a CPU beside it that decodes.
    """
    share = settings.num_gpus_per_predictor
    needs = {**_CPU, **({"GPU": share} if share else {})}
    setting = "segment.num_gpus_per_predictor" if share else "segment.num_predictors"
    require_placeable(capacity, "predictors", needs, 1, setting)
    require_placeable(capacity, "processes, one that predicts and one that decodes,", _CPU, 2, setting)
    num_fitting = min(_count(capacity, needs), _count(capacity, _CPU) - 1)
    if settings.num_predictors:
        count = min(settings.num_predictors, num_fitting)
    elif share:
        count = min(num_fitting, num_fragments)
    else:
        num_cpus = _count(capacity, _CPU)
        num_in_memory = _count(capacity, {"memory": _PREDICTOR_BYTES})
        count = min(num_cpus - 2, num_cpus * 7 // 8, num_in_memory, num_fragments // _FRAGMENTS_PER_PREDICTOR)
    count = max(1, int(count))
    return Predictors(count, _count_per_node(count, needs, capacity), needs)


def _count(capacity: Capacity, each: Mapping[str, float]) -> float:
    """Return how many there is room for; where nobody knows what may be added, on the nodes that are there."""
    most = capacity.count(each)
    return max(1, capacity.count(each, with_more=False)) if math.isinf(most) else most


def _count_per_node(count: int, needs: Mapping[str, float], capacity: Capacity) -> int:
    # Ray spreads work over the nodes that are there; but what has to be added it fills up, one after the other
    if count <= capacity.count(needs, with_more=False):
        num_nodes = sum(node.get("CPU", 0) > 0 for node in capacity.nodes)  # a head that takes no work has no CPUs
        return -(-count // num_nodes)
    return int(min(count, capacity.count_most_on_one(needs)))
