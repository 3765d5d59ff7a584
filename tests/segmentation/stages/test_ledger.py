"""The ledger of worker deaths: images that crash their worker process become error rows, and no others do."""

import random
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from segray.errors import ClusterError, FaultKind
from segray.segmentation.stages.attempt import AttemptPlan
from segray.segmentation.stages.ledger import DECODE, MAX_DEATHS_PER_IMAGE, PREDICT, Ledger
from tests.segmentation.local_ledger import LocalLedger

TIMEOUT_S = 300
MAX_ATTEMPTS = 1001  # as Ray is allowed by the pipeline


class Death(BaseException):
    """Stands for the end of the worker process."""


def simulate(
    num_images: int,
    dies: Callable[[int, int], bool],
    *,
    dies_at_the_end: Callable[[], bool] = lambda: False,
    client: LocalLedger | None = None,
) -> tuple[int, dict[int, FaultKind], dict[int, Any]]:
    """Process a fragment until an attempt survives, as Ray does.

    Args:
        num_images: Number of images.
        dies: Whether the process dies at an image, given its index and the number of results that the process holds.
        dies_at_the_end: Whether it dies after all images.
        client: The stage's access to the ledger.

    Returns:
        The number of attempts, the error kind of each failed image, and the results of the others.
    """
    client = client or LocalLedger(DECODE)
    for attempt in count(1):
        assert attempt <= MAX_ATTEMPTS
        attempt_plan = client.begin(0)
        held: list[int] = []

        def process(index: int, attempt_plan: AttemptPlan = attempt_plan, held: list[int] = held) -> str:
            if dies(index, len(held)):
                raise Death
            if not attempt_plan.hands_over:
                held.append(index)
            return f"result {index}"

        try:
            if attempt_plan.one_by_one:
                order = attempt_plan.order_images(num_images)
                results = client.process_one_by_one(0, attempt_plan, order, process)
            else:
                results = {index: process(index) for index in range(num_images)}
            if dies_at_the_end():
                raise Death
        except Death:
            continue
        client.end(0, attempt_plan)
        break
    return attempt, {index: failure.kind for index, failure in attempt_plan.failed.items()}, results


@pytest.mark.parametrize(("num_images", "capacity"), [(64, 48), (256, 200), (64, 1), (2, 1)])
def test_a_fragment_whose_results_do_not_fit_into_a_process_completes(num_images: int, capacity: int) -> None:
    attempts, failed, results = simulate(num_images, lambda _, num_held: num_held >= capacity)
    assert (failed, sorted(results)) == ({}, list(range(num_images)))
    assert results[num_images - 1] == f"result {num_images - 1}"
    assert attempts == 3


@pytest.mark.parametrize("killers", [[0], [5], [63], [0, 1, 2], [3, 4, 40], list(range(64)), [7, 9, 11, 13, 15]])
@pytest.mark.parametrize("capacity", [64, 48])
def test_exactly_the_images_that_kill_their_worker_fail(killers: list[int], capacity: int) -> None:
    attempts, failed, results = simulate(64, lambda index, num_held: index in killers or num_held >= capacity)
    assert failed == dict.fromkeys(killers, FaultKind.FAILED)
    assert sorted(results) == [index for index in range(64) if index not in killers]
    assert attempts <= 2 + (MAX_DEATHS_PER_IMAGE + 1) * len(killers) + 1


@pytest.mark.parametrize(("killer", "num_deaths"), [(0, 4), (5, 5)])
def test_only_deaths_alone_are_counted_against_an_image(killer: int, num_deaths: int) -> None:
    """The first death is at full speed, and at image 5 the second one is among the results of other images."""
    attempts, failed, _ = simulate(8, lambda index, _: index == killer)
    assert (attempts, list(failed)) == (num_deaths + 1, [killer])


@pytest.mark.parametrize("seed", range(20))
def test_deaths_with_other_causes_fail_no_image(seed: int) -> None:
    """Processes end at any image, as when nodes are lost or the system is short of memory."""
    chance = random.Random(seed)
    attempts, failed, results = simulate(256, lambda *_: chance.random() < 0.05)
    assert failed == {}
    assert len(results) == 256
    assert attempts > 5


def test_an_image_is_cleared_when_it_survives() -> None:
    ledger = Ledger(1, TIMEOUT_S)
    ledger.begin(DECODE, 0)
    for _ in range(2):
        ledger.record_image(DECODE, 0, ledger.begin(DECODE, 0).attempt, 3)
    attempt_plan = ledger.begin(DECODE, 0)
    for index in (3, None):
        ledger.record_image(DECODE, 0, attempt_plan.attempt, index)
    ledger.end(DECODE, 0, attempt_plan.attempt)  # Then the result is lost with its node.
    ledger.record_image(DECODE, 0, ledger.begin(DECODE, 0).attempt, 3)
    attempt_plan = ledger.begin(DECODE, 0)
    assert (attempt_plan.suspect, attempt_plan.failed) == (3, {})


def test_the_suspect_is_processed_before_the_others() -> None:
    deaths = iter([True, True])
    seen: list[int] = []

    def dies(index: int, num_held: int) -> bool:
        seen.append(index)
        return index == 2 and next(deaths, False)

    attempts, failed, results = simulate(4, dies)
    assert (attempts, failed, len(results)) == (3, {}, 4)
    assert seen == [0, 1, 2, 0, 1, 2, 2, 0, 1, 3]  # At full speed, then one by one, then the suspect first.


def test_the_image_at_the_last_death_is_processed_first_and_alone() -> None:
    ledger = Ledger(1, TIMEOUT_S)
    ledger.begin(DECODE, 0)
    attempt_plan = ledger.begin(DECODE, 0)
    assert attempt_plan == AttemptPlan(2, one_by_one=True)
    for index in (0, 1, 3):
        ledger.record_image(DECODE, 0, attempt_plan.attempt, index)
    attempt_plan = ledger.begin(DECODE, 0)
    assert attempt_plan == AttemptPlan(3, one_by_one=True, hands_over=True, suspect=3)
    assert attempt_plan.order_images(5) == [3, 0, 1, 2, 4]


def test_a_failed_image_stays_failed_and_other_fragments_and_stages_are_not_affected() -> None:
    ledger = Ledger(1, TIMEOUT_S)
    ledger.begin(DECODE, 7)
    for _ in range(MAX_DEATHS_PER_IMAGE):
        ledger.record_image(DECODE, 7, ledger.begin(DECODE, 7).attempt, 4)
    attempt_plan = ledger.begin(DECODE, 7)
    assert attempt_plan.failed[4] == (FaultKind.FAILED, "the worker process died 3 times while decoding this image")
    assert not ledger.begin(PREDICT, 7).failed
    assert not ledger.begin(DECODE, 8).one_by_one
    ledger.end(DECODE, 7, attempt_plan.attempt)
    assert list(ledger.begin(DECODE, 7).failed) == [4]  # The node was lost, but what is known is kept.


def test_a_death_after_the_last_image_makes_no_image_a_suspect() -> None:
    ledger = Ledger(1, TIMEOUT_S)
    attempt_plan = ledger.begin(DECODE, 0)
    ledger.record_image(DECODE, 0, attempt_plan.attempt, 4)
    ledger.record_image(DECODE, 0, attempt_plan.attempt, None)
    assert ledger.begin(DECODE, 0).suspect is None


def test_calls_of_an_attempt_presumed_dead_are_ignored() -> None:
    ledger = Ledger(1, TIMEOUT_S)
    earlier, current = ledger.begin(DECODE, 0), ledger.begin(DECODE, 0)
    ledger.record_image(DECODE, 0, current.attempt, 2)
    ledger.record_image(DECODE, 0, earlier.attempt, 4)
    assert not ledger.hand_over(DECODE, 0, earlier.attempt, 4, "result")
    ledger.end(DECODE, 0, earlier.attempt)
    assert ledger.begin(DECODE, 0).suspect == 2


def test_a_restarted_empty_ledger_accepts_calls_of_running_attempts() -> None:
    ledger = Ledger(1, TIMEOUT_S)
    ledger.record_image(DECODE, 0, 3, 1)
    assert not ledger.hand_over(DECODE, 0, 3, 1, "result")
    assert ledger.fetch_results(DECODE, 0, 3) == {}
    ledger.end(DECODE, 0, 3)
    assert ledger.begin(DECODE, 0).suspect is None


@pytest.mark.parametrize("lost_after", [0, 2, 4])
def test_results_that_a_lost_ledger_held_are_computed_again(lost_after: int) -> None:
    client = LocalLedger(DECODE)
    for _ in range(3):
        attempt_plan = client.begin(0)
    assert attempt_plan.hands_over
    processed: list[int] = []

    def process(index: int) -> int:
        if len(processed) == lost_after:
            client.ledger = Ledger(1, TIMEOUT_S)
        processed.append(index)
        return index

    assert client.process_one_by_one(0, attempt_plan, range(5), process) == {index: index for index in range(5)}
    assert len(processed) == 5 + lost_after


def test_a_fragment_without_deaths_is_processed_at_full_speed_again() -> None:
    ledger = Ledger(1, TIMEOUT_S)
    for _ in range(50):
        attempt_plan = ledger.begin(DECODE, 1)
        assert not attempt_plan.one_by_one
        ledger.end(DECODE, 1, attempt_plan.attempt)


def test_a_fragment_that_never_fits_ends_the_run_after_a_few_attempts() -> None:
    seen: list[int] = []

    def survive(index: int, num_held: int) -> bool:
        seen.append(index)
        return False

    with pytest.raises(ClusterError, match=r"fragment 0 died 11 times, and no image explains it: the fragment may not"):
        simulate(64, survive, dies_at_the_end=lambda: True)
    assert len(seen) == 3 * 64  # Images whose results were handed over are not processed again.


def test_a_device_that_fails_at_every_image_ends_the_run() -> None:
    client = LocalLedger(PREDICT)

    def fail(index: int, num_held: int) -> bool:
        client.report(0, "CUDA error: uncorrectable ECC error")
        return True

    with pytest.raises(ClusterError, match=r"fragment 0 dies at every image \(CUDA error: uncorrectable ECC error\)"):
        simulate(64, fail, client=client)


class Clock:
    """A clock that the test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("durations_s", "kind"),
    [([300, 301, 350], FaultKind.TIMEOUT), ([299, 10, 1], FaultKind.FAILED), ([300, 300, 20], FaultKind.FAILED)],
)
def test_an_image_is_a_timeout_if_all_its_deaths_were(durations_s: list[float], kind: FaultKind) -> None:
    clock = Clock()
    ledger = Ledger(1, TIMEOUT_S, clock)
    ledger.begin(DECODE, 0)
    for duration_s in durations_s:
        ledger.record_image(DECODE, 0, ledger.begin(DECODE, 0).attempt, 4)
        clock.now_s += duration_s
    failure = ledger.begin(DECODE, 0).failed[4]
    assert failure.kind == kind
    if kind == FaultKind.TIMEOUT:
        assert failure.message == "decoding this image took longer than 300 s (segment.image_timeout_s), 3 times"


def test_a_timeout_is_explained_by_its_image_in_any_position() -> None:
    clock = Clock()
    client = LocalLedger(DECODE, Ledger(1, TIMEOUT_S, clock))

    def hang(index: int, num_held: int) -> bool:
        clock.now_s += TIMEOUT_S if index == 5 else 1
        return index == 5

    attempts, failed, results = simulate(8, hang, client=client)
    assert (attempts, failed) == (5, {5: FaultKind.TIMEOUT})
    assert len(results) == 7


def test_attempts_that_the_driver_stopped_are_not_deaths_and_progress_is_reported_once() -> None:
    ledger = Ledger(1, TIMEOUT_S)
    ledger.record_image(DECODE, 0, ledger.begin(DECODE, 0).attempt, 0)
    assert not ledger.abandon_attempts()
    attempt_plan = ledger.begin(DECODE, 0)
    assert not attempt_plan.one_by_one
    for index in (0, 1):
        ledger.record_image(DECODE, 0, attempt_plan.attempt, index)
    assert ledger.abandon_attempts()
    assert not ledger.abandon_attempts()


def test_predictors_that_keep_dying_while_loading_end_the_run_unless_there_is_progress() -> None:
    ledger = Ledger(num_predictors=2, image_timeout_s=TIMEOUT_S)
    for _ in range(10):
        ledger.start_predictor()
    ledger.begin(PREDICT, 0)
    for _ in range(10):
        ledger.start_predictor()
    with pytest.raises(ClusterError, match="predictors died 10 times while loading the model"):
        ledger.start_predictor()
