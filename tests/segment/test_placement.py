"""How many predictors a run has when nobody says, and when a cluster can never have what somebody says."""

import math

import pytest

from segray.capacity import Capacity, NodeType
from segray.config import SegmentSettings
from segray.errors import ClusterError
from segray.segment.placement import place_predictors

GIB = 2**30


@pytest.mark.parametrize(
    ("num_cpus", "memory_gib", "num_fragments", "expected"),
    [
        (4, 24, 1, 1),
        (4, 24, 7, 1),
        (4, 24, 8, 2),  # four fragments each
        (4, 24, 10_000, 2),  # two CPUs decode and write
        (64, 256, 10_000, 56),
        (64, 20, 10_000, 10),  # 2 GiB each
        (2, 24, 10_000, 1),
    ],
)
def test_predictors_leave_room_for_decoding_and_have_something_to_do(
    num_cpus: int, memory_gib: int, num_fragments: int, expected: int
) -> None:
    capacity = Capacity(({"CPU": num_cpus, "memory": memory_gib * GIB},))
    placed = place_predictors(SegmentSettings(), num_fragments, capacity)
    assert (placed.count, placed.num_per_node, placed.needs) == (expected, expected, {"CPU": 1})
    asked_for = place_predictors(SegmentSettings(num_predictors=3), num_fragments, capacity)
    assert asked_for.count == min(3, num_cpus - 1)  # one CPU has to decode, or nothing would ever move


@pytest.mark.parametrize(
    ("share", "num_gpus", "num_fragments", "expected"),
    [(1, 8, 100, 8), (1, 8, 3, 3), (2, 8, 100, 4), (0.5, 8, 100, 16), (0.6, 2, 100, 2), (0.3, 2, 100, 6)],
)
def test_a_gpu_has_a_predictor_or_as_many_as_share_it(
    share: float, num_gpus: int, num_fragments: int, expected: int
) -> None:
    settings = SegmentSettings(num_gpus_per_predictor=share)
    placed = place_predictors(settings, num_fragments, Capacity(({"CPU": 96, "GPU": num_gpus},)))
    assert (placed.count, placed.needs) == (expected, {"CPU": 1, "GPU": share})


HEAD = {"CPU": 0, "memory": 8 * GIB}
GPU_NODE = NodeType("gpu_spot", {"CPU": 8, "GPU": 1, "memory": 32 * GIB}, 8)
OTHER_GPU_NODE = NodeType("gpu_on_demand", {"CPU": 8, "GPU": 1, "memory": 32 * GIB}, 8)


def test_a_cluster_without_workers_is_asked_for_all_that_it_may_have() -> None:
    empty = Capacity((HEAD,), (GPU_NODE, OTHER_GPU_NODE), num_more=8)
    settings = SegmentSettings(num_gpus_per_predictor=1)
    assert place_predictors(settings, 100, empty).count == 8
    assert place_predictors(settings, 3, empty).count == 3  # but no more than there are fragments
    on_cpus = place_predictors(SegmentSettings(), 10_000, empty)
    assert on_cpus.count == 56
    assert on_cpus.num_per_node == 8  # the autoscaler fills a node before it adds another


def test_where_nobody_knows_what_may_be_added_what_is_there_counts() -> None:
    capacity = Capacity(({"CPU": 4, "memory": math.inf},) * 2, is_open=True)
    assert place_predictors(SegmentSettings(), 10_000, capacity).count == 6
    assert place_predictors(SegmentSettings(num_gpus_per_predictor=1), 100, capacity).count == 1


@pytest.mark.parametrize(
    ("settings", "node", "message"),
    [
        (
            {"num_gpus_per_predictor": 1},
            {"CPU": 8},
            "segment.num_gpus_per_predictor: 1 predictors of 1 CPU and 1 GPU each asked for, and 0 can ever be placed: "
            "the cluster has 8 CPU, 0 GPU on 1 node, and may add none",
        ),
        ({}, {"CPU": 1}, "segment.num_predictors: 2 processes, one that predicts and one that decodes, of 1 CPU each"),
    ],
)
def test_what_can_never_be_placed_is_refused(settings: dict[str, float], node: dict[str, float], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        place_predictors(SegmentSettings.model_validate(settings), 10, Capacity((node,)))
