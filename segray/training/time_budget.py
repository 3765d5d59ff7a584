"""Convert ``train.time_budget_min`` to ``train.num_epochs``, once per run, from the first measured steps.

From then on the run is one with that ``num_epochs``: the same schedule and the same bits, also when it is resumed, and
when it turns out to be faster or slower than measured.
"""

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from segray.config import TrainConfig
from segray.errors import ConfigError, MissingFileError
from segray.storage import join_uri, normalize_uri, read_bytes, write_bytes

_NAME = "time_budget.json"
_S_PER_MIN = 60


class TimeBudget(BaseModel):
    """Content of ``time_budget.json``.

    Attributes:
        time_budget_min: The setting that ``num_epochs`` was computed from.
        num_epochs: The number of epochs of the run.
        s_per_epoch: Measured seconds for the steps of an epoch.
        s_per_evaluation: Measured seconds to evaluate the validation split.
    """

    model_config = ConfigDict(frozen=True)

    time_budget_min: float
    num_epochs: int
    s_per_epoch: float
    s_per_evaluation: float


def compute_num_epochs(budget_s: float, s_per_epoch: float, s_per_evaluation: float, eval_every_epochs: int) -> int:
    """Return the highest number of epochs whose steps and evaluations fit into a time budget; at least 1."""

    def fits(num_epochs: int) -> bool:
        num_evaluations = math.ceil(num_epochs / eval_every_epochs)  # The last epoch is always evaluated.
        return num_epochs * s_per_epoch + num_evaluations * s_per_evaluation <= budget_s

    num_epochs = 1 + int(budget_s / (s_per_epoch + s_per_evaluation / eval_every_epochs))
    while num_epochs > 1 and not fits(num_epochs):
        num_epochs -= 1
    return num_epochs


def apply_measured(config: TrainConfig, measured: Mapping[str, float], console: Console) -> TrainConfig:
    """Return the configuration with ``num_epochs`` in place of the budget; print it, and keep it in the output.

    Args:
        config: It has a time budget.
        measured: ``s_per_epoch`` and ``s_per_evaluation``.
        console: Where one line is printed.
    """
    train = config.train
    assert train.time_budget_min is not None
    s_per_epoch, s_per_evaluation = measured["s_per_epoch"], measured["s_per_evaluation"]
    budget_s = train.time_budget_min * _S_PER_MIN
    budget = TimeBudget(
        time_budget_min=train.time_budget_min,
        num_epochs=compute_num_epochs(budget_s, s_per_epoch, s_per_evaluation, train.eval_every_epochs),
        s_per_epoch=s_per_epoch,
        s_per_evaluation=s_per_evaluation,
    )
    write_bytes(_get_uri(config), budget.model_dump_json(indent=2).encode())
    return _apply(config, budget, console)


def apply_recorded(config: TrainConfig, console: Console) -> TrainConfig:
    """Return the configuration with the number of epochs that was computed when the run was started.

    With another budget than then, the number is computed again from the speed that was measured then.

    Raises:
        ConfigError: None was computed, because the run was started with ``train.num_epochs``, or it is lost.
    """
    try:
        budget = TimeBudget.model_validate_json(read_bytes(_get_uri(config)))
    except (MissingFileError, ValidationError) as error:
        raise ConfigError(
            f"train.time_budget_min: the run in {config.output} was started with train.num_epochs, or its {_NAME} was "
            f"removed or damaged, got {config.train.time_budget_min:g}; set train.num_epochs, or choose another output"
        ) from error
    if budget.time_budget_min == config.train.time_budget_min:
        return _apply(config, budget, console)
    return apply_measured(config, budget.model_dump(include={"s_per_epoch", "s_per_evaluation"}), console)


def _apply(config: TrainConfig, budget: TimeBudget, console: Console) -> TrainConfig:
    console.print(
        f"train.time_budget_min {budget.time_budget_min:g}: train.num_epochs is {budget.num_epochs}, at "
        f"{budget.s_per_epoch:.3g} s per epoch and {budget.s_per_evaluation:.3g} s per evaluation ({_NAME})",
        highlight=False,
    )
    train = config.train.model_copy(update={"num_epochs": budget.num_epochs, "time_budget_min": None})
    return config.model_copy(update={"train": train})


def _get_uri(config: TrainConfig) -> str:
    return join_uri(normalize_uri(config.output), _NAME)
