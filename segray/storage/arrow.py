"""Other stores, such as ``hdfs://``, through pyarrow; and pyarrow's file systems of all stores, for Ray Train."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from segray.errors import ForbiddenFileError, MissingFileError, StorageError, UnusableFileError
from segray.storage.rate_limit import RateLimiter
from segray.storage.redaction import describe_error
from segray.storage.retries import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, TransientError, retrying
from segray.storage.store import Content, StoredFile
from segray.storage.uris import split_azure_authority, split_uri

ResultT = TypeVar("ResultT")

_GOOGLE_RETRY_FOR_S = 10


class ArrowStore:
    """A name node.

    Entity tags are built from modification time and size, because pyarrow's listings contain no entity tags.
    """

    def __init__(self, scheme: str, authority: str) -> None:
        self._base = f"{scheme}://{authority}/"
        self._filesystem, root = _open(self._base)
        self._root = root.rstrip("/")
        self._limiter = RateLimiter()

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
        """See ``Store.write``. Writes a hidden temporary file in the same folder and renames it."""
        self._retry("write", key, lambda: self._write(self._path(key), content))

    def _write(self, path: str, content: bytes | memoryview) -> None:
        folder, _, name = path.rpartition("/")
        partial = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
        self._filesystem.create_dir(folder, recursive=True)
        try:
            with self._filesystem.open_output_stream(partial) as stream:
                stream.write(content)
            self._filesystem.move(partial, path)
        except BaseException:
            with suppress(OSError):
                self._filesystem.delete_file(partial)
            raise

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
                kind = ForbiddenFileError if verb in ("read", "stat") else StorageError
                raise kind(
                    f"cannot {verb} {uri}: permission denied; check the permissions of these credentials"
                ) from error
            except OSError as error:  # pyarrow does not distinguish transient errors, so all of them are retried.
                raise TransientError(describe_error(error)) from error
            except (pa.ArrowInvalid, UnicodeError) as error:
                raise UnusableFileError(f"cannot {verb} {uri}: {describe_error(error)}; rename the file") from error
            except pa.ArrowException as error:
                raise StorageError(f"cannot {verb} {uri}: {describe_error(error)}") from error

        return retrying(verb, uri, act_translated, self._limiter)


@lru_cache(maxsize=32)
def _open(base: str) -> tuple[fs.FileSystem, str]:
    # Google's client retries by itself, for 15 minutes by default.
    limit = f"?retry_limit_seconds={_GOOGLE_RETRY_FOR_S}" if base.startswith(("gs://", "gcs://")) else ""
    try:
        filesystem, root = fs.FileSystem.from_uri(base + limit)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot open {base}: {describe_error(error)}") from error
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
    if scheme in ("az", "abfs", "abfss"):
        container, account, endpoint = split_azure_authority(authority)
        return _open_azure(account, endpoint), f"{container}/{key}".rstrip("/")
    filesystem, root = _open(f"{scheme}://{authority}/")
    return filesystem, f"{root.rstrip('/')}/{key}".rstrip("/") or "/"


def _open_azure(account: str, endpoint: str) -> fs.FileSystem:
    """Open an account, with the environment variables that ``storage.cloud`` reads too."""
    if account:
        domain = urlsplit(endpoint).netloc.partition(".blob.")[2]
        options = {"blob_storage_authority": f".blob.{domain}", "dfs_storage_authority": f".dfs.{domain}"}
    elif location := os.environ.get("AZURE_STORAGE_ENDPOINT"):
        parts = urlsplit(location)
        options = {f"{kind}_storage_authority": parts.netloc for kind in ("blob", "dfs")}
        options |= {f"{kind}_storage_scheme": parts.scheme for kind in ("blob", "dfs")}
    else:
        options = {}
    names = (("account_key", "AZURE_STORAGE_ACCOUNT_KEY"), ("sas_token", "AZURE_STORAGE_SAS_TOKEN"))
    options |= {option: os.environ[name] for option, name in names if os.environ.get(name)}
    try:
        return fs.AzureFileSystem(account or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", ""), **options)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot open the Azure account {account}: {describe_error(error)}") from None


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
        raise StorageError(f"cannot open s3://{bucket}: {describe_error(error)}") from error
