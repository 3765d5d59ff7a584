"""Local disks, and what is mounted like one."""

import errno
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from segray.errors import MissingFileError, StorageError, UnsupportedNameError, flatten_message
from segray.storage.store import Content, StoredFile

ResultT = TypeVar("ResultT")

_LEFTOVER_AGE_S = 3600  # no write takes that long: whoever began it is gone


class LocalStore:
    """The disks of this machine. Keys are absolute paths; an entity tag is made of modification time and size."""

    def list(self, folder: str, recursive: bool, start: str) -> Iterator[StoredFile]:
        """See ``Store.list``; links are followed."""
        if not os.path.isdir(folder):
            what = "a file, not a folder" if os.path.exists(folder) else "nothing is there"
            raise MissingFileError(f"cannot list {folder}: {what}; check the spelling")
        return self._walk(folder, recursive, start)

    def _walk(self, folder: str, recursive: bool, start: str) -> Iterator[StoredFile]:
        """Yield files in the order of their full paths, in which ``a.png`` comes before ``a/b.png``."""
        names: dict[str, bool] = {}
        for entry in _translated("list", folder, lambda: list(os.scandir(folder))):
            _require_unicode(entry.path)
            is_folder = _translated("look at", entry.path, entry.is_dir)
            name = entry.name + "/" if is_folder else entry.name
            if name.startswith(start) or (is_folder and start.startswith(name)):
                names[name] = is_folder
        for name in sorted(names):
            path = os.path.join(folder, name)
            if not names[name]:
                with suppress(MissingFileError):  # removed in this moment, or a link to nowhere
                    yield self._describe(path)
            elif recursive or start.startswith(name):
                yield from self._walk(path.rstrip("/"), recursive, start[len(name) :])

    def list_names(self, folder: str, folders: bool) -> set[str]:
        """See ``Store.list_names``."""
        with suppress(MissingFileError):
            return {
                entry.name
                for entry in _translated("list", folder, lambda: list(os.scandir(folder)))
                if entry.is_dir() == folders
            }
        return set()

    def find(self, key: str) -> StoredFile | None:
        """See ``Store.find``."""
        try:
            return None if os.path.isdir(key) else self._describe(key)
        except MissingFileError:
            return None

    def _describe(self, path: str) -> StoredFile:
        status = _translated("look at", path, lambda: os.stat(path))
        return StoredFile(path, status.st_size, _build_etag(status), status.st_mtime)

    def read(self, key: str) -> Content:
        """See ``Store.read``."""

        def read() -> Content:
            with open(key, "rb") as file:
                etag = _build_etag(os.fstat(file.fileno()))
                return Content(file.read(), etag)

        return _translated("read", key, read)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """See ``Store.read_range``."""

        def read() -> bytes:
            with open(key, "rb") as file:
                return os.pread(file.fileno(), end - start, start)

        return _translated("read", key, read)

    def write(self, key: str, content: bytes | memoryview) -> None:
        """See ``Store.write``: a hidden file beside it, which then takes its name."""
        _translated("write", key, lambda: _write_beside(Path(key), content, os.replace))

    def create(self, key: str, content: bytes) -> bool:
        """See ``Store.create``: a second name for the hidden file, which the disk refuses if the name is taken."""
        try:
            _translated("write", key, lambda: _write_beside(Path(key), content, os.link))
        except _TakenError:
            return False
        return True

    def remove(self, key: str) -> None:
        """See ``Store.remove``."""
        with suppress(MissingFileError):
            _translated("remove", key, lambda: os.remove(key))


def remove_leftovers(folder: str) -> None:
    """Remove what writers that were killed long ago have left in a folder."""
    for path in Path(folder).glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                path.unlink()


class _TakenError(StorageError):
    """There is a file of this name already."""


def _build_etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def _write_beside(path: Path, content: bytes | memoryview, take_name: Callable[[Path, Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # hidden: no Parquet reader picks it up
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut can leave the new name on an empty file
        take_name(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _require_unicode(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UnsupportedNameError(
            f"cannot list {os.fsencode(path)!r}: its name is not UTF-8; rename the file"
        ) from None


def _translated(verb: str, path: str, act: Callable[[], ResultT]) -> ResultT:
    """Do something, and turn what the operating system says into one line that names the act and the path."""
    try:
        return act()
    except FileNotFoundError as error:
        raise MissingFileError(
            f"cannot {verb} {path}: nothing is there; check the spelling, or create it first"
        ) from error
    except PermissionError as error:
        raise StorageError(f"cannot {verb} {path}: permission denied; check the rights of this user") from error
    except FileExistsError as error:
        raise _TakenError(f"cannot {verb} {path}: {error.filename2 or error.filename} is in the way") from error
    except OSError as error:
        remedy = "; free some space, then the same call goes on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StorageError(f"cannot {verb} {path}: {error.strerror or flatten_message(error)}{remedy}") from error
