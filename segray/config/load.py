"""A configuration from a YAML file, overridden with ``--set section.name=value``."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from segray.config.files import SegmentFile
from segray.errors import ConfigError, flatten_message
from segray.storage import is_relative, read_bytes

ConfigT = TypeVar("ConfigT", bound=SegmentFile)


def load_config(kind: type[ConfigT], uri: str | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a configuration file and apply ``KEY=VALUE`` overrides to it.

    Args:
        kind: ``TrainConfig`` or ``SegmentFile``.
        uri: YAML file, or None for the defaults alone.
        overrides: ``"train.num_epochs=3"``; values are YAML, keys are dotted.

    Raises:
        ConfigError: The file is not YAML, or a setting is unknown, missing or wrong.
        StorageError: The file cannot be read.
    """
    values: Any = {}
    if uri is not None:
        try:
            values = yaml.safe_load(read_bytes(uri).decode("utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{uri}: expected YAML: {flatten_message(error)}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{uri}: expected sections such as data: and train:, got {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_describe(problem, kind) for problem in error.errors())
        raise ConfigError(f"{uri or 'settings'}: {problems}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as --set train.num_epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML; quote it") from error
    if key == "augmentation.preset":  # which stands for all other settings of its section
        key, value = "augmentation", {"preset": value}
    *sections, name = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict | None):  # such as a preset, which would be lost without a word
            raise ConfigError(
                f"--set {override}: {section} is {inner!r}, no section to set {name} in; set it as a whole"
            )
        values[section] = dict(inner or {})
        values = values[section]
    values[name] = value


def _describe(problem: Any, kind: type[SegmentFile]) -> str:
    # pydantic adds the tried union member (a class name, or a type with brackets); a user knows only the settings
    path = ".".join(str(part) for part in problem["loc"] if not str(part)[:1].isupper() and "[" not in str(part))
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path, list(_iterate_settings(kind)), n=1)
        return f"{path}: unknown setting" + (f"; did you mean {close[0]}?" if close else "; remove it")
    if problem["type"] == "missing":
        return f"{path}: this setting is required"
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if problem["type"] == "value_error" else f", got {problem['input']!r}"
    return f"{path}: {message[0].lower()}{message[1:]}{got}" if path else message + got


def _iterate_settings(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield prefix + name
        for inner in [field.annotation, *get_args(field.annotation)]:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _iterate_settings(inner, f"{prefix}{name}.")


def find_differences(theirs: Any, mine: Any, path: str = "") -> list[str]:
    """Return each setting that differs between two resolved configurations, as ``name: there …, here …``."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        names = sorted(theirs.keys() | mine.keys())
        pairs = [(theirs.get(name), mine.get(name), f"{path}.{name}" if path else name) for name in names]
        return [difference for pair in pairs for difference in find_differences(*pair)]
    return [] if theirs == mine else [f"{path}: there {theirs!r}, here {mine!r}"]


def require_absolute(uris: Mapping[str, str | None]) -> None:
    """Refuse paths that depend on the current folder, given by the name of their setting.

    Submitted jobs run in a folder of their own that is thrown away, and on machines that do not share it.

    Raises:
        ConfigError: Names the first relative path and its setting.
    """
    for setting, uri in uris.items():
        if uri is not None and is_relative(uri):
            raise ConfigError(
                f"{setting}: {uri} is relative, but a submitted job runs in a folder of its own that is thrown away; "
                "give an absolute path that every node sees, or an s3:// URI"
            )
