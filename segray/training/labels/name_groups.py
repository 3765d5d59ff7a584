"""Find groups of images that the names suggest, such as the frames of a video, and that are in train and in val."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

# From the largest groups to the smallest: names without all their last numbers (the tiles of a scene), without the last
# one (the frames of a video, also in a folder of their own), and without its digits.
_EXPRESSIONS = (r"^(.+?)(?:[-_]\d+)+$", r"^(.+)[-_/]\d+$", r"^(.*?\D)\d+\D*$")
_MIN_SHARE = 0.1  # Of the images in val: fewer may have such names by chance.


class SharedGroups(NamedTuple):
    """Groups of images that are in train and in val.

    Attributes:
        expression: A regular expression whose first group is the group of an image's name.
        example: The one with the most images in val, with its number of images in train and in val.
        num_val: Number of images in val that belong to one of them.
        first: Index of the first of these images.
    """

    expression: str
    example: tuple[str, int, int]
    num_val: int
    first: int


def suspect_groups(train: Sequence[pa.Array], val: Sequence[pa.Array]) -> SharedGroups | None:
    """Return the groups of names that differ only in the numbers at their end, if some are in train and in val.

    None is returned if no expression that makes groups matches every name, or if hardly any group is in both.

    Args:
        train: Names of the training images, without extension, as Arrow arrays of strings.
        val: Names of the validation images.
    """
    for expression in _EXPRESSIONS:
        train_sizes, val_sizes = _count_groups(train, expression), _count_groups(val, expression)
        if train_sizes is None or val_sizes is None or len(train_sizes.keys() | val_sizes.keys()) < 2:
            continue
        shared = train_sizes.keys() & val_sizes.keys()
        num_val = sum(val_sizes[group] for group in shared)
        if num_val < _MIN_SHARE * sum(map(len, val)) or not shared:
            return None
        group = max(shared, key=lambda group: (val_sizes[group], group))
        first = next(number for number, name in enumerate(_iterate(val)) if _get_group(name, expression) in shared)
        return SharedGroups(expression, (group, train_sizes[group], val_sizes[group]), num_val, first)
    return None


def _get_group(name: str, expression: str) -> str | None:
    match = re.match(expression, name)
    return None if match is None else match[1]


def _iterate(names: Sequence[pa.Array]) -> Iterator[str]:
    for batch in names:
        yield from batch.to_pylist()


def _count_groups(names: Sequence[pa.Array], expression: str) -> Counter[str] | None:
    """Return the number of images of each group, or None if the expression does not match every name."""
    sizes: Counter[str] = Counter()
    for name in _iterate(names):
        group = _get_group(name, expression)
        if group is None:
            return None
        sizes[group] += 1
    return sizes
