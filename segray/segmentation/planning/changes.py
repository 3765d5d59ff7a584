"""Compares the frozen listing of a run with the present one."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain

from segray.runs.plan import ListedImage

Planned = tuple[ListedImage, int]


class Change(StrEnum):
    """How an image differs between the two listings."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"  # the image or its mask


@dataclass
class Changes:
    """Number of changes of each kind, and a description of the first one."""

    counts: Counter[Change] = field(default_factory=Counter)
    first: str | None = None

    def add(self, change: Change, uri: str) -> None:
        """Count a change of the image at ``uri``."""
        self.counts[change] += 1
        self.first = self.first or f"{uri} was {change}"

    def __str__(self) -> str:
        counts = ", ".join(f"{self.counts[change]} {change}" for change in Change if self.counts[change])
        return f"different listing: {counts}; {self.first}"


def merge_listings(
    frozen: Iterable[Planned], present: Iterable[Planned], retryable: Collection[str], changes: Changes
) -> Iterator[Planned]:
    """Yield the images of the frozen plan in their present state, and collect the changes that are not allowed.

    Args:
        frozen: The plan of the run, sorted by URI.
        present: The present listing, sorted by URI.
        retryable: URIs of images that may change because they are error rows. If one was removed, it stays in the plan.
        changes: Receives every change of other images.
    """
    others = iter(present)
    other = next(others, None)
    for image, fragment in frozen:
        while other is not None and other[0].uri < image.uri:
            changes.add(Change.ADDED, other[0].uri)
            other = next(others, None)
        found = other[0] if other is not None and other[0].uri == image.uri else None
        if found is not None:
            other = next(others, None)
        if found != image and image.uri not in retryable:
            changes.add(Change.REMOVED if found is None else Change.CHANGED, image.uri)
        yield found or image, fragment
    for added, _ in chain([other] if other is not None else [], others):
        changes.add(Change.ADDED, added.uri)
