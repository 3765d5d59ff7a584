"""How many predictors a run has when nobody says."""

import pytest

from segray.config import SegmentSettings
from segray.segment.pipeline import choose_num_predictors

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
    resources = {"CPU": num_cpus, "memory": memory_gib * GIB}
    assert choose_num_predictors(SegmentSettings(), num_fragments, resources) == expected
    assert choose_num_predictors(SegmentSettings(num_predictors=3), num_fragments, resources) == 3


@pytest.mark.parametrize(
    ("share", "num_gpus", "num_fragments", "expected"),
    [(1, 8, 100, 8), (1, 8, 3, 3), (2, 8, 100, 4), (0.5, 8, 100, 16), (0.6, 2, 100, 2), (0.3, 2, 100, 6), (1, 0, 9, 1)],
)
def test_a_gpu_has_a_predictor_or_as_many_as_share_it(
    share: float, num_gpus: int, num_fragments: int, expected: int
) -> None:
    settings = SegmentSettings(num_gpus_per_predictor=share)
    assert choose_num_predictors(settings, num_fragments, {"CPU": 96, "GPU": num_gpus}) == expected
