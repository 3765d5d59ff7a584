"""The phases of a run: the settings that may change between two starts of it, and the steps that each applied to."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict

from segray.config import find_differences

_SCHEDULE_SETTINGS = ("num_epochs", "schedule", "warm_up_fraction", "poly_power")  # Besides those that bind the run.


class Phase(BaseModel):
    """A part of a run with the same settings.

    Attributes:
        num_steps_done: Training steps completed when it began.
        epoch: The epoch in which it began, from 1.
        num_workers: Number of training workers (ranks).
        settings: ``TrainConfig.phase_settings``.
    """

    model_config = ConfigDict(frozen=True)

    num_steps_done: int
    epoch: int
    num_workers: int
    settings: dict[str, Any]


def add_phase(phases: Sequence[Phase], phase: Phase) -> list[Phase]:
    """Return the phases of a run that starts or resumes with ``phase``; nothing is added if nothing has changed."""
    if phases and (phases[-1].settings, phases[-1].num_workers) == (phase.settings, phase.num_workers):
        return list(phases)
    return [*phases, phase]


def have_same_schedule(phase: Phase, other: Phase) -> bool:
    """Return whether the learning-rate schedules of two phases of one run are the same."""
    one, two = phase.settings["train"], other.settings["train"]
    return all(one[name] == two[name] for name in _SCHEDULE_SETTINGS)


def describe_phases(phases: Sequence[Phase]) -> list[str]:
    """Return one line for each phase but the first: where it began, and what changed."""
    return [_describe_change(before, after) for before, after in pairwise(phases)]


def _describe_change(before: Phase, after: Phase) -> str:
    changes = find_differences(before.settings, after.settings)
    if before.num_workers != after.num_workers:  # Instead of the configured number, which is an upper limit.
        changes = [change for change in changes if not change.startswith("train.num_train_workers:")]
        changes.append(f"number of workers: the run has {before.num_workers}, got {after.num_workers}")
    line = f"changed after step {after.num_steps_done} (epoch {after.epoch}): {'; '.join(changes)}"
    if not have_same_schedule(before, after):
        num_epochs = after.settings["train"]["num_epochs"]
        line += f"; the learning-rate schedule is recomputed over {num_epochs} epochs"
    return line
