"""Number of predictors by default and on request, and refusal of requests that a cluster can never satisfy."""

import math

import pytest

from segray.config import SegmentSettings
from segray.errors import ClusterError
from segray.runtime.capacity import Capacity, NodeType
from segray.segmentation.stages.placement import place_stages

GIB = 2**30


@pytest.mark.parametrize(
    ("num_cpus", "memory_gib", "num_fragments", "expected"),
    [
        (4, 24, 1, 1),
        (4, 24, 3, 1),
        (4, 24, 4, 2),  # at least two fragments each
        (4, 24, 10_000, 2),  # two CPUs are left to decode and write
        (64, 256, 10_000, 56),
        (64, 20, 10_000, 10),  # 2 GiB each
        (2, 24, 10_000, 1),
    ],
)
def test_predictors_leave_cpus_for_decoding_and_have_enough_fragments(
    num_cpus: int, memory_gib: int, num_fragments: int, expected: int
) -> None:
    capacity = Capacity(({"CPU": num_cpus, "memory": memory_gib * GIB},))
    placed = place_stages(SegmentSettings(), num_fragments, capacity)
    assert placed.num_predictors == expected
    assert placed.num_tasks == min(max(2, num_cpus - expected), num_fragments)
    assert place_stages(SegmentSettings(num_predictors=3), num_fragments, capacity).num_predictors == min(3, num_cpus)


def test_predictors_with_several_threads_are_fewer() -> None:
    capacity = Capacity(({"CPU": 64, "memory": 256 * GIB},))
    placed = place_stages(SegmentSettings(num_threads_per_predictor=8), 10_000, capacity)
    assert (placed.num_predictors, placed.num_tasks) == (7, 8)
    assert placed.needs == {"CPU": pytest.approx(8 * 0.89)}


def test_predictors_never_occupy_all_cpus_of_a_node() -> None:
    """Also if most nodes are lost, since their predictors restart on the remaining ones."""
    for num_cpus in range(1, 1025):
        many = Capacity(({"CPU": num_cpus, "memory": 10_000 * GIB},) * 10)
        placed = place_stages(SegmentSettings(num_predictors=10 * num_cpus), 10_000, many)
        assert placed.num_predictors == 10 * num_cpus
        # CPUs that stay free, in Ray's ten-thousandths, on a node that holds as many predictors as fit.
        left = num_cpus * 10_000 % round(placed.needs["CPU"] * 10_000)
        assert left >= 10_000 * max(placed.decode_cpus, placed.write_cpus) or num_cpus % 89 == 0


@pytest.mark.parametrize(
    ("share", "num_gpus", "num_fragments", "expected"),
    [(1, 8, 100, 8), (1, 8, 3, 3), (2, 8, 100, 4), (0.5, 8, 100, 16), (0.6, 2, 100, 2), (0.3, 2, 100, 6)],
)
def test_each_gpu_has_one_predictor_or_as_many_as_share_it(
    share: float, num_gpus: int, num_fragments: int, expected: int
) -> None:
    settings = SegmentSettings(num_gpus_per_predictor=share)
    placed = place_stages(settings, num_fragments, Capacity(({"CPU": 96, "GPU": num_gpus},)))
    assert (placed.num_predictors, placed.needs, placed.num_tasks) == (expected, {"CPU": 1, "GPU": share}, None)


HEAD = {"CPU": 0, "memory": 8 * GIB}
GPU_NODE = NodeType("gpu_spot", {"CPU": 8, "GPU": 1, "memory": 32 * GIB}, 8)
OTHER_GPU_NODE = NodeType("gpu_on_demand", {"CPU": 8, "GPU": 1, "memory": 32 * GIB}, 8)


def test_nodes_that_the_autoscaler_may_add_are_counted() -> None:
    empty = Capacity((HEAD,), (GPU_NODE, OTHER_GPU_NODE), num_more=8)
    settings = SegmentSettings(num_gpus_per_predictor=1)
    assert place_stages(settings, 100, empty).num_predictors == 8
    assert place_stages(settings, 3, empty).num_predictors == 3  # at most one predictor per fragment
    on_cpus = place_stages(SegmentSettings(), 10_000, empty)
    assert on_cpus.num_predictors == 56


def test_unknown_memory_is_no_limit() -> None:
    node = NodeType("gpu_spot", {"CPU": 8, "GPU": 1, "memory": math.inf}, 8)
    assert place_stages(SegmentSettings(), 10_000, Capacity((HEAD,), (node,), num_more=8)).num_predictors == 56


def test_with_unknown_autoscaling_the_present_nodes_or_the_request_decide() -> None:
    some = Capacity(({"CPU": 4, "memory": 32 * GIB},) * 2, is_open=True)
    assert place_stages(SegmentSettings(), 10_000, some).num_predictors == 6
    none = Capacity((HEAD,), is_open=True)
    on_gpus = place_stages(SegmentSettings(num_gpus_per_predictor=1), 100, none)
    assert on_gpus.num_predictors == 1
    asked_for = SegmentSettings(num_gpus_per_predictor=1, num_predictors=64)
    assert place_stages(asked_for, 100, none).num_predictors == 64
    on_cpus = place_stages(SegmentSettings(num_predictors=4), 100, none)
    assert on_cpus.num_predictors == 4


@pytest.mark.parametrize(
    ("settings", "node", "message"),
    [
        (
            {"num_gpus_per_predictor": 1},
            {"CPU": 8},
            "segment.num_gpus_per_predictor: requested 1 predictor with 1 CPU and 1 GPU, but at most 0 can be placed: "
            "the cluster has 8 CPU, 0 GPU on 1 node and may add no nodes",
        ),
        (
            {"num_gpus_per_predictor": 1},
            {"CPU": 1, "GPU": 1},
            "segment: one predictor and one decode task: requested 2 processes with 1 CPU each",
        ),
        (
            {"num_threads_per_predictor": 8},
            {"CPU": 4},
            "segment.num_threads_per_predictor: requested 1 predictor with 7.12 CPU, but at most 0 can be placed",
        ),
        (
            {},
            {"CPU": 0},
            "segment.num_threads_per_predictor: requested 1 predictor with 0.89 CPU, but at most 0 can be placed",
        ),
    ],
)
def test_a_request_that_can_never_be_placed_is_refused(
    settings: dict[str, float], node: dict[str, float], message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        place_stages(SegmentSettings.model_validate(settings), 10, Capacity((node,)))
