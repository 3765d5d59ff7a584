"""Pair images with masks: from two folders, a Parquet or CSV manifest, or the Oxford-IIIT Pet layout."""

import hashlib
import json
import posixpath
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from segray.config import IMAGE_EXTENSIONS, MASK_EXTENSIONS, MAX_FOLDS, DataConfig, OxfordPetLayout, SplitConfig
from segray.data.groups import describe_draw, divide_groups, draw_groups, find_groups, number_groups, require_separate
from segray.data.table_files import open_table_file
from segray.errors import DataError, flatten_message
from segray.storage import StoredFile, join_uri, list_files, normalize_uri, read_bytes


class Sample(NamedTuple):
    """A labelled image: the URIs of an image and of its mask."""

    image_uri: str
    mask_uri: str


class Splits(NamedTuple):
    """The labelled images of a run; each split is sorted by image URI."""

    train: list[Sample]
    val: list[Sample]

    def compute_sha256(self) -> str:
        """Return the sha256 of all image and mask URIs and their split."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


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
        require_separate(*group_samples(data, train, val))
    return Splits(train, val)


def load_folds(
    data: DataConfig, folds: int | Literal["groups"], unpaired: list[Unpaired] | None = None
) -> list[list[Sample]]:
    """List the samples of each fold of a cross-validation over all images, those of train and of val.

    Args:
        data: Location of the labelled images, and what belongs together (``data.val.group_by``).
        folds: Number of folds, or one for each group.
        unpaired: As for ``load_splits``.

    Raises:
        DataError: As for ``load_splits``, or there are too few or too many groups.
        StorageError: A folder or manifest cannot be read.
    """
    train, val = _list_samples(data, unpaired)
    samples = sorted({sample.image_uri: sample for sample in [*(val or ()), *train]}.values())
    if data.val is not None and data.val.group_by is not None:
        (groups,) = group_samples(data, samples)
    else:
        groups = name_images(data, samples)
    if folds == "groups":
        numbers = number_groups(groups, MAX_FOLDS)
    else:
        numbers = divide_groups(groups, folds, data.val.seed if data.val else 0)
    divided: list[list[Sample]] = [[] for _ in range(max(numbers) + 1)]
    for sample, number in zip(samples, numbers, strict=True):
        divided[number].append(sample)
    return divided


def hold_out(folds: Sequence[Sequence[Sample]], number: int) -> Splits:
    """Return the splits of a fold, given by its index: it is held out for validation, the others are for training."""
    train = [sample for index, fold in enumerate(folds) if index != number for sample in fold]
    return Splits(sorted(train), list(folds[number]))


def join_folds(folds: Sequence[Sequence[Sample]]) -> Splits:
    """Return the splits of the run that follows a cross-validation: it trains on all images and validates on none."""
    return Splits(sorted(sample for fold in folds for sample in fold), [])


def _list_samples(data: DataConfig, unpaired: list[Unpaired] | None) -> tuple[list[Sample], list[Sample] | None]:
    """Return the samples of train and val; None for val if it is to be drawn from train."""
    found: list[Unpaired] = []
    if isinstance(data.layout, OxfordPetLayout):
        root = normalize_uri(data.layout.oxford_iiit_pet.root)
        train = _load_oxford_split(root, "trainval")
        val = None if data.val else _load_oxford_split(root, "test")
    else:
        assert data.train is not None
        train = _load_split(data.train, "train", found)
        val = None if data.val is None or data.val.fraction else _load_split(data.val, "val", found)
    if unpaired is not None:
        unpaired += found
    elif found:
        raise DataError(f"{len(found)} files have no matching mask or image (segray check lists all): {found[0]}")
    return train, val


def name_images(data: DataConfig, samples: Sequence[Sample]) -> list[str]:
    """Return the name of each image: its path below its folder, or the URI of a manifest, without the extension."""
    if isinstance(data.layout, OxfordPetLayout):
        roots = [join_uri(normalize_uri(data.layout.oxford_iiit_pet.root), "images")]
    else:
        roots = [normalize_uri(split.images) for split in (data.train, data.val) if split and split.images]
    roots.sort(key=len, reverse=True)  # An image is below the deepest folder that contains it.
    return [_name_image(sample.image_uri, roots) for sample in samples]


def _name_image(uri: str, roots: Sequence[str]) -> str:
    for root in roots:
        if uri.startswith(f"{root.rstrip('/')}/"):
            return get_pairing_key(uri, root)
    return posixpath.splitext(uri)[0]


def group_samples(data: DataConfig, *splits: Sequence[Sample]) -> list[list[str]]:
    """Return the group of each image of each split, as ``data.val.group_by`` defines it; it must be set.

    Raises:
        DataError: The expression does not match a name.
    """
    assert data.val is not None
    assert data.val.group_by is not None
    groups = iter(find_groups(name_images(data, [s for split in splits for s in split]), data.val.group_by))
    return [[next(groups) for _ in split] for split in splits]


def describe_groups(data: DataConfig, splits: Splits) -> list[str]:
    """Return lines that say how well whole groups fit ``data.val.fraction``; none without groups or fraction."""
    if data.val is None or data.val.group_by is None or data.val.fraction is None:
        return []
    train, val = group_samples(data, *splits)
    return describe_draw(train, val, data.val.fraction)


def _load_split(split: SplitConfig, name: str, unpaired: list[Unpaired]) -> list[Sample]:
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
    return _index_by_key(list_files(masks_root, MASK_EXTENSIONS), masks_root)


def _index_by_key(files: Iterable[StoredFile], root: str) -> dict[str, StoredFile]:
    by_key: dict[str, StoredFile] = {}
    for file in files:
        other = by_key.setdefault(get_pairing_key(file.uri, root), file)
        if other is not file:
            first, second = sorted((other.uri, file.uri))
            raise DataError(f"{first} and {second} have the same name; keep one, or use a manifest")
    return by_key


def _pair_folders(images_root: str, masks_root: str, unpaired: list[Unpaired]) -> list[Sample]:
    images = _index_by_key(list_files(images_root, IMAGE_EXTENSIONS), images_root)
    masks = index_masks(masks_root)
    common = images.keys() & masks.keys()
    if not common:
        num_jpegs = sum(1 for _ in list_files(masks_root, ("jpg", "jpeg")))
        raise DataError(
            f"no image has a mask: {len(images)} images under {images_root} and {len(masks)} masks under {masks_root} "
            "have no path without extension in common; "
            + (
                f"found {num_jpegs} JPEG files, whose compression changes class values: create the masks again as PNG"
                if num_jpegs and not masks
                else "name each mask like its image, or use a manifest"
            )
        )
    unpaired += [Unpaired(images[key].uri, "mask") for key in sorted(images.keys() - common)]
    unpaired += [Unpaired(masks[key].uri, "image") for key in sorted(masks.keys() - common)]
    return sorted(Sample(images[key].uri, masks[key].uri) for key in common)


def _load_manifest(uri: str, split: str) -> list[Sample]:
    table = open_table_file(uri)
    names = ("image_uri", "mask_uri", "split")
    if missing := set(names) - set(table.column_names):
        raise DataError(f"{uri}: expected columns image_uri, mask_uri and split; missing: {', '.join(sorted(missing))}")
    rows: list[dict[str, Any]] = []
    for batch in table.read(names):
        try:
            rows += pa.table({name: batch[name].cast(pa.large_string()) for name in names}).to_pylist()
        except pa.ArrowException as error:
            raise DataError(f"{uri}: cannot be read as a table of samples: {flatten_message(error)}") from error
    if any(not row["image_uri"] or not row["mask_uri"] for row in rows):
        raise DataError(f"{uri}: a row has no image_uri or mask_uri; fill it in or remove the row")
    samples = [Sample(normalize_uri(r["image_uri"]), normalize_uri(r["mask_uri"])) for r in rows if r["split"] == split]
    if not samples:
        found = ", ".join(sorted({str(row["split"]) for row in rows})) or "nothing"
        raise DataError(f"{uri}: no rows with split {split!r}; the column split holds: {found}")
    if len({sample.image_uri for sample in samples}) < len(samples):
        raise DataError(f"{uri}: split {split!r} lists an image twice; keep one row for each image")
    return sorted(samples)


def _load_oxford_split(root: str, name: str) -> list[Sample]:
    list_uri = join_uri(root, "annotations", f"{name}.txt")
    # A line is "Abyssinian_100 1 1 1": name, class, species, breed.
    try:
        names = [line.split()[0] for line in read_bytes(list_uri).decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{list_uri}: expected UTF-8 text with one image name per line: {error}") from error
    if not names:
        raise DataError(f"{list_uri}: expected one image name per line, got an empty file")
    return sorted(
        Sample(join_uri(root, "images", f"{name}.jpg"), join_uri(root, "annotations", "trimaps", f"{name}.png"))
        for name in names
    )


def _draw_fraction(data: DataConfig, samples: list[Sample], split: SplitConfig) -> tuple[list[Sample], list[Sample]]:
    """Divide samples into those to train on and those to validate on."""
    assert split.fraction is not None
    if split.group_by is not None:
        (groups,) = group_samples(data, samples)
        drawn = draw_groups(groups, split.fraction, split.seed)
        is_val = [group in drawn for group in groups]
    else:
        num_val = max(1, round(len(samples) * split.fraction))
        if num_val >= len(samples):
            raise DataError(
                f"data.val.fraction: {split.fraction} of {len(samples)} images leaves none to train on; add images"
            )
        order = np.random.default_rng(split.seed).permutation(len(samples))
        is_val = np.isin(np.arange(len(samples)), order[:num_val]).tolist()
    return (
        [sample for sample, held_out in zip(samples, is_val, strict=True) if not held_out],
        [sample for sample, held_out in zip(samples, is_val, strict=True) if held_out],
    )
