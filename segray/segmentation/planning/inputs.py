"""Lists the input images of a run (folders, globs, single files, text lists, manifests) as one stream sorted by URI."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.utils import glob_translate

from segray.config import SegmentSettings
from segray.data.manifest import get_pairing_key, index_masks
from segray.data.table_files import open_table_file
from segray.errors import ConfigError, DataError, MissingFileError
from segray.runs.listing import ListedImage, tabulate
from segray.segmentation.planning.lists import read_manifest, read_text_list
from segray.segmentation.planning.sorting import merge_sorted, sort_by_uri
from segray.storage import StoredFile, find_file, list_files, split_uri

_TEXT_LIST = (".txt", ".lst")
_MANIFEST = (".csv", ".parquet", ".pq")
_WILDCARD = re.compile(r"[*?[]")


class Source(NamedTuple):
    """The images of one ``--images`` argument, and whether they come with ground truth.

    Attributes:
        batches: Batches of ``LISTING_SCHEMA``, sorted by URI; rows with equal URIs are in the same batch.
    """

    batches: Iterator[pa.RecordBatch]
    has_truth: bool


def open_sources(image_uris: Sequence[str], mask_uris: Sequence[str], settings: SegmentSettings) -> list[Source]:
    """Return one source for each image URI; folders are listed, and lists are read, while the source is read.

    Args:
        image_uris: Folders or prefixes, globs, single images, text lists (.txt, .lst), manifests (.csv, .parquet, .pq).
        mask_uris: Empty, or one folder of ground truth for each image URI; masks are paired by path without extension.
        settings: ``extensions``, ``recursive`` and ``split`` are used.

    Raises:
        ConfigError: The number of mask folders is wrong, or masks cannot be paired with a list.
        DataError: A manifest cannot be used. Unusable rows are reported when the source is read.
        StorageError: The store refused the request or failed. A missing folder is reported when its source is read.
    """
    if mask_uris and len(mask_uris) != len(image_uris):
        raise ConfigError(
            f"got {len(image_uris)} --images and {len(mask_uris)} --masks; give one --masks for each --images, in order"
        )
    masks_by_index = dict(enumerate(mask_uris))
    return [_open_source(uri, masks_by_index.get(index), settings) for index, uri in enumerate(image_uris)]


def _open_source(uri: str, masks_uri: str | None, settings: SegmentSettings) -> Source:
    if uri.lower().endswith(_TEXT_LIST + _MANIFEST) and find_file(uri):
        if masks_uri is not None:
            raise ConfigError(
                f"--masks {masks_uri}: masks are paired by their path below a folder, but {uri} is a list; "
                "give a manifest with a column mask_uri"
            )
        return _open_text_list(uri) if uri.lower().endswith(_TEXT_LIST) else _open_manifest(uri, settings.split)
    root, files = _list_folder(uri, settings)
    return Source(tabulate(_pair(files, root, masks_uri)), masks_uri is not None)


def _open_text_list(uri: str) -> Source:
    return Source(sort_by_uri(read_text_list(uri)), has_truth=False)


def _open_manifest(uri: str, split: str | None) -> Source:
    table = open_table_file(uri)
    name = next((name for name in ("image_uri", "uri") if name in table.column_names), None)
    if name is None:
        raise DataError(f"{uri}: expected a column image_uri; the columns are {', '.join(table.column_names)}")
    if split is not None and "split" not in table.column_names:
        raise DataError(f"{uri}: segment.split is {split!r}, but there is no column split")
    return Source(sort_by_uri(read_manifest(table, name, split)), "mask_uri" in table.column_names)


def _list_folder(uri: str, settings: SegmentSettings) -> tuple[str, Iterable[StoredFile]]:
    """Return the files of a folder, a glob or a single image, and the folder that their paths are relative to."""
    options: dict[str, Any] = {"extensions": settings.extensions, "recursive": settings.recursive}
    wildcard = _WILDCARD.search(uri)
    if _WILDCARD.search(split_uri(uri)[1]):
        raise ConfigError(
            f"--images {uri}: patterns are not allowed in bucket names; give one --images for each bucket"
        )
    if uri.lower().endswith(tuple(f".{extension}" for extension in settings.extensions)) and (file := find_file(uri)):
        return uri.rpartition("/")[0], [file]
    if wildcard and not _is_folder(uri):  # The name of a folder may contain wildcards too.
        root, _, start = uri[: wildcard.start()].rpartition("/")
        pattern = re.compile(glob_translate(uri))
        options["recursive"] = "/" in uri[wildcard.start() :] or "**" in uri
        root = root or "/"
        return root, (file for file in list_files(root, start=start, **options) if pattern.match(file.uri))
    return uri, list_files(uri, **options)


def _is_folder(uri: str) -> bool:
    try:
        return next(list_files(uri), None) is not None
    except MissingFileError:
        return False


def _pair(files: Iterable[StoredFile], root: str, masks_uri: str | None) -> Iterator[ListedImage]:
    masks: Mapping[str, StoredFile] = index_masks(masks_uri) if masks_uri is not None else {}
    num_images, num_pairs = 0, 0
    for file in files:
        mask = masks.get(get_pairing_key(file.uri, root))
        num_images, num_pairs = num_images + 1, num_pairs + (mask is not None)
        truth = (mask.uri, mask.etag) if mask else (None, None)
        yield ListedImage(file.uri, file.size_bytes, file.etag, *truth)
    if masks_uri is not None and num_images and not num_pairs:
        raise DataError(
            f"no image has a mask: {num_images} images under {root} and {len(masks)} masks under {masks_uri} have no "
            "path without extension in common; give the folder in which each mask has the name of its image"
        )


def merge_sources(sources: Sequence[Source]) -> Iterator[pa.RecordBatch]:
    """Yield the images of all sources as batches of ``LISTING_SCHEMA``, sorted by URI, each image once.

    Of several entries of an image, the first one that has an entity tag is kept, otherwise the last one.

    Raises:
        DataError: An image is listed with two different masks, or no image of a folder has a mask.
        StorageError: A folder is missing, or the store refused the request or failed.
    """
    for batch in merge_sorted(source.batches for source in sources):
        yield _drop_duplicates(batch)


def _drop_duplicates(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a sorted batch with one row for each URI."""
    uris = batch["uri"]
    is_next_equal = pc.equal(uris[:-1], uris[1:]).to_numpy(zero_copy_only=False)
    if not is_next_equal.any():
        return batch
    starts = np.flatnonzero(np.concatenate([[True], ~is_next_equal]))  # of the groups of equal URIs
    ends = np.concatenate([starts[1:], [batch.num_rows]])
    chosen = starts.copy()
    for group in np.flatnonzero(ends - starts > 1):
        entries = batch.slice(starts[group], ends[group] - starts[group]).to_pylist()
        masks = [entry["mask_uri"] for entry in entries]
        if different := [mask for mask in masks if mask != masks[0]]:
            raise DataError(f"{entries[0]['uri']} is listed twice, with the masks {masks[0]} and {different[0]}")
        tagged = [number for number, entry in enumerate(entries) if entry["etag"] is not None]
        chosen[group] += tagged[0] if tagged else len(entries) - 1
    return batch.take(pa.array(chosen))
