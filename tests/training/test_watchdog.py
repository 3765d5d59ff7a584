"""Which ranks the diagnosis of a stalled run names; test_runs.py stalls a real run."""

from segray.training.watchdog import StallDetector

TIMEOUT_S = 10.0


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Ranks:
    """Ranks that report to a stall detector every second."""

    def __init__(self, num_ranks: int) -> None:
        self.clock = Clock()
        self.detector = StallDetector(TIMEOUT_S, self.clock)
        self.detector.restart(num_ranks)
        self.positions = dict.fromkeys(range(num_ranks), (0, "setting up", 0))

    def update(self, rank: int, step: int, stage: str) -> None:
        self.positions[rank] = (step, stage, self.positions[rank][2] + 1)

    def report(self, seconds: int, silent: tuple[int, ...] = ()) -> str | None:
        for _ in range(seconds):
            self.clock.now_s += 1
            for rank, position in self.positions.items():
                if rank not in silent:
                    self.detector.record(rank, *position)
        return self.detector.diagnosis


def test_there_is_no_diagnosis_while_one_rank_makes_progress() -> None:
    ranks = Ranks(3)
    for step in range(60):
        ranks.update(1, step, "forward")
        assert ranks.report(1) is None


def test_the_rank_that_is_behind_is_named_with_step_and_stage() -> None:
    ranks = Ranks(3)
    for rank in (0, 2):
        ranks.update(rank, 270, "update")
    ranks.update(1, 270, "backward")
    diagnosis = ranks.report(12)
    assert diagnosis is not None
    assert "stalled: rank 1 in step 271 (backward);" in diagnosis
    assert "10 s (train.stall_timeout_s)" in diagnosis


def test_a_rank_that_is_still_saving_is_behind_one_that_computes_the_next_step() -> None:
    ranks = Ranks(2)
    ranks.update(0, 300, "forward")
    ranks.update(1, 300, "saving")
    assert "stalled: rank 1 in step 301 (saving);" in str(ranks.report(12))


def test_a_rank_that_stopped_reporting_is_named_even_if_it_is_ahead() -> None:
    ranks = Ranks(2)
    ranks.update(0, 5, "forward")
    ranks.update(1, 5, "update")
    ranks.report(1)
    assert "stalled: rank 1 in step 6 (update);" in str(ranks.report(12, silent=(1,)))


def test_new_ranks_do_not_inherit_the_idle_time_of_those_they_replace() -> None:
    ranks = Ranks(2)
    for rank in range(2):
        ranks.update(rank, 3, "loading")
        ranks.update(rank, 3, "forward")
    ranks.report(1)
    ranks.clock.now_s += TIMEOUT_S - 1  # The time it took to start new ranks.
    ranks.positions = dict.fromkeys(range(2), (0, "setting up", 0))
    assert ranks.detector.record(1, 0, "setting up", 0) is None  # Before rank 0 has registered the new ranks.
    assert ranks.report(9) is None
    assert ranks.report(2) is not None
