"""Labelled images as Arrow arrays, which take a fraction of the memory of Python objects.

Ray maps Arrow arrays from its object store into a process without a copy, so all workers of a node share one list.
"""

import hashlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from segray.data.json_rows import format_rows

_BATCH_ROWS = 2**16
_ENCODED_ROWS = 2**18  # URIs that are encoded at once.
_STRING = pa.large_string()


class Sample(NamedTuple):
    """A labelled image: the URIs of an image and of its mask."""

    image_uri: str
    mask_uri: str


@dataclass(frozen=True)
class _UriColumn:
    """URIs, divided into folders and names.

    Attributes:
        folders: (N,) what precedes the name, with the last slash; a dictionary array, so each folder is stored once.
        names: (N,) the rest.
    """

    folders: pa.DictionaryArray
    names: pa.LargeStringArray

    @classmethod
    def encode(cls, uris: pa.ChunkedArray) -> "_UriColumn":
        """Divide URIs; what is not encoded yet takes no more memory than ``_ENCODED_ROWS`` of them."""
        starts = range(0, max(len(uris), 1), _ENCODED_ROWS)
        pairs = [_split_uris(uris.slice(start, _ENCODED_ROWS).combine_chunks()) for start in starts]
        folders = pa.chunked_array([folders for folders, _ in pairs]).unify_dictionaries().combine_chunks()
        return cls(folders, pa.concat_arrays([names for _, names in pairs]))

    def get(self, index: int) -> str:
        """Return the URI at an index."""
        folder: str = self.folders[index].as_py()
        name: str = self.names[index].as_py()
        return folder + name

    def take(self, indices: pa.Array) -> "_UriColumn":
        """Return the URIs at the given indices."""
        return _UriColumn(self.folders.take(indices), self.names.take(indices))

    def decode(self, start: int, num_rows: int) -> pa.LargeStringArray:
        """Return up to ``num_rows`` whole URIs from an index on."""
        folders, names = self.folders.slice(start, num_rows), self.names.slice(start, num_rows)
        return pc.binary_join_element_wise(folders.cast(_STRING), names, pa.scalar("", _STRING))


def _split_uris(uris: pa.LargeStringArray) -> tuple[pa.DictionaryArray, pa.LargeStringArray]:
    """Return the folders of URIs, each with its last slash, and their names."""
    parts = pc.split_pattern(uris, "/", max_splits=1, reverse=True).flatten()
    if len(parts) < 2 * len(uris):  # A URI without a slash. Regular expressions take three times as long.
        folders = pc.replace_substring_regex(uris, "[^/]*$", "").dictionary_encode()
        return folders, pc.replace_substring_regex(uris, "(?s)^.*/", "")
    numbers = np.arange(0, len(parts), 2)
    folders = parts.take(pa.array(numbers)).dictionary_encode()
    slash, nothing = pa.scalar("/", _STRING), pa.scalar("", _STRING)
    with_slash = pc.binary_join_element_wise(folders.dictionary, slash, nothing)
    return pa.DictionaryArray.from_arrays(folders.indices, with_slash), parts.take(pa.array(numbers + 1))


class SampleList(Sequence[Sample]):
    """An immutable sequence of labelled images.

    Args:
        images: URIs of the images.
        masks: URIs of their masks, in the same order.
        version: Changes if one of the listed files is replaced; empty if that is not known, as of a manifest.
    """

    def __init__(self, images: pa.ChunkedArray, masks: pa.ChunkedArray, version: str = "") -> None:
        self.version = version
        self._columns = (_UriColumn.encode(images), _UriColumn.encode(masks))

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "SampleList":
        """Return samples as a ``SampleList``; one that is such a list already is returned as it is."""
        if isinstance(samples, SampleList):
            return samples
        rows = iter(samples)
        chunks: list[list[pa.Array]] = [[], []]
        while batch := list(islice(rows, _BATCH_ROWS)):
            for column, values in zip(chunks, zip(*batch, strict=True), strict=True):
                column.append(pa.array(values, _STRING))
        images, masks = (pa.chunked_array(column, _STRING) for column in chunks)
        return cls(images, masks)

    def __len__(self) -> int:
        return len(self._columns[0].names)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "SampleList": ...
    def __getitem__(self, index: int | slice) -> "Sample | SampleList":
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        number = range(len(self))[operator.index(index)]
        images, masks = self._columns
        return Sample(images.get(number), masks.get(number))

    def __iter__(self) -> Iterator[Sample]:
        for columns in self.read_columns():
            yield from map(Sample, *(column.to_pylist() for column in columns))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_bytes(self) -> int:
        """Memory that the list takes."""
        return sum(array.nbytes for column in self._columns for array in (column.folders, column.names))

    def take(self, indices: npt.NDArray[np.integer]) -> "SampleList":
        """Return the samples at the given indices, in that order."""
        taken = object.__new__(SampleList)
        taken.version = self.version
        numbers = pa.array(indices)
        images, masks = self._columns
        taken._columns = (images.take(numbers), masks.take(numbers))
        return taken

    def read_columns(self) -> Iterator[tuple[pa.LargeStringArray, pa.LargeStringArray]]:
        """Yield the URIs of images and masks in batches, in order."""
        images, masks = self._columns
        for start in range(0, len(self), _BATCH_ROWS):
            yield images.decode(start, _BATCH_ROWS), masks.decode(start, _BATCH_ROWS)


def merge_samples(first: SampleList, other: SampleList) -> SampleList:
    """Return the samples of two lists, sorted by image URI; of an image in both, that of the first list."""
    pairs = [pair for samples in (first, other) for pair in samples.read_columns()]
    images, masks = (pa.chunked_array(list(column), _STRING) for column in zip(*pairs, strict=True))
    order = pc.sort_indices(images)  # The sort is stable, so that samples of the first list come first.
    sorted_images = images.take(order).combine_chunks()
    is_new = pc.not_equal(sorted_images[1:], sorted_images[:-1]).to_numpy(zero_copy_only=False)
    merged = SampleList(images, masks, first.version + other.version)
    return merged.take(order.to_numpy()[np.concatenate([[True], is_new])])


class Splits(NamedTuple):
    """The labelled images of a run; each split is sorted by image URI."""

    train: Sequence[Sample]
    val: Sequence[Sample]

    def compute_sha256(self, *, with_version: bool = False) -> str:
        """Return the sha256 of all image and mask URIs and their split, as JSON: a list of pairs for each split.

        ``with_version`` appends the versions of the lists, so that it changes with the content of the files.
        """
        digest = hashlib.sha256()
        for split, before in zip(self, ("[[", "], ["), strict=True):
            digest.update(before.encode())
            is_first = True
            for columns in SampleList.of(split).read_columns():
                rows = format_rows(list(columns), ", ")
                digest.update(rows[2:] if is_first else rows)
                is_first = False
        digest.update(b"]]")
        if with_version:
            digest.update("".join(SampleList.of(split).version for split in self).encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Folds:
    """The labelled images of a cross-validation, and the fold of each.

    Attributes:
        samples: All images, sorted by image URI.
        numbers: (N,) uint8, the fold of each image, from 0.
    """

    samples: SampleList
    numbers: npt.NDArray[np.uint8]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of images of each fold."""
        return tuple(np.bincount(self.numbers).tolist())

    @property
    def order(self) -> npt.NDArray[np.intp]:
        """(N,) indices of the images, one fold after the other, each sorted by image URI."""
        return np.argsort(self.numbers, kind="stable")

    def select(self, number: int) -> SampleList:
        """Return the samples of a fold, given by its index."""
        return self.samples.take(np.flatnonzero(self.numbers == number))

    def hold_out(self, number: int) -> Splits:
        """Return the splits of a fold, given by its index: it is held out for validation, the others train."""
        return Splits(self.samples.take(np.flatnonzero(self.numbers != number)), self.select(number))

    def join(self) -> Splits:
        """Return the splits of the run after a cross-validation: it trains on all images and validates on none."""
        return Splits(self.samples, [])

    def compute_sha256(self, *, with_version: bool = False) -> str:
        """Return the sha256 of all image and mask URIs and their fold; ``with_version`` as for ``Splits``."""
        folds = [Splits(self.select(number), []) for number in range(len(self.sizes))]
        listings = [fold.compute_sha256(with_version=with_version) for fold in folds]
        return hashlib.sha256("".join(listings).encode()).hexdigest()
