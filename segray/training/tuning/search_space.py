"""The search space: draw settings by dotted name, and check them before anything starts."""

from typing import Any

import numpy as np
from pydantic import ValidationError

from segray.config import SearchRange, TrainConfig
from segray.errors import ConfigError
from segray.training.driver import check_network

_PRESET = "augmentation.preset"
_SEARCHABLE = ("model", "loss", "augmentation", "train", "image_size")


def set_values(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """Return a configuration with some settings replaced, given by dotted name.

    Raises:
        ConfigError: A name is not a setting that can be searched, or a value is invalid.
    """
    content = config.model_dump(mode="json")
    for name, value in sorted(values.items(), key=lambda pair: pair[0] != _PRESET):
        if name == _PRESET:  # A preset replaces all other settings of its section, so it is applied first.
            name, value = "augmentation", {"preset": value}
        *sections, last = name.split(".")
        if (sections or [last])[0] not in _SEARCHABLE:
            raise ConfigError(f"tune.space.{name}: expected a setting in {', '.join(_SEARCHABLE)}")
        inner = content
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"tune.space.{name}: {section} is {inner!r}, not a section that {last} can be set in")
        inner[last] = value
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"tune.space: with {format_values(values)}: {where}: {problem['msg'].removeprefix('Value error, ')}"
        ) from error


def check_space(config: TrainConfig) -> None:
    """Check that the search space is not empty and holds only existing settings with valid values.

    Raises:
        ConfigError: Names the setting.
    """
    if not config.tune.space:
        raise ConfigError("tune.space: expected settings to search, such as train.learning_rate: {log_uniform: [a, b]}")
    if config.train.time_budget_min is not None:
        raise ConfigError(
            "train.time_budget_min: trials are compared epoch by epoch, got "
            f"{config.train.time_budget_min:g}; set train.num_epochs instead"
        )
    if "train" in config.tune.space:
        raise ConfigError("tune.space.train: expected single settings, such as train.learning_rate; got the section")
    if "train.folds" in config.tune.space:
        raise ConfigError("tune.space.train.folds: cannot be searched, because trials train once each; remove it")
    if config.train.folds is not None:
        raise ConfigError(
            f"train.folds: a search trains once for each trial, got {config.train.folds}; set train.folds: null"
        )
    if config.tune.grace_epochs > config.train.num_epochs:
        raise ConfigError(
            f"tune.grace_epochs: expected at most train.num_epochs ({config.train.num_epochs}), "
            f"got {config.tune.grace_epochs}"
        )
    if "train.num_epochs" in config.tune.space:
        raise ConfigError(
            "tune.space.train.num_epochs: trials are compared epoch by epoch and need the same number of epochs; "
            "set train.num_epochs instead"
        )
    for name, search_range in config.tune.space.items():
        for value in search_range.extremes:
            check_network(set_values(config, {name: value}))


def draw_values(config: TrainConfig, number: int) -> dict[str, Any]:
    """Draw the settings of a trial, by dotted name; they depend only on the seed and the trial's number."""
    generator = np.random.default_rng([config.tune.seed, number])
    return {name: _draw(config.tune.space[name], generator) for name in sorted(config.tune.space)}


def _draw(search_range: SearchRange, generator: np.random.Generator) -> Any:
    if search_range.choice is not None:
        return search_range.choice[generator.integers(len(search_range.choice))]
    if search_range.uniform is not None:
        return float(generator.uniform(*search_range.uniform))
    if search_range.log_uniform is not None:
        return float(np.exp(generator.uniform(*np.log(search_range.log_uniform))))
    assert search_range.int_uniform is not None
    return int(generator.integers(*search_range.int_uniform, endpoint=True))


def format_values(values: dict[str, Any]) -> str:
    """Format drawn settings, for example ``train.learning_rate=0.0012 loss.dice=1``."""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
