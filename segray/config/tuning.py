"""Settings of a hyperparameter search."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from segray.config.section import Section


class SearchRange(Section):
    """Values that one setting is drawn from. Give exactly one of the four forms."""

    choice: tuple[Any, ...] | None = Field(
        None, min_length=1, description="List of values, each drawn with equal probability."
    )
    uniform: tuple[float, float] | None = Field(
        None, description="``[low, high]`` of a uniform distribution of real numbers."
    )
    log_uniform: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = Field(
        None, description="``[low, high]``, both above 0, of a distribution whose logarithm is uniform."
    )
    int_uniform: tuple[int, int] | None = Field(
        None, description="``[low, high]`` of a uniform distribution of integers; both ends are included."
    )

    @model_validator(mode="after")
    def _check_one_form(self) -> Self:
        given = {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(
                f"expected one of {', '.join(type(self).model_fields)}, got {', '.join(given) or 'none of them'}"
            )
        for name, ends in given.items():
            if name != "choice" and ends[0] >= ends[1]:
                raise ValueError(f"{name}: expected [low, high] with low < high, got {list(ends)}")
        return self

    @property
    def extremes(self) -> tuple[Any, ...]:
        """All values of a choice, or both ends of a range."""
        return self.choice or self.uniform or self.log_uniform or self.int_uniform or ()


class TuneSettings(Section):
    """Hyperparameter search with ``segray tune``: random search in which ASHA stops weak trials early.

    Each trial is a training run in its own folder under the output. The values of a trial depend only on the seed and
    the number of the trial.
    """

    space: dict[str, SearchRange] = Field(
        {},
        description="Settings to search, by dotted name, as in ``train.learning_rate: {log_uniform: [1.0e-4, "
        "1.0e-2]}``. Sections ``model``, ``loss``, ``augmentation`` and ``train``, and ``image_size``, can be "
        "searched; ``train.num_epochs`` cannot.",
    )
    num_trials: int = Field(10, ge=1, description="Number of trials.")
    max_concurrent_trials: int = Field(
        1, ge=1, description="Trials that run at the same time; each needs ``train.num_train_workers`` workers."
    )
    grace_epochs: int = Field(1, ge=1, description="Epochs that each trial runs before ASHA may stop it.")
    reduction_factor: int = Field(
        3, ge=2, description="At each rung, ASHA lets about one in this many trials continue."
    )
    seed: int = Field(0, ge=0, description="Seed of the drawn values.")
