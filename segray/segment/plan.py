"""The frozen listing of a run: which images, in which order, in which fragment.

A fragment is the unit of work, retry, resume and commit. The plan is written once, before any image is read; after that
a fragment's number says everything about it.
"""

import hashlib
import io
import json
import re
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from segray.config import SegmentSettings
from segray.errors import DataError
from segray.images import IMAGE_EXTENSIONS
from segray.manifest import get_pairing_key, index_masks
from segray.schema import PLAN_SCHEMA
from segray.storage import get_file_name, join_uri, list_files, list_names, read_bytes, remove_file, write_bytes

_FRAGMENT_NAME = re.compile(r"part-(\d{8,})\.parquet")
_FRAGMENTS_PER_PLAN_FILE = 1024  # 65,536 images of the default fragment size: a file that decodes in milliseconds


def build_plan(images_uri: str, masks_uri: str | None, settings: SegmentSettings) -> pa.Table:
    """List the images under a folder and cut the list, sorted by URI, into fragments.

    Args:
        images_uri: Folder or prefix, in its one spelling.
        masks_uri: Folder of ground truth, paired by path without extension, or None.
        settings: ``fragment_size`` and ``fragment_bytes`` bound a fragment; an image larger than that is alone.

    Returns:
        Table of ``PLAN_SCHEMA``.

    Raises:
        DataError: There are no images, or masks were asked for and no image has one.
        StorageError: The folder is missing, or the store refused or failed.
    """
    files = sorted(list_files(images_uri, IMAGE_EXTENSIONS), key=lambda file: file.uri)
    if not files:
        raise DataError(f"no images under {images_uri}: expected files named *.{', *.'.join(IMAGE_EXTENSIONS)}")
    masks = index_masks(masks_uri) if masks_uri else {}
    mask_uris = [masks.get(get_pairing_key(file.uri, images_uri)) for file in files]
    if masks_uri and not any(mask_uris):
        raise DataError(
            f"no pairs: {len(files)} images under {images_uri}, {len(masks)} masks under {masks_uri}, and no path "
            "without extension in common; give the folder in which each mask is named as its image"
        )
    fragments: list[int] = []
    fragment, num_images, num_bytes = 0, 0, 0
    for file in files:
        if num_images and (
            num_images == settings.fragment_size or num_bytes + file.size_bytes > settings.fragment_bytes
        ):
            fragment, num_images, num_bytes = fragment + 1, 0, 0
        fragments.append(fragment)
        num_images, num_bytes = num_images + 1, num_bytes + file.size_bytes
    columns = {
        "uri": [file.uri for file in files],
        "size_bytes": [file.size_bytes for file in files],
        "etag": [None] * len(files),
        "mask_uri": mask_uris,
        "fragment": fragments,
    }
    return pa.table(columns, schema=PLAN_SCHEMA)


def compute_plan_sha256(plan: pa.Table) -> str:
    """Return the sha256 of a plan's rows, independent of how they are stored."""
    digest = hashlib.sha256()
    for batch in plan.to_batches(max_chunksize=10_000):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def count_fragments(plan: pa.Table) -> int:
    """Return the number of fragments of a plan."""
    return int(pc.max(plan["fragment"]).as_py()) + 1


def save_plan(output_uri: str, plan: pa.Table) -> None:
    """Write ``plan/*.parquet``, and remove what a start that was cut off may have left of another listing."""
    groups = pc.divide(plan["fragment"], _FRAGMENTS_PER_PLAN_FILE)
    uris = [_get_plan_uri(output_uri, group) for group in range(int(groups[-1].as_py()) + 1)]
    for group, uri in enumerate(uris):
        buffer = io.BytesIO()
        pq.write_table(plan.filter(pc.equal(groups, group)), buffer, compression="zstd")
        write_bytes(uri, buffer.getbuffer())
    for name in list_names(join_uri(output_uri, "plan")) - {get_file_name(uri) for uri in uris}:
        remove_file(join_uri(output_uri, "plan", name))


def load_fragment(output_uri: str, plan_sha256: str, fragment: int) -> pa.Table:
    """Return the planned images of one fragment, a table of ``PLAN_SCHEMA``.

    ``plan_sha256`` tells plans apart that were written to the same place, one after the other.
    """
    part = _load_plan_file(_get_plan_uri(output_uri, fragment // _FRAGMENTS_PER_PLAN_FILE), plan_sha256)
    return part.filter(pc.equal(part["fragment"], fragment))


def list_finished_fragments(output_uri: str) -> set[int]:
    """Return the fragments whose file is there; a file that is there is complete."""
    names = list_names(join_uri(output_uri, "images"))
    return {int(match[1]) for name in names if (match := _FRAGMENT_NAME.fullmatch(name))}


def get_fragment_uri(output_uri: str, fragment: int) -> str:
    """Return where a fragment's rows are stored."""
    return join_uri(output_uri, "images", f"part-{fragment:08d}.parquet")


def _get_plan_uri(output_uri: str, group: int) -> str:
    return join_uri(output_uri, "plan", f"plan-{group:05d}.parquet")


@lru_cache(maxsize=2)  # a decode task's next fragment is nearly always in the same file
def _load_plan_file(uri: str, plan_sha256: str) -> pa.Table:
    return pq.read_table(io.BytesIO(read_bytes(uri)))
