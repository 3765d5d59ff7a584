"""Groups of images: drawn and divided whole, independent of order, and as near to the wanted number as groups allow."""

import random
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pytest

from segray.data.groups import (
    Groups,
    describe_draw,
    divide_groups,
    draw_groups,
    find_groups,
    number_groups,
    require_separate,
)
from segray.errors import DataError


def find(names: Sequence[str], expression: str = "^.*$") -> Groups:
    """Find groups in batches of three names, with other groups in each."""
    batches = [pa.array(names[start : start + 3], pa.large_string()) for start in range(0, len(names), 3)]
    return find_groups(batches, expression)


def list_groups(groups: Groups) -> list[str]:
    return [groups.names[number] for number in groups.numbers]


def build_names(sizes: list[int]) -> list[str]:
    return [f"group{number}" for number, size in enumerate(sizes) for _ in range(size)]


def draw(names: Sequence[str], fraction: float, seed: int) -> set[str]:
    is_drawn = draw_groups(find(names), fraction, seed)
    drawn = {name for name, is_own in zip(names, is_drawn, strict=True) if is_own}
    assert drawn.isdisjoint(name for name, is_own in zip(names, is_drawn, strict=True) if not is_own)
    return drawn


def test_a_group_is_the_first_group_of_the_expression_or_the_whole_match() -> None:
    names = ["a1_7", "a1_8", "b2_7", "b2_7"]
    assert list_groups(find(names, r"^(.*)_\d+$")) == ["a1", "a1", "b2", "b2"]
    assert list_groups(find(names, r"^[a-z]")) == ["a", "a", "b", "b"]
    assert list_groups(find(names, r"_(\d)")) == ["7", "8", "7", "7"]
    # A group that took no part in the match names nothing.
    with pytest.raises(DataError, match=r"does not match the image name 'b2_7' \(2 of 4 images\).*URI of a manifest"):
        find(names, "b|(a)")


def test_the_drawn_number_is_off_by_at_most_half_of_the_smallest_group_left() -> None:
    rng = random.Random(0)
    for _ in range(60):
        groups = build_names([rng.choice([1, 2, 5, 40, 200]) for _ in range(rng.randint(2, 12))])
        sizes, fraction = Counter(groups), rng.choice([0.05, 0.2, 0.5, 0.9])
        drawn = draw(groups, fraction, seed=rng.randint(0, 9))
        assert drawn
        left = [size for group, size in sizes.items() if group not in drawn]
        assert left
        off = abs(sum(sizes[group] for group in drawn) - fraction * len(groups))
        if min(sizes.values()) > fraction * len(groups):  # No group fits.
            assert [sizes[group] for group in drawn] == [min(sizes.values())]
        elif len(left) > 1:
            assert off <= min(left) / 2


def test_the_draw_depends_on_seed_and_names_but_not_on_the_order() -> None:
    groups = build_names([3] * 30)
    drawn = draw(groups, 0.2, seed=1)
    assert len(drawn) == 6
    shuffled = random.Random(5).sample(groups, len(groups))
    assert draw(shuffled, 0.2, seed=1) == drawn
    assert draw(groups, 0.2, seed=2) != drawn
    divided = [set(zip(names, divide_groups(find(names), 4, 1).tolist(), strict=True)) for names in (groups, shuffled)]
    assert divided[0] == divided[1]


def test_one_group_cannot_be_drawn_from() -> None:
    with pytest.raises(DataError, match="all 5 images belong to the group 'group0'"):
        draw(build_names([5]), 0.2, seed=0)


def test_folds_hold_whole_groups_and_have_similar_sizes() -> None:
    groups = build_names([7, 1, 9, 3, 3, 5, 2, 2, 8, 4])
    folds = divide_groups(find(groups), 4, seed=0).tolist()
    assert len(set(zip(groups, folds, strict=True))) == 10  # Each group is in one fold.
    sizes = Counter(folds)
    assert sorted(sizes) == [0, 1, 2, 3]
    assert max(sizes.values()) - min(sizes.values()) <= 2
    remedy = r"set train\.folds to at most 10, or change data\.val\.group_by"
    with pytest.raises(DataError, match=rf"^train\.folds: 11 folds need as many groups of images, found 10; {remedy}$"):
        divide_groups(find(groups), 11, seed=0)


def test_groups_are_numbered_in_alphabetical_order() -> None:
    assert number_groups(find(["b", "c", "a", "c", "b"]), 3).tolist() == [1, 2, 0, 2, 1]
    with pytest.raises(DataError, match="expected 2 to 3 groups, found 4"):
        number_groups(find(list("abcd")), 3)


def test_the_largest_group_of_those_in_both_splits_is_named() -> None:
    require_separate(find(["a", "b", "c", "c"]), 2)
    with pytest.raises(DataError, match=r"group 'b' has 1 images in train and 3 in val \(2 such groups\)"):
        require_separate(find(["a", "b", "d", "b", "a", "b", "b", "c"]), 3)


def test_the_description_says_how_far_off_the_split_is_and_names_a_large_group() -> None:
    assert describe_draw(find(build_names([10, 70, 20])), 80, 0.25) == [
        "val has 1 of 3 groups, 20 of 100 images: 20.0% (data.val.fraction: 25.0%)",
        "warning: data.val.group_by: group 'group1' has 70 images, more than data.val.fraction asks for (25); "
        "train.folds gives a score over all groups",
    ]
    assert len(describe_draw(find(["a", "b", "c"]), 2, 0.34)) == 1
