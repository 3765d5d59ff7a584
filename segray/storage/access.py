"""Tell access that is denied to one file from access that is denied to all of them."""

import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from segray.errors import StorageError
from segray.storage.files import is_readable, list_files
from segray.storage.store import StoredFile
from segray.storage.uris import is_local, normalize_uri

_NUM_LISTED = 1000  # One page of a listing.
_NUM_TRIED = 8
_VALID_FOR_S = 60  # Permissions may be withdrawn during a run.
_MAX_REMEMBERED = 10_000

_readable_folders: dict[str, float] = {}  # When a file of the folder was last read, by time.monotonic().


def can_read_beside(uri: str) -> bool:
    """Return whether another file beside a file can be read, so that the credentials work.

    Reads one byte of up to 8 other files of the same folder or, if there are none, of the folder above. False also
    means that the folder cannot be listed. A success holds for the whole folder for a minute.
    """
    folder = _get_folder(normalize_uri(uri))
    if time.monotonic() - _readable_folders.get(folder, -_VALID_FOR_S) < _VALID_FOR_S:
        return True
    with suppress(StorageError):
        others = list(_list_others(folder, uri)) or list(_list_others(_get_folder(folder), uri, recursive=True))
        if any(is_readable(file.uri) for file in others[:: -(-len(others) // _NUM_TRIED) or 1]):
            if len(_readable_folders) >= _MAX_REMEMBERED:
                _readable_folders.clear()
            _readable_folders[folder] = time.monotonic()
            return True
    return False


def _get_folder(uri: str) -> str:
    """Return the folder of a file or folder: the bucket and the root are their own."""
    above = uri.rpartition("/")[0]
    if is_local(uri):
        return above or "/"
    return uri if above.endswith(":/") else above


def _list_others(folder: str, uri: str, recursive: bool = False) -> Iterator[StoredFile]:
    files = islice(list_files(folder, recursive=recursive), _NUM_LISTED)
    return (file for file in files if file.uri != uri and file.size_bytes)
