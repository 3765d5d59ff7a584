"""What a search draws from: settings by dotted name, checked before anything starts."""

from typing import Any

import numpy as np
from pydantic import ValidationError

from segray.config import SearchRange, TrainConfig
from segray.errors import ConfigError
from segray.training.driver import check_network

_PRESET = "augmentation.preset"
_OF_A_TRIAL = ("model", "loss", "augmentation", "train", "image_size")


def set_values(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """Return a configuration with other values, given by dotted name.

    Raises:
        ConfigError: A name is no setting that a trial may have of its own, or a value is wrong.
    """
    content = config.model_dump(mode="json")
    for name, value in sorted(values.items(), key=lambda pair: pair[0] != _PRESET):
        if name == _PRESET:  # which stands for all other settings of its section
            name, value = "augmentation", {"preset": value}
        *sections, last = name.split(".")
        if (sections or [last])[0] not in _OF_A_TRIAL:
            raise ConfigError(f"tune.space.{name}: expected a setting of {', '.join(_OF_A_TRIAL)}")
        inner = content
        for section in sections:
            inner = inner.setdefault(section, {})
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
    """Refuse a search over nothing, over what is no setting, or over values that a setting cannot have.

    Raises:
        ConfigError: Names the setting.
    """
    if not config.tune.space:
        raise ConfigError("tune.space: expected settings to search, as in train.learning_rate: {log_uniform: [a, b]}")
    if config.tune.grace_epochs > config.train.num_epochs:
        raise ConfigError(
            f"tune.grace_epochs: expected at most train.num_epochs: {config.train.num_epochs}, "
            f"got {config.tune.grace_epochs}"
        )
    if "train.num_epochs" in config.tune.space:
        raise ConfigError("tune.space.train.num_epochs: trials are compared epoch by epoch; set it for all of them")
    for name, drawn_from in config.tune.space.items():
        for value in drawn_from.extremes:
            check_network(set_values(config, {name: value}))


def draw_values(config: TrainConfig, number: int) -> dict[str, Any]:
    """Return the settings of a trial, by dotted name; the same for the same seed and number."""
    generator = np.random.default_rng([config.tune.seed, number])
    return {name: _draw(config.tune.space[name], generator) for name in sorted(config.tune.space)}


def _draw(drawn_from: SearchRange, generator: np.random.Generator) -> Any:
    if drawn_from.choice is not None:
        return drawn_from.choice[generator.integers(len(drawn_from.choice))]
    if drawn_from.uniform is not None:
        return float(generator.uniform(*drawn_from.uniform))
    if drawn_from.log_uniform is not None:
        return float(np.exp(generator.uniform(*np.log(drawn_from.log_uniform))))
    assert drawn_from.int_uniform is not None
    return int(generator.integers(*drawn_from.int_uniform, endpoint=True))


def format_values(values: dict[str, Any]) -> str:
    """Return settings drawn, as in ``train.learning_rate=0.0012 loss.dice=1``."""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
