"""Local disks, and what is mounted like one."""

import errno
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from segray.errors import MissingFileError, StorageError, UnusableFileError, flatten_message
from segray.storage.store import Content, StoredFile

ResultT = TypeVar("ResultT")

_OF_THE_FILE = (errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)  # the disk is well
_NO_SECOND_NAMES = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)
_LEFTOVER_AGE_S = 3600  # no write takes that long: whoever began it is gone


class LocalStore:
    """The disks of this machine. Keys are absolute paths; an entity tag is made of modification time and size."""

    def list(self, folder: str, recursive: bool, start: str) -> Iterator[StoredFile]:
        """See ``Store.list``; links are followed."""
        if not os.path.isdir(folder):
            what = "a file, not a folder" if os.path.exists(folder) else "nothing is there"
            raise MissingFileError(f"cannot list {folder}: {what}; check the spelling")
        return self._walk(folder, recursive, start, frozenset())

    def _walk(
        self, folder: str, recursive: bool, start: str, above: frozenset[tuple[int, int]]
    ) -> Iterator[StoredFile]:
        """Yield files in the order of their full paths, in which ``a.png`` comes before ``a/b.png``."""
        status = _translated("look at", folder, lambda: os.stat(folder))
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link to a folder that it is in
            return
        names = _translated("list", folder, lambda: [_get_listed_name(entry) for entry in os.scandir(folder)])
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.endswith("/"):
                is_on_the_way = start.startswith(name)
                if is_on_the_way or (recursive and name.startswith(start)):
                    yield from self._walk(path[:-1], recursive, start[len(name) :], above | {identity})
            elif name.startswith(start):
                with suppress(MissingFileError, UnusableFileError):  # removed in this moment, or a link to nowhere
                    yield self._describe(path)

    def list_names(self, folder: str, folders: bool) -> set[str]:
        """See ``Store.list_names``."""
        with suppress(MissingFileError):
            return _translated(
                "list", folder, lambda: {entry.name for entry in os.scandir(folder) if _is_folder(entry) == folders}
            )
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
                before = _build_etag(os.fstat(file.fileno()))
                data = file.read()
                after = _build_etag(os.fstat(file.fileno()))
                # written while it was read: of no one content
                return Content(data, before if before == after else f"{before} to {after}")

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
            _translated("write", key, lambda: _write_beside(Path(key), content, _take_free_name))
        except _TakenError:
            if not os.path.isfile(key):  # something else is in the way: of it, or of its folder
                raise
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


def remove_empty_folders(folder: str) -> None:
    """Remove a folder, and those in it, as far as no file is in them."""
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # written to again in this moment
            os.rmdir(path)


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


def _take_free_name(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in _NO_SECOND_NAMES:
            raise
        if path.exists():  # a disk without second names: a gap between this and the next line
            raise FileExistsError(errno.EEXIST, "there already", str(path)) from error
        os.replace(partial, path)


def _get_listed_name(entry: "os.DirEntry[str]") -> str:
    """Return the name by which an entry is sorted: a folder's ends in a slash, as in the paths below it."""
    return entry.name + "/" if _is_folder(entry) else entry.name


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def _translated(verb: str, path: str, act: Callable[[], ResultT]) -> ResultT:
    """Do something, and turn what the operating system says into one line that names the act and the path."""
    try:
        return act()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(
            f"cannot {verb} {path}: nothing is there; check the spelling, or create it first"
        ) from error
    except PermissionError as error:
        raise StorageError(f"cannot {verb} {path}: permission denied; check the rights of this user") from error
    except FileExistsError as error:
        raise _TakenError(f"cannot {verb} {path}: {error.filename2 or error.filename} is in the way") from error
    except ValueError as error:  # a NUL in the name
        raise UnusableFileError(f"cannot {verb} {path!r}: {flatten_message(error)}; rename it") from error
    except OSError as error:
        if error.errno in _OF_THE_FILE:
            raise UnusableFileError(f"cannot {verb} {path}: {error.strerror}; rename or remove it") from error
        remedy = "; free some space, then the same call goes on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StorageError(f"cannot {verb} {path}: {error.strerror or flatten_message(error)}{remedy}") from error
