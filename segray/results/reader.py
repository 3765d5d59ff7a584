"""Opens the run folder of a segmentation for reading: rows, masks and summary."""

import json
from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import dataset

from segray.results.masks import load_mask
from segray.results.summary import load_summary
from segray.runs.fragment_metadata import CLASS_NAMES_KEY
from segray.runs.plan import get_fragment_uri
from segray.runs.run_file import require_run
from segray.runs.written import list_written_fragments
from segray.schema import IMAGES_SCHEMA
from segray.storage import normalize_uri, read_columns
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
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the indices in masks and of the elements of lists.

        Raises:
            MissingFileError: There are no rows yet, or an early version of segray wrote them and they are not complete.
        """
        for fragment in self._list_fragments()[:1]:
            metadata = read_columns(get_fragment_uri(self.output, fragment), ["status"]).schema.metadata or {}
            if names := metadata.get(CLASS_NAMES_KEY.encode()):
                return tuple(json.loads(names))
        # Rows that were written before there was metadata.
        return tuple(self.summary["class_name"].to_pylist())

    @property
    def images(self) -> dataset.FileSystemDataset:
        """The rows as a pyarrow dataset of ``IMAGES_SCHEMA``, one row per image, sorted by URI.

        Select columns where masks are not needed: ``results.images.to_table(columns=["uri", "status"])``.
        """
        filesystem, folder = open_filesystem(self.output)
        paths = [get_fragment_uri(folder, fragment) for fragment in self._list_fragments()]
        return dataset.FileSystemDataset.from_paths(
            paths, schema=IMAGES_SCHEMA, format=dataset.ParquetFileFormat(), filesystem=filesystem
        )

    def _list_fragments(self) -> list[int]:
        return sorted(list_written_fragments(self.output, self._run.plan.num_fragments))

    @property
    def summary(self) -> pa.Table:
        """One row per class, a table of ``SUMMARY_SCHEMA``.

        Raises:
            MissingFileError: The run is not complete.
        """
        return load_summary(self.output)

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
