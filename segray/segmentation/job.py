"""Job descriptions and the result of a segmentation run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from segray.config import SegmentSettings
from segray.data.classes import ClassMap
from segray.storage import normalize_uri


@dataclass(frozen=True)
class SegmentJob:
    """What to segment, with which model and settings, and where to write the results.

    Attributes:
        bundle_uri: The model bundle.
        image_uris: Folders or prefixes, globs, single images, text lists, manifests.
        output_uri: The run folder.
        mask_uris: One folder of ground truth for each image URI, paired by path without extension; empty to segment
            without scoring.
        settings: The section ``segment`` of the configuration.
        exclude_uris: Run folders of earlier runs; images that they have as ``ok`` rows, with the same entity tag, are
            left out.
        limit: Process only the first images of the plan, at least this many, as a trial; None processes all. It does
            not belong to the run.
    """

    bundle_uri: str
    image_uris: tuple[str, ...]
    output_uri: str
    mask_uris: tuple[str, ...]
    settings: SegmentSettings
    exclude_uris: tuple[str, ...] = ()
    limit: int | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The URIs that are read, as recorded in ``run.json``."""
        exclude = {"exclude": list(self.exclude_uris)} if self.exclude_uris else {}
        return {"bundle": self.bundle_uri, "images": list(self.image_uris), "masks": list(self.mask_uris), **exclude}

    def normalize(self) -> "SegmentJob":
        """Return the job with normalized URIs."""
        return replace(
            self,
            bundle_uri=normalize_uri(self.bundle_uri),
            image_uris=tuple(normalize_uri(uri) for uri in self.image_uris),
            output_uri=normalize_uri(self.output_uri),
            mask_uris=tuple(normalize_uri(uri) for uri in self.mask_uris),
            exclude_uris=tuple(sorted({normalize_uri(uri) for uri in self.exclude_uris})),
        )


@dataclass(frozen=True)
class PipelineJob:
    """What the stages of the pipeline share. It is sent to every worker, so it holds no model and no listing.

    Attributes:
        output_uri: The run folder.
        cut_sha256: Hash in the file names of the run's plan, see ``Plan``.
        bundle_uri: The model bundle.
        bundle_sha256: sha256 of the bundle's manifest when the run was planned; workers refuse any other bundle.
        classes: Classes of the model.
        image_size: Height and width of the model's input.
        settings: The section ``segment`` of the configuration.
        has_truth: Whether masks are read and scored.
    """

    output_uri: str
    cut_sha256: str
    bundle_uri: str
    bundle_sha256: str
    classes: ClassMap
    image_size: tuple[int, int]
    settings: SegmentSettings
    has_truth: bool


@dataclass(frozen=True)
class SegmentResult:
    """Result of a complete run, or of a trial of its first images.

    Attributes:
        output: URI of the run folder.
        num_ok: Number of ``ok`` rows.
        errors: Number of error rows by kind.
        summary: Content of ``summary.parquet``: one row per class, a table of ``SUMMARY_SCHEMA``.
        trial_of: After a trial (``limit``), the number of images of the whole run; the other attributes then describe
            the first images, and no summary or report is written. None for a complete run.
    """

    output: str
    num_ok: int
    errors: dict[str, int]
    summary: pa.Table
    trial_of: int | None = None

    def rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the rows of the run, sorted by URI: a table of ``IMAGES_SCHEMA``, or of some of its columns.

        Without ``columns`` the masks are read too; ``segray.open_results`` reads them one by one.
        """
        # Imported here, because every process of a run imports this module, and pyarrow.dataset takes 1 s.
        from segray.results.reader import RunResults

        columns = None if columns is None else list(columns)
        table: pa.Table = RunResults(self.output).images.to_table(columns=columns)
        return table
