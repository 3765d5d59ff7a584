"""Google Cloud Storage and Azure Blob Storage, through obstore: ``gs://bucket``, ``az://container`` and ``abfs://``.

obstore lists page by page with entity tags and creates files conditionally, which pyarrow does not. It reads
credentials as Google's and Azure's tools do.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import AzureStore, GCSStore

from segray.errors import MissingFileError, StorageError, UnusableFileError
from segray.storage.cloud_errors import describe_reason, translate_error
from segray.storage.rate_limit import RateLimiter
from segray.storage.retries import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, retrying
from segray.storage.store import Content, StoredFile
from segray.storage.uris import split_azure_authority

if TYPE_CHECKING:
    from obstore import ObjectMeta

ResultT = TypeVar("ResultT")

_PAGE_SIZE = 1000
_TIMEOUT = timedelta(minutes=10)  # Of a whole request. obstore's default, 30 s, would cut large files off.
_NO_RETRIES: Any = {"max_retries": 0}  # Only `retrying` retries, because it adapts the rate too.


class CloudStore:
    """A bucket of Google Cloud Storage, or a container of Azure Blob Storage.

    obstore does not support keys that begin with a slash or contain two in a row. They are refused.
    """

    def __init__(self, scheme: str, authority: str) -> None:
        self._base = f"{scheme}://{authority}/"
        self._store = _open_google(authority) if scheme in ("gs", "gcs") else _open_azure(authority)
        self._limiter = RateLimiter()

    def list(self, folder: str, recursive: bool, start: str) -> Iterator[StoredFile]:
        """See ``Store.list``."""
        begin = (f"{folder}/" if folder else "") + start
        if recursive:
            files = self._iterate(begin.rpartition("/")[0])
        else:
            files = iter(sorted(map(self._describe, self._list_level(folder)[0]), key=lambda file: file.uri))
        is_empty = True
        for file in files:
            is_empty = False
            if file.uri.startswith(self._base + begin):
                yield file
        if is_empty and (not start or next(self._iterate(folder), None) is None):
            raise MissingFileError(f"cannot list {self._base}{folder}: no such folder or prefix; check the spelling")

    def _iterate(self, folder: str) -> Iterator[StoredFile]:
        """Yield the files under a folder in the order of the store.

        obstore removes the slash at the end of a folder marker, an empty object such as ``a/``. Such an object is
        omitted if it comes after ``a-b``, where ``a/`` belongs but ``a`` does not, or before ``a/b``.
        """
        previous: StoredFile | None = None
        for page in self._iterate_pages(folder):
            for file in map(self._describe, page):
                if previous is not None:
                    if not file.size_bytes and file.uri < previous.uri:
                        continue
                    if previous.size_bytes or not file.uri.startswith(f"{previous.uri}/"):
                        yield previous
                previous = file
        if previous is not None:
            yield previous

    def _iterate_pages(self, folder: str) -> "Iterator[Sequence[ObjectMeta]]":
        pages: Any = None
        last: str | None = None

        def fetch() -> "Sequence[ObjectMeta] | None":
            nonlocal pages
            if pages is None:
                pages = iter(obstore.list(self._store, folder or None, offset=last, chunk_size=_PAGE_SIZE))
            try:
                return next(pages, None)
            except BaseError:
                pages = None  # It ends with its first error; the next attempt begins after the last page.
                raise

        while page := self._retry("list", folder, fetch):
            yield page
            last = page[-1]["path"]

    def _list_level(self, folder: str) -> "tuple[Sequence[ObjectMeta], set[str]]":
        """Return the files directly in a folder, and the paths of its subfolders."""
        found = self._retry("list", folder, lambda: obstore.list_with_delimiter(self._store, folder or None))
        files = [meta for meta in found["objects"] if meta["path"] != folder]  # Without the folder's own marker.
        return files, set(found["common_prefixes"])

    def list_names(self, folder: str, folders: bool) -> set[str]:
        """See ``Store.list_names``."""
        files, subfolders = self._list_level(folder)
        return {path.rpartition("/")[2] for path in (subfolders if folders else [meta["path"] for meta in files])}

    def find(self, key: str) -> StoredFile | None:
        """See ``Store.find``."""
        try:
            return self._describe(self._retry("stat", key, lambda: obstore.head(self._store, key)))
        except MissingFileError:
            return None

    def read(self, key: str) -> Content:
        """See ``Store.read``."""

        def get() -> Content:
            result = obstore.get(self._store, key)
            return Content(bytes(result.bytes()), _get_etag(result.meta))

        return self._retry("read", key, get)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """See ``Store.read_range``."""

        def get() -> bytes:
            return bytes(obstore.get_range(self._store, key, start=start, end=end))

        return self._retry("read", key, get) if end > start else b""

    def write(self, key: str, content: bytes | memoryview) -> None:
        """See ``Store.write``. One PUT, which the store applies atomically."""
        self._retry("write", key, lambda: obstore.put(self._store, key, bytes(content), use_multipart=False))

    def create(self, key: str, content: bytes) -> bool:
        """See ``Store.create``. One PUT on the condition that there is no such file."""

        def put() -> bool:
            try:
                obstore.put(self._store, key, content, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
            return True

        return self._retry("write", key, put)

    def remove(self, key: str) -> None:
        """See ``Store.remove``."""
        with suppress(MissingFileError):
            self._retry("remove", key, lambda: obstore.delete(self._store, key))

    def _describe(self, meta: "ObjectMeta") -> StoredFile:
        return StoredFile(self._base + meta["path"], meta["size"], _get_etag(meta), meta["last_modified"].timestamp())

    def _retry(self, verb: str, key: str, act: Callable[[], ResultT]) -> ResultT:
        uri = self._base + key
        if "//" in f"/{key}":  # obstore would remove the first slash of the key.
            raise UnusableFileError(f"cannot {verb} {uri}: an empty name between two slashes; rename the file")

        def act_translated() -> ResultT:
            try:
                return act()
            except (BaseError, OSError, ValueError) as error:
                # Not chained: the messages of obstore may contain signatures.
                raise translate_error(error, verb, uri) from None

        return retrying(verb, uri, act_translated, self._limiter)


def _get_etag(meta: "ObjectMeta") -> str | None:
    return (meta["e_tag"] or "").strip('"') or None


def _build_options(endpoint: str) -> Any:
    return {
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        "read_timeout": timedelta(seconds=READ_TIMEOUT_S),
        "timeout": _TIMEOUT,
        "allow_http": endpoint.startswith("http://"),
    }


def _open_google(authority: str) -> GCSStore:
    user, _, bucket = authority.rpartition("@")
    endpoint = os.environ.get("GOOGLE_BASE_URL") or os.environ.get("STORAGE_EMULATOR_HOST") or ""
    config: Any = {"skip_signature": True} if user == "anonymous" else {}
    if endpoint:
        config["base_url"] = endpoint
    try:
        return GCSStore(bucket, config=config, client_options=_build_options(endpoint), retry_config=_NO_RETRIES)
    except (BaseError, OSError, ValueError) as error:
        raise StorageError(f"cannot open gs://{bucket}: {describe_reason(error)}") from None


def _open_azure(authority: str) -> AzureStore:
    container, account, endpoint = split_azure_authority(authority)
    config: Any = {name: value for name, value in (("account_name", account), ("endpoint", endpoint)) if value}
    options = _build_options(endpoint or os.environ.get("AZURE_STORAGE_ENDPOINT", ""))
    try:
        return AzureStore(container, config=config, client_options=options, retry_config=_NO_RETRIES)
    except (BaseError, OSError, ValueError) as error:
        raise StorageError(
            f"cannot open az://{container}: {describe_reason(error)}; name the account in the URI, "
            "abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/, or in AZURE_STORAGE_ACCOUNT_NAME"
        ) from None
