"""Tests of segray.storage.parallel_listing and key_ranges: the same files in the same order as page by page."""

import bisect
import gc
import heapq
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from segray.errors import StorageError
from segray.storage import parallel_listing
from segray.storage.parallel_listing import Page, ParallelListing
from segray.storage.store import StoredFile


class FakePages:
    """The listing of a sorted list of keys, in small pages."""

    def __init__(self, keys: Sequence[str], prefix: str = "", page_size: int = 10) -> None:
        self.prefix = prefix
        self.num_requests = 0
        self.num_fetched = 0
        self._keys = sorted(key for key in keys if key.startswith(prefix))
        self._page_size = page_size

    def fetch(self, after: str, until: str | None) -> Page:
        self.num_requests += 1
        begin = bisect.bisect_right(self._keys, after)
        end = len(self._keys) if until is None else bisect.bisect_right(self._keys, until)
        keys = self._keys[begin : min(end, begin + self._page_size)]
        files = [StoredFile(key, 1, None, 0) for key in keys if not key.endswith("/")]
        self.num_fetched += len(files)
        # As from a store, a full page is not known to be the last one of its range unless it is that of the listing.
        is_full = len(keys) == self._page_size and begin + len(keys) < len(self._keys)
        return Page(keys, files, is_complete=not is_full)

    def fetch_level(self, folder: str, after: str) -> tuple[Sequence[str], bool]:
        self.num_requests += 1
        assert folder.startswith(self.prefix)
        entries: list[str] = []
        position = bisect.bisect_right(self._keys, after)
        while position < len(self._keys) and self._keys[position].startswith(folder):
            if len(entries) == self._page_size:
                return entries, False
            name, slash, _ = self._keys[position][len(folder) :].partition("/")
            entries.append(folder + name + slash)
            end = folder + name + "0" if slash else entries[-1] + "\0"
            position = bisect.bisect_left(self._keys, end)
        return entries, True


def list_keys(pages: FakePages) -> list[str]:
    return [file.uri for file in ParallelListing(pages)]


def make_folders(num_folders: int, size: int) -> list[str]:
    return [f"in/{folder:04}/frame-{number:06}.jpg" for folder in range(num_folders) for number in range(size)]


def make_random(rng: random.Random) -> list[str]:
    alphabet = rng.choice(["ab/", "01/-.", "a/\U0001f600é\uffff", "abcdefghij", "/", "0123456789abcdef"])
    length = rng.randint(1, 12)
    return ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, length))) for _ in range(rng.randint(0, 150))]


LISTINGS: dict[str, Callable[[random.Random], list[str]]] = {
    "folders": lambda rng: make_folders(12, 25),
    "small folders": lambda rng: make_folders(100, 2),
    "large folders": lambda rng: make_folders(3, 80),
    "one large folder, then small ones": lambda rng: make_folders(1, 99) + [f"in/x{n:03}/a" for n in range(60)],
    "numbers": lambda rng: [f"img_{number:08}.png" for number in range(200)],
    "numbers without zeros": lambda rng: [f"img_{number}.png" for number in range(250)],
    "hashes": lambda rng: [f"{rng.getrandbits(64):016x}" for _ in range(200)],
    "days": lambda rng: [
        f"2026/{m:02}/{d:02}/{h:02}/{n}.jpg"
        for m in range(1, 4)
        for d in range(1, 9)
        for h in range(5)
        for n in range(9)
    ],
    "clusters": lambda rng: [f"{c * 7919 % 1000:03}-{n:06}" for c in range(30) for n in range(rng.randint(1, 60))],
    "markers": lambda rng: [f"{n:03}/" for n in range(200)] + [f"{n:03}/x" for n in range(0, 200, 3)],
    "adversarial": lambda rng: ["a-b", "a/b", "a", "a//b", "a/", "/", "//", "/a", "a0", "a\U0001f600", "a\uffff", "é"],
    **{f"random {seed}": make_random for seed in range(20)},
}


@pytest.mark.parametrize("name", LISTINGS)
@pytest.mark.parametrize("page_size", [1, 3, 10])
def test_files_and_their_order_are_those_of_a_serial_listing(
    name: str, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_listing, "_NUM_THREADS", 5)
    keys = sorted(set(LISTINGS[name](random.Random(name))))
    for prefix in {"", *(key[: len(key) // 2] for key in keys[::67])}:
        expected = [key for key in keys if key.startswith(prefix) and not key.endswith("/")]
        assert list_keys(FakePages(keys, prefix, page_size)) == expected


@dataclass
class VirtualFuture:
    """The result of a request that ends at a time."""

    pool: "VirtualPool"
    ends_at: int
    result_value: Sequence[StoredFile]

    def done(self) -> bool:
        return self.pool.now >= self.ends_at

    def result(self) -> Sequence[StoredFile]:
        assert self.done()
        return self.result_value


class VirtualPool:
    """A pool of threads in which every request takes one unit of time, and nothing else takes any."""

    def __init__(self, pages: FakePages) -> None:
        self.now = 1  # The first page is fetched before there is a pool.
        self._pages = pages
        self._free_at = [self.now] * parallel_listing._NUM_THREADS

    def submit(self, act: Callable[[Any], Sequence[StoredFile]], part: object) -> VirtualFuture:
        before = self._pages.num_requests
        result = act(part)
        ends_at = max(self.now, heapq.heappop(self._free_at)) + self._pages.num_requests - before
        heapq.heappush(self._free_at, ends_at)
        return VirtualFuture(self, ends_at, result)

    def wait(self, futures: Sequence[VirtualFuture], return_when: str) -> None:
        self.now = max(self.now, min(future.ends_at for future in futures))

    def shutdown(self, **options: object) -> None:
        """Do nothing."""


FEW_IN_VAIN = {
    "many folders": make_folders(150, 1000),
    "small folders": make_folders(3000, 5),
    "folders of a page and a half": make_folders(1000, 150),
    "large folders": make_folders(3, 20_000),
    "numbers": [f"img_{number:08}.png" for number in range(100_000)],
    "hashes": [f"{random.Random(number).getrandbits(64):016x}" for number in range(100_000)],
}


@pytest.mark.parametrize("name", FEW_IN_VAIN)
def test_a_listing_uses_many_requests_at_a_time_and_few_in_vain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = FEW_IN_VAIN[name]
    pages = FakePages(keys, page_size=100)
    pool = VirtualPool(pages)
    monkeypatch.setattr(parallel_listing, "ThreadPoolExecutor", lambda *arguments: pool)
    monkeypatch.setattr(parallel_listing, "wait", pool.wait)
    num_yielded = most_held = 0
    for _ in ParallelListing(pages):
        num_yielded += 1
        most_held = max(most_held, pages.num_fetched - num_yielded)
    num_pages = len(keys) / 100
    assert num_yielded == len(keys)
    assert pages.num_requests < 1.6 * num_pages
    assert num_pages / pool.now > 9  # Times as fast as one page after the other.
    assert most_held < 200 * 100


@pytest.mark.parametrize("keys", [make_folders(300, 40), make_folders(3, 4000)], ids=["folders", "large folders"])
def test_files_that_were_yielded_are_not_held(keys: list[str]) -> None:
    most = 0
    for number, _ in enumerate(ParallelListing(FakePages(keys))):
        if number % 1000 == 999:
            most = max(most, sum(type(value) is StoredFile for value in gc.get_objects()))
    assert most < 10 * (parallel_listing._MAX_PAGES_AHEAD + 2 * parallel_listing._NUM_THREADS)


def test_a_short_listing_is_one_request_without_threads() -> None:
    pages = FakePages([f"{number}" for number in range(10)])
    before = threading.active_count()
    assert len(list_keys(pages)) == 10
    assert pages.num_requests == 1
    assert threading.active_count() == before


def test_an_error_comes_after_the_files_before_it() -> None:
    class BrokenPages(FakePages):
        def fetch(self, after: str, until: str | None) -> Page:
            if after >= "000500":
                raise StorageError("cannot list: permission denied")
            return super().fetch(after, until)

    found: list[str] = []
    listing = ParallelListing(BrokenPages([f"{number:06}" for number in range(1000)]))
    with pytest.raises(StorageError, match="permission denied"):
        found.extend(file.uri for file in listing)
    assert found == [f"{number:06}" for number in range(len(found))]
    assert len(found) >= 500
