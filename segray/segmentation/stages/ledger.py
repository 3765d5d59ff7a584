"""Tracks worker deaths to find images that kill their worker; these become error rows instead of ending the run.

Ray restarts a task whose process died, but cannot tell which image of the fragment it was processing. So the first
attempt at a fragment runs at full speed. If its process dies, later attempts process one image at a time and record
each image in the ledger before they start on it. An image that was being processed in several deaths becomes a
``failed`` row. Deaths with other causes (a lost node, the kernel's out-of-memory killer choosing another process) occur
at a different image each time, because suspects are processed last. They cost time, but produce no error rows.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segray.errors import ClusterError

MAX_DEATHS_PER_IMAGE = 3
_MAX_UNEXPLAINED_DEATHS = 10  # Per fragment, with no image recorded: the cause lies elsewhere and will not go away.
_MAX_STARTS = 5  # Per predictor, counted from the last time that any predictor started a fragment.
DECODE, PREDICT = "decoding", "predicting"


@dataclass
class _Record:
    """State of one fragment in one stage."""

    attempt: int = 0
    is_begun: bool = False
    current: int | None = None
    deaths: Counter[int] = field(default_factory=Counter)
    num_unexplained: int = 0


@dataclass(frozen=True)
class AttemptPlan:
    """How an attempt must process a fragment. Images are identified by their index in the fragment.

    Attributes:
        attempt: Number of the attempt. Calls of an earlier attempt, which was presumed dead, are ignored.
        one_by_one: Process one image at a time and record each beforehand, because an earlier attempt died.
        suspects: Images that were being processed when attempts died. They are processed last, so that a
            death with another cause occurs at another image and is not counted against the same one again.
        failed: Images that must not be processed any more.
    """

    attempt: int
    one_by_one: bool = False
    suspects: tuple[int, ...] = ()
    failed: frozenset[int] = frozenset()

    def order_images(self, num_images: int) -> list[int]:
        """Return the indices of a fragment's images in the order in which to process them."""
        return [index for index in range(num_images) if index not in self.suspects] + list(self.suspects)


class Ledger:
    """The state of all attempts of a run, by stage and fragment; runs as a Ray actor.

    If the actor is lost, it restarts empty, and attempts are counted from zero again.
    """

    def __init__(self, num_predictors: int) -> None:
        self._records: dict[tuple[str, int], _Record] = {}
        self._max_starts = _MAX_STARTS * num_predictors
        self._num_starts = 0

    def begin(self, stage: str, fragment: int) -> AttemptPlan:
        """Start an attempt. If the previous attempt has not ended, its process died.

        Raises:
            ClusterError: Processes die repeatedly on this fragment, and no image explains it.
        """
        if stage == PREDICT:
            self._num_starts = 0
        record = self._records.setdefault((stage, fragment), _Record())
        if record.is_begun:
            if record.current is None:
                record.num_unexplained += 1
            else:
                record.deaths[record.current] += 1
        record.attempt, record.is_begun, record.current = record.attempt + 1, True, None
        if record.num_unexplained > _MAX_UNEXPLAINED_DEATHS:
            raise ClusterError(
                f"{stage}: the worker process of fragment {fragment} died {record.num_unexplained} times, and no image "
                "explains it; check the nodes' memory, and rerun with SEGRAY_WORKER_LOGS=1 to see the workers' logs"
            )
        return AttemptPlan(
            record.attempt,
            one_by_one=bool(record.num_unexplained or record.deaths),
            suspects=tuple(sorted(record.deaths, key=lambda index: (record.deaths[index], index))),
            failed=frozenset(index for index, count in record.deaths.items() if count >= MAX_DEATHS_PER_IMAGE),
        )

    def record_image(self, stage: str, fragment: int, attempt: int, index: int | None) -> None:
        """Record that an image is about to be processed; None means that all images of the fragment are done."""
        record = self._records.get((stage, fragment))
        if record is not None and record.attempt == attempt:
            record.current = index

    def end(self, stage: str, fragment: int, attempt: int) -> None:
        """End an attempt. Recorded deaths are kept: Ray processes the fragment again if its node is lost."""
        record = self._records.get((stage, fragment))
        if record is None or record.attempt != attempt:
            return
        record.is_begun, record.current = False, None
        if not record.deaths and not record.num_unexplained:
            del self._records[stage, fragment]

    def start_predictor(self) -> None:
        """Record that a predictor is about to load its model.

        Raises:
            ClusterError: Predictors die repeatedly while they load it.
        """
        self._num_starts += 1
        if self._num_starts > self._max_starts:
            raise ClusterError(
                f"predictors died {self._max_starts} times while loading the model; check the nodes' memory, and "
                "rerun with SEGRAY_WORKER_LOGS=1 to see the workers' logs"
            )


class LedgerClient:
    """Gives one stage access to the ledger of the run."""

    def __init__(self, stage: str, actor: Any) -> None:
        self._stage = stage
        self._actor = actor

    def begin(self, fragment: int) -> AttemptPlan:
        """See ``Ledger.begin``."""
        attempt_plan: AttemptPlan = ray.get(self._actor.begin.remote(self._stage, fragment))
        return attempt_plan

    def record_image(self, fragment: int, attempt_plan: AttemptPlan, index: int | None) -> None:
        """See ``Ledger.record_image``; waits until it is recorded, because this process may die right afterwards."""
        ray.get(self._actor.record_image.remote(self._stage, fragment, attempt_plan.attempt, index))

    def end(self, fragment: int, attempt_plan: AttemptPlan) -> None:
        """See ``Ledger.end``."""
        ray.get(self._actor.end.remote(self._stage, fragment, attempt_plan.attempt))

    def start_predictor(self) -> None:
        """See ``Ledger.start_predictor``."""
        ray.get(self._actor.start_predictor.remote())


def start_ledger(num_predictors: int) -> Any:
    """Start the ledger as a Ray actor on the node of the driver, and return its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Ledger)
    return actor.remote(num_predictors)
