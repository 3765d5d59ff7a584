"""Checkpoints to resume from: ``state.safetensors`` and ``checkpoint.json``, which holds the sha256 of the former.

They are found again by looking at what is there, not by asking Ray Train's own list of them, which can be left empty by
a driver that dies while writing it. A damaged one is passed over for the one before, and said so. Nothing is pickled.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_safetensors

from segray.errors import MissingFileError, TrainingError
from segray.models.bundle import pack_tensors
from segray.storage import get_file_name, join_uri, list_names, read_bytes, remove_folder, write_bytes

_STATE, _INDEX = "state.safetensors", "checkpoint.json"
RUN_NAME = "ray_train"  # the folder under the output that Ray Train keeps its checkpoints in
CHECKPOINT_PREFIX = "checkpoint_"
_MODEL, _AVERAGE, _OPTIMIZER = "model", "average", "optimizer"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainingState:
    """All that an unbroken run would have had at this point.

    Attributes:
        num_steps_done: Steps behind this state. Random numbers are drawn by (seed, step, rank) and (seed, position), so
            the step is also the place in the sample order and the state of every generator.
        model: Whole state dict of the model, however many ranks hold it.
        optimizer: State dict of the optimizer by parameter names, as ``get_optimizer_state_dict`` gives it.
        schedule: State dict of the learning-rate schedule.
        scaler: State dict of the gradient scaler; empty unless in fp16.
        average: State dict of the model with averaged weights, or None.
        epoch_losses: Losses of the steps of the epoch that was begun.
        history: Metrics of each finished epoch.
    """

    num_steps_done: int
    model: Tensors
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    average: Tensors | None = None
    epoch_losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def weights(self) -> Tensors:
        """The weights that are scored and kept: the averaged ones where there are."""
        return self.model if self.average is None else self.average

    @property
    def score(self) -> float | None:
        """Validation mean IoU of these weights; None in the middle of an epoch, or if it was not evaluated."""
        return _get_score({"epoch_losses": self.epoch_losses, "history": self.history})


def save_state(uri: str, state: TrainingState) -> None:
    """Write a checkpoint into an empty folder; what describes it is written last.

    Raises:
        StorageError: The store refused or failed.
    """
    tensors = {f"{_MODEL}.{name}": tensor for name, tensor in state.model.items()}
    tensors |= {f"{_AVERAGE}.{name}": tensor for name, tensor in (state.average or {}).items()}
    scalars: dict[str, Any] = {}
    for parameter, values in state.optimizer["state"].items():
        for name, value in values.items():
            key = f"{_OPTIMIZER}.{parameter}.{name}"
            (tensors if isinstance(value, torch.Tensor) else scalars)[key] = value
    content = pack_tensors(tensors)
    index = {
        "state_sha256": hashlib.sha256(content).hexdigest(),
        "num_steps_done": state.num_steps_done,
        "optimizer_scalars": scalars,
        "optimizer_groups": state.optimizer["param_groups"],
        "schedule": state.schedule,
        "scaler": state.scaler,
        "epoch_losses": state.epoch_losses,
        "history": state.history,
    }
    write_bytes(join_uri(uri, _STATE), content)
    text = json.dumps(index)
    write_bytes(join_uri(uri, _INDEX), json.dumps({"index_sha256": _hash(text), "index": text}).encode())


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
    if found != index["state_sha256"]:
        raise ValueError(f"{_STATE} has sha256 {found[:12]}… instead of {index['state_sha256'][:12]}…")
    parts: dict[str, Tensors] = {_MODEL: {}, _AVERAGE: {}}
    parameters: dict[str, dict[str, Any]] = {}
    # sorted, for safetensors gives them in an order of each process's own, and ranks split weights tensor by tensor
    for key, value in sorted({**load_safetensors(content), **index["optimizer_scalars"]}.items()):
        owner, _, name = key.partition(".")
        if owner == _OPTIMIZER:
            parameter, _, name = name.rpartition(".")
            parameters.setdefault(parameter, {})[name] = value
        else:
            parts[owner][name] = value
    return TrainingState(
        num_steps_done=index["num_steps_done"],
        model=parts[_MODEL],
        optimizer={"state": parameters, "param_groups": [_tuple_betas(group) for group in index["optimizer_groups"]]},
        schedule=index["schedule"],
        scaler=index["scaler"],
        average=parts[_AVERAGE] or None,
        epoch_losses=index["epoch_losses"],
        history=index["history"],
    )


def _tuple_betas(group: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if name == "betas" else value for name, value in group.items()}  # JSON has lists


def name_checkpoint(num_steps_done: int) -> str:
    """Return a new folder name; those of one step differ, so that no start writes into what another has left."""
    return f"{CHECKPOINT_PREFIX}{num_steps_done:09d}_{uuid.uuid4().hex[:8]}"


def list_checkpoints(run_uri: str) -> list[str]:
    """Return the URIs of the checkpoints of a run, damaged ones included."""
    names = sorted(name for name in list_names(run_uri, folders=True) if name.startswith(CHECKPOINT_PREFIX))
    return [join_uri(run_uri, name) for name in names]


def find_newest_state(run_uri: str, warn: Callable[[str], None]) -> tuple[str, TrainingState] | None:
    """Return the whole checkpoint with most steps behind it and its URI, or None; ``warn`` hears of damaged ones."""
    return _find_first_whole(run_uri, lambda index: int(index["num_steps_done"]), warn)


def find_newest_history(run_uri: str) -> list[dict[str, Any]]:
    """Return the metrics of all finished epochs."""
    indices = [index for _, index in _read_indices(run_uri, lambda _: None)]
    return max((index["history"] for index in indices), key=len, default=[])


def find_best_state(run_uri: str, warn: Callable[[str], None]) -> TrainingState:
    """Return the whole checkpoint with the highest validation mean IoU, the latest among equals.

    Ray Train keeps the latest of equals too: the earliest may be gone, or not, by how often the run was started.

    Raises:
        TrainingError: No scored checkpoint of the run is whole.
    """
    found = _find_first_whole(run_uri, _rank_by_score, warn)
    if found is None or found[1].score is None:
        raise TrainingError(f"no whole checkpoint under {run_uri}; train again with another output")
    return found[1]


def remove_surplus(run_uri: str, num_best: int) -> None:
    """Remove the checkpoints that are neither the newest two nor among the best, and what broken uploads have left.

    The newest may be damaged, so the one before stays too.
    """
    found = list(_read_indices(run_uri, lambda _: None))
    newest = sorted(found, key=lambda pair: int(pair[1]["num_steps_done"]), reverse=True)[:2]
    best = sorted(found, key=lambda pair: _rank_by_score(pair[1]), reverse=True)[:num_best]
    kept = {uri for uri, _ in (*newest, *best)}
    whole = {uri for uri, _ in found}
    oldest_kept = min((int(index["num_steps_done"]) for _, index in newest), default=0)
    for uri in list_checkpoints(run_uri):
        is_broken = uri not in whole and _get_num_steps(uri) < oldest_kept
        if is_broken or uri in whole - kept:
            remove_folder(uri)


def _get_num_steps(uri: str) -> int:
    """Return the steps in a checkpoint's name, with which uploads of later steps are told from broken ones."""
    number = get_file_name(uri).removeprefix(CHECKPOINT_PREFIX).partition("_")[0]
    return int(number) if number.isdecimal() else 0


def _get_score(index: dict[str, Any]) -> float | None:
    history = index["history"]
    return history[-1].get("val_mean_iou") if history and not index["epoch_losses"] else None


def _rank_by_score(index: dict[str, Any]) -> tuple[float, int]:
    score = _get_score(index)
    return (-1.0 if score is None or score != score else score, int(index["num_steps_done"]))


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
        content = json.loads(read_bytes(join_uri(uri, _INDEX)))
        text, expected = content["index"], content["index_sha256"]
    except MissingFileError as error:
        raise ValueError(f"incomplete: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{_INDEX} is not one") from error
    if _hash(text) != expected:
        raise ValueError(f"{_INDEX} is damaged")
    index: dict[str, Any] = json.loads(text)
    return index


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _warn_of_damage(uri: str, error: ValueError, warn: Callable[[str], None]) -> None:
    warn(f"warning: passing over a damaged checkpoint for another: {uri}: {error}")
