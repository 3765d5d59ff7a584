"""Settings of a search over other settings."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from segray.config.section import Section


class SearchRange(Section):
    """What one setting is drawn from: one of the four."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    int_uniform: tuple[int, int] | None = Field(None, description="both ends included")

    @model_validator(mode="after")
    def _check_one_form(self) -> Self:
        given = {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(
                f"expected one of {', '.join(type(self).model_fields)}, got {', '.join(given) or 'none of them'}"
            )
        for name, ends in given.items():
            if name != "choice" and ends[0] >= ends[1]:
                raise ValueError(f"{name}: expected [low, high], got {list(ends)}")
        return self

    @property
    def extremes(self) -> tuple[Any, ...]:
        """All values of a choice, or both ends of a range."""
        return self.choice or self.uniform or self.log_uniform or self.int_uniform or ()


class TuneSettings(Section):
    """A search with ``segray tune``: random draws, of which ASHA stops the worse ones early."""

    space: dict[str, SearchRange] = Field({}, description="by dotted name: train.learning_rate: {log_uniform: [a, b]}")
    num_trials: int = Field(10, ge=1)
    max_concurrent_trials: int = Field(1, ge=1)
    grace_epochs: int = Field(1, ge=1, description="that every trial may run")
    reduction_factor: int = Field(3, ge=2, description="one of so many goes on at each rung")
    seed: int = Field(0, ge=0)
