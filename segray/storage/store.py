"""Define the interface of a store, and retry its transient errors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from segray.errors import StorageError

ResultT = TypeVar("ResultT")

# An unreachable store is reported within a minute: the last attempt may itself wait for the time-outs below.
RETRY_FOR_S = 30
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
_MAX_WAIT_S = 4


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


class TransientError(Exception):
    """An error that a retry may resolve: a missing or partial response, throttling. Only ``retrying`` handles it."""


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


def retrying(verb: str, uri: str, act: Callable[[], ResultT]) -> ResultT:
    """Call ``act``, and retry on ``TransientError`` with exponential back-off for up to ``RETRY_FOR_S``.

    Args:
        verb: The operation, for the message: "cannot VERB URI".
        uri: The file or folder, for the message.
        act: The operation.

    Raises:
        StorageError: ``act`` raised it, or the transient error persisted.
    """
    # Full jitter, so that workers which failed at the same moment do not retry at the same moment.
    attempts = Retrying(
        retry=retry_if_exception_type(TransientError),
        wait=wait_random_exponential(multiplier=0.1, max=_MAX_WAIT_S),
        stop=stop_after_delay(RETRY_FOR_S),
        reraise=True,
    )
    try:
        return attempts(act)
    except TransientError as error:
        number = attempts.statistics["attempt_number"]
        raise StorageError(
            f"cannot {verb} {uri}: {error} ({number} attempts in {RETRY_FOR_S} s); "
            "to resume once the store is available again, rerun the same command"
        ) from error
