"""A decode stage for given images, without Ray and without a run folder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyarrow as pa

from segray.config import SegmentSettings
from segray.schema import PLAN_SCHEMA
from segray.segmentation.job import PipelineJob
from segray.segmentation.stages import decode
from segray.segmentation.stages.decode import FragmentDecoder
from segray.segmentation.stages.ledger import DECODE
from tests.conftest import PET_CLASSES
from tests.segmentation.local_ledger import LocalLedger

DEFAULTS = SegmentSettings()


@contextmanager
def planned_decoder(
    images: Sequence[Mapping[str, Any]],
    settings: SegmentSettings = DEFAULTS,
    image_size: tuple[int, int] = (16, 16),
    ledger: LocalLedger | None = None,
) -> Iterator[FragmentDecoder]:
    """Yield a decoder whose fragments, of any number, all consist of the given rows of ``PLAN_SCHEMA``.

    There is ground truth if an image has a mask.
    """
    has_truth = any(image.get("mask_uri") for image in images)
    job = PipelineJob("", "", "", "", PET_CLASSES, image_size, settings, has_truth)

    def load_fragment(output_uri: str, cut_sha256: str, fragment: int) -> pa.Table:
        return pa.Table.from_pylist([{**image, "fragment": fragment} for image in images], PLAN_SCHEMA)

    with mock.patch.object(decode, "load_fragment", load_fragment):
        yield FragmentDecoder(job, ledger or LocalLedger(DECODE))


def decode_rows(decoder: FragmentDecoder, fragment: int = 0) -> list[dict[str, Any]]:
    """Decode a fragment and return its rows."""
    rows: list[dict[str, Any]] = decoder(pa.table({"fragment": [fragment]}))["rows"][0].as_py()
    return rows
