"""What a kind of store has to offer, and how its passing troubles are retried."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from segray.errors import StorageError

ResultT = TypeVar("ResultT")

# A store that is down is reported within a minute: the last attempt may itself wait for the time-outs below.
RETRY_FOR_S = 30
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
_MAX_WAIT_S = 4


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as a listing or an answer describes it.

    Attributes:
        etag: Tells two contents of one name apart: the store's entity tag, or modification time and size.
        modified_s: When it was written, seconds since 1970.
    """

    uri: str
    size_bytes: int
    etag: str | None
    modified_s: float


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of a file, and the tag of just these bytes."""

    data: bytes
    etag: str | None


class TransientError(Exception):
    """A trouble that may pass: no answer, half an answer, "slow down". Only ``retrying`` sees it."""


class Store(Protocol):
    """Files by key, in one bucket, container or disk. Methods raise ``StorageError``; they have retried."""

    def list(self, folder: str, recursive: bool, start: str) -> Iterator[StoredFile]:
        """Yield the files under a folder whose key begins with ``start``, sorted by key.

        Raises:
            MissingFileError: There is no such folder.
        """
        ...

    def list_names(self, folder: str, folders: bool) -> set[str]:
        """Return the names of files, or of folders, directly in a folder; none if it is not there."""
        ...

    def find(self, key: str) -> StoredFile | None:
        """Return what is known of a file without reading it, or None."""
        ...

    def read(self, key: str) -> Content:
        """Return a whole file."""
        ...

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` up to, not including, ``end``."""
        ...

    def write(self, key: str, content: bytes | memoryview) -> None:
        """Store a whole file by one atomic act, replacing what was there."""
        ...

    def create(self, key: str, content: bytes) -> bool:
        """Store a whole file if there is none; False, and nothing done, if there is."""
        ...

    def remove(self, key: str) -> None:
        """Remove a file; it is no error if it is not there."""
        ...


def retrying(verb: str, uri: str, act: Callable[[], ResultT]) -> ResultT:
    """Do something with a store again and again while its trouble may pass, for ``RETRY_FOR_S`` at most.

    Raises:
        StorageError: What ``act`` raises, or that the trouble has not passed.
    """
    # full jitter: a cluster of workers that failed at one moment does not come back at one moment
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
            "once the store is well again, the same call goes on"
        ) from error
