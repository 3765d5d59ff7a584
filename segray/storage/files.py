"""Read, list and write files by URI, wherever they are.

Every function raises ``StorageError`` when the world is at fault: one line that names the act, the URI and what to do.
Troubles that may pass have been retried by then, for half a minute.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache

from segray.errors import ChangedFileError, MissingFileError, StorageError, UnusableFileError
from segray.storage.arrow import ArrowStore
from segray.storage.local import LocalStore, remove_empty_folders, remove_leftovers
from segray.storage.store import Store, StoredFile
from segray.storage.uris import is_local, normalize_uri, split_uri

_READ_AHEAD_BYTES = 2**16  # the footer of a Parquet file, and what lies before it


def _open(uri: str) -> tuple[Store, str]:
    scheme, authority, key = split_uri(uri)
    return _open_store(scheme, authority), key


@lru_cache(maxsize=32)
def _open_store(scheme: str, authority: str) -> Store:
    if not scheme:
        return LocalStore()
    if scheme == "s3":
        from segray.storage.s3 import S3Store  # 0.3 s of imports, for those who need it

        return S3Store(authority)
    return ArrowStore(scheme, authority)


def list_files(
    uri: str, extensions: Iterable[str] | None = None, *, recursive: bool = True, start: str = ""
) -> Iterator[StoredFile]:
    """Yield the files under a folder or prefix, sorted by URI.

    Args:
        uri: Folder or prefix; ``s3://bucket/a`` means what is below ``a/``.
        extensions: Lower-case extensions without the dot, taken in any case; None takes every file.
        recursive: Also what is in folders below it.
        start: Only files whose path below the folder begins so.

    Raises:
        MissingFileError: The folder does not exist.
        StorageError: The store refused or failed, or gave its keys in no order.
    """
    store, key = _open(uri)
    wanted = None if extensions is None else tuple(f".{extension.lower()}" for extension in extensions)
    last = ""
    for file in store.list(key, recursive, start):
        if file.uri <= last:
            raise StorageError(f"cannot list {uri}: {file.uri} came after {last}, expected sorted keys; use a manifest")
        last = file.uri
        if wanted is None or file.uri.lower().endswith(wanted):
            _require_unicode(file.uri)
            yield file


def _require_unicode(uri: str) -> None:
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise UnusableFileError(f"cannot list {os.fsencode(uri)!r}: its name is not UTF-8; rename the file") from None


def list_names(uri: str, *, folders: bool = False) -> set[str]:
    """Return the names of the files, or of the folders, directly under a folder or prefix; empty if it is not there."""
    store, key = _open(uri)
    return store.list_names(key, folders)


def find_file(uri: str) -> StoredFile | None:
    """Return size and entity tag of a file, or None if there is no such file (a folder is none)."""
    store, key = _open(uri)
    return store.find(key)


def exists(uri: str) -> bool:
    """Say whether a file is at a URI."""
    return find_file(uri) is not None


def read_bytes(uri: str, etag: str | None = None) -> bytes:
    """Return the whole content of a file.

    Args:
        uri: The file.
        etag: The entity tag that it had; None takes any content.

    Raises:
        MissingFileError: Nothing is there.
        ChangedFileError: The file has another entity tag by now.
        StorageError: The store refused or failed.
    """
    store, key = _open(uri)
    content = store.read(key)
    if etag is not None and content.etag != etag:
        raise ChangedFileError(f"{uri} has changed: its entity tag was {etag}, and is {content.etag}")
    return content.data


def open_for_reading(uri: str) -> io.BufferedReader:
    """Open a file for reading at any position, without reading all of it.

    Raises:
        MissingFileError: Nothing is there.
        StorageError: The store refused or failed, here or in any later read.
    """
    store, key = _open(uri)
    found = store.find(key)
    if found is None:
        raise MissingFileError(f"cannot read {uri}: nothing is there; check the spelling, or create it first")
    reader = _RangeReader(lambda start, end: store.read_range(key, start, end), found.size_bytes)
    return io.BufferedReader(reader, _READ_AHEAD_BYTES)


class _RangeReader(io.RawIOBase):
    """A file of which each read is a request of its own."""

    def __init__(self, read_range: Callable[[int, int], bytes], size_bytes: int) -> None:
        self._read_range = read_range
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # what io hands over is always one
        end = min(self._position + len(buffer), self._size_bytes)
        data = self._read_range(self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def write_bytes(uri: str, content: bytes | memoryview) -> None:
    """Store a whole file by one atomic act, replacing what was there.

    A reader, and a writer that died half-way, see the old file or the new one, never a part.

    Raises:
        StorageError: The store refused or failed; the old file or, if only its answer was lost, the new one is there.
    """
    store, key = _open(uri)
    store.write(key, content)


def create_bytes(uri: str, content: bytes) -> bool:
    """Store a whole file if there is none; return False if there is.

    One atomic act on S3 and on disks with second names; elsewhere there is a short gap between looking and writing.

    Raises:
        StorageError: The store refused or failed.
    """
    store, key = _open(uri)
    return store.create(key, content)


def remove_file(uri: str) -> None:
    """Remove a file; it is no error if it is not there."""
    store, key = _open(uri)
    store.remove(key)


def remove_folder(uri: str) -> None:
    """Remove a folder, or every file under a prefix; it is no error if it is not there.

    Raises:
        StorageError: The store refused or failed; a part may be left.
    """
    with suppress(MissingFileError):
        for file in list(list_files(uri)):
            remove_file(file.uri)
        if is_local(uri):
            remove_empty_folders(normalize_uri(uri))


def sweep_folder(uri: str) -> None:
    """Remove what writers that were killed long ago have left in a folder; object stores keep nothing of them."""
    if is_local(uri):
        remove_leftovers(normalize_uri(uri))
