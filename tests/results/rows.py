"""Hand-made rows of a run, and their fragment files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from segray.schema import IMAGES_SCHEMA

NUM_CLASSES = 3


def make_row(uri: str, tp_px: list[int], fp_px: list[int], fn_px: list[int]) -> dict[str, Any]:
    counts = list(zip(tp_px, fp_px, fn_px, strict=True))
    return {
        "uri": uri,
        "status": "ok",
        "pixel_count": [tp + fp for tp, fp, _ in counts],
        "tp_px": tp_px,
        "fp_px": fp_px,
        "fn_px": fn_px,
        "iou": [tp / (tp + fp + fn) if tp + fp + fn else None for tp, fp, fn in counts],
        "dice": [2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None for tp, fp, fn in counts],
    }


def make_error_row(uri: str, kind: str = "truncated") -> dict[str, Any]:
    return {"uri": uri, "status": "error", "error_kind": kind, "error_message": f"{kind} for a test"}


def make_random_rows(fragment: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return up to six rows, among them error rows, rows without ground truth, and absent classes."""
    rng = np.random.default_rng([fragment, seed])
    rows = []
    for number in range(rng.integers(1, 7)):
        uri = f"{fragment:04d}-{number}"
        tp, fp, fn = (rng.integers(0, 50, NUM_CLASSES) * rng.integers(0, 2, NUM_CLASSES) for _ in range(3))
        row = make_row(uri, tp.tolist(), fp.tolist(), fn.tolist())
        if rng.random() < 0.2:
            row = {name: row[name] for name in ("uri", "status", "pixel_count")}
        kind = str(rng.choice(["truncated", "missing"]))
        rows.append(make_error_row(uri, kind) if rng.random() < 0.3 else row)
    return rows


def save_fragment(output: Path, fragment: int, rows: list[dict[str, Any]]) -> int:
    """Write the file of a fragment, and return its size in bytes."""
    path = output / "images" / f"part-{fragment:08d}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA), path, write_page_checksum=True)
    return path.stat().st_size
