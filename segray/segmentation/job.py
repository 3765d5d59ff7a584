"""What a call of ``segray segment`` asks for, and what it comes to."""

from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from segray.config import SegmentSettings
from segray.storage import normalize_uri


@dataclass(frozen=True)
class SegmentJob:
    """What to segment, with what, and where to.

    Attributes:
        image_uris: Folders or prefixes, globs, single images, text lists, manifests.
        mask_uris: Ground truth for each of them, paired by path without extension; empty to segment without scoring.
    """

    bundle_uri: str
    image_uris: tuple[str, ...]
    output_uri: str
    mask_uris: tuple[str, ...]
    settings: SegmentSettings

    @property
    def inputs(self) -> dict[str, Any]:
        """The URIs that are read."""
        return {"bundle": self.bundle_uri, "images": list(self.image_uris), "masks": list(self.mask_uris)}

    def normalize(self) -> "SegmentJob":
        """Return the job with each URI in its one spelling."""
        return replace(
            self,
            bundle_uri=normalize_uri(self.bundle_uri),
            image_uris=tuple(normalize_uri(uri) for uri in self.image_uris),
            output_uri=normalize_uri(self.output_uri),
            mask_uris=tuple(normalize_uri(uri) for uri in self.mask_uris),
        )


@dataclass(frozen=True)
class SegmentOutcome:
    """A finished run."""

    output_uri: str
    num_ok: int
    errors: dict[str, int]
    summary: pa.Table
