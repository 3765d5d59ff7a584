"""Chooses the number of predictors and the resources of each stage, and checks that the cluster can provide them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from segray.config import SegmentSettings
from segray.runtime.capacity import Capacity, require_placeable

_PREDICTOR_BYTES = 2 * 2**30  # Libraries, weights and the activations of one batch of a resnet18 U-Net take 1.3 GiB.
_FRAGMENTS_PER_PREDICTOR = 2
# CPUs of a predictor, a decode task and a write task. Nodes with GPUs have CPUs to spare. On nodes without GPUs,
# predictors must never occupy all CPUs of a node: when a node dies, its predictors restart on the others, and no CPU
# would be left to decode. No multiple of 0.89 is a whole number below 89, so at least a hundredth of a CPU is always
# free for the tasks; their number is limited by `num_tasks` instead.
_GPU_STAGE_CPUS = (1.0, 1.0, 0.25)
_CPU_STAGE_CPUS = (0.89, 0.01, 0.01)


@dataclass(frozen=True)
class Placement:
    """Number and resources of the processes of a run.

    Attributes:
        num_predictors: Number of predictors; each holds a copy of the model.
        needs: Resources that a predictor requests, by Ray's names.
        decode_cpus: CPUs that a decode task requests.
        write_cpus: CPUs that a write task requests.
        num_tasks: Maximum number of concurrent decode tasks, and also of write tasks; None if only CPUs limit it.
    """

    num_predictors: int
    needs: Mapping[str, float]
    decode_cpus: float
    write_cpus: float
    num_tasks: int | None


def place_stages(settings: SegmentSettings, num_fragments: int, capacity: Capacity) -> Placement:
    """Choose the number of predictors: as requested, or else what the cluster can hold, including nodes it may add.

    By default there is one predictor per GPU, or several if they share it. Without GPUs there is one per CPU, except
    for an eighth of the CPUs (at least two), which decode and write: a predictor with one thread is as fast as one
    thread of a larger predictor, and never waits for other threads. Their threads do not depend on the cluster or on
    what is left to do, because another number may change the last bits of rows. Each predictor is assumed to need 2 GiB
    of memory, and gets at least two fragments, because it takes seconds to start.

    Raises:
        ClusterError: The cluster can never run one predictor and one decode task at the same time.
    """
    share = settings.num_gpus_per_predictor
    predict_cpus, decode_cpus, write_cpus = _GPU_STAGE_CPUS if share else _CPU_STAGE_CPUS
    num_threads = 1 if share else settings.num_threads_per_predictor
    predict_cpus *= num_threads
    needs = {"CPU": predict_cpus, **({"GPU": share} if share else {})}
    setting = "segment.num_gpus_per_predictor" if share else "segment.num_threads_per_predictor"
    require_placeable(capacity, "predictor", needs, 1, setting)
    if share:
        require_placeable(capacity, "process", {"CPU": 1}, 2, "segment: one predictor and one decode task")
    num_fitting = capacity.count(needs) if not share else min(capacity.count(needs), capacity.count({"CPU": 1}) - 1)
    num_cpus = _count_known(capacity, {"CPU": 1})
    if settings.num_predictors:
        count = min(settings.num_predictors, num_fitting)
    elif share:
        count = min(_count_known(capacity, needs), num_fitting, num_fragments)
    else:
        num_in_memory = _count_known(capacity, {"CPU": num_threads, "memory": _PREDICTOR_BYTES})
        most = min(num_cpus - 2, num_cpus * 7 // 8) // num_threads
        count = min(most, num_in_memory, num_fragments // _FRAGMENTS_PER_PREDICTOR)
    count = max(1, int(count))
    num_tasks = None if share else min(max(2, int(num_cpus) - count * num_threads), num_fragments)
    return Placement(count, needs, decode_cpus, write_cpus, num_tasks)


def _count_known(capacity: Capacity, each: Mapping[str, float]) -> float:
    """Return how many tasks fit on the cluster; if unknown nodes may be added, how many fit on the present nodes."""
    most = capacity.count(each)
    return max(1, capacity.count(each, with_more=False)) if math.isinf(most) else most
