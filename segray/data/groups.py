"""Groups of images that belong together, such as the frames of a video: found by name, drawn and divided as a whole.

A random split over single frames puts nearly the same picture into train and val, so that the validation score
rewards memorising. Nothing here depends on the order of the images: groups are drawn in the order of a hash of their
name and the seed.
"""

import hashlib
import heapq
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from segray.errors import DataError


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of each image.

    Attributes:
        names: Names of the groups.
        numbers: (N,) int32, the group of each image, as an index of ``names``.
    """

    names: list[str]
    numbers: npt.NDArray[np.int32]

    def count(self, start: int = 0, stop: int | None = None) -> list[int]:
        """Return how many of the images, or of a range of them, belong to each group."""
        counts: list[int] = np.bincount(self.numbers[start:stop], minlength=len(self.names)).tolist()
        return counts

    def shuffle(self, seed: int) -> list[int]:
        """Return the numbers of the groups in an order that depends only on their names and the seed."""
        return sorted(range(len(self.names)), key=lambda group: (_hash(self.names[group], seed), self.names[group]))


def find_groups(names: Iterable[pa.LargeStringArray], expression: str) -> Groups:
    """Return the group of each image: what the first group of the expression, or all of it, matches in its name.

    Args:
        names: Names of the images, in batches.
        expression: A regular expression.

    Raises:
        DataError: The expression does not match a name; the message has the first one.
    """
    pattern = re.compile(expression)
    chunks, missing, num_missing = [], "", 0
    for batch in names:
        found = [match[pattern.groups > 0] if (match := pattern.search(name)) else None for name in batch.to_pylist()]
        column = pa.array(found, pa.large_string())
        if column.null_count and not num_missing:
            missing = batch[found.index(None)].as_py()
        num_missing += column.null_count
        chunks.append(column.dictionary_encode())
    if num_missing:
        raise DataError(
            f"data.val.group_by: {expression!r} does not match the image name {missing!r} ({num_missing} of "
            f"{sum(map(len, chunks))} images); expected an expression that matches every name, which is the path below "
            "the image folder, or the URI of a manifest, without extension"
        )
    encoded = pa.chunked_array(chunks).unify_dictionaries().combine_chunks()
    return Groups(encoded.dictionary.to_pylist(), encoded.indices.to_numpy())


def draw_groups(groups: Groups, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Draw whole groups with about a fraction of all images; return which images are drawn, (N,).

    Groups are visited in an order that depends only on their names and the seed, and each is drawn that still fits.
    If the smallest group that is left then brings the number of images nearer to the fraction, it is drawn as well.
    So the number differs from the fraction by at most half the size of the smallest group that is not drawn, unless
    only one is left, or no group fits, in which case the smallest is drawn.

    Args:
        groups: Group of each image.
        fraction: Share of the images to draw, 0 to 1.
        seed: Seed of the draw.

    Raises:
        DataError: There is only one group.
    """
    sizes = groups.count()
    if len(sizes) < 2:
        raise DataError(
            f"data.val.group_by: all {sizes[0]} images belong to the group {groups.names[0]!r}, so none would be left "
            "to train on; expected an expression that tells groups apart"
        )
    missing = sum(sizes) * fraction
    is_drawn = np.zeros(len(sizes), bool)
    order = groups.shuffle(seed)
    for group in order:
        if sizes[group] <= missing:
            is_drawn[group] = True
            missing -= sizes[group]
    left = [group for group in order if not is_drawn[group]]
    smallest = min(left, key=lambda group: sizes[group])
    if not is_drawn.any() or (len(left) > 1 and sizes[smallest] < 2 * missing):
        is_drawn[smallest] = True
    return is_drawn[groups.numbers]


def divide_groups(groups: Groups, num_folds: int, seed: int) -> npt.NDArray[np.uint8]:
    """Return the fold of each image, 0 to ``num_folds - 1``; folds have whole groups and about the same size.

    The largest group comes first, and each goes to the fold that has the fewest images so far.

    Raises:
        DataError: There are fewer groups than folds.
    """
    sizes = groups.count()
    require_enough(len(sizes), num_folds, "groups of images", ", or change data.val.group_by")
    folds = [(0, number) for number in range(num_folds)]
    numbers = np.zeros(len(sizes), np.uint8)
    for group in sorted(groups.shuffle(seed), key=lambda group: -sizes[group]):
        size, number = folds[0]
        numbers[group] = number
        heapq.heapreplace(folds, (size + sizes[group], number))
    return numbers[groups.numbers]


def require_enough(found: int, num_folds: int, what: str, also: str = "") -> None:
    """Raise if there are fewer groups, or single images, than folds.

    Raises:
        DataError: Names both numbers.
    """
    if found < num_folds:
        remedy = f"set train.folds to at most {found}" if found > 1 else "remove train.folds"
        raise DataError(f"train.folds: {num_folds} folds need as many {what}, found {found}; {remedy}{also}")


def number_groups(groups: Groups, max_groups: int) -> npt.NDArray[np.uint8]:
    """Return the number of each image's group, from 0 in alphabetical order.

    Raises:
        DataError: There is only one group, or there are more than ``max_groups``.
    """
    names = groups.names
    if not 2 <= len(names) <= max_groups:
        raise DataError(
            f"train.folds: groups makes one fold of each group; expected 2 to {max_groups} groups, found {len(names)}; "
            "set a number of folds, or change data.val.group_by"
        )
    numbers = np.zeros(len(names), np.uint8)
    numbers[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    return numbers[groups.numbers]


def describe_draw(groups: Groups, num_train: int, fraction: float) -> list[str]:
    """Return lines that say how far a drawn split is from the fraction, and name a group that is too large for it.

    Args:
        groups: Group of each image, first those of train and then those of val.
        num_train: Number of images of train.
        fraction: Share of the images that was to be drawn.
    """
    num_images = len(groups.numbers)
    num_val = num_images - num_train
    sizes, val_sizes = groups.count(), groups.count(num_train)
    lines = [
        f"val has {sum(map(bool, val_sizes)):,} of {len(sizes):,} groups, {num_val:,} of {num_images:,} images: "
        f"{num_val / num_images:.1%} (data.val.fraction: {fraction:.1%})"
    ]
    size, largest = max(zip(sizes, groups.names, strict=True))
    if size > num_images * fraction:
        lines.append(
            f"warning: data.val.group_by: group {largest!r} has {size:,} images, more than data.val.fraction asks "
            f"for ({num_images * fraction:,.0f}); train.folds gives a score over all groups"
        )
    return lines


def require_separate(groups: Groups, num_train: int) -> None:
    """Raise if a group has images in train and in val.

    Args:
        groups: Group of each image, first those of train and then those of val.
        num_train: Number of images of train.

    Raises:
        DataError: Names the largest such group.
    """
    rows = zip(groups.count(num_train), groups.names, groups.count(0, num_train), strict=True)
    shared = [row for row in rows if row[0] and row[2]]
    if shared:
        num_val, group, num_own = max(shared)
        raise DataError(
            f"data.val.group_by: group {group!r} has {num_own} images in train and {num_val} in val ({len(shared)} "
            "such groups); move them to one side, draw val with {fraction: 0.2, group_by: …}, or set train.folds"
        )


def _hash(group: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=16).digest()
