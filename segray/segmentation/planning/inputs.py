"""Lists the input images of a run (folders, globs, single files, text lists, manifests) as one stream sorted by URI."""

import heapq
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.utils import glob_translate

from segray.config import SegmentSettings, require_absolute
from segray.data.manifest import get_pairing_key, index_masks, read_manifest
from segray.errors import ConfigError, DataError, MissingFileError, flatten_message
from segray.runs.plan import ListedImage
from segray.runtime.connect import is_submitted_job
from segray.storage import StoredFile, find_file, list_files, normalize_uri, read_bytes, split_uri

_TEXT_LIST = (".txt", ".lst")
_MANIFEST = (".csv", ".parquet", ".pq")
_WILDCARD = re.compile(r"[*?[]")
_MANIFEST_COLUMNS = {"mask_uri": pa.string(), "size_bytes": pa.int64(), "etag": pa.string()}


class Source(NamedTuple):
    """The images of one ``--images`` argument, sorted by URI, and whether they come with ground truth."""

    images: Iterator[ListedImage]
    has_truth: bool


def open_sources(image_uris: Sequence[str], mask_uris: Sequence[str], settings: SegmentSettings) -> list[Source]:
    """Return one source for each image URI; folders are listed while the source is read.

    Args:
        image_uris: Folders or prefixes, globs, single images, text lists (.txt, .lst), manifests (.csv, .parquet, .pq).
        mask_uris: Empty, or one folder of ground truth for each image URI; masks are paired by path without extension.
        settings: ``extensions``, ``recursive`` and ``split`` are used.

    Raises:
        ConfigError: The number of mask folders is wrong, or masks cannot be paired with a list.
        DataError: A text list or manifest cannot be used.
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
        table = _read_list(uri) if uri.lower().endswith(_TEXT_LIST) else _read_manifest(uri, settings.split)
        return Source(_iterate_rows(table), "mask_uri" in table.column_names)
    root, files = _list_folder(uri, settings)
    return Source(_pair(files, root, masks_uri), masks_uri is not None)


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


def _read_list(uri: str) -> pa.Table:
    """Read one URI per line; only the line end is stripped, because keys may start and end with spaces."""
    try:
        lines = read_bytes(uri).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: expected UTF-8 text with one image URI per line: {error}") from error
    uris = [line.removesuffix("\r") for line in lines]
    return _build_table(uri, [line for line in uris if line.strip()], {})


def _read_manifest(uri: str, split: str | None) -> pa.Table:
    table = read_manifest(uri)
    name = next((name for name in ("image_uri", "uri") if name in table.column_names), None)
    if name is None:
        raise DataError(f"{uri}: expected a column image_uri; the columns are {', '.join(table.column_names)}")
    try:
        if split is not None:
            if "split" not in table.column_names:
                raise DataError(f"{uri}: segment.split is {split!r}, but there is no column split")
            table = table.filter(pc.equal(table["split"].cast(pa.string()), split))
        columns = {other: table[other] for other in _MANIFEST_COLUMNS if other in table.column_names}
        if "etag" in columns:
            etag = pc.utf8_trim(columns["etag"].cast(pa.string()), '"')  # HTTP writes entity tags in quotes.
            columns["etag"] = pc.if_else(pc.equal(etag, ""), pa.scalar(None, pa.string()), etag)
        return _build_table(uri, table[name].cast(pa.string()).to_pylist(), columns)
    except (pa.ArrowException, KeyError) as error:  # KeyError: a column name occurs twice.
        raise DataError(f"{uri}: cannot be read as a table of images: {flatten_message(error)}") from error


def _build_table(where: str, uris: list[str | None], columns: Mapping[str, pa.ChunkedArray]) -> pa.Table:
    """Return the rows of a list or manifest, sorted by URI."""
    names: dict[str, list[str | None]] = {"uri": uris}
    if "mask_uri" in columns:
        names["mask_uri"] = columns["mask_uri"].to_pylist()
    arrays = {name: pa.array(_normalize(values, name, where), pa.string()) for name, values in names.items()}
    for name, column in columns.items():
        if name not in arrays:
            try:
                arrays[name] = column.cast(_MANIFEST_COLUMNS[name])
            except pa.ArrowException as error:
                raise DataError(f"{where}: column {name}: {flatten_message(error)}") from error
    return pa.table(arrays).sort_by("uri")


def _normalize(uris: list[str | None], column: str, where: str) -> Iterator[str | None]:
    for number, uri in enumerate(uris, start=1):
        if not uri:
            if column == "uri":
                raise DataError(f"{where}: row {number} has no image URI; fill it in or remove the row")
            yield None
            continue
        if is_submitted_job():
            require_absolute({f"{where}, row {number}": uri})
        yield normalize_uri(uri)


def _iterate_rows(table: pa.Table) -> Iterator[ListedImage]:
    for batch in table.to_batches(max_chunksize=10_000):
        yield from (ListedImage(**row) for row in batch.to_pylist())


def merge_sources(sources: Sequence[Source]) -> Iterator[ListedImage]:
    """Yield the images of all sources, sorted by URI, each once.

    Raises:
        DataError: An image is listed with two different masks, or no image of a folder has a mask.
        StorageError: A folder is missing, or the store refused the request or failed.
    """
    last: ListedImage | None = None
    for image in heapq.merge(*(source.images for source in sources), key=lambda image: image.uri):
        if last is None or image.uri != last.uri:
            if last is not None:
                yield last
            last = image
        elif image.mask_uri != last.mask_uri:
            raise DataError(f"{image.uri} is listed twice, with the masks {last.mask_uri} and {image.mask_uri}")
        elif last.etag is None:  # Keep the entry that has an entity tag, if any.
            last = image
    if last is not None:
        yield last
