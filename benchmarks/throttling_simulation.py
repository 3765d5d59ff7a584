"""Simulate the decoding processes of 64 GPUs on an S3 prefix that throttles all but 5,500 requests per second.

    python benchmarks/throttling_simulation.py [--seconds 120]

Time is virtual: `segray.storage.retries` and `segray.storage.rate_limit` are the real code, with a clock that jumps to
the next event. 704 processes of 16 threads start within ten seconds and read without a pause; the store takes 50 ms per
request, accepted or not. A tenth is simulated: 70 processes and 550 requests per second. "before" is what segray did
until 2026-11: no limit of the rate, and throttling was retried for as long as other errors, for 30 s.
"""

import argparse
import math
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

from measuring import report

from segray.errors import StorageError
from segray.storage import retries
from segray.storage.rate_limit import RateLimiter
from segray.storage.retries import ThrottledError, retrying
from tests.storage.virtual_time import ThrottlingServer, VirtualTime

_NUM_PROCESSES = 70
_NUM_THREADS = 16
_REQUESTS_PER_S = 550
_START_S = 10


class NoLimiter(RateLimiter):
    """What every process did before: send at once, and give up each request on its own."""

    def wait_for_turn(self) -> float:
        """Return the present time."""
        return self.clock()

    def record_answer(self) -> None:
        """Do nothing."""


@dataclass
class Outcome:
    """What happened in a simulation.

    Attributes:
        num_reads: Reads that succeeded, by second.
        slowest_s: Duration of the slowest read.
        given_up_s: When the first read was given up; infinite if none was.
    """

    num_reads: Counter[int] = field(default_factory=Counter)
    slowest_s: float = 0.0
    given_up_s: float = math.inf


def simulate(limiter_type: type[RateLimiter], until_s: float) -> tuple[Outcome, ThrottlingServer]:
    """Run all processes until a time, or until the first read is given up."""
    time = VirtualTime()
    server = ThrottlingServer(time, _REQUESTS_PER_S)
    outcome = Outcome()
    rng = random.Random(0)

    def send() -> None:
        if not server.accept():
            raise ThrottledError("503 SlowDown")

    def run(limiter: RateLimiter, start_s: float) -> None:
        time.sleep(start_s)
        while (began_s := time.clock()) < min(until_s, outcome.given_up_s):
            try:
                retrying("read", "s3://bucket/image", send, limiter)
            except StorageError:
                outcome.given_up_s = min(outcome.given_up_s, time.clock())
                return
            outcome.num_reads[int(time.clock())] += 1
            outcome.slowest_s = max(outcome.slowest_s, time.clock() - began_s)

    threads: list[Callable[[], None]] = []
    for _ in range(_NUM_PROCESSES):
        limiter, start_s = limiter_type(time.clock, time.sleep), rng.uniform(0, _START_S)
        threads += [lambda own=limiter, at_s=start_s: run(own, at_s)] * _NUM_THREADS  # type: ignore[misc]
    time.run(threads)
    return outcome, server


def main() -> None:
    """Simulate both policies and print a line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=120)
    until_s = parser.parse_args().seconds
    threading.stack_size(2**17)
    rows, figures = [], {}
    for name, limiter_type, patience_s in (
        ("before", NoLimiter, retries.RETRY_FOR_S),
        ("rate limit", RateLimiter, retries.RETRY_THROTTLED_FOR_S),
    ):
        with mock.patch.object(retries, "RETRY_THROTTLED_FOR_S", patience_s):
            outcome, server = simulate(limiter_type, until_s)
        ended_s = min(until_s, outcome.given_up_s)
        steady = [outcome.num_reads[second] for second in range(2 * _START_S, int(ended_s))]
        figures[name] = {
            "given_up_s": None if math.isinf(outcome.given_up_s) else outcome.given_up_s,
            "reads_per_s": sum(steady) / max(1, len(steady)),
            "least_reads_in_a_second": min(steady, default=0),
            "throttled_share": server.num_throttled / (server.num_throttled + server.num_answered),
            "slowest_read_s": outcome.slowest_s,
        }
        rows.append([name, *(f"{value:,.2f}" if value is not None else "never" for value in figures[name].values())])
    report("throttling_simulation", ["policy", *figures["before"]], rows, figures)


if __name__ == "__main__":
    main()
