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
    try:
        index = json.loads(read_bytes(join_uri(uri, _INDEX)))
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
    """Return the URIs of the checkpoints of a run, damaged ones included, the newest first."""
    names = sorted(
        (name for name in list_names(run_uri, folders=True) if name.startswith(_CHECKPOINT_PREFIX)), reverse=True
    )
    return [join_uri(run_uri, name) for name in names]


def find_newest_state(run_uri: str, warn: Callable[[str], None]) -> tuple[str, TrainingState] | None:
    """Return the newest whole checkpoint of a run and its URI, or None; ``warn`` hears of damaged ones."""
    return next(_iterate_states(run_uri, warn), None)


def find_best_state(run_uri: str, warn: Callable[[str], None]) -> TrainingState:
    """Return the whole checkpoint with the highest validation mean IoU, the earliest among equals.

    Raises:
        TrainingError: No checkpoint of the run is whole.
    """
    states = [state for _, state in _iterate_states(run_uri, warn)]
    if not states:
        raise TrainingError(f"no whole checkpoint under {run_uri}; train again with another output")
    return max(states, key=lambda state: (state.history[-1]["val_mean_iou"], -state.num_epochs_done))


def _iterate_states(run_uri: str, warn: Callable[[str], None]) -> Iterator[tuple[str, TrainingState]]:
    for uri in list_checkpoints(run_uri):
        try:
            yield uri, load_state(uri)
        except (ValueError, KeyError) as error:
            warn(f"warning: passing over a damaged checkpoint for the one before: {uri}: {error}")
