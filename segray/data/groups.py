"""Groups of images that belong together, such as the frames of a video: found by name, drawn and divided as a whole.

A random split over single frames puts nearly the same picture into train and val, so that the validation score
rewards memorising. Nothing here depends on the order of the images: groups are drawn in the order of a hash of their
name and the seed.
"""

import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from segray.errors import DataError


def find_groups(names: Sequence[str], expression: str) -> list[str]:
    """Return the group of each image: what the first group of the expression, or all of it, matches in its name.

    Raises:
        DataError: The expression does not match a name; the message has the first one.
    """
    pattern = re.compile(expression)
    groups = [match[pattern.groups > 0] if (match := pattern.search(name)) else None for name in names]
    missing = [name for name, group in zip(names, groups, strict=True) if group is None]
    if missing:
        raise DataError(
            f"data.val.group_by: {expression!r} does not match the image name {missing[0]!r} ({len(missing)} of "
            f"{len(names)} images); expected an expression that matches every name, which is the path below the "
            "image folder without extension"
        )
    return [group for group in groups if group is not None]


def draw_groups(groups: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Draw whole groups with about a fraction of all images.

    Groups are visited in an order that depends only on their names and the seed, and each is drawn that still fits.
    If the smallest group that is left then brings the number of images nearer to the fraction, it is drawn as well.
    So the number differs from the fraction by at most half the size of the smallest group that is not drawn.

    Args:
        groups: Group of each image.
        fraction: Share of the images to draw, 0 to 1.
        seed: Seed of the draw.

    Raises:
        DataError: There is only one group.
    """
    sizes = Counter(groups)
    if len(sizes) < 2:
        raise DataError(
            f"data.val.group_by: all {len(groups)} images belong to the group {groups[0]!r}, so none would be left to "
            "train on; expected an expression that tells groups apart"
        )
    missing = len(groups) * fraction
    drawn = set()
    order = _shuffle(sizes, seed)
    for group in order:
        if sizes[group] <= missing:
            drawn.add(group)
            missing -= sizes[group]
    left = [group for group in order if group not in drawn]
    smallest = min(left, key=lambda group: sizes[group])
    if not drawn or (len(left) > 1 and sizes[smallest] < 2 * missing):
        drawn.add(smallest)
    return drawn


def divide_groups(groups: Sequence[str], num_folds: int, seed: int) -> list[int]:
    """Return the fold of each image, 0 to ``num_folds - 1``; folds have whole groups and about the same size.

    The largest group comes first, and each goes to the fold that has the fewest images so far.

    Raises:
        DataError: There are fewer groups than folds.
    """
    sizes = Counter(groups)
    if len(sizes) < num_folds:
        raise DataError(f"train.folds: {num_folds} folds need as many groups of images, found {len(sizes)}")
    folds = [(0, number) for number in range(num_folds)]
    numbers = {}
    for group in sorted(_shuffle(sizes, seed), key=lambda group: -sizes[group]):
        size, number = folds[0]
        numbers[group] = number
        heapq.heapreplace(folds, (size + sizes[group], number))
    return [numbers[group] for group in groups]


def number_groups(groups: Sequence[str], max_groups: int) -> list[int]:
    """Return the number of each image's group, from 0 in alphabetical order.

    Raises:
        DataError: There is only one group, or there are more than ``max_groups``.
    """
    names = sorted(set(groups))
    if not 2 <= len(names) <= max_groups:
        raise DataError(
            f"train.folds: groups makes one fold of each group; expected 2 to {max_groups} groups, found {len(names)}; "
            "set a number of folds, or change data.val.group_by"
        )
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[group] for group in groups]


def describe_draw(train: Sequence[str], val: Sequence[str], fraction: float) -> list[str]:
    """Return lines that say how far a drawn split is from the fraction, and name a group that is too large for it.

    Args:
        train: Group of each training image.
        val: Group of each validation image.
        fraction: Share of the images that was to be drawn.
    """
    num_images = len(train) + len(val)
    sizes = Counter(train) + Counter(val)
    lines = [
        f"val has {len(set(val)):,} of {len(sizes):,} groups, {len(val):,} of {num_images:,} images: "
        f"{len(val) / num_images:.1%} (data.val.fraction: {fraction:.1%})"
    ]
    largest, size = max(sizes.items(), key=lambda item: (item[1], item[0]))
    if size > num_images * fraction:
        lines.append(
            f"warning: data.val.group_by: group {largest!r} has {size:,} images, more than data.val.fraction asks "
            f"for ({num_images * fraction:,.0f}); train.folds gives a score over all groups"
        )
    return lines


def require_separate(train: Sequence[str], val: Sequence[str]) -> None:
    """Raise if a group has images in train and in val.

    Raises:
        DataError: Names the largest such group.
    """
    train_sizes, val_sizes = Counter(train), Counter(val)
    shared = train_sizes.keys() & val_sizes.keys()
    if shared:
        group = max(shared, key=lambda group: (val_sizes[group], group))
        raise DataError(
            f"data.val.group_by: group {group!r} has {train_sizes[group]} images in train and {val_sizes[group]} in "
            f"val ({len(shared)} such groups); move them to one side, draw val with {{fraction: 0.2, group_by: …}}, or "
            "set train.folds"
        )


def _shuffle(sizes: Mapping[str, int], seed: int) -> list[str]:
    return sorted(sizes, key=lambda group: (_hash(group, seed), group))


def _hash(group: str, seed: int) -> bytes:
    # Names of files may hold bytes that are not UTF-8, which Python reads as surrogates.
    return hashlib.blake2b(f"{seed}:{group}".encode(errors="surrogatepass"), digest_size=16).digest()
