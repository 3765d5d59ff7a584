"""Read, list and write files by URI: on local disks, on S3, and in any other store that pyarrow supports."""

from segray.storage.access import can_read_beside
from segray.storage.files import (
    create_bytes,
    exists,
    find_file,
    list_files,
    list_names,
    open_for_reading,
    read_bytes,
    remove_file,
    remove_folder,
    sweep_folder,
    write_bytes,
)
from segray.storage.parquet import ParquetReader, read_columns
from segray.storage.store import StoredFile
from segray.storage.uris import get_file_name, is_local, is_relative, join_uri, normalize_uri, split_uri

__all__ = [
    "ParquetReader",
    "StoredFile",
    "can_read_beside",
    "create_bytes",
    "exists",
    "find_file",
    "get_file_name",
    "is_local",
    "is_relative",
    "join_uri",
    "list_files",
    "list_names",
    "normalize_uri",
    "open_for_reading",
    "read_bytes",
    "read_columns",
    "remove_file",
    "remove_folder",
    "split_uri",
    "sweep_folder",
    "write_bytes",
]
