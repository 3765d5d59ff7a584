"""What is different between the listing that a run froze and the one of today."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain

from segray.runs.plan import ListedImage

Planned = tuple[ListedImage, int]


class Change(StrEnum):
    """What became of an image since the run was planned."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"  # it, or its mask


@dataclass
class Changes:
    """Counts of changes, and the first of them."""

    counts: Counter[Change] = field(default_factory=Counter)
    first: str | None = None

    def add(self, change: Change, uri: str) -> None:
        """Count a change."""
        self.counts[change] += 1
        self.first = self.first or f"{uri} was {change}"

    def __str__(self) -> str:
        counts = ", ".join(f"{self.counts[change]} {change}" for change in Change if self.counts[change])
        return f"another listing: {counts}; {self.first}"


def merge_listings(
    frozen: Iterable[Planned], present: Iterable[Planned], mendable: Collection[str], changes: Changes
) -> Iterator[Planned]:
    """Yield the frozen plan, with the present state of the images that may be mended.

    Args:
        frozen: The plan of the run, sorted by URI.
        present: The listing of today, sorted by URI.
        mendable: URIs of images whose change is wanted: they are error rows. One that is gone stays planned.
        changes: Takes every other change.
    """
    mine, others = iter(frozen), iter(present)
    theirs = next(others, None)
    for image, fragment in mine:
        while theirs is not None and theirs[0].uri < image.uri:
            changes.add(Change.ADDED, theirs[0].uri)
            theirs = next(others, None)
        found = theirs[0] if theirs is not None and theirs[0].uri == image.uri else None
        if found is not None:
            theirs = next(others, None)
        if found != image and image.uri not in mendable:
            changes.add(Change.REMOVED if found is None else Change.CHANGED, image.uri)
        yield found or image, fragment
    for added, _ in chain([theirs] if theirs is not None else [], others):
        changes.add(Change.ADDED, added.uri)
