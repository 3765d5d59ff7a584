"""Define the interface of a store."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as a listing or a response describes it.

    Attributes:
        uri: The file, in the spelling of ``normalize_uri``.
        size_bytes: Its size.
        etag: Identifies the content: the store's entity tag, or modification time and size; None if unknown.
        modified_s: Modification time, in seconds since 1970.
    """

    uri: str
    size_bytes: int
    etag: str | None
    modified_s: float


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a file and the entity tag of exactly this content."""

    data: bytes
    etag: str | None


class Store(Protocol):
    """Files by key in one bucket, container or disk.

    Methods retry transient errors and raise ``StorageError`` if these persist or the store refuses.
    """

    def list(self, folder: str, recursive: bool, start: str) -> Iterator[StoredFile]:
        """Yield the files under a folder whose key begins with ``start``, sorted by key.

        Raises:
            MissingFileError: There is no such folder.
        """
        ...

    def list_names(self, folder: str, folders: bool) -> set[str]:
        """Return the names of files (or folders) directly in a folder; an empty set if it does not exist."""
        ...

    def find(self, key: str) -> StoredFile | None:
        """Return the metadata of a file, or None if it does not exist."""
        ...

    def read(self, key: str) -> Content:
        """Return the content of a file."""
        ...

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` to ``end`` (exclusive)."""
        ...

    def write(self, key: str, content: bytes | memoryview) -> None:
        """Write a whole file atomically, replacing an existing one."""
        ...

    def create(self, key: str, content: bytes) -> bool:
        """Write a whole file if none exists; return False and change nothing if one does."""
        ...

    def remove(self, key: str) -> None:
        """Remove a file, if it exists."""
        ...
