"""Training checkpoints to resume from, stored as ``state.safetensors`` and ``checkpoint.json``.

The tensors of a sharded model, and those beyond 4 GiB, are in several files instead; see ``checkpoint_parts``.
Checkpoints are found by listing the run's folder, not from Ray Train's own list, which is left empty if the driver dies
while writing it. A damaged checkpoint is skipped with a warning, and the one before it is used. Nothing is pickled.
"""

import hashlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_safetensors

from segray.errors import TrainingError
from segray.models.bundle import pack_tensors
from segray.storage import get_file_name, join_uri, list_names, remove_folder, write_bytes
from segray.training.checkpoint_index import CheckpointIndex, get_score, read_index, write_index
from segray.training.checkpoint_parts import (
    OPTIMIZER,
    Part,
    Rows,
    Tensors,
    get_owner,
    get_parameter,
    read_parts,
    read_verified,
    take_rows,
    wait_for_parts,
    write_part,
)
from segray.training.phases import Phase

_STATE_NAME = "state.safetensors"
RUN_NAME = "ray_train"  # The folder under the output in which Ray Train keeps its checkpoints.
CHECKPOINT_PREFIX = "checkpoint_"
_MODEL, _AVERAGE = "model", "average"
_MAX_STATE_BYTES = 2**32  # S3 accepts objects of up to 5 GiB in one request.


@dataclass(frozen=True)
class TrainingState:
    """The complete state of a training run after some step.

    Attributes:
        num_steps_done: Training steps completed. Random numbers are drawn from (seed, step, rank) and (seed, position),
            so the step also determines the position in the sample order and the state of every generator.
        model: State dict of the model.
        optimizer: State dict of the optimizer by parameter names, as ``get_optimizer_state_dict`` returns it.
        schedule: State dict of the learning-rate schedule.
        scaler: State dict of the gradient scaler; empty unless training in fp16.
        average: State dict of the model with averaged weights, or None.
        epoch_losses: Losses of the steps so far of an unfinished epoch, NaN for a skipped step; empty at the end of an
            epoch.
        history: Metrics of each finished epoch.
        num_skipped: Steps that were skipped in a row before this one.
        phases: Settings that changed during the run.
        rows: Which rows of each sharded parameter, and of its tensors in optimizer and average, this rank holds; empty
            if all tensors are whole.
    """

    num_steps_done: int
    model: Tensors
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    average: Tensors | None = None
    epoch_losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    num_skipped: int = 0
    phases: list[Phase] = field(default_factory=list)
    rows: Mapping[str, Rows] = field(default_factory=dict)

    @property
    def weights(self) -> Tensors:
        """The weights to evaluate and to ship: the averaged weights if there are any, else those of the model."""
        return self.model if self.average is None else self.average

    @property
    def score(self) -> float | None:
        """Validation mean IoU of these weights; None in the middle of an epoch, or if they were not evaluated."""
        return get_score(self.history, self.epoch_losses)


def save_state(uri: str, state: TrainingState) -> None:
    """Write a checkpoint into the empty folder ``uri``; its index is written last and marks it as complete.

    Raises:
        StorageError: Permissions, network or disk error.
    """
    tensors, scalars = _flatten(state)
    if sum(tensor.nbytes for tensor in tensors.values()) > _MAX_STATE_BYTES:
        write_index(uri, _build_index(state, scalars, parts=[write_part(uri, tensors, {})]))
        return
    content = pack_tensors(tensors)
    write_bytes(join_uri(uri, _STATE_NAME), content)
    write_index(uri, _build_index(state, scalars, hashlib.sha256(content).hexdigest()))


def save_sharded_state(uri: str, state: TrainingState, rank: int, num_ranks: int) -> None:
    """Write this rank's part of a checkpoint into the folder ``uri``; all ranks must call it.

    Rank 0 then waits for the others, and writes the index, which marks the checkpoint as complete.

    Raises:
        StorageError: Permissions, network or disk error.
    """
    tensors, scalars = _flatten(state)
    write_part(uri, tensors, state.rows, rank)
    if rank == 0:
        write_index(uri, _build_index(state, scalars, parts=wait_for_parts(uri, num_ranks)))


def _flatten(state: TrainingState) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of a state, and the optimizer's values that are none, by key."""
    tensors = {f"{_MODEL}.{name}": tensor for name, tensor in state.model.items()}
    tensors |= {f"{_AVERAGE}.{name}": tensor for name, tensor in (state.average or {}).items()}
    scalars: dict[str, Any] = {}
    for parameter, values in state.optimizer["state"].items():
        for name, value in values.items():
            key = f"{OPTIMIZER}.{parameter}.{name}"
            (tensors if isinstance(value, torch.Tensor) else scalars)[key] = value
    return tensors, scalars


def _build_index(
    state: TrainingState, scalars: dict[str, Any], state_sha256: str = "", parts: list[Part] | None = None
) -> CheckpointIndex:
    return CheckpointIndex(
        state_sha256=state_sha256,
        num_steps_done=state.num_steps_done,
        optimizer_scalars=scalars,
        optimizer_groups=state.optimizer["param_groups"],
        schedule=state.schedule,
        scaler=state.scaler,
        epoch_losses=state.epoch_losses,
        history=state.history,
        num_skipped=state.num_skipped,
        phases=state.phases,
        parts=parts or [],
    )


def load_state(
    uri: str,
    rows: Mapping[str, Rows] | None = None,
    *,
    only_weights: bool = False,
    announce: Callable[[], None] = lambda: None,
) -> TrainingState:
    """Read the checkpoint in the folder ``uri`` and verify its checksums.

    Args:
        uri: The folder.
        rows: The rows of sharded parameters that this rank holds. None: whole tensors.
        only_weights: Read only the tensors that ``TrainingState.weights`` needs, if they are in several files.
        announce: Called before each file of tensors is read.

    Raises:
        ValueError: The checkpoint is incomplete or damaged.
        StorageError: Permissions, network or disk error.
    """
    index, wanted = read_index(uri), rows or {}
    if index.parts:
        owners = {file.owner for part in index.parts for file in part.files}
        if only_weights:
            owners = {_AVERAGE if _AVERAGE in owners else _MODEL}
        tensors = read_parts(uri, index.parts, wanted, owners, announce)
    else:
        announce()
        tensors = load_safetensors(read_verified(join_uri(uri, _STATE_NAME), index.state_sha256))
        tensors = {key: take_rows(key, tensor, wanted) for key, tensor in tensors.items()}
    parts: dict[str, Tensors] = {_MODEL: {}, _AVERAGE: {}}
    parameters: dict[str, dict[str, Any]] = {}
    # Sorted, because safetensors returns tensors in an order that differs between processes, and ranks shard the
    # weights tensor by tensor.
    for key, value in sorted({**tensors, **index.optimizer_scalars}.items()):
        owner, parameter = get_owner(key), get_parameter(key)
        if owner == OPTIMIZER:
            parameters.setdefault(parameter, {})[key.rpartition(".")[2]] = value
        else:
            parts[owner][parameter] = value
    return TrainingState(
        num_steps_done=index.num_steps_done,
        model=parts[_MODEL],
        optimizer={"state": parameters, "param_groups": [_restore_tuples(group) for group in index.optimizer_groups]},
        schedule=index.schedule,
        scaler=index.scaler,
        average=parts[_AVERAGE] or None,
        epoch_losses=index.epoch_losses,
        history=index.history,
        num_skipped=index.num_skipped,
        phases=index.phases,
        rows=wanted,
    )


def _restore_tuples(group: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's parameter group with ``betas`` as the tuple that JSON stored as a list."""
    return {name: tuple(value) if name == "betas" else value for name, value in group.items()}


def name_checkpoint(num_steps_done: int) -> str:
    """Return a new folder name; it is unique, so that a restarted run never writes into an earlier upload."""
    return f"{CHECKPOINT_PREFIX}{num_steps_done:09d}_{uuid.uuid4().hex[:8]}"


def list_checkpoints(run_uri: str) -> list[str]:
    """Return the URIs of all checkpoints of a run, including damaged ones."""
    names = sorted(name for name in list_names(run_uri, folders=True) if name.startswith(CHECKPOINT_PREFIX))
    return [join_uri(run_uri, name) for name in names]


def find_newest_state(
    run_uri: str, warn: Callable[[str], None], *, only_weights: bool = False
) -> tuple[str, TrainingState] | None:
    """Return the intact checkpoint with the most steps, as (URI, state), or None if there is none.

    ``warn`` is called with a message for each damaged checkpoint. ``only_weights`` is as in ``load_state``.
    """
    return _load_first_intact(rank_checkpoints(run_uri, warn), warn, only_weights=only_weights)


def rank_checkpoints(
    run_uri: str,
    warn: Callable[[str], None],
    key: Callable[[CheckpointIndex], Any] = lambda index: index.num_steps_done,
) -> list[str]:
    """Return the URIs of the checkpoints whose index is intact, the one with the highest key (most steps) first."""
    found = sorted(_read_indices(run_uri, warn), key=lambda pair: key(pair[1]), reverse=True)
    return [uri for uri, _ in found]


def find_newest_history(run_uri: str) -> list[dict[str, Any]]:
    """Return the metrics of all finished epochs, from the checkpoint that has the most of them."""
    histories = [index.history for _, index in _read_indices(run_uri, lambda _: None)]
    return max(histories, key=len, default=[])


def find_newest_step(run_uri: str) -> int:
    """Return the number of completed steps of the newest checkpoint; 0 if there is none."""
    return max((index.num_steps_done for _, index in _read_indices(run_uri, lambda _: None)), default=0)


def find_newest_phases(run_uri: str) -> list[Phase]:
    """Return the settings that changed during a run, from the checkpoint that has the most steps."""
    newest = max((index for _, index in _read_indices(run_uri, lambda _: None)), key=lambda index: index.num_steps_done)
    return newest.phases


def find_best_state(run_uri: str, warn: Callable[[str], None]) -> TrainingState:
    """Return the intact checkpoint with the highest validation mean IoU, the latest among equals, to use its weights.

    ``remove_surplus`` also keeps the latest among equals, so the result does not depend on when it was called.

    Raises:
        TrainingError: No checkpoint of the run is both evaluated and intact.
    """
    found = _load_first_intact(rank_checkpoints(run_uri, warn, _get_score_key), warn, only_weights=True)
    if found is None or found[1].score is None:
        raise TrainingError(f"no intact evaluated checkpoint under {run_uri}; choose another output and train again")
    return found[1]


def find_last_state(run_uri: str, warn: Callable[[str], None]) -> TrainingState:
    """Return the intact checkpoint at the end of the last epoch, to use its weights; for a run without validation.

    Raises:
        TrainingError: No checkpoint of the run is intact, or the last epoch's is damaged.
    """
    found = find_newest_state(run_uri, warn, only_weights=True)
    if found is None or len(found[1].history) < len(find_newest_history(run_uri)):
        raise TrainingError(f"no intact checkpoint of the last epoch under {run_uri}; rerun the same command")
    return found[1]


def remove_surplus(run_uri: str, num_best: int) -> None:
    """Remove all complete checkpoints except the newest two and the best ``num_best``, and older interrupted uploads.

    Two are kept because the newest may be damaged. An incomplete checkpoint newer than these may still be uploading.
    """
    found = list(_read_indices(run_uri, lambda _: None))
    newest = sorted(found, key=lambda pair: pair[1].num_steps_done, reverse=True)[:2]
    best = sorted(found, key=lambda pair: _get_score_key(pair[1]), reverse=True)[:num_best]
    kept = {uri for uri, _ in (*newest, *best)}
    complete = {uri for uri, _ in found}
    oldest_kept = min((index.num_steps_done for _, index in newest), default=0)
    for uri in list_checkpoints(run_uri):
        is_interrupted = uri not in complete and _get_num_steps(uri) < oldest_kept
        if is_interrupted or uri in complete - kept:
            remove_folder(uri)


def _get_num_steps(uri: str) -> int:
    """Return the number of steps in a checkpoint's name; it can be read even if the checkpoint is incomplete."""
    number = get_file_name(uri).removeprefix(CHECKPOINT_PREFIX).partition("_")[0]
    return int(number) if number.isdecimal() else 0


def _get_score_key(index: CheckpointIndex) -> tuple[float, int]:
    """Return the key to sort checkpoints by score and, among equals, by step; one without a score comes first."""
    score = index.score
    return (-1.0 if score is None or score != score else score, index.num_steps_done)


def _load_first_intact(
    uris: list[str], warn: Callable[[str], None], *, only_weights: bool = False
) -> tuple[str, TrainingState] | None:
    """Load the first intact checkpoint, without reading the tensors of those after it."""
    for uri in uris:
        try:
            return uri, load_state(uri, only_weights=only_weights)
        except ValueError as error:
            warn_of_damage(uri, error, warn)
    return None


def _read_indices(run_uri: str, warn: Callable[[str], None]) -> Iterator[tuple[str, CheckpointIndex]]:
    for uri in list_checkpoints(run_uri):
        try:
            yield uri, read_index(uri)
        except ValueError as error:
            warn_of_damage(uri, error, warn)


def warn_of_damage(uri: str, error: ValueError | str, warn: Callable[[str], None]) -> None:
    """Say that a checkpoint is not used, and why."""
    warn(f"warning: skipping a damaged checkpoint: {uri}: {error}")
