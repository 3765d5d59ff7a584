"""Who is named when a run stalls; a real one is in test_training.py."""

from segray.training.watchdog import StallJudge

TIMEOUT_S = 10.0


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Ranks:
    """Ranks that beat every second."""

    def __init__(self, num_ranks: int) -> None:
        self.clock = Clock()
        self.judge = StallJudge(TIMEOUT_S, self.clock)
        self.judge.restart(num_ranks)
        self.places = dict.fromkeys(range(num_ranks), (0, "setting up", 0))

    def move(self, rank: int, step: int, stage: str) -> None:
        self.places[rank] = (step, stage, self.places[rank][2] + 1)

    def beat(self, seconds: int, silent: tuple[int, ...] = ()) -> str | None:
        for _ in range(seconds):
            self.clock.now_s += 1
            for rank, place in self.places.items():
                if rank not in silent:
                    self.judge.hear(rank, *place)
        return self.judge.verdict


def test_no_verdict_while_one_rank_moves() -> None:
    ranks = Ranks(3)
    for step in range(60):
        ranks.move(1, step, "forward")
        assert ranks.beat(1) is None


def test_the_rank_that_is_behind_is_named_with_its_step_and_stage() -> None:
    ranks = Ranks(3)
    for rank in (0, 2):
        ranks.move(rank, 270, "update")
    ranks.move(1, 270, "backward")
    verdict = ranks.beat(12)
    assert verdict is not None
    assert "stalled: rank 1 in step 271 (backward)." in verdict
    assert "10 s (train.stall_timeout_s)" in verdict


def test_a_rank_still_saving_is_behind_one_that_computes_the_next_step() -> None:
    ranks = Ranks(2)
    ranks.move(0, 300, "forward")
    ranks.move(1, 300, "saving")
    assert "stalled: rank 1 in step 301 (saving)." in str(ranks.beat(12))


def test_the_rank_that_says_nothing_is_named_even_if_it_is_ahead() -> None:
    ranks = Ranks(2)
    ranks.move(0, 5, "forward")
    ranks.move(1, 5, "update")
    ranks.beat(1)
    assert "stalled: rank 1 in step 6 (update)." in str(ranks.beat(12, silent=(1,)))


def test_ranks_that_died_do_not_count_against_those_that_replace_them() -> None:
    ranks = Ranks(2)
    for rank in range(2):
        ranks.move(rank, 3, "loading")
        ranks.move(rank, 3, "forward")
    ranks.beat(1)
    ranks.clock.now_s += TIMEOUT_S - 1  # so long it took to start new ones
    ranks.places = dict.fromkeys(range(2), (0, "setting up", 0))
    assert ranks.judge.hear(1, 0, "setting up", 0) is None  # before rank 0 has said that all are new
    assert ranks.beat(9) is None
    assert ranks.beat(2) is not None
