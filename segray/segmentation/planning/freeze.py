"""Lists the images of a job, and cuts the listing into the plan of a new run; both on the driver's disk."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from segray.errors import DataError
from segray.runs.listing import Listing, spool_listing
from segray.runs.plan import Plan, spool_plan
from segray.segmentation.job import SegmentJob
from segray.segmentation.planning.cut import FragmentLimits, cut_fragments
from segray.segmentation.planning.exclusion import EarlierRun, leave_out, open_earlier_runs
from segray.segmentation.planning.inputs import Source, merge_sources, open_sources


@dataclass(frozen=True)
class JobInputs:
    """The opened inputs of a job, which can be listed once.

    Attributes:
        job: The job, with normalized URIs.
        image_size: Height and width of the model's input.
        sources: The images.
        earlier_runs: Runs whose images are left out.
    """

    job: SegmentJob
    image_size: tuple[int, int]
    sources: list[Source]
    earlier_runs: list[EarlierRun]

    @property
    def has_truth(self) -> bool:
        """Whether any source has ground truth."""
        return any(source.has_truth for source in self.sources)

    def list_images(self, path: Path, console: Console) -> Listing:
        """List the images into a local file.

        Args:
            path: The file.
            console: For progress, and the number of images that are left out.

        Raises:
            DataError: There are no images, or a list cannot be used.
            StorageError: Environment error (permissions, network, disk).
        """
        num_found = 0
        with console.status("listing images") as status:

            def show_progress(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
                nonlocal num_found
                for batch in batches:
                    num_found += batch.num_rows
                    status.update(f"listing images: {num_found:,}")
                    yield batch

            images = leave_out(show_progress(merge_sources(self.sources)), self.earlier_runs)
            listing = spool_listing(images, path)
        if not num_found:
            raise DataError(
                f"no images under {', '.join(self.job.image_uris)}: expected files named "
                f"{', '.join(f'*.{extension}' for extension in self.job.settings.extensions)} (segment.extensions)"
            )
        if self.earlier_runs:
            num_left_out = num_found - listing.num_images
            console.print(
                f"left out {num_left_out} of {num_found} images, which are ok rows of {self._earlier_uris} (--exclude)",
                highlight=False,
            )
        return listing

    @property
    def _earlier_uris(self) -> str:
        return ", ".join(run.output_uri for run in self.earlier_runs)

    def cut(self, listing: Listing, folder: Path) -> Plan:
        """Divide a listing into fragments, and write the plan to a local folder, which must not exist.

        Raises:
            DataError: All images are left out.
        """
        if not listing.num_images:
            raise DataError(f"there is nothing to segment: all images are ok rows of {self._earlier_uris} (--exclude)")
        folder.mkdir()
        limits = FragmentLimits.resolve(self.job.settings, self.image_size, listing.num_images)
        return spool_plan(cut_fragments(listing.read(), limits), folder)


def open_inputs(job: SegmentJob, image_size: tuple[int, int], bundle_sha256: str, console: Console) -> JobInputs:
    """Open the inputs of a job.

    Args:
        job: The job, with normalized URIs.
        image_size: Height and width of the model's input.
        bundle_sha256: sha256 of the bundle's manifest, compared with that of the runs to exclude.
        console: For warnings.

    Raises:
        ConfigError: The options of the inputs contradict each other.
        DataError: A manifest cannot be used.
        StorageError: The store refused the request or failed.
    """
    earlier_runs = open_earlier_runs(job.exclude_uris, job.output_uri)
    for run in earlier_runs:
        if line := run.describe(bundle_sha256):
            console.print(line, highlight=False)
    return JobInputs(job, image_size, open_sources(job.image_uris, job.mask_uris, job.settings), earlier_runs)
