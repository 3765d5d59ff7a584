"""Pair images with masks: from two folders, a Parquet or CSV manifest, or the Oxford-IIIT Pet layout."""

import hashlib
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from segray.config import IMAGE_EXTENSIONS, MASK_EXTENSIONS, MAX_FOLDS, DataConfig, OxfordPetLayout, SplitConfig
from segray.data.groups import (
    Groups,
    describe_draw,
    divide_groups,
    draw_groups,
    find_groups,
    number_groups,
    require_enough,
    require_separate,
)
from segray.data.sample_list import Folds, Sample, SampleList, Splits, merge_samples
from segray.data.table_files import open_table_file
from segray.data.uri_columns import normalize_uris
from segray.errors import DataError, flatten_message
from segray.storage import StoredFile, join_uri, list_files, normalize_uri, read_bytes

_BATCH_ROWS = 2**16
_MAX_LISTED_SPLITS = 20
# As posixpath.splitext: dots at the start of a name do not begin an extension.
_EXTENSION = r"((?:^|/)\.*[^./][^/]*)\.[^./]*$"


class Unpaired(NamedTuple):
    """An image without a mask, or a mask without an image.

    Attributes:
        uri: The file that exists.
        missing: ``mask`` or ``image``.
    """

    uri: str
    missing: str

    @property
    def kind(self) -> str:
        """What is wrong, as a short phrase."""
        return f"no {self.missing} of this name"

    @property
    def message(self) -> str:
        """The same phrase, under the name that other findings of a label check have for it."""
        return self.kind

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return "add it, remove this file, or use a manifest"

    def __str__(self) -> str:
        return f"{self.uri}: {self.kind}; {self.remedy}"


def load_splits(data: DataConfig, unpaired: list[Unpaired] | None = None) -> Splits:
    """List the training and validation samples of a configuration.

    Args:
        data: Location of the labelled images.
        unpaired: List to which images without a mask and masks without an image are appended. If None, they are errors.

    Raises:
        DataError: A folder or split is empty, a manifest or list cannot be used, a mask or image has no counterpart, or
            ``data.val.group_by`` does not fit the names or is contradicted by given splits.
        StorageError: A folder or manifest cannot be read.
    """
    train, val = _list_samples(data, unpaired)
    if val is None:
        assert data.val is not None
        return Splits(*_draw_fraction(data, train, data.val))
    if data.val is not None and data.val.group_by is not None:
        require_separate(_group_samples(data, train, val), len(train))
    return Splits(train, val)


def load_folds(data: DataConfig, folds: int | Literal["groups"], unpaired: list[Unpaired] | None = None) -> Folds:
    """List the samples of a cross-validation over all images, those of train and of val, and the fold of each.

    Args:
        data: Location of the labelled images, and what belongs together (``data.val.group_by``).
        folds: Number of folds, or one for each group.
        unpaired: As for ``load_splits``.

    Raises:
        DataError: As for ``load_splits``, or there are too few or too many groups.
        StorageError: A folder or manifest cannot be read.
    """
    train, val = _list_samples(data, unpaired)
    samples = train if val is None else merge_samples(train, val)
    seed = data.val.seed if data.val else 0
    if folds == "groups":
        return Folds(samples, number_groups(_group_samples(data, samples), MAX_FOLDS))
    if data.val is not None and data.val.group_by is not None:
        return Folds(samples, divide_groups(_group_samples(data, samples), folds, seed))
    require_enough(len(samples), folds, "images")
    return Folds(samples, (np.random.default_rng(seed).permutation(len(samples)) % folds).astype(np.uint8))


def _list_samples(data: DataConfig, unpaired: list[Unpaired] | None) -> tuple[SampleList, SampleList | None]:
    """Return the samples of train and val; None for val if it is to be drawn from train."""
    found: list[Unpaired] = []
    if isinstance(data.layout, OxfordPetLayout):
        root = normalize_uri(data.layout.oxford_iiit_pet.root)
        train = _load_oxford_split(root, "trainval")
        val = None if data.val else _load_oxford_split(root, "test")
        # Of both splits, whose files are in the same folders.
        train.version = _list_uris(join_uri(root, "images"), IMAGE_EXTENSIONS)[1]
        train.version += _list_uris(join_uri(root, "annotations", "trimaps"), MASK_EXTENSIONS)[1]
    else:
        assert data.train is not None
        train = _load_split(data.train, "train", found)
        val = None if data.val is None or data.val.fraction else _load_split(data.val, "val", found)
    if unpaired is not None:
        unpaired += found
    elif found:
        raise DataError(f"{len(found)} files have no matching mask or image (segray check lists all): {found[0]}")
    return train, val


def name_images(data: DataConfig, samples: Sequence[Sample]) -> Iterator[pa.LargeStringArray]:
    """Yield the name of each image, in batches: its path below its folder, or the URI of a manifest; no extension."""
    if isinstance(data.layout, OxfordPetLayout):
        roots = [join_uri(normalize_uri(data.layout.oxford_iiit_pet.root), "images")]
    else:
        roots = [normalize_uri(split.images) for split in (data.train, data.val) if split and split.images]
    for images, _ in SampleList.of(samples).read_columns():
        names = _get_keys(images, "")
        for root in sorted(roots, key=len):  # An image is below the deepest folder that contains it.
            is_below = pc.starts_with(images, f"{root.rstrip('/')}/")
            names = pc.if_else(is_below, _get_keys(images, root), names)
        yield names


def _group_samples(data: DataConfig, *splits: Sequence[Sample]) -> Groups:
    """Return the group of each image of all splits, as ``data.val.group_by`` defines it; it must be set.

    Raises:
        DataError: The expression does not match a name.
    """
    assert data.val is not None
    assert data.val.group_by is not None
    return find_groups((batch for split in splits for batch in name_images(data, split)), data.val.group_by)


def describe_groups(data: DataConfig, splits: Splits) -> list[str]:
    """Return lines that say how well whole groups fit ``data.val.fraction``; none without groups or fraction."""
    if data.val is None or data.val.group_by is None or data.val.fraction is None:
        return []
    return describe_draw(_group_samples(data, *splits), len(splits.train), data.val.fraction)


def _load_split(split: SplitConfig, name: str, unpaired: list[Unpaired]) -> SampleList:
    if split.manifest is not None:
        return _load_manifest(normalize_uri(split.manifest), name)
    assert split.images is not None
    assert split.masks is not None
    return _pair_folders(normalize_uri(split.images), normalize_uri(split.masks), unpaired)


def get_pairing_key(uri: str, root: str) -> str:
    """Return the path below ``root`` without its extension; an image and its mask have the same key."""
    return posixpath.splitext(uri[len(root) :].lstrip("/"))[0]


def index_masks(masks_root: str) -> dict[str, StoredFile]:
    """Return the masks under a folder, by pairing key.

    Raises:
        DataError: The paths of two masks differ only by their extension.
    """
    files = list(list_files(masks_root, MASK_EXTENSIONS))
    keys = _get_unique_keys(pa.array([file.uri for file in files], pa.large_string()), masks_root)
    return dict(zip(keys.to_pylist(), files, strict=True))


def _pair_folders(images_root: str, masks_root: str, unpaired: list[Unpaired]) -> SampleList:
    images, images_version = _list_uris(images_root, IMAGE_EXTENSIONS)
    masks, masks_version = _list_uris(masks_root, MASK_EXTENSIONS)
    image_keys, mask_keys = _get_unique_keys(images, images_root), _get_unique_keys(masks, masks_root)
    positions = pc.index_in(image_keys, value_set=mask_keys)
    has_mask = positions.is_valid()
    if not pc.any(has_mask).as_py():
        num_jpegs = sum(1 for _ in list_files(masks_root, ("jpg", "jpeg")))
        raise DataError(
            f"no image has a mask: {len(images)} images under {images_root} and {len(masks)} masks under {masks_root} "
            "have no path without extension in common; "
            + (
                f"found {num_jpegs} JPEG files, whose compression changes class values: create the masks again as PNG"
                if num_jpegs and not len(masks)
                else "name each mask like its image, or use a manifest"
            )
        )
    positions = positions.drop_null()
    has_image = np.zeros(len(masks), bool)
    has_image[positions.to_numpy()] = True
    unpaired += [Unpaired(uri, "mask") for uri in images.filter(pc.invert(has_mask)).to_pylist()]
    unpaired += [Unpaired(uri, "image") for uri in masks.filter(pa.array(~has_image)).to_pylist()]
    paired = pa.chunked_array([images.filter(has_mask)]), pa.chunked_array([masks.take(positions)])
    return SampleList(*paired, version=images_version + masks_version)


def _list_uris(root: str, extensions: Iterable[str]) -> tuple[pa.LargeStringArray, str]:
    """Return the URIs of the files under a folder, sorted, and the sha256 of their entity tags and sizes."""
    files = iter(list_files(root, extensions))
    chunks, tags = [], hashlib.sha256()
    while batch := list(islice(files, _BATCH_ROWS)):
        chunks.append(pa.array([file.uri for file in batch], pa.large_string()))
        tags.update("\n".join(f"{file.etag} {file.size_bytes}" for file in batch).encode())
    return pa.chunked_array(chunks, pa.large_string()).combine_chunks(), tags.hexdigest()


def _get_keys(uris: pa.LargeStringArray, root: str) -> pa.LargeStringArray:
    """Return what ``get_pairing_key`` returns for each URI; an empty root leaves whole URIs, without extension."""
    paths = pc.utf8_ltrim(pc.utf8_slice_codeunits(uris, len(root)), "/") if root else uris
    return pc.replace_substring_regex(paths, _EXTENSION, r"\1")


def _get_unique_keys(uris: pa.LargeStringArray, root: str) -> pa.LargeStringArray:
    """Return the pairing key of each URI.

    Raises:
        DataError: The paths of two files differ only by their extension.
    """
    keys = _get_keys(uris, root)
    if pc.count_distinct(keys).as_py() < len(keys):
        numbers = keys.dictionary_encode().indices.to_numpy()
        twice = np.flatnonzero(np.bincount(numbers) > 1)[0]
        first, second = sorted(uris[index].as_py() for index in np.flatnonzero(numbers == twice)[:2])
        raise DataError(f"{first} and {second} have the same name; keep one, or use a manifest")
    return keys


def _load_manifest(uri: str, split: str) -> SampleList:
    samples, order = _read_manifest(uri, split)  # The whole URIs are freed before the samples are copied in order.
    if order is not None:
        samples = samples.take(order)
    if _has_neighbours(samples, pc.equal):
        raise DataError(f"{uri}: split {split!r} lists an image twice; keep one row for each image")
    return samples


def _has_neighbours(samples: SampleList, compare: Callable[[pa.Array, pa.Array], pa.BooleanArray]) -> bool:
    """Return whether the URIs of any image and the next one compare as true."""
    last = pa.array([], pa.large_string())
    for images, _ in samples.read_columns():
        column = pa.concat_arrays([last, images])
        if pc.any(compare(column[:-1], column[1:])).as_py():
            return True
        last = images[-1:]
    return False


def _read_manifest(uri: str, split: str) -> tuple[SampleList, npt.NDArray[np.integer] | None]:
    """Return the samples of a split in the order of their rows, and the indices that sort them by image URI.

    The indices are None if they are sorted already.
    """
    table = open_table_file(uri)
    names = ("image_uri", "mask_uri", "split")
    if missing := set(names) - set(table.column_names):
        raise DataError(f"{uri}: expected columns image_uri, mask_uri and split; missing: {', '.join(sorted(missing))}")
    chunks: tuple[list[pa.Array], list[pa.Array]] = ([], [])
    found: set[str] = set()
    num_rows = 0
    for batch in table.read(names):
        try:
            *uris, splits = (batch[name].cast(pa.large_string()) for name in names)
        except pa.ArrowException as error:
            raise DataError(f"{uri}: cannot be read as a table of samples: {flatten_message(error)}") from error
        if any(pc.any(pc.equal(column, "").fill_null(True)).as_py() for column in uris):
            raise DataError(f"{uri}: a row has no image_uri or mask_uri; fill it in or remove the row")
        is_wanted = pc.equal(splits, split).fill_null(False)
        numbers = np.arange(num_rows + 1, num_rows + 1 + batch.num_rows)[is_wanted.to_numpy(zero_copy_only=False)]
        num_rows += batch.num_rows
        for column, part in zip(chunks, uris, strict=True):
            column.append(normalize_uris(part.filter(is_wanted), numbers, uri))
        if len(found) < _MAX_LISTED_SPLITS:
            found.update(map(str, pc.unique(splits).to_pylist()))
    images, masks = (pa.chunked_array(column, pa.large_string()) for column in chunks)
    if not len(images):
        listed = ", ".join(sorted(found)[:_MAX_LISTED_SPLITS]) or "nothing"
        raise DataError(f"{uri}: no rows with split {split!r}; the column split holds: {listed}")
    samples = SampleList(images, masks)
    if not _has_neighbours(samples, pc.greater):
        return samples, None
    return samples, pc.sort_indices(images).to_numpy()  # Bytes of UTF-8 have the order of the characters.


def _load_oxford_split(root: str, name: str) -> SampleList:
    list_uri = join_uri(root, "annotations", f"{name}.txt")
    # A line is "Abyssinian_100 1 1 1": name, class, species, breed.
    try:
        names = [line.split()[0] for line in read_bytes(list_uri).decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{list_uri}: expected UTF-8 text with one image name per line: {error}") from error
    if not names:
        raise DataError(f"{list_uri}: expected one image name per line, got an empty file")
    images, masks = join_uri(root, "images"), join_uri(root, "annotations", "trimaps")
    samples = sorted({Sample(join_uri(images, f"{name}.jpg"), join_uri(masks, f"{name}.png")) for name in names})
    return SampleList.of(samples)


def _draw_fraction(data: DataConfig, samples: SampleList, split: SplitConfig) -> tuple[SampleList, SampleList]:
    """Divide samples into those to train on and those to validate on."""
    assert split.fraction is not None
    if split.group_by is not None:
        is_val = draw_groups(_group_samples(data, samples), split.fraction, split.seed)
    else:
        num_val = max(1, round(len(samples) * split.fraction))
        if num_val >= len(samples):
            raise DataError(
                f"data.val.fraction: {split.fraction} of {len(samples)} images leaves none to train on; add images"
            )
        order = np.random.default_rng(split.seed).permutation(len(samples))
        is_val = np.zeros(len(samples), bool)
        is_val[order[:num_val]] = True
    return samples.take(np.flatnonzero(~is_val)), samples.take(np.flatnonzero(is_val))
