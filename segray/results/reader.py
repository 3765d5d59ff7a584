"""Opens the run folder of a segmentation for reading: rows, masks and summary."""

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import dataset

from segray.errors import MissingFileError
from segray.results.masks import load_mask
from segray.runs.plan import get_fragment_uri, list_finished_fragments
from segray.runs.run_file import require_run
from segray.schema import IMAGES_SCHEMA
from segray.storage import join_uri, normalize_uri, read_columns
from segray.storage.arrow import open_filesystem

_MASKS_PER_BATCH = 16


class RunResults:
    """A run folder, opened for reading. A run in progress can be opened too, and has the rows written so far.

    Attributes:
        output: URI of the run folder.
        is_complete: Whether every planned image has a row, and summary and report are written.
    """

    def __init__(self, output_uri: str) -> None:
        """Open a run folder.

        Raises:
            MissingFileError: There is no run.
            RunMismatchError: ``run.json`` is not valid.
        """
        self.output = normalize_uri(output_uri)
        self._run = require_run(self.output)
        self.is_complete = self._run.status == "complete"

    @property
    def images(self) -> dataset.FileSystemDataset:
        """The rows as a pyarrow dataset of ``IMAGES_SCHEMA``, one row per image, sorted by URI.

        Select columns where masks are not needed: ``results.images.to_table(columns=["uri", "status"])``.
        """
        finished = sorted(list_finished_fragments(self.output) & set(range(self._run.plan.num_fragments)))
        filesystem, folder = open_filesystem(self.output)
        paths = [get_fragment_uri(folder, fragment) for fragment in finished]
        return dataset.FileSystemDataset.from_paths(
            paths, schema=IMAGES_SCHEMA, format=dataset.ParquetFileFormat(), filesystem=filesystem
        )

    @property
    def summary(self) -> pa.Table:
        """One row per class, a table of ``SUMMARY_SCHEMA``.

        Raises:
            MissingFileError: The run is not complete.
        """
        try:
            return read_columns(join_uri(self.output, "summary.parquet"))
        except MissingFileError as error:
            raise MissingFileError(
                f"{self.output}: the run is not complete, so it has no summary; to resume, rerun the same command"
            ) from error

    def masks(self, uris: Collection[str] | None = None) -> Iterator[tuple[str, npt.NDArray[np.integer]]]:
        """Yield the URI and the mask of each segmented image; a few masks are in memory at a time.

        Args:
            uris: Images to read, as in the column ``uri``; None reads all.

        Yields:
            The URI and its mask: (height, width) class indices, uint8, or uint16 above 256 classes.
        """
        condition = pc.field("status") == "ok"
        if uris is not None:
            condition &= pc.field("uri").isin(list(uris))
        columns = ["uri", "mask", "mask_encoding", "height", "width"]
        batches = self.images.to_batches(
            columns=columns, filter=condition, batch_size=_MASKS_PER_BATCH, fragment_readahead=1, batch_readahead=1
        )
        for batch in batches:
            for row in batch.to_pylist():
                yield row["uri"], load_mask(row)
