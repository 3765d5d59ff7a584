"""How a stage must process a fragment, after earlier attempts at it died."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from segray.errors import FaultKind


class Failure(NamedTuple):
    """Why an image must not be processed any more: the columns ``error_kind`` and ``error_message`` of its row."""

    kind: FaultKind
    message: str


@dataclass(frozen=True)
class AttemptPlan:
    """How an attempt must process a fragment. Images are identified by their index in the fragment.

    Attributes:
        attempt: Number of the attempt. Calls of an earlier attempt, which was presumed dead, are ignored.
        one_by_one: Process one image at a time and record each beforehand, because an earlier attempt died.
        hands_over: Hand each result to the ledger as soon as it is finished.
        suspect: Image to process first, because the last attempt died while processing it.
        failed: Images that must not be processed any more.
        finished: Images whose results the ledger has from earlier attempts.
    """

    attempt: int
    one_by_one: bool = False
    hands_over: bool = False
    suspect: int | None = None
    failed: Mapping[int, Failure] = field(default_factory=dict)
    finished: frozenset[int] = frozenset()

    def order_images(self, num_images: int) -> list[int]:
        """Return the indices of the images to process, in the order in which to process them."""
        remaining = [index for index in range(num_images) if index not in self.failed and index not in self.finished]
        return sorted(remaining, key=lambda index: index != self.suspect)
