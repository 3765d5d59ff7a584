"""Retry requests to a store that fail for a while: half a minute if it does not work, longer if it throttles them."""

from collections.abc import Callable
from typing import Generic, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from segray.errors import StorageError
from segray.storage.rate_limit import RateLimiter

ResultT = TypeVar("ResultT")

# An unreachable store is reported within a minute: the last attempt may itself wait for the time-outs below.
RETRY_FOR_S = 30
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
# A store that throttles works, and needs time: S3 takes minutes to distribute a prefix over more servers.
RETRY_THROTTLED_FOR_S = 600
_MAX_THROTTLED_S = 3600
_MAX_WAIT_S = 4


class TransientError(Exception):
    """An error that a retry may resolve, such as a missing or partial response. Only ``retrying`` handles it."""


class ThrottledError(TransientError):
    """The store works, but refuses this request because there are too many."""


def retrying(verb: str, uri: str, act: Callable[[], ResultT], limiter: RateLimiter) -> ResultT:
    """Call ``act``, and retry with exponential back-off on ``TransientError``, at the rate that the store accepts.

    A store that fails is given up after ``RETRY_FOR_S``; one that throttles after ``RETRY_THROTTLED_FOR_S`` in which it
    answered no request of this process, and in any case after an hour.

    Args:
        verb: The operation, for the message: "cannot VERB URI".
        uri: The file or folder, for the message.
        act: The operation: one request.
        limiter: The limiter of the bucket.

    Raises:
        StorageError: ``act`` raised it, or the transient error persisted.
    """
    request = _Request(act, limiter)
    # Full jitter, so that workers which failed at the same moment do not retry at the same moment.
    attempts = Retrying(
        retry=retry_if_exception_type(TransientError),
        wait=wait_random_exponential(multiplier=0.1, max=_MAX_WAIT_S),
        stop=request.is_given_up,
        sleep=limiter.sleep,
        reraise=True,
    )
    try:
        return attempts(request.send)
    except TransientError as error:
        number = attempts.statistics["attempt_number"]
        advice = "lower segment.num_fetch_threads or the number of nodes, or " * isinstance(error, ThrottledError)
        raise StorageError(
            f"cannot {verb} {uri}: {error} ({number} attempts in {limiter.clock() - request.began_s:.0f} s); {advice}"
            "to resume once the store is available again, rerun the same command"
        ) from error


class _Request(Generic[ResultT]):
    """A request with all its attempts."""

    def __init__(self, act: Callable[[], ResultT], limiter: RateLimiter) -> None:
        self._act = act
        self._limiter = limiter
        self.began_s = limiter.clock()
        self._failing_since_s: float | None = None

    def send(self) -> ResultT:
        """Send the request once."""
        called_s = self._limiter.wait_for_turn()
        sent_s = self._limiter.clock()
        try:
            result = self._act()
        except ThrottledError:
            self._limiter.record_throttling(called_s)
            self._failing_since_s = None
            raise
        except TransientError:
            if self._failing_since_s is None:
                self._failing_since_s = sent_s
            raise
        except StorageError:
            self._limiter.record_answer()
            raise
        self._limiter.record_answer()
        return result

    def is_given_up(self, state: RetryCallState) -> bool:
        """Return whether not to retry after a failed attempt."""
        now_s = self._limiter.clock()
        if self._failing_since_s is not None:
            return now_s - self._failing_since_s >= RETRY_FOR_S
        waited_s = now_s - max(self.began_s, self._limiter.answered_s)
        return waited_s >= RETRY_THROTTLED_FOR_S or now_s - self.began_s >= _MAX_THROTTLED_S
