"""Tracks worker deaths to find images that kill their worker; these become error rows instead of ending the run.

Ray restarts a task whose process died, but cannot tell which image of the fragment it was processing. So the first
attempt at a fragment runs at full speed. If its process dies, later attempts process one image at a time and record
each image in the ledger before they start on it:

- The image that was in progress at the last death is the suspect. The next attempt processes it first, when its process
  holds nothing else of the fragment. If it survives, it is cleared. If the process dies again, the image is blamed.
  After three such deaths, without surviving in between, it becomes a ``failed`` row. So an image is never blamed for
  the memory that others take, or for the end of a node.
- A death after the time limit of an image (``segment.image_timeout_s``) is explained by that image, in any position.
  If all three deaths were of this kind, the row is a ``timeout`` row.
- From the second death on, each finished result is handed to the ledger at once. So later attempts go on where the
  earlier ones died, and their memory does not grow with the number of images.

Deaths that no image explains, with no image finished in between, end the run.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from segray.errors import ClusterError, FaultKind
from segray.segmentation.stages.attempt import AttemptPlan, Failure

MAX_DEATHS_PER_IMAGE = 3
_MAX_UNEXPLAINED_DEATHS = 10  # Per fragment and without progress: the cause lies elsewhere and will not go away.
_MAX_STARTS = 5  # Per predictor, counted from the last time that any predictor started a fragment.
# Images of a fragment that fail in the predict stage with no image in between that survives. The model's input always
# has the same size, so the cause is hardly ever the images: a broken GPU would fail all of them.
_MAX_FAILED_PREDICTIONS = 3
DECODE, PREDICT = "decoding", "predicting"
_SEE_LOGS = "rerun with SEGRAY_WORKER_LOGS=1 to see the workers' output"


@dataclass
class _Record:
    """State of one fragment in one stage.

    Attributes:
        current: The image in progress, recorded at ``recorded_s``; ``is_alone`` if it is the first of its attempt.
        deaths: For each image, the deaths that it is blamed for since it last survived: whether they were timeouts.
        num_deaths: All deaths.
        num_unexplained: Deaths that no image is blamed for, since the last progress.
        num_failed_in_a_row: ``failed`` images since an image last survived.
        reason: What the last process that exited by itself reported.
    """

    attempt: int = 0
    is_begun: bool = False
    num_recorded: int = 0
    current: int | None = None
    recorded_s: float = 0.0
    suspect: int | None = None
    deaths: defaultdict[int, list[bool]] = field(default_factory=lambda: defaultdict(list))
    num_deaths: int = 0
    num_unexplained: int = 0
    num_failed_in_a_row: int = 0
    failed: dict[int, Failure] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)
    reason: str = ""


class Ledger:
    """The state of all attempts of a run, by stage and fragment; runs as a Ray actor.

    If the actor is lost, it restarts empty, and attempts are counted from zero again.

    Args:
        num_predictors: Number of predictors of the run.
        image_timeout_s: Time limit of an image, in seconds.
        clock: Returns the current time in seconds.
    """

    def __init__(
        self, num_predictors: int, image_timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._records: dict[tuple[str, int], _Record] = {}
        self._max_starts = _MAX_STARTS * num_predictors
        self._num_starts = 0
        self._image_timeout_s = image_timeout_s
        self._clock = clock
        self._has_progressed = False

    def begin(self, stage: str, fragment: int) -> AttemptPlan:
        """Start an attempt. If the previous attempt has not ended, its process died.

        Raises:
            ClusterError: Processes die repeatedly on this fragment, and no image explains it.
        """
        if stage == PREDICT:
            self._num_starts = 0
        record = self._records.setdefault((stage, fragment), _Record())
        if record.is_begun:
            self._record_death(stage, record)
        _require_explained(stage, fragment, record)
        record.attempt, record.is_begun = record.attempt + 1, True
        record.num_recorded, record.current = 0, None
        return AttemptPlan(
            record.attempt,
            one_by_one=record.num_deaths > 0,
            hands_over=record.num_deaths > 1,
            suspect=record.suspect,
            failed=dict(record.failed),
            finished=frozenset(record.results),
        )

    def _record_death(self, stage: str, record: _Record) -> None:
        record.num_deaths += 1
        index = record.current
        if index is None:
            record.num_unexplained += 1
            return
        record.suspect = index
        is_timeout = self._clock() - record.recorded_s >= self._image_timeout_s
        if record.num_recorded > 1 and not is_timeout:
            record.num_unexplained += 1
            return
        deaths = record.deaths[index]
        deaths.append(is_timeout)
        if len(deaths) == MAX_DEATHS_PER_IMAGE:
            record.failed[index] = self._build_failure(stage, is_timeout=all(deaths))
            record.num_failed_in_a_row += record.failed[index].kind == FaultKind.FAILED
            record.suspect, record.num_unexplained = None, 0
            self._has_progressed = True

    def _build_failure(self, stage: str, is_timeout: bool) -> Failure:
        if is_timeout:
            return Failure(
                FaultKind.TIMEOUT,
                f"{stage} this image took longer than {self._image_timeout_s:g} s (segment.image_timeout_s), "
                f"{MAX_DEATHS_PER_IMAGE} times",
            )
        message = f"the worker process died {MAX_DEATHS_PER_IMAGE} times while {stage} this image"
        return Failure(FaultKind.FAILED, message)

    def record_image(self, stage: str, fragment: int, attempt: int, index: int | None) -> None:
        """Record that an image is about to be processed; None means that all images of the fragment are done."""
        if record := self._find(stage, fragment, attempt):
            self._clear_current(record)
            record.current, record.recorded_s = index, self._clock()
            record.num_recorded += 1

    def hand_over(self, stage: str, fragment: int, attempt: int, index: int, result: Any) -> bool:
        """Keep the result of an image for later attempts.

        Returns:
            False if it is not kept: the attempt was presumed dead, or the ledger has been restarted.
        """
        record = self._find(stage, fragment, attempt)
        if record is None:
            return False
        self._clear_current(record)
        record.results[index] = copy.deepcopy(result)  # What an actor receives may be memory of its caller.
        return True

    def fetch_results(self, stage: str, fragment: int, attempt: int) -> dict[int, Any]:
        """Return the results that were handed over, by index."""
        record = self._find(stage, fragment, attempt)
        return {} if record is None else record.results

    def end(self, stage: str, fragment: int, attempt: int) -> None:
        """End an attempt. What is known of images is kept: Ray processes the fragment again if its node is lost."""
        record = self._find(stage, fragment, attempt)
        if record is None:
            return
        self._has_progressed = True
        record.is_begun, record.current = False, None
        record.results.clear()
        if not record.num_deaths:
            del self._records[stage, fragment]

    def report(self, stage: str, fragment: int, reason: str) -> None:
        """Record why a process is about to exit while it processes a fragment."""
        if record := self._records.get((stage, fragment)):
            record.reason = reason

    def start_predictor(self) -> None:
        """Record that a predictor is about to load its model.

        Raises:
            ClusterError: Predictors die repeatedly while they load it.
        """
        self._num_starts += 1
        if self._num_starts > self._max_starts:
            raise ClusterError(
                f"predictors died {self._max_starts} times while loading the model; check the nodes' memory and GPUs, "
                f"and {_SEE_LOGS}"
            )

    def abandon_attempts(self) -> bool:
        """End all attempts without counting deaths, because the driver has stopped their processes.

        Returns:
            Whether an image or a fragment was finished or given up since the last call.
        """
        for record in self._records.values():
            record.is_begun, record.current = False, None
        has_progressed, self._has_progressed = self._has_progressed, False
        return has_progressed

    def _find(self, stage: str, fragment: int, attempt: int) -> _Record | None:
        """Return the record of the current attempt; None if another attempt has begun, or the ledger is new."""
        record = self._records.get((stage, fragment))
        return record if record is not None and record.attempt == attempt else None

    def _clear_current(self, record: _Record) -> None:
        """Record that the image in progress, if any, has survived."""
        if record.current is None:
            return
        record.deaths.pop(record.current, None)
        if record.suspect == record.current:
            record.suspect = None
        record.current = None
        record.num_unexplained = record.num_failed_in_a_row = 0
        self._has_progressed = True


def _require_explained(stage: str, fragment: int, record: _Record) -> None:
    """Raise if the deaths on a fragment cannot be explained by its images."""
    reason = f" ({record.reason})" if record.reason else ""
    if record.num_unexplained > _MAX_UNEXPLAINED_DEATHS:
        raise ClusterError(
            f"{stage}: the worker process of fragment {fragment} died {record.num_unexplained} times{reason}, and no "
            "image explains it: the fragment may not fit into the nodes' memory; use larger nodes, fewer predictors "
            "(segment.num_predictors), or a new output with a lower segment.fragment_size and segment.fragment_px; "
            f"{_SEE_LOGS}"
        )
    if stage == PREDICT and record.num_failed_in_a_row >= _MAX_FAILED_PREDICTIONS:
        raise ClusterError(
            f"{stage}: the worker process of fragment {fragment} dies at every image{reason}; check the nodes' GPUs, "
            f"drivers and memory, and {_SEE_LOGS}"
        )
