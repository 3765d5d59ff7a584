"""Limit the rate of requests to a store that throttles them."""

import math
import threading
import time
from collections.abc import Callable

_DECREASE = 0.7  # Factor on the rate after a throttled request.
_INCREASE = 0.1  # Added to the rate in each second, as a share of the rate at which the store throttled.
_MIN_INCREASE = 0.5  # The same in requests per second, and
_MIN_RATE = 1.0  # requests per second: 32 waiting threads each have a turn every half a minute.
_MEMORY_S = 1.0  # The present rate is measured over about this time.


class RateLimiter:
    """Adapts the rate of one process's requests to one bucket to what the store accepts. Threads share it.

    There is no limit until the store throttles a request for the first time. Then the rate is that of the last second
    times ``_DECREASE``; it grows linearly while requests succeed, and shrinks by the same factor whenever one is
    throttled. So processes that know nothing of each other converge to equal shares of what the store accepts (additive
    increase, multiplicative decrease: Chiu and Jain, 1989; TCP does the same). Answers to requests that were waiting or
    in flight when the rate was last decreased do not decrease it again.

    Args:
        clock: Returns the time in seconds.
        sleep: Waits for a number of seconds.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.clock = clock
        self.sleep = sleep
        self._lock = threading.Lock()
        self._rate = math.inf
        self._increase = _MIN_INCREASE
        self._next_turn_s = self._counted_s = self._decreased_s = self._answered_s = -math.inf
        self._num_recent = 0.0

    @property
    def rate(self) -> float:
        """Requests per second that are allowed now; infinite before the first throttled request."""
        return self._rate

    @property
    def answered_s(self) -> float:
        """When the store last answered a request without throttling it, by ``clock``; minus infinity if never."""
        return self._answered_s

    def wait_for_turn(self) -> float:
        """Wait until the next request may be sent; return when the call was made, for ``record_throttling``."""
        with self._lock:
            called_s = self.clock()
            turn_s = max(called_s, self._next_turn_s)
            self._next_turn_s = turn_s + 1 / self._rate
            self._num_recent = self._measure_rate(turn_s) + 1
            self._counted_s = turn_s
        if turn_s > called_s:
            self.sleep(turn_s - called_s)
        return called_s

    def record_answer(self) -> None:
        """Increase the rate a little: the store answered a request, with a refusal perhaps."""
        with self._lock:
            self._rate += self._increase / self._rate
            self._answered_s = self.clock()

    def record_throttling(self, called_s: float) -> None:
        """Decrease the rate: the store throttled a request.

        Args:
            called_s: What ``wait_for_turn`` returned before that request.
        """
        with self._lock:
            if called_s <= self._decreased_s:
                return
            self._decreased_s = self.clock()
            present = min(self._rate, self._measure_rate(self._decreased_s))
            self._rate = max(_MIN_RATE, present * _DECREASE)
            self._increase = max(_MIN_INCREASE, present * _INCREASE)

    def _measure_rate(self, now_s: float) -> float:
        """Return the requests per second of about the last ``_MEMORY_S``."""
        return self._num_recent * math.exp(min(0.0, self._counted_s - now_s) / _MEMORY_S) / _MEMORY_S
