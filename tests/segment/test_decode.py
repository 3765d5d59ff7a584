"""The decoder on its own: a large JPEG at a fraction of its size."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from segray.config import SegmentSettings
from segray.segment import plan
from segray.segment.decode import FragmentDecoder
from segray.segment.inputs import ListedImage
from segray.segment.ledger import DECODE
from tests.conftest import PET_CLASSES
from tests.segment.local_ledger import LocalLedger


def decode(folder: Path, settings: SegmentSettings) -> pa.Table:
    """Decode a fragment of the one image in a folder, with its mask."""
    spool = folder / "spool"
    spool.mkdir(exist_ok=True)
    images = [ListedImage(str(folder / "a.jpg"), mask_uri=str(folder / "a.png"))]
    frozen = plan.spool_plan(plan.cut_fragments(images, settings), spool)
    plan.save_plan(str(folder / "run"), frozen, spool)
    made = FragmentDecoder(
        str(folder / "run"), frozen.cut_sha256, PET_CLASSES, (32, 48), settings, True, LocalLedger(DECODE)
    )
    return made(pa.table({"fragment": [0]}))


def test_a_reduced_jpeg_keeps_its_size_and_truth_and_nearly_its_pixels(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:600, :880]
    pixels = np.stack([rows // 3, columns // 4, (rows + columns) // 6], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray((rows % 3 + 1).astype(np.uint8)).save(tmp_path / "a.png")
    whole = decode(tmp_path, SegmentSettings())
    reduced = decode(tmp_path, SegmentSettings(reduce_jpeg=True))
    (row,) = reduced["rows"][0].as_py()
    assert (row["error_kind"], row["height"], row["width"]) == (None, 600, 880)
    assert reduced["truths"].equals(whole["truths"])
    images = [np.frombuffer(table["images"][0].as_py(), np.uint8).astype(int) for table in (whole, reduced)]
    difference = np.abs(images[0] - images[1])
    assert 0 < difference.mean() < 1  # it was indeed decoded otherwise
