"""Local disks and mounted file systems."""

import errno
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from segray.errors import ForbiddenFileError, MissingFileError, StorageError, UnusableFileError, flatten_message
from segray.storage.store import Content, StoredFile

ResultT = TypeVar("ResultT")

_PATH_ERRORS = (errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)  # The path is unusable; the disk works.
_NO_HARD_LINK_ERRORS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)
_LEFTOVER_AGE_S = 3600  # No write takes this long, so the writer has died.


class LocalStore:
    """The disks of this machine. Keys are absolute paths; entity tags are built from modification time and size."""

    def list(self, folder: str, recursive: bool, start: str) -> Iterator[StoredFile]:
        """See ``Store.list``. Symbolic links are followed."""
        if not os.path.isdir(folder):
            what = "it is a file, not a folder" if os.path.exists(folder) else "no such folder"
            raise MissingFileError(f"cannot list {folder}: {what}; check the spelling")
        return self._walk(folder, recursive, start, frozenset())

    def _walk(
        self, folder: str, recursive: bool, start: str, above: frozenset[tuple[int, int]]
    ) -> Iterator[StoredFile]:
        """Yield files in the order of their full paths, in which ``a.png`` comes before ``a/b.png``."""
        status = _translated("stat", folder, lambda: os.stat(folder))
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # A link to one of its own parent folders.
            return
        names = _translated("list", folder, lambda: [_get_listed_name(entry) for entry in os.scandir(folder)])
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.endswith("/"):
                is_parent = start.startswith(name)
                if is_parent or (recursive and name.startswith(start)):
                    yield from self._walk(path[:-1], recursive, start[len(name) :], above | {identity})
            elif name.startswith(start):
                with suppress(MissingFileError, UnusableFileError):  # Just removed, or a dangling link.
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
        status = _translated("stat", path, lambda: os.stat(path))
        return StoredFile(path, status.st_size, _build_etag(status), status.st_mtime)

    def read(self, key: str) -> Content:
        """See ``Store.read``."""

        def read() -> Content:
            with open(key, "rb") as file:
                before = _build_etag(os.fstat(file.fileno()))
                data = file.read()
                after = _build_etag(os.fstat(file.fileno()))
                # A file that was written during the read gets a tag that no other read has.
                return Content(data, before if before == after else f"{before} to {after}")

        return _translated("read", key, read)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """See ``Store.read_range``."""

        def read() -> bytes:
            with open(key, "rb") as file:
                return os.pread(file.fileno(), end - start, start)

        return _translated("read", key, read)

    def write(self, key: str, content: bytes | memoryview) -> None:
        """See ``Store.write``. Writes a hidden temporary file in the same folder and renames it."""
        _translated("write", key, lambda: _write_temporary(Path(key), content, os.replace))

    def create(self, key: str, content: bytes) -> bool:
        """See ``Store.create``. Hard-links the hidden temporary file, which fails if the name exists."""
        try:
            _translated("write", key, lambda: _write_temporary(Path(key), content, _link_new_name))
        except _NameTakenError:
            if not os.path.isfile(key):  # A folder has this name, or a file has the name of its folder.
                raise
            return False
        return True

    def remove(self, key: str) -> None:
        """See ``Store.remove``."""
        with suppress(MissingFileError):
            _translated("remove", key, lambda: os.remove(key))


def remove_leftovers(folder: str) -> None:
    """Remove temporary files older than ``_LEFTOVER_AGE_S`` that killed writers left in a folder or its subfolders."""
    for path in (*Path(folder).glob(".*.tmp"), *Path(folder).glob("*/.*.tmp")):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                path.unlink()


def remove_empty_folders(folder: str) -> None:
    """Remove a folder and its subfolders, except those that contain files."""
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # A file was just written to it.
            os.rmdir(path)


class _NameTakenError(StorageError):
    """A file or folder has this name already."""


def _build_etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def _write_temporary(path: Path, content: bytes | memoryview, give_name: Callable[[Path, Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # Hidden, so Parquet readers ignore it.
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # Without this, a power failure can leave an empty file under the new name.
        give_name(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _link_new_name(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINK_ERRORS:
            raise
        if path.exists():  # Without hard links there is a gap between this check and the rename.
            raise FileExistsError(errno.EEXIST, "exists already", str(path)) from error
        os.replace(partial, path)


def _get_listed_name(entry: "os.DirEntry[str]") -> str:
    """Return the name by which an entry is sorted: folders end in a slash, as in the paths of their files."""
    return entry.name + "/" if _is_folder(entry) else entry.name


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # A link to itself.
            return False
        raise


def _translated(verb: str, path: str, act: Callable[[], ResultT]) -> ResultT:
    """Call ``act``, and convert errors of the operating system to one line that names the operation and the path."""
    try:
        return act()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(
            f"cannot {verb} {path}: no such file or folder; check the spelling, or create it first"
        ) from error
    except PermissionError as error:
        kind = ForbiddenFileError if verb in ("read", "stat") else StorageError
        raise kind(f"cannot {verb} {path}: permission denied; check the permissions of this user") from error
    except FileExistsError as error:
        existing = error.filename2 or error.filename
        raise _NameTakenError(f"cannot {verb} {path}: {existing} exists already; rename or remove it") from error
    except ValueError as error:  # A NUL in the name.
        raise UnusableFileError(f"cannot {verb} {path!r}: {flatten_message(error)}; rename it") from error
    except OSError as error:
        if error.errno in _PATH_ERRORS:
            raise UnusableFileError(f"cannot {verb} {path}: {error.strerror}; rename or remove it") from error
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free some space; to resume, rerun the same command" if is_full else ""
        raise StorageError(f"cannot {verb} {path}: {error.strerror or flatten_message(error)}{remedy}") from error
