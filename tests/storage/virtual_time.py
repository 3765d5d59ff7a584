"""Virtual time for threads: sleeping takes none, and only one thread runs at a time."""

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable


class VirtualTime:
    """A clock that stands still while a thread runs, and jumps to the next one to wake when that thread sleeps."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._order = itertools.count()
        self._sleeping: list[tuple[float, int, threading.Lock]] = []
        self._errors: list[BaseException] = []

    def clock(self) -> float:
        """Return the time in seconds."""
        return self._now_s

    def sleep(self, seconds: float) -> None:
        """Let other threads run for a while."""
        wake = self._fall_asleep(seconds)
        self._wake_next()
        wake.acquire()

    def run(self, acts: Iterable[Callable[[], object]]) -> None:
        """Call each function in a thread of its own until all have returned; raise the first error of one."""
        threads = [threading.Thread(target=self._call, args=(act, self._fall_asleep(0)), daemon=True) for act in acts]
        for thread in threads:
            thread.start()
        self._wake_next()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _call(self, act: Callable[[], object], wake: threading.Lock) -> None:
        wake.acquire()
        try:
            act()
        except BaseException as error:
            self._errors.append(error)
        if self._sleeping:
            self._wake_next()

    def _fall_asleep(self, seconds: float) -> threading.Lock:
        wake = threading.Lock()
        wake.acquire()
        heapq.heappush(self._sleeping, (self._now_s + seconds, next(self._order), wake))
        return wake

    def _wake_next(self) -> None:
        self._now_s, _, wake = heapq.heappop(self._sleeping)
        wake.release()


class ThrottlingServer:
    """A store in virtual time that answers a number of requests per second and throttles all others.

    Attributes:
        num_answered: Number of requests that were answered.
        num_throttled: Number of requests that were throttled.
    """

    def __init__(self, time: VirtualTime, requests_per_s: float, latency_s: float = 0.05, burst_s: float = 0.1) -> None:
        self._time = time
        self._interval_s = 1 / requests_per_s
        self._latency_s = latency_s
        self._burst_s = burst_s
        self._free_s = 0.0
        self.num_answered = 0
        self.num_throttled = 0

    def accept(self) -> bool:
        """Return whether a request that arrives now is answered, after the time that it takes."""
        now_s = self._time.clock()
        self._free_s = max(self._free_s, now_s - self._burst_s)
        accepted = self._free_s <= now_s
        if accepted:
            self._free_s += self._interval_s
            self.num_answered += 1
        else:
            self.num_throttled += 1
        self._time.sleep(self._latency_s)
        return accepted
