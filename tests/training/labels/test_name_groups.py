"""Groups that names suggest: found where videos or scenes are in train and in val, and not where names mean nothing."""

import re
from collections.abc import Sequence

import pyarrow as pa
import pytest

from segray.data.groups import find_groups
from segray.training.labels.name_groups import SharedGroups, suspect_groups

FRAMES = [f"{video}_{frame:05}" for video in ("0001TP", "0006R0", "0016E5") for frame in range(0, 300, 30)]


def suspect(*splits: Sequence[str]) -> SharedGroups | None:
    """Pass the names in two batches for each split."""
    return suspect_groups(*([pa.array(names[:7], pa.string()), pa.array(names[7:], pa.string())] for names in splits))


def list_groups(names: Sequence[str], expression: str) -> list[str]:
    groups = find_groups([pa.array(names)], expression)
    return [groups.names[number] for number in groups.numbers]


def test_a_video_whose_frames_are_in_both_splits_is_suspected() -> None:
    shared = suspect(FRAMES[:25], FRAMES[25:])
    assert shared is not None
    assert (shared.example, shared.num_val, shared.first) == (("0016E5", 5, 5), 5, 0)
    assert list_groups(FRAMES, shared.expression) == [name[:6] for name in FRAMES]


@pytest.mark.parametrize(
    ("names", "group"),
    [
        ([f"scene{n}_{row}_{column}" for n in range(3) for row in range(4) for column in range(4)], r"scene\d"),
        ([f"video_{n}/{frame:04}" for n in range(3) for frame in range(16)], r"video_\d"),
        ([f"day{n}/img-{frame}" for n in range(3) for frame in range(16)], r"day\d/img"),
        ([f"Seq{n:02}VD_f{frame:05}" for n in range(3) for frame in range(16)], r"Seq\d\dVD_f"),
        ([f"take_{n}_2024-01-{frame:02}" for n in "ab" for frame in range(16)], r"take_[ab]"),
    ],
)
def test_the_expression_separates_what_belongs_together(names: list[str], group: str) -> None:
    shared = suspect(names[::2], names[1::2])
    assert shared is not None
    found = list_groups(names, shared.expression)
    expected = []
    for name in names:
        match = re.match(group, name)
        assert match
        expected.append(match[0])
    assert found == expected


@pytest.mark.parametrize(
    "names",
    [
        [f"{number:012}" for number in range(40)],  # COCO
        [f"img_{number:04}" for number in range(40)],  # All in one group.
        [f"{number * 7919 % 100_003:x}" + "abcdefgh"[number % 8] for number in range(40)],
        ["a", "b", "c", "d"],
        [],
    ],
)
def test_names_that_suggest_no_groups_are_not_suspected(names: list[str]) -> None:
    assert suspect(names[::2], names[1::2]) is None


def test_groups_in_one_split_are_not_suspected_and_a_few_images_do_not_count() -> None:
    assert suspect(FRAMES[:20], FRAMES[20:]) is None
    others = [f"other_{number}" for number in range(100)]
    assert suspect(FRAMES[:25], [*FRAMES[25:], *others]) is None
