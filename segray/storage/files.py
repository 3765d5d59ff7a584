"""Read, list and write files by URI, in any store.

Every function raises ``StorageError`` on environment errors (permissions, network, disk): one line that names the
operation, the URI and the remedy. Transient errors have been retried by then: for 30 s, or for 10 minutes if the store
throttles requests.
"""

import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache

from segray.errors import ChangedFileError, MissingFileError, StorageError, UnusableFileError
from segray.storage.arrow import ArrowStore
from segray.storage.local import LocalStore, remove_empty_folders, remove_leftovers
from segray.storage.store import Store, StoredFile
from segray.storage.uris import is_local, normalize_uri, split_uri

CLOUD_SCHEMES = ("gs", "gcs", "az", "abfs", "abfss")
_OPENING = threading.Lock()
_READ_AHEAD_BYTES = 2**16  # Enough for the footer of a typical Parquet file in one request.


def _open(uri: str) -> tuple[Store, str]:
    scheme, authority, key = split_uri(uri)
    if ":" in authority.rpartition("@")[0]:
        raise StorageError(
            f"cannot open {scheme}://…@{authority.rpartition('@')[2]}: the URI contains a password, which would be "
            "stored with the results; configure the credentials of this user and of each node instead"
        )
    with _OPENING:  # All threads share one store, and so one limit of the rate of its requests.
        return _open_store(scheme, authority), key


@lru_cache(maxsize=32)
def _open_store(scheme: str, authority: str) -> Store:
    if not scheme:
        return LocalStore()
    if scheme == "s3":
        from segray.storage.s3 import S3Store  # The import takes 0.3 s.

        return S3Store(authority)
    if scheme in CLOUD_SCHEMES:
        from segray.storage.cloud import CloudStore

        return CloudStore(scheme, authority)
    return ArrowStore(scheme, authority)


def list_files(
    uri: str, extensions: Iterable[str] | None = None, *, recursive: bool = True, start: str = ""
) -> Iterator[StoredFile]:
    """Yield the files under a folder or prefix, sorted by URI.

    Args:
        uri: Folder or prefix; ``s3://bucket/a`` lists the keys that begin with ``a/``.
        extensions: Extensions without the dot, compared case-insensitively; None lists every file.
        recursive: Also list files in subfolders.
        start: List only files whose path below the folder begins with this.

    Raises:
        MissingFileError: The folder does not exist.
        UnusableFileError: A file name is not valid UTF-8.
        StorageError: The store refused the request or failed, or returned its keys unsorted.
    """
    store, key = _open(uri)
    wanted = None if extensions is None else tuple(f".{extension.lower()}" for extension in extensions)
    last = ""
    for file in store.list(key, recursive, start):
        if file.uri <= last:
            raise StorageError(
                f"cannot list {uri}: the store returned {file.uri} after {last}, expected sorted keys; use a manifest"
            )
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
    """Return the names of the files (or folders) directly under a folder or prefix; empty if it does not exist."""
    store, key = _open(uri)
    return store.list_names(key, folders)


def find_file(uri: str) -> StoredFile | None:
    """Return size, entity tag and modification time of a file, or None if it does not exist or is a folder."""
    store, key = _open(uri)
    return store.find(key)


def exists(uri: str) -> bool:
    """Return whether a file exists at a URI."""
    return find_file(uri) is not None


def read_bytes(uri: str, etag: str | None = None) -> bytes:
    """Return the whole content of a file.

    Args:
        uri: The file.
        etag: The expected entity tag; None accepts any content.

    Raises:
        MissingFileError: The file does not exist.
        ChangedFileError: The file has another entity tag.
        ForbiddenFileError: Reading it was denied.
        StorageError: The store refused the request or failed.
    """
    store, key = _open(uri)
    content = store.read(key)
    if etag is not None and content.etag != etag:
        raise ChangedFileError(f"{uri} has changed: its entity tag was {etag} and is now {content.etag}")
    return content.data


def is_readable(uri: str) -> bool:
    """Return whether the first byte of a file can be read."""
    store, key = _open(uri)
    try:
        return len(store.read_range(key, 0, 1)) == 1
    except StorageError:
        return False


def open_for_reading(uri: str) -> io.BufferedReader:
    """Open a seekable file without reading all of it.

    Raises:
        MissingFileError: The file does not exist.
        StorageError: The store refused the request or failed, here or in any later read.
    """
    store, key = _open(uri)
    found = store.find(key)
    if found is None:
        raise MissingFileError(f"cannot read {uri}: no such file; check the spelling, or create it first")
    reader = _RangeReader(lambda start, end: store.read_range(key, start, end), found.size_bytes)
    return io.BufferedReader(reader, _READ_AHEAD_BYTES)


class _RangeReader(io.RawIOBase):
    """A seekable file in which every read is a separate request to the store."""

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

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # io always passes a memoryview.
        end = min(self._position + len(buffer), self._size_bytes)
        data = self._read_range(self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def write_bytes(uri: str, content: bytes | memoryview) -> None:
    """Write a whole file atomically, replacing an existing one.

    Readers see the old file or the new one, never a part, even if the writer dies.

    Raises:
        StorageError: The store refused the request or failed. If only the
            response was lost, the file has been replaced.
    """
    store, key = _open(uri)
    store.write(key, content)


def create_bytes(uri: str, content: bytes) -> bool:
    """Write a whole file if none exists; return False if one does.

    Atomic on S3 and on disks with hard links. Elsewhere there is a short gap between the check and the write.

    Raises:
        StorageError: The store refused the request or failed.
    """
    store, key = _open(uri)
    return store.create(key, content)


def remove_file(uri: str) -> None:
    """Remove a file, if it exists."""
    store, key = _open(uri)
    store.remove(key)


def remove_folder(uri: str) -> None:
    """Remove a folder, or every file under a prefix, if it exists.

    Raises:
        StorageError: The store refused the request or failed; some files may be left.
    """
    with suppress(MissingFileError):
        for file in list(list_files(uri)):
            remove_file(file.uri)
        if is_local(uri):
            remove_empty_folders(normalize_uri(uri))


def sweep_folder(uri: str) -> None:
    """Remove temporary files that killed writers left over an hour ago in a folder and directly below its subfolders.

    Object stores have none.
    """
    if is_local(uri):
        remove_leftovers(normalize_uri(uri))
