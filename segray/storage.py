"""Read, list and write files by URI, on a local disk or any object store that pyarrow's file systems take.

A URI is either a local path (``/data/a.png``, ``data/a.png``, ``file:///data/a.png``) or ``scheme://authority/key``.
Keys are taken as they are: nothing is percent-decoded, so ``s3://bucket/a%20b #1.png`` names exactly that key. Only
``file://`` URIs are decoded, as their standard says. Credentials, region and endpoint come from where the store's own
tools read them: for S3 the usual AWS chain, ``AWS_REGION`` and ``AWS_ENDPOINT_URL``.
"""

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import NativeFile, fs

from segray.errors import MissingFileError, StorageError, UnsupportedNameError, flatten_message

# Stores whose PUT is atomic: a reader sees the whole object or none. Elsewhere a rename is the atomic act.
ATOMIC_PUT_STORES = {"s3", "gcs", "abfs"}
_LOCAL = fs.LocalFileSystem()
S3_CONNECT_TIMEOUT_S = 5
S3_REQUEST_TIMEOUT_S = 30
S3_MAX_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file found by a listing."""

    uri: str
    size_bytes: int


def normalize_uri(uri: str) -> str:
    """Return the one spelling of a URI that segray stores: absolute local paths, no ``file://``, no trailing slash."""
    if uri.startswith("file://"):
        uri = unquote(uri.removeprefix("file://"))
    if is_local(uri):
        return str(Path(uri).expanduser().absolute())
    return uri.rstrip("/")


def is_local(uri: str) -> bool:
    """Say whether a URI is a path of this machine."""
    return "://" not in uri or uri.startswith("file://")


def is_relative(uri: str) -> bool:
    """Say whether a URI is a path that depends on the current folder."""
    return is_local(uri) and not uri.startswith(("/", "~", "file://"))


def join_uri(uri: str, *names: str) -> str:
    """Append path components to a URI."""
    return "/".join([uri.rstrip("/"), *names])


def get_file_name(uri: str) -> str:
    """Return the part of a URI after its last slash."""
    return uri.rsplit("/", 1)[-1]


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a URI, and the path of the URI in it.

    Raises:
        StorageError: pyarrow does not know the scheme, or cannot set up its store.
    """
    uri = normalize_uri(uri)
    if is_local(uri):
        return _LOCAL, uri
    scheme, _, rest = uri.partition("://")
    authority, _, key = rest.partition("/")
    try:
        filesystem, root = _open_store(scheme, authority)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot open {scheme}://{authority}: {flatten_message(error)}") from error
    return filesystem, f"{root.rstrip('/')}/{key}".rstrip("/") or "/"


@lru_cache(maxsize=32)
def _open_store(scheme: str, authority: str) -> tuple[fs.FileSystem, str]:
    """Return a file system and the path in it that stands for ``scheme://authority``: a bucket, a container, a root."""
    if scheme == "s3":
        return _open_s3(authority), authority
    filesystem, root = fs.FileSystem.from_uri(f"{scheme}://{authority}/")
    return filesystem, root


def _open_s3(bucket: str) -> fs.FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    location = urlsplit(endpoint) if endpoint else None
    return fs.S3FileSystem(
        region=region,
        endpoint_override=location.netloc if location else None,
        scheme=location.scheme if location else "https",
        connect_timeout=S3_CONNECT_TIMEOUT_S,
        request_timeout=S3_REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_MAX_ATTEMPTS),
    )


def list_files(uri: str, extensions: Iterable[str] | None = None) -> Iterator[StoredFile]:
    """Yield the files under a folder or prefix and all below it, in no particular order.

    Args:
        uri: Folder or prefix.
        extensions: Lower-case extensions without the dot; others are passed over. None takes every file.

    Raises:
        MissingFileError: The folder does not exist.
        StorageError: The store refused or failed.
    """
    uri = normalize_uri(uri)
    filesystem, path = open_filesystem(uri)
    wanted = None if extensions is None else tuple(f".{e}" for e in extensions)
    with _translated("list", uri):
        infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    for info in infos:
        if info.type == fs.FileType.File and (wanted is None or info.path.lower().endswith(wanted)):
            yield StoredFile(uri + info.path[len(path) :], info.size)


def list_names(uri: str, *, folders: bool = False) -> set[str]:
    """Return the names of the files, or of the folders, directly under a folder or prefix; empty if it is not there."""
    filesystem, path = open_filesystem(uri)
    wanted = fs.FileType.Directory if folders else fs.FileType.File
    with _translated("list", uri):
        infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return {info.base_name for info in infos if info.type == wanted}


def exists(uri: str) -> bool:
    """Say whether a file or a folder is at a URI."""
    filesystem, path = open_filesystem(uri)
    with _translated("look at", uri):
        return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    """Return the whole content of a file.

    Raises:
        MissingFileError: Nothing is there.
        StorageError: The store refused or failed.
    """
    with open_for_reading(uri) as stream:
        return bytes(stream.read())


@contextmanager
def open_for_reading(uri: str) -> Iterator[NativeFile]:
    """Open a file for reading at any position; what fails in the block is named as ``read_bytes`` names it."""
    filesystem, path = open_filesystem(uri)
    with _translated("read", uri), filesystem.open_input_file(path) as stream:
        yield stream


def write_bytes(uri: str, content: bytes | memoryview) -> None:
    """Store a whole file by one atomic act, replacing what was there.

    A reader, and a writer that died half-way, see the old file or the new one, never a part.

    Raises:
        StorageError: The store refused or failed; nothing was changed.
    """
    filesystem, path = open_filesystem(uri)
    with _translated("write", uri):
        if isinstance(filesystem, fs.LocalFileSystem):
            _replace_local_file(Path(path), content)
        elif filesystem.type_name in ATOMIC_PUT_STORES:
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)
        else:
            partial = f"{path}.{uuid.uuid4().hex}.tmp"
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            with filesystem.open_output_stream(partial) as stream:
                stream.write(content)
            filesystem.move(partial, path)


def _replace_local_file(path: Path, content: bytes | memoryview) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # hidden: no Parquet reader picks it up
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut can leave the new name on an empty file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_file(uri: str) -> None:
    """Remove a file; it is no error if it is not there."""
    filesystem, path = open_filesystem(uri)
    with _translated("remove", uri), suppress(FileNotFoundError):
        filesystem.delete_file(path)


@contextmanager
def _translated(verb: str, uri: str) -> Iterator[None]:
    """Turn what a file system raises into one line that names the act and the URI."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(
            f"cannot {verb} {uri}: there is nothing; check the spelling, or create it first"
        ) from error
    except PermissionError as error:
        raise StorageError(
            f"cannot {verb} {uri}: permission denied; check the rights of this user or its credentials"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot {verb} {uri}: {flatten_message(error)}") from error
    except (pa.ArrowInvalid, UnicodeError) as error:
        raise UnsupportedNameError(f"cannot {verb} {uri}: {flatten_message(error)}; rename the file") from error
