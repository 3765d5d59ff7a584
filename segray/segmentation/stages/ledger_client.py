"""A stage's access to the ledger, and the processing of a fragment image by image."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segray.segmentation.stages.attempt import AttemptPlan
from segray.segmentation.stages.ledger import Ledger

ResultT = TypeVar("ResultT")


class LedgerClient:
    """Gives one stage access to the ledger of the run.

    Args:
        stage: ``DECODE`` or ``PREDICT``.
        actor: Handle of the ``Ledger`` actor.
    """

    def __init__(self, stage: str, actor: Any) -> None:
        self._stage = stage
        self._actor = actor

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the ledger and wait for it, because this process may die right afterwards."""
        return ray.get(getattr(self._actor, method).remote(*arguments))

    def begin(self, fragment: int) -> AttemptPlan:
        """See ``Ledger.begin``."""
        attempt_plan: AttemptPlan = self._call("begin", self._stage, fragment)
        return attempt_plan

    def record_image(self, fragment: int, attempt_plan: AttemptPlan, index: int | None) -> None:
        """See ``Ledger.record_image``."""
        self._call("record_image", self._stage, fragment, attempt_plan.attempt, index)

    def report(self, fragment: int, reason: str) -> None:
        """See ``Ledger.report``."""
        self._call("report", self._stage, fragment, reason)

    def end(self, fragment: int, attempt_plan: AttemptPlan) -> None:
        """See ``Ledger.end``."""
        self._call("end", self._stage, fragment, attempt_plan.attempt)

    def start_predictor(self) -> None:
        """See ``Ledger.start_predictor``."""
        self._call("start_predictor")

    def process_one_by_one(
        self, fragment: int, attempt_plan: AttemptPlan, indices: Iterable[int], process: Callable[[int], ResultT]
    ) -> dict[int, ResultT]:
        """Process images one after another, and record each in the ledger beforehand.

        Args:
            fragment: Number of the fragment.
            attempt_plan: What ``begin`` returned for it.
            indices: Images to process, in this order.
            process: Returns the result of an image.

        Returns:
            The results by index, including those of earlier attempts.
        """
        key = (self._stage, fragment, attempt_plan.attempt)
        results: dict[int, ResultT] = {}
        handed_over = set(attempt_plan.finished)
        for index in indices:
            self.record_image(fragment, attempt_plan, index)
            result = process(index)
            if attempt_plan.hands_over and self._call("hand_over", *key, index, result):
                handed_over.add(index)
            else:
                results[index] = result
        self.record_image(fragment, attempt_plan, None)
        if handed_over:
            results |= self._call("fetch_results", *key)
        # The ledger's process was lost after it had received these.
        results |= {index: process(index) for index in sorted(handed_over - results.keys())}
        return results


def start_ledger(num_predictors: int, image_timeout_s: float) -> Any:
    """Start the ledger as a Ray actor on the node of the driver, and return its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Ledger)
    return actor.remote(num_predictors, image_timeout_s)
