"""Tests of segray.storage.retries, in virtual time: how long a failing and a throttling store are retried."""

import random
from collections.abc import Callable

import pytest

from segray.errors import MissingFileError, StorageError
from segray.storage.rate_limit import RateLimiter
from segray.storage.retries import ThrottledError, TransientError, retrying
from tests.storage.virtual_time import VirtualTime


@pytest.fixture
def time() -> VirtualTime:
    return VirtualTime()


def send(time: VirtualTime, answer: Callable[[], object], limiter: RateLimiter | None = None) -> tuple[object, float]:
    """Return the result or error of a retried request, and when it ended."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(retrying("read", "s3://b/x", answer, limiter or RateLimiter(time.clock, time.sleep)))
        except StorageError as error:
            results.append(error)

    time.run([run])
    return results[0], time.clock()


def fail_for(time: VirtualTime, seconds: float, error: Exception, took_s: float = 0.0) -> Callable[[], object]:
    def answer() -> str:
        time.sleep(took_s)
        if time.clock() < seconds:
            raise error
        return "content"

    return answer


def test_a_throttling_store_is_retried_for_ten_minutes(time: VirtualTime) -> None:
    assert send(time, fail_for(time, 590, ThrottledError("503 SlowDown")))[0] == "content"
    error, ended_s = send(time := VirtualTime(), fail_for(time, 1e9, ThrottledError("503 SlowDown")))
    assert 600 <= ended_s < 620
    assert str(error).startswith("cannot read s3://b/x: 503 SlowDown (")
    assert "lower segment.num_fetch_threads" in str(error)


@pytest.mark.parametrize("took_s", [0, 25])
def test_a_failing_store_is_reported_within_a_minute(time: VirtualTime, took_s: float) -> None:
    error, ended_s = send(time, fail_for(time, 1e9, TransientError("500"), took_s))
    assert 30 <= ended_s < 60
    assert str(error).startswith("cannot read s3://b/x: 500 (")
    assert str(error).endswith("to resume once the store is available again, rerun the same command")


def test_a_store_that_fails_after_throttling_is_reported_within_a_minute(time: VirtualTime) -> None:
    def answer() -> None:
        raise ThrottledError("503 SlowDown") if time.clock() < 300 else TransientError("reset")

    error, ended_s = send(time, answer)
    assert 330 <= ended_s < 365
    assert "x: reset (" in str(error)


def test_a_request_is_retried_for_up_to_an_hour_while_the_store_answers_others(time: VirtualTime) -> None:
    limiter = RateLimiter(time.clock, time.sleep)
    ended_s: list[float] = []

    def read_others() -> None:
        while not ended_s:
            retrying("read", "s3://b/y", lambda: time.sleep(10), limiter)

    def read_throttled() -> None:
        with pytest.raises(StorageError, match="SlowDown"):
            retrying("read", "s3://b/x", fail_for(time, 1e9, ThrottledError("503 SlowDown")), limiter)
        ended_s.append(time.clock())

    time.run([read_others, read_throttled])
    assert 3600 <= ended_s[0] < 3640


def test_sixteen_threads_survive_three_minutes_in_which_95_percent_are_throttled(time: VirtualTime) -> None:
    limiter = RateLimiter(time.clock, time.sleep)
    chance = random.Random(1)
    done: list[float] = []

    def answer() -> None:
        time.sleep(0.05)
        if time.clock() < 180 and chance.random() < 0.95:
            raise ThrottledError("503 SlowDown")

    def run() -> None:
        for _ in range(20):
            retrying("read", "s3://b/x", answer, limiter)
            done.append(time.clock())

    time.run([run] * 16)
    assert len(done) == 320
    assert max(done) < 240  # It is fast again within a minute.


def test_a_refusal_is_not_retried(time: VirtualTime) -> None:
    error, ended_s = send(time, fail_for(time, 1e9, MissingFileError("none")))
    assert isinstance(error, MissingFileError)
    assert ended_s == 0
