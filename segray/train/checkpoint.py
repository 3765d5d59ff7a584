"""Checkpoints to resume from: ``state.safetensors`` and ``checkpoint.json``, which holds the sha256 of the former.

Ray Train carries them to storage and prunes them. They are found again by looking at what is there, not by asking
Ray's own list of them, which can be left empty by a driver that dies while writing it. A damaged one is passed over
for the one before, and said so. Nothing is pickled.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors

from segray.bundle import pack_tensors
from segray.errors import MissingFileError, TrainingError
from segray.storage import join_uri, list_names, read_bytes

_STATE, _INDEX = "state.safetensors", "checkpoint.json"
RUN_NAME = "ray_train"  # the folder under the output that Ray Train keeps its checkpoints in
_CHECKPOINT_PREFIX = "checkpoint_"  # Ray Train's name for the folders that it makes


@dataclass(frozen=True)
class TrainingState:
    """All that an unbroken run would have had at this point.

    Attributes:
        num_epochs_done: Epochs behind this state. Random numbers are drawn by (seed, step, rank), so the epoch is
            also the position in the sample order and the state of every generator.
        model: State dict of the model.
        optimizer: State dict of the optimizer.
        schedule: State dict of the learning-rate schedule.
        history: Metrics of each epoch so far.
    """

    num_epochs_done: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    history: list[dict[str, Any]]


def save_state(folder: Path, state: TrainingState) -> None:
    """Write a checkpoint into an empty local folder."""
    tensors = {f"model.{name}": tensor for name, tensor in state.model.items()}
    scalars: dict[str, Any] = {}
    for parameter, values in state.optimizer["state"].items():
        for name, value in values.items():
            key = f"optimizer.{parameter}.{name}"
            (tensors if isinstance(value, torch.Tensor) else scalars)[key] = value
    content = pack_tensors(tensors)
    index = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "num_epochs_done": state.num_epochs_done,
        "optimizer_scalars": scalars,
        "optimizer_groups": state.optimizer["param_groups"],
        "schedule": state.schedule,
        "history": state.history,
    }
    (folder / _STATE).write_bytes(content)
    (folder / _INDEX).write_text(json.dumps(index))


def load_state(uri: str) -> TrainingState:
    """Read a checkpoint.

    Raises:
        ValueError: It is incomplete or damaged.
        StorageError: The store refused or failed.
    """
    index = _read_index(uri)
    try:
        content = read_bytes(join_uri(uri, _STATE))
    except MissingFileError as error:
        raise ValueError(f"incomplete: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != index["sha256"]:
        raise ValueError(f"{_STATE} has sha256 {found[:12]}… instead of {index['sha256'][:12]}…")
    model: dict[str, torch.Tensor] = {}
    parameters: dict[int, dict[str, Any]] = {}
    for key, value in {**load_safetensors(content), **index["optimizer_scalars"]}.items():
        owner, _, name = key.partition(".")
        if owner == "model":
            model[name] = value
        else:
            parameter, _, name = name.partition(".")
            parameters.setdefault(int(parameter), {})[name] = value
    groups = [{**group, "betas": tuple(group["betas"])} for group in index["optimizer_groups"]]  # JSON has lists
    optimizer = {"state": parameters, "param_groups": groups}
    return TrainingState(index["num_epochs_done"], model, optimizer, index["schedule"], index["history"])


def list_checkpoints(run_uri: str) -> list[str]:
    """Return the URIs of the checkpoints of a run, damaged ones included."""
    names = sorted(name for name in list_names(run_uri, folders=True) if name.startswith(_CHECKPOINT_PREFIX))
    return [join_uri(run_uri, name) for name in names]


def find_newest_state(run_uri: str, warn: Callable[[str], None]) -> tuple[str, TrainingState] | None:
    """Return the whole checkpoint with most epochs behind it and its URI, or None; ``warn`` hears of damaged ones."""
    return _find_first_whole(run_uri, lambda index: int(index["num_epochs_done"]), warn)


def find_newest_history(run_uri: str) -> list[dict[str, Any]]:
    """Return the metrics of all finished epochs."""
    indices = [index for _, index in _read_indices(run_uri, lambda _: None)]
    return max((index["history"] for index in indices), key=len, default=[])


def find_best_state(run_uri: str, warn: Callable[[str], None]) -> TrainingState:
    """Return the whole checkpoint with the highest validation mean IoU, the latest among equals.

    Ray Train keeps the latest of equals too: the earliest may be gone, or not, by how often the run was started.

    Raises:
        TrainingError: No checkpoint of the run is whole.
    """
    found = _find_first_whole(
        run_uri, lambda index: (index["history"][-1]["val_mean_iou"], index["num_epochs_done"]), warn
    )
    if found is None:
        raise TrainingError(f"no whole checkpoint under {run_uri}; train again with another output")
    return found[1]


def _find_first_whole(
    run_uri: str, rank: Callable[[dict[str, Any]], Any], warn: Callable[[str], None]
) -> tuple[str, TrainingState] | None:
    """Return the highest-ranked checkpoint that is whole; only its weights are read, and those of damaged ones."""
    for uri, _ in sorted(_read_indices(run_uri, warn), key=lambda pair: rank(pair[1]), reverse=True):
        try:
            return uri, load_state(uri)
        except ValueError as error:
            _warn_of_damage(uri, error, warn)
    return None


def _read_indices(run_uri: str, warn: Callable[[str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    for uri in list_checkpoints(run_uri):
        try:
            yield uri, _read_index(uri)
        except ValueError as error:
            _warn_of_damage(uri, error, warn)


def _read_index(uri: str) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(read_bytes(join_uri(uri, _INDEX)))
    except MissingFileError as error:
        raise ValueError(f"incomplete: {error}") from error
    return index


def _warn_of_damage(uri: str, error: ValueError, warn: Callable[[str], None]) -> None:
    warn(f"warning: passing over a damaged checkpoint for another: {uri}: {error}")
