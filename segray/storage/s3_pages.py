"""Pages of a listing of S3, parsed fast: boto3 itself takes ten times as long for the entries of a page."""

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from html import unescape
from typing import Any
from urllib.parse import unquote_plus

from segray.errors import StorageError
from segray.storage.parallel_listing import Page
from segray.storage.store import StoredFile

PAGE_SIZE = 1000
_ENTRY = re.compile(
    r"<Contents>\s*<Key>([^<]*)</Key>\s*<LastModified>([^<]*)</LastModified>\s*<ETag>([^<]*)</ETag>"
    r".*?<Size>(\d+)</Size>",
    re.DOTALL,
)
_RAW = "RawContents"


class UnsortedPageError(StorageError):
    """The keys of a page are not sorted, or not after the key that was asked for."""


class S3Pages:
    """The pages of the listing of a prefix; see ``parallel_listing.Pages``.

    Args:
        base: The bucket's URI with a slash.
        prefix: With which the keys begin.
        call: Returns the response of ListObjectsV2 for the arguments.
    """

    def __init__(self, base: str, prefix: str, call: Callable[..., dict[str, Any]]) -> None:
        self.prefix = prefix
        self._base = base
        self._call = call

    def fetch(self, after: str, until: str | None) -> Page:
        """See ``Pages.fetch``.

        Raises:
            UnsortedPageError: The store does not sort its keys, or ignores where to begin.
        """
        page = next(self._iterate_pages(self.prefix, StartAfter=after), {})
        keys: list[str] = []
        files: list[StoredFile] = []
        last = after
        for key, file in self._iterate_entries(page):
            if until is not None and key > until:
                return Page(keys, files, is_complete=True)
            if key <= last and last:
                raise UnsortedPageError(f"cannot list {self._base}{self.prefix}: {key} comes after {last}")
            last = key
            keys.append(key)
            if not key.endswith("/"):
                files.append(file)
        return Page(keys, files, is_complete=not page.get("IsTruncated"))

    def fetch_level(self, folder: str, after: str) -> tuple[Sequence[str], bool]:
        """See ``Pages.fetch_level``."""
        page = next(self._iterate_pages(folder, StartAfter=after, Delimiter="/"), {})
        entries = [*(key for key, _ in self._iterate_entries(page)), *_get_folders(page)]
        return sorted(entries), not page.get("IsTruncated")

    def iterate_files(self, delimiter: str = "") -> Iterator[StoredFile]:
        """Yield the files page by page: with a delimiter, without those in subfolders."""
        for page in self._iterate_pages(self.prefix, Delimiter=delimiter):
            yield from (file for key, file in self._iterate_entries(page) if not key.endswith("/"))

    def list_names(self) -> tuple[set[str], set[str]]:
        """Return the names of the files and of the folders directly below the prefix."""
        files: set[str] = set()
        folders: set[str] = set()
        for page in self._iterate_pages(self.prefix, Delimiter="/"):
            files |= {key[len(self.prefix) :] for key, _ in self._iterate_entries(page) if not key.endswith("/")}
            folders |= {folder[len(self.prefix) :].rstrip("/") for folder in _get_folders(page)}
        return files, folders - {""}

    def exist(self) -> bool:
        """Return whether any key begins with the prefix, also that of a folder marker."""
        return next(self._iterate_pages(self.prefix, Delimiter="/", MaxKeys=1), None) is not None

    def _iterate_pages(self, prefix: str, **options: Any) -> Iterator[dict[str, Any]]:
        """Yield the responses that are not empty."""
        options = {"Prefix": prefix, "MaxKeys": PAGE_SIZE} | {name: value for name, value in options.items() if value}
        while True:
            page = self._call(**options)
            if page.get(_RAW) or page.get("Contents") or page.get("CommonPrefixes"):
                yield page
            if not page.get("IsTruncated"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def _iterate_entries(self, page: dict[str, Any]) -> Iterator[tuple[str, StoredFile]]:
        is_quoted = page.get("EncodingType") == "url"
        for key, modified, etag, size in page.get(_RAW, ()):
            key = unquote_plus(unescape(key)) if is_quoted else unescape(key)
            etag = etag.replace("&quot;", '"').strip('"') or None  # Not by unescape, which is slow.
            yield key, StoredFile(self._base + key, int(size), etag, datetime.fromisoformat(modified).timestamp())
        for entry in page.get("Contents", ()):
            key, etag = entry["Key"], entry.get("ETag", "").strip('"') or None
            yield key, StoredFile(self._base + key, entry["Size"], etag, entry["LastModified"].timestamp())


def _get_folders(page: dict[str, Any]) -> list[str]:
    return [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]


def parse_entries_fast(client: Any) -> None:
    """Let an S3 client of boto3 return the entries of listings as they are in the response, under another name."""
    # With this pattern it is called before boto3's own handler for "before-parse.s3.*", which parses the body too.
    client.meta.events.register("before-parse.*.ListObjectsV2", take_entries)


def take_entries(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Take the entries out of a response, if they are written in the usual way, before boto3 parses the rest of it."""
    try:
        text = response_dict["body"].decode()
    except UnicodeDecodeError:
        return
    begin, end = text.find("<Contents>"), text.rfind("</Contents>") + len("</Contents>")
    entries = _ENTRY.findall(text) if begin >= 0 else []
    if entries and len(entries) == text.count("Contents>") / 2 and "<CommonPrefixes>" not in text[begin:end]:
        customized_response_dict[_RAW] = entries
        response_dict["body"] = (text[:begin] + text[end:]).encode()
