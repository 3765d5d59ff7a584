"""Load a configuration from a YAML file, with overrides of the form ``section.name=value``."""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from segray.config.files import SegmentFile
from segray.errors import ConfigError, flatten_message
from segray.storage import is_relative, read_bytes

ConfigT = TypeVar("ConfigT", bound=SegmentFile)


def load_config(
    kind: type[ConfigT], source: str | os.PathLike[str] | Mapping[str, Any] | None, overrides: Sequence[str] = ()
) -> ConfigT:
    """Read a configuration and apply ``KEY=VALUE`` overrides to it.

    Args:
        kind: ``TrainConfig`` or ``SegmentFile``.
        source: Path or URI of a YAML file, the sections as a mapping, or None to use only the defaults.
        overrides: Strings such as ``"train.num_epochs=3"``. Keys are dotted names, values are YAML.

    Raises:
        ConfigError: The file is not YAML, or a setting is unknown, missing or invalid.
        StorageError: The file cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        name, values = os.fspath(source), _read_file(os.fspath(source))
    else:
        name, values = "settings", dict(source or {})
    for override in overrides:
        _apply_override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_describe(problem, kind) for problem in error.errors())
        raise ConfigError(f"{name}: {problems}") from error


def _read_file(uri: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(read_bytes(uri).decode("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri}: expected YAML: {flatten_message(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{uri}: expected sections such as data: and train:, got {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as --set train.num_epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML; quote it") from error
    if key == "augmentation.preset":  # A preset sets all other settings of its section.
        key, value = "augmentation", {"preset": value}
    *sections, name = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict | None):  # For example a preset name, which would be silently dropped.
            raise ConfigError(
                f"--set {override}: {section} is {inner!r}, not a section that {name} can be set in; "
                f"replace {section} as a whole"
            )
        values[section] = dict(inner or {})
        values = values[section]
    values[name] = value


def _describe(problem: Any, kind: type[SegmentFile]) -> str:
    # For a union, pydantic adds the member that it tried (a class name, or a type), which is not part of the setting's
    # name.
    parts = [str(part) for part in problem["loc"] if part not in ("int", "constrained-int")]
    path = ".".join(part for part in parts if not part[:1].isupper() and "[" not in part)
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


def find_differences(recorded: Any, current: Any, path: str = "") -> list[str]:
    """Compare two resolved configurations, and return one ``NAME: the run has X, got Y`` for each setting that differs.

    Args:
        recorded: Configuration that the run was started with, as nested dicts of JSON values.
        current: Configuration of this call.
        path: Dotted name of the section that both belong to.
    """
    if isinstance(recorded, dict) and isinstance(current, dict):
        names = sorted(recorded.keys() | current.keys())
        pairs = [(recorded.get(name), current.get(name), f"{path}.{name}" if path else name) for name in names]
        return [difference for pair in pairs for difference in find_differences(*pair)]
    return [] if recorded == current else [f"{path}: the run has {recorded!r}, got {current!r}"]


def require_absolute(uris: Mapping[str, str | None]) -> None:
    """Raise if a path depends on the current folder.

    A submitted job runs in a temporary folder that other nodes do not share.

    Args:
        uris: Paths and URIs by the name of their setting; None is skipped.

    Raises:
        ConfigError: A path is relative. The message names the first one and its setting.
    """
    for setting, uri in uris.items():
        if uri is not None and is_relative(uri):
            raise ConfigError(
                f"{setting}: {uri} is a relative path, but a submitted job runs in a temporary folder; "
                "give an absolute path that every node can access, or an s3:// URI"
            )
