"""Groups of images: drawn and divided whole, independent of order, and as near to the wanted number as groups allow."""

import random
from collections import Counter

import pytest

from segray.data.groups import describe_draw, divide_groups, draw_groups, find_groups
from segray.errors import DataError


def build_groups(sizes: list[int]) -> list[str]:
    return [f"group{number}" for number, size in enumerate(sizes) for _ in range(size)]


def test_a_group_is_the_first_group_of_the_expression_or_the_whole_match() -> None:
    names = ["a1_7", "a1_8", "b2_7"]
    assert find_groups(names, r"^(.*)_\d+$") == ["a1", "a1", "b2"]
    assert find_groups(names, r"^[a-z]") == ["a", "a", "b"]
    assert find_groups(names, r"_(\d)") == ["7", "8", "7"]
    # A group that took no part in the match names nothing.
    with pytest.raises(DataError, match=r"does not match the image name 'b2_7' \(1 of 3 images\)"):
        find_groups(names, "b|(a)")


def test_the_drawn_number_is_off_by_at_most_half_of_the_smallest_group_left() -> None:
    rng = random.Random(0)
    for _ in range(500):
        groups = build_groups([rng.choice([1, 2, 5, 40, 200]) for _ in range(rng.randint(2, 12))])
        sizes, fraction = Counter(groups), rng.choice([0.05, 0.2, 0.5, 0.9])
        drawn = draw_groups(groups, fraction, seed=rng.randint(0, 9))
        assert drawn
        left = [size for group, size in sizes.items() if group not in drawn]
        assert left
        off = abs(sum(sizes[group] for group in drawn) - fraction * len(groups))
        if len(drawn) > 1 and len(left) > 1:
            assert off <= min(left) / 2


def test_the_draw_depends_on_seed_and_names_but_not_on_the_order() -> None:
    groups = build_groups([3] * 30)
    drawn = draw_groups(groups, 0.2, seed=1)
    assert len(drawn) == 6
    shuffled = random.Random(5).sample(groups, len(groups))
    assert draw_groups(shuffled, 0.2, seed=1) == drawn
    assert draw_groups(groups, 0.2, seed=2) != drawn
    assert set(zip(shuffled, divide_groups(shuffled, 4, 1), strict=True)) == set(
        zip(groups, divide_groups(groups, 4, 1), strict=True)
    )


def test_one_group_cannot_be_drawn_from() -> None:
    with pytest.raises(DataError, match="all 5 images belong to the group 'group0'"):
        draw_groups(build_groups([5]), 0.2, seed=0)


def test_folds_hold_whole_groups_and_have_similar_sizes() -> None:
    groups = build_groups([7, 1, 9, 3, 3, 5, 2, 2, 8, 4])
    folds = divide_groups(groups, 4, seed=0)
    assert len(set(zip(groups, folds, strict=True))) == 10  # Each group is in one fold.
    sizes = Counter(folds)
    assert sorted(sizes) == [0, 1, 2, 3]
    assert max(sizes.values()) - min(sizes.values()) <= 2
    with pytest.raises(DataError, match=r"train\.folds: 11 folds need as many groups of images, found 10"):
        divide_groups(groups, 11, seed=0)


def test_the_description_says_how_far_off_the_split_is_and_names_a_large_group() -> None:
    train, val = build_groups([10, 70]), ["x"] * 20
    assert describe_draw(train, val, 0.25) == [
        "val has 1 of 3 groups, 20 of 100 images: 20.0% (data.val.fraction: 25.0%)",
        "warning: data.val.group_by: group 'group1' has 70 images, more than data.val.fraction asks for (25); "
        "train.folds gives a score over all groups",
    ]
    assert len(describe_draw(["a", "b"], ["c"], 0.34)) == 1
