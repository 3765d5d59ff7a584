"""Stores other than local disks and S3, through pyarrow: ``gs://``, ``abfs://``, ``hdfs://`` and others."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from segray.errors import MissingFileError, StorageError, UnusableFileError, flatten_message
from segray.storage.store import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, Content, StoredFile, TransientError, retrying
from segray.storage.uris import split_uri

ResultT = TypeVar("ResultT")

CLIENT_RETRY_FOR_S = 10

# In these stores a PUT is atomic: a reader sees the whole object or none. Elsewhere files are written under another
# name and renamed.
_ATOMIC_PUT_STORES = {"gcs", "abfs"}


class ArrowStore:
    """A bucket, container or name node.

    Entity tags are built from modification time and size, because pyarrow's listings contain no entity tags.
    """

    def __init__(self, scheme: str, authority: str) -> None:
        self._base = f"{scheme}://{authority}/"
        self._filesystem, root = _open(self._base)
        self._root = root.rstrip("/")

    def list(self, folder: str, recursive: bool, start: str) -> Iterator[StoredFile]:
        """See ``Store.list``. The whole listing is held in memory: pyarrow does not stream it."""
        selector = fs.FileSelector(self._path(folder), recursive=recursive)
        infos = self._retry("list", folder, lambda: self._filesystem.get_file_info(selector))
        files = (self._describe(info) for info in infos if info.type == fs.FileType.File)
        begin = self._base + (f"{folder}/" if folder else "") + start
        return iter(sorted((file for file in files if file.uri.startswith(begin)), key=lambda file: file.uri))

    def list_names(self, folder: str, folders: bool) -> set[str]:
        """See ``Store.list_names``."""
        selector = fs.FileSelector(self._path(folder), allow_not_found=True)
        infos = self._retry("list", folder, lambda: self._filesystem.get_file_info(selector))
        wanted = fs.FileType.Directory if folders else fs.FileType.File
        return {info.base_name for info in infos if info.type == wanted}

    def find(self, key: str) -> StoredFile | None:
        """See ``Store.find``."""
        info = self._retry("stat", key, lambda: self._filesystem.get_file_info(self._path(key)))
        return self._describe(info) if info.type == fs.FileType.File else None

    def read(self, key: str) -> Content:
        """See ``Store.read``."""

        def read() -> Content:
            etag = self._describe(self._filesystem.get_file_info(self._path(key))).etag
            with self._filesystem.open_input_stream(self._path(key)) as stream:
                return Content(stream.read(), etag)

        return self._retry("read", key, read)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """See ``Store.read_range``."""

        def read() -> bytes:
            with self._filesystem.open_input_file(self._path(key)) as file:
                return bytes(file.read_at(end - start, start))

        return self._retry("read", key, read)

    def write(self, key: str, content: bytes | memoryview) -> None:
        """See ``Store.write``."""
        self._retry("write", key, lambda: self._write(self._path(key), content))

    def _write(self, path: str, content: bytes | memoryview) -> None:
        if self._filesystem.type_name in _ATOMIC_PUT_STORES:
            with self._filesystem.open_output_stream(path) as stream:
                stream.write(content)
            return
        partial = f"{path}.{uuid.uuid4().hex}.tmp"
        self._filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with self._filesystem.open_output_stream(partial) as stream:
            stream.write(content)
        self._filesystem.move(partial, path)

    def create(self, key: str, content: bytes) -> bool:
        """See ``Store.create``. pyarrow has no conditional write, so two simultaneous calls may both return True."""
        if self.find(key) is not None:
            return False
        self.write(key, content)
        return True

    def remove(self, key: str) -> None:
        """See ``Store.remove``."""
        with suppress(MissingFileError):
            self._retry("remove", key, lambda: self._filesystem.delete_file(self._path(key)))

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/") or "/"

    def _describe(self, info: fs.FileInfo) -> StoredFile:
        etag = None if info.mtime_ns is None else f"{info.mtime_ns:x}-{info.size or 0:x}"
        return StoredFile(
            self._base + info.path[len(self._root) :].lstrip("/"), info.size or 0, etag, (info.mtime_ns or 0) / 1e9
        )

    def _retry(self, verb: str, key: str, act: Callable[[], ResultT]) -> ResultT:
        uri = self._base + key

        def act_translated() -> ResultT:
            try:
                return act()
            except FileNotFoundError as error:
                raise MissingFileError(
                    f"cannot {verb} {uri}: no such file or folder; check the spelling, or create it first"
                ) from error
            except PermissionError as error:
                raise StorageError(
                    f"cannot {verb} {uri}: permission denied; check the permissions of these credentials"
                ) from error
            except OSError as error:  # pyarrow does not distinguish transient errors, so all of them are retried.
                raise TransientError(flatten_message(error)) from error
            except (pa.ArrowInvalid, UnicodeError) as error:
                raise UnusableFileError(f"cannot {verb} {uri}: {flatten_message(error)}; rename the file") from error
            except pa.ArrowException as error:  # For example, missing credentials for Azure.
                raise StorageError(f"cannot {verb} {uri}: {flatten_message(error)}") from error

        return retrying(verb, uri, act_translated)


@lru_cache(maxsize=32)
def _open(base: str) -> tuple[fs.FileSystem, str]:
    # Google's client retries by itself, for 15 minutes by default.
    limit = f"?retry_limit_seconds={CLIENT_RETRY_FOR_S}" if base.startswith(("gs://", "gcs://")) else ""
    try:
        filesystem, root = fs.FileSystem.from_uri(base + limit)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot open {base}: {flatten_message(error)}") from error
    return filesystem, root


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Return pyarrow's file system for a URI and the path in it, as Ray Train expects them.

    Raises:
        StorageError: pyarrow does not know the scheme, or cannot open the store.
    """
    scheme, authority, key = split_uri(uri)
    if not scheme:
        return fs.LocalFileSystem(), key
    if scheme == "s3":
        return _open_s3(authority), f"{authority}/{key}".rstrip("/")
    filesystem, root = _open(f"{scheme}://{authority}/")
    return filesystem, f"{root.rstrip('/')}/{key}".rstrip("/") or "/"


def _open_s3(bucket: str) -> fs.FileSystem:
    from botocore.exceptions import BotoCoreError

    from segray.storage.s3 import find_endpoint

    try:
        endpoint, region = find_endpoint()
        location = urlsplit(endpoint) if endpoint else None
        return fs.S3FileSystem(
            region=region or ("us-east-1" if endpoint else fs.resolve_s3_region(bucket)),
            endpoint_override=location.netloc if location else None,
            scheme=location.scheme if location else "https",
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=READ_TIMEOUT_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=5),
        )
    except (OSError, BotoCoreError) as error:
        raise StorageError(f"cannot open s3://{bucket}: {flatten_message(error)}") from error
