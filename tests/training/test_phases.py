"""The record of settings that changed during a run."""

from typing import Any

from segray.training.phases import Phase, add_phase, describe_phases, have_same_schedule

TRAIN = {"num_epochs": 10, "schedule": "one_cycle", "warm_up_fraction": None, "poly_power": 0.9, "precision": "bf16"}


def build(num_steps_done: int = 0, num_workers: int = 8, **train: Any) -> Phase:
    settings = {"augmentation": {"preset": "light"}, "train": {**TRAIN, **train}}
    return Phase(
        num_steps_done=num_steps_done, epoch=1 + num_steps_done // 20, num_workers=num_workers, settings=settings
    )


def test_a_restart_with_the_same_settings_adds_no_phase() -> None:
    first = add_phase([], build())
    assert first == [build()]
    assert add_phase(first, build(30)) == first
    assert describe_phases(first) == []


def test_more_epochs_are_a_new_phase_with_a_new_schedule() -> None:
    phases = add_phase([build()], build(200, num_epochs=20))
    assert describe_phases(phases) == [
        "changed after step 200 (epoch 11): train.num_epochs: the run has 10, got 20; "
        "the learning-rate schedule is recomputed over 20 epochs"
    ]
    assert not have_same_schedule(*phases)


def test_fewer_workers_and_another_precision_keep_the_schedule() -> None:
    phases = add_phase([build(num_train_workers=8)], build(30, 4, precision="fp32", num_train_workers=4))
    assert describe_phases(phases) == [
        "changed after step 30 (epoch 2): train.precision: the run has 'bf16', got 'fp32'; "
        "number of workers: the run has 8, got 4"
    ]
    assert have_same_schedule(*phases)


def test_a_change_of_the_configured_workers_alone_is_named_because_it_changes_the_accumulation() -> None:
    phases = add_phase([build(num_workers=2, num_train_workers=4)], build(30, 2, num_train_workers=2))
    assert describe_phases(phases) == ["changed after step 30 (epoch 2): train.num_train_workers: the run has 4, got 2"]
