"""Lists the fragments of a run whose file is written."""

from collections.abc import Iterator
from typing import NamedTuple

from segray.errors import MissingFileError
from segray.runs.plan import FRAGMENT_NAME
from segray.storage import StoredFile, get_file_name, join_uri, list_files


class WrittenFragment(NamedTuple):
    """The file of a fragment, as a listing describes it.

    Attributes:
        size_bytes: Its size.
        modified_s: Modification time, in seconds since 1970.
    """

    size_bytes: int
    modified_s: float


def list_written_fragments(output_uri: str, num_fragments: int | None = None) -> dict[int, WrittenFragment]:
    """Return the fragments whose file exists, by number and ascending; files are written atomically.

    Args:
        output_uri: The run folder.
        num_fragments: Number of planned fragments; files of others are left out. None returns all.

    Raises:
        StorageError: The store refused the request or failed.
    """
    found = {}
    for file in _list_folder(join_uri(output_uri, "images")):
        match = FRAGMENT_NAME.fullmatch(get_file_name(file.uri))
        if match and (num_fragments is None or int(match[1]) < num_fragments):
            found[int(match[1])] = WrittenFragment(file.size_bytes, file.modified_s)
    return found


def _list_folder(uri: str) -> Iterator[StoredFile]:
    try:
        yield from list_files(uri, recursive=False)
    except MissingFileError:
        return  # No fragment has been written yet.
