"""Tests of segray.storage.rate_limit: when the rate changes, and how processes share a store."""

import itertools
import math
import random
from collections.abc import Callable

import pytest

from segray.storage.rate_limit import RateLimiter
from segray.storage.retries import ThrottledError, retrying
from tests.storage.virtual_time import ThrottlingServer, VirtualTime


class Clock:
    """A clock that moves only when someone sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> RateLimiter:
    return RateLimiter(clock, clock.sleep)


def test_there_is_no_limit_before_the_first_throttled_request(limiter: RateLimiter, clock: Clock) -> None:
    for _ in range(1000):
        limiter.wait_for_turn()
        limiter.record_answer()
    assert (clock.now_s, limiter.rate) == (100, math.inf)


def test_the_rate_falls_once_for_all_requests_in_flight_and_then_rises(limiter: RateLimiter, clock: Clock) -> None:
    calls = [limiter.wait_for_turn() for _ in range(50)]
    clock.now_s += 0.01
    for called_s in calls:
        limiter.record_throttling(called_s)
    assert limiter.rate == pytest.approx(35, rel=0.02)  # 0.7 of the 50 requests of the last second.
    begin = clock.now_s
    for _ in range(100):
        called_s = limiter.wait_for_turn()
        limiter.record_answer()
    assert clock.now_s - begin == pytest.approx(100 / 41, rel=0.1)
    assert limiter.rate == pytest.approx(35 + 5 * (clock.now_s - begin), rel=0.05)  # 10% of 50 for each second.
    limiter.record_throttling(called_s)
    assert limiter.rate < 35


def test_the_rate_falls_to_one_request_per_second_and_no_further(limiter: RateLimiter, clock: Clock) -> None:
    for _ in range(100):
        called_s = limiter.wait_for_turn()
        clock.now_s += 0.001
        limiter.record_throttling(called_s)
    assert limiter.rate == 1
    begin = clock.now_s
    for _ in range(10):
        limiter.wait_for_turn()
    assert clock.now_s - begin == pytest.approx(10, abs=1)


def test_a_limit_above_the_present_rate_does_not_delay_its_decrease(limiter: RateLimiter, clock: Clock) -> None:
    limiter.record_throttling(limiter.wait_for_turn())
    limiter._rate = 1e6  # After hours of success at a low rate.
    for _ in range(20):
        clock.now_s += 0.1
        called_s = limiter.wait_for_turn()
    clock.now_s += 0.05
    limiter.record_throttling(called_s)
    assert limiter.rate < 10


def start_clients(
    time: VirtualTime, server: ThrottlingServer, num_processes: int, num_threads: int, until_s: float
) -> tuple[list[Callable[[], None]], list[int]]:
    """Return functions that read until a time, each for one thread, and counters of their successes by process."""
    counts = [0] * num_processes
    start = random.Random(0)

    def act() -> None:
        if not server.accept():
            raise ThrottledError("503 SlowDown")

    def run(process: int, limiter: RateLimiter, begin_s: float) -> None:
        time.sleep(begin_s)
        while time.clock() < until_s:
            retrying("read", "s3://b/x", act, limiter)
            counts[process] += 1

    clients: list[Callable[[], None]] = []
    for process in range(num_processes):
        limiter = RateLimiter(time.clock, time.sleep)
        begin_s = start.uniform(0, 2)
        for _ in range(num_threads):
            clients.append(lambda p=process, own=limiter, at_s=begin_s: run(p, own, at_s))  # type: ignore[misc]
    return clients, counts


def test_processes_use_all_that_a_throttling_store_accepts_in_fair_shares() -> None:
    """A fortieth of 5,500 requests/s for 704 decoding processes. They ask for four times the rate."""
    time = VirtualTime()
    server = ThrottlingServer(time, requests_per_s=140, latency_s=0.25)
    clients, counts = start_clients(time, server, num_processes=18, num_threads=8, until_s=30)
    time.run(clients)
    assert server.num_answered > 0.9 * 140 * 30
    assert server.num_throttled < 0.25 * server.num_answered
    assert max(counts) < 3 * min(counts)


def test_a_recovered_store_is_used_again(limiter: RateLimiter, clock: Clock) -> None:
    limiter.record_throttling(limiter.wait_for_turn())
    rates = itertools.count()
    for _ in rates:
        limiter.wait_for_turn()
        limiter.record_answer()
        if limiter.rate > 50:
            break
    assert clock.now_s - 100 < 120
