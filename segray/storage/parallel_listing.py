"""List a prefix with several requests at a time, in the order of its keys.

A store returns a listing page by page, each after the key at which the last one ended. Here each page tells where to
begin further ones (``key_ranges``): at the next subfolders, or at guessed keys. A hundred million keys are a hundred
thousand pages, which take an hour and a half one after the other at 50 ms each.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from segray.storage.key_ranges import KeyRange, count_entries, divide_by_entries, divide_by_guess, find_level
from segray.storage.store import StoredFile

_NUM_THREADS = 32  # As many as a client of S3 has connections.
_MAX_PAGES_AHEAD = 128  # At 0.4 MB each.
_MAX_GUESSES = 32


@dataclass(frozen=True)
class Page:
    """The first keys of a range.

    Attributes:
        keys: The keys, in order.
        files: Those that are files: all but the folder markers.
        is_complete: Whether there are no more keys in the range.
    """

    keys: Sequence[str]
    files: Sequence[StoredFile]
    is_complete: bool


class Pages(Protocol):
    """The pages of one listing: of all keys that begin with a prefix."""

    prefix: str

    def fetch(self, after: str, until: str | None) -> Page:
        """Return the first page of the keys after a key (exclusive) up to another (inclusive; None is the end).

        A page without keys is complete.
        """
        ...

    def fetch_level(self, folder: str, after: str) -> tuple[Sequence[str], bool]:
        """Return the first files and subfolders of a folder after a key, in order, and whether these are all."""
        ...


@dataclass
class _Guesses:
    """Ranges that were guessed together, and the rest after them: how many of them had about a page of keys."""

    num: int
    num_seen: int = 0
    num_right: int = 0
    is_rest_right: bool = False

    def record(self, is_rest: bool, is_right: bool) -> None:
        self.num_seen += 1
        self.num_right += is_right and not is_rest
        self.is_rest_right |= is_right and is_rest

    def suggest_next(self, num_guesses: int) -> int:
        """Return how many to guess from now on: as many as were right, or more if all were."""
        if self.num_seen <= self.num:  # With the rest, there is one more.
            return num_guesses
        if self.num_right < self.num:
            return self.num_right
        return max(num_guesses, min(1 + self.num * 3 // 2, _MAX_GUESSES)) if self.is_rest_right else num_guesses


@dataclass
class _Part:
    """A range of keys, the request for its first page, and the parts after that page."""

    range: KeyRange
    guesses: _Guesses | None = None
    future: "Future[Sequence[StoredFile]] | None" = None
    children: "list[_Part]" = field(default_factory=list)

    @property
    def is_running(self) -> bool:
        return self.future is not None and not self.future.done()


class ParallelListing:
    """One listing. The first page is fetched alone, so a short listing is a single request."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._lock = threading.Lock()
        self._num_held = 0  # Pages that are fetched and whose files are not yet yielded.
        self._page_size = 0
        self._num_guesses = 2
        self._is_idle = True  # Whether there are too few parts to keep all threads busy.

    def __iter__(self) -> Iterator[StoredFile]:
        """Yield the files in the order of their keys, and hold at most ``_MAX_PAGES_AHEAD`` pages in memory."""
        first = _Part(KeyRange("", None))
        yield from self._fetch(first)
        if not first.children:
            return
        pool = ThreadPoolExecutor(_NUM_THREADS, "segray-listing")
        try:
            yield from self._iterate_parts(first.children, pool)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _iterate_parts(self, parts: Sequence[_Part], pool: ThreadPoolExecutor) -> Iterator[StoredFile]:
        waiting = list(reversed(parts))  # The next one is at the end.
        while waiting:
            running = self._submit(waiting, pool)
            future = waiting[-1].future
            if future is None or not future.done():
                wait(running, return_when=FIRST_COMPLETED)
                continue
            part = waiting.pop()
            yield from future.result()
            with self._lock:
                self._num_held -= 1
            waiting += reversed(part.children)
            part.future, part.children = None, []  # The list that it came from still holds the part.

    def _submit(self, waiting: Sequence[_Part], pool: ThreadPoolExecutor) -> "list[Future[Sequence[StoredFile]]]":
        """Request the first pages that are not yet requested; return the requests that are in flight."""
        window = _MAX_PAGES_AHEAD if self._num_held < _MAX_PAGES_AHEAD else _NUM_THREADS
        ahead = list(islice(_walk(reversed(waiting)), window))
        unsent = [part for part in ahead if part.future is None]
        num_free = max(0, _NUM_THREADS - sum(part.is_running for part in ahead))
        self._is_idle = len(unsent) - num_free < _NUM_THREADS
        for part in unsent[:num_free]:
            part.future = pool.submit(self._fetch, part)
        return [part.future for part in ahead if part.future is not None and part.is_running]

    def _fetch(self, part: _Part) -> Sequence[StoredFile]:
        """Return the first files of a part, and divide what is left of it."""
        page = self._pages.fetch(part.range.after, part.range.until)
        with self._lock:
            self._num_held += 1
            if part.guesses is not None:
                part.guesses.record(part.range.is_rest, 2 * len(page.keys) > self._page_size)
                self._num_guesses = part.guesses.suggest_next(self._num_guesses)
        if not page.is_complete:
            self._page_size = len(page.keys)
            ranges = self._divide(part.range, page.keys)
            guesses = _Guesses(sum(rest.is_guess for rest in ranges))
            part.children = [_Part(rest, guesses if rest.is_guess or rest.is_rest else None) for rest in ranges]
        return page.files

    def _divide(self, whole: KeyRange, keys: Sequence[str]) -> list[KeyRange]:
        prefix = self._pages.prefix
        rest = KeyRange(keys[-1], whole.until)
        if rest.after == rest.until:
            return []
        folder = find_level(prefix, keys, whole.level)
        if folder is None:
            return divide_by_guess(rest, prefix, keys, self._num_guesses if self._is_idle else 0)
        entries, is_last = self._pages.fetch_level(folder, rest.after)
        return divide_by_entries(rest, prefix, folder, entries, count_entries(folder, keys), is_last)


def _walk(parts: "Iterator[_Part]") -> Iterator[_Part]:
    """Yield parts, and after each one those that its page led to."""
    for part in parts:
        yield part
        if part.future is not None and not part.is_running:
            yield from _walk(iter(part.children))
