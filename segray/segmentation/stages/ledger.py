"""Who was at work on what when a worker process died, so that an image that kills its worker is found and passed over.

Ray starts a lost task again, but cannot say which image of the fragment it was. So the first attempt at a fragment runs
at full speed; if its process dies, the next attempts take image after image and say before each which one it is. An
image that was at work in several deaths becomes a ``failed`` row. Kills that have nothing to do with the images (a lost
node, the kernel's memory killer choosing a bystander) hit another image each time, as suspects are taken last, and cost
nothing but time.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segray.errors import ClusterError

MAX_DEATHS_PER_IMAGE = 3
_MAX_UNEXPLAINED_DEATHS = 10  # of one fragment, with no image at work: the fault is elsewhere, and will not pass
_MAX_STARTS = 5  # of each predictor, if none ever comes to a fragment
DECODE, PREDICT = "decoding", "predicting"


@dataclass
class _Record:
    """What is known of one fragment in one stage."""

    attempt: int = 0
    is_begun: bool = False
    current: int | None = None
    deaths: Counter[int] = field(default_factory=Counter)
    unexplained: int = 0


@dataclass(frozen=True)
class Orders:
    """How an attempt at a fragment has to go about it.

    Attributes:
        attempt: Its number; of an attempt that was taken for dead and is not, nothing is believed any more.
        is_careful: Say before each image which one it is, for an attempt before this one has died.
        suspects: Images (their places in the fragment) at which attempts died, to be taken last: an innocent one is
            then not at work again when the next death comes for another reason.
        failed: Images not to be touched any more.
    """

    attempt: int
    is_careful: bool = False
    suspects: tuple[int, ...] = ()
    failed: frozenset[int] = frozenset()

    def sort(self, num_images: int) -> list[int]:
        """Return the places of the images of a fragment in the order in which they are to be taken."""
        return [index for index in range(num_images) if index not in self.suspects] + list(self.suspects)


class Ledger:
    """The state of all attempts of a run; lives in a Ray actor. Stage and fragment are the key.

    It may be lost and start empty: then it only has to learn again.
    """

    def __init__(self, num_predictors: int) -> None:
        self._records: dict[tuple[str, int], _Record] = {}
        self._max_starts = _MAX_STARTS * num_predictors
        self._num_starts = 0

    def begin(self, stage: str, fragment: int) -> Orders:
        """Begin an attempt; one that was begun and not ended has died.

        Raises:
            ClusterError: The fragment's processes die again and again, and it is not for an image.
        """
        if stage == PREDICT:
            self._num_starts = 0
        record = self._records.setdefault((stage, fragment), _Record())
        if record.is_begun:
            if record.current is None:
                record.unexplained += 1
            else:
                record.deaths[record.current] += 1
        record.attempt, record.is_begun, record.current = record.attempt + 1, True, None
        if record.unexplained > _MAX_UNEXPLAINED_DEATHS:
            raise ClusterError(
                f"{stage}: the process at work on fragment {fragment} died {record.unexplained} times, at no image in "
                "particular; look at the memory of the nodes, and run with SEGRAY_WORKER_LOGS=1 to see what led to it"
            )
        return Orders(
            record.attempt,
            is_careful=bool(record.unexplained or record.deaths),
            suspects=tuple(sorted(record.deaths, key=lambda index: (record.deaths[index], index))),
            failed=frozenset(index for index, count in record.deaths.items() if count >= MAX_DEATHS_PER_IMAGE),
        )

    def enter(self, stage: str, fragment: int, attempt: int, index: int | None) -> None:
        """Note that an image is about to be worked on; None: all are done, and only the fragment is left."""
        record = self._records.get((stage, fragment))
        if record is not None and record.attempt == attempt:
            record.current = index

    def end(self, stage: str, fragment: int, attempt: int) -> None:
        """End an attempt. What was learned stays: the fragment may be made again, when its node is lost."""
        record = self._records.get((stage, fragment))
        if record is None or record.attempt != attempt:
            return
        record.is_begun, record.current = False, None
        if not record.deaths and not record.unexplained:
            del self._records[stage, fragment]

    def start_predictor(self) -> None:
        """Note that a predictor is about to load its model.

        Raises:
            ClusterError: Predictors die again and again while loading it.
        """
        self._num_starts += 1
        if self._num_starts > self._max_starts:
            raise ClusterError(
                f"predictors died {self._max_starts} times while loading the model; look at the memory of the nodes, "
                "and run with SEGRAY_WORKER_LOGS=1 to see what led to it"
            )


class LedgerClient:
    """One stage's way to the run's ledger."""

    def __init__(self, stage: str, actor: Any) -> None:
        self._stage = stage
        self._actor = actor

    def begin(self, fragment: int) -> Orders:
        """See ``Ledger.begin``."""
        orders: Orders = ray.get(self._actor.begin.remote(self._stage, fragment))
        return orders

    def enter(self, fragment: int, orders: Orders, index: int | None) -> None:
        """See ``Ledger.enter``; returns when it is noted, for the next moment may be the last."""
        ray.get(self._actor.enter.remote(self._stage, fragment, orders.attempt, index))

    def end(self, fragment: int, orders: Orders) -> None:
        """See ``Ledger.end``."""
        ray.get(self._actor.end.remote(self._stage, fragment, orders.attempt))

    def start_predictor(self) -> None:
        """See ``Ledger.start_predictor``."""
        ray.get(self._actor.start_predictor.remote())


def start_ledger(num_predictors: int) -> Any:
    """Start a ledger beside the driver, whose life it shares."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Ledger)
    return actor.remote(num_predictors)
