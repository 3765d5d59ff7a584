"""Read and write ``checkpoint.json``: everything in a checkpoint except its tensors, plus their sha256.

The file holds the index as JSON text beside the sha256 of that text, so that any damage to the file is detected.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from segray.errors import MissingFileError
from segray.storage import join_uri, read_bytes, write_bytes
from segray.training.checkpoint_parts import Part
from segray.training.phases import Phase

_INDEX_NAME = "checkpoint.json"


class CheckpointIndex(BaseModel):
    """The description of a checkpoint.

    Attributes:
        state_sha256: sha256 of ``state.safetensors``; empty if the tensors are in ``parts``.
        num_steps_done: Training steps completed.
        optimizer_scalars: Optimizer state that is not a tensor, by ``optimizer.<parameter>.<name>``.
        optimizer_groups: Parameter groups of the optimizer.
        schedule: State dict of the learning-rate schedule.
        scaler: State dict of the gradient scaler; empty unless training in fp16.
        epoch_losses: Losses of the steps so far of an unfinished epoch; empty at the end of an epoch.
        history: Metrics of each finished epoch.
        num_skipped: Steps that were skipped in a row before this one.
        phases: Settings that changed during the run.
        parts: The files of each rank; empty if there is only ``state.safetensors``.
    """

    model_config = ConfigDict(frozen=True)

    state_sha256: str
    num_steps_done: int
    optimizer_scalars: dict[str, Any]
    optimizer_groups: list[dict[str, Any]]
    schedule: dict[str, Any]
    scaler: dict[str, Any]
    epoch_losses: list[float]
    history: list[dict[str, Any]]
    num_skipped: int = 0  # Checkpoints of earlier versions lack these two.
    phases: list[Phase] = []
    parts: list[Part] = []

    @property
    def score(self) -> float | None:
        """See ``get_score``."""
        return get_score(self.history, self.epoch_losses)


class _IndexFile(BaseModel):
    """Content of ``checkpoint.json``: a ``CheckpointIndex`` as JSON text, and the sha256 of that text."""

    index_sha256: str
    index: str


def get_score(history: Sequence[Mapping[str, Any]], epoch_losses: Sequence[float]) -> float | None:
    """Return the validation mean IoU of a checkpoint; None in the middle of an epoch, or without an evaluation."""
    return history[-1].get("val_mean_iou") if history and not epoch_losses else None


def write_index(uri: str, index: CheckpointIndex) -> None:
    """Write the index of the checkpoint in the folder ``uri``.

    Raises:
        StorageError: Permissions, network or disk error.
    """
    # Without ``parts`` the file is the same as in earlier versions.
    text = json.dumps(index.model_dump(exclude=None if index.parts else {"parts"}))
    content = _IndexFile(index_sha256=_compute_sha256(text), index=text)
    write_bytes(join_uri(uri, _INDEX_NAME), json.dumps(content.model_dump()).encode())


def read_index(uri: str) -> CheckpointIndex:
    """Read the index of the checkpoint in the folder ``uri``.

    Raises:
        ValueError: The index is missing, damaged, or not an index.
        StorageError: Permissions, network or disk error.
    """
    try:
        file = _IndexFile.model_validate(json.loads(read_bytes(join_uri(uri, _INDEX_NAME))))
    except MissingFileError as error:
        raise ValueError(f"incomplete: {error}") from error
    except ValidationError as error:
        raise ValueError(f"{_INDEX_NAME} is not a checkpoint index{_describe_problem(error)}") from error
    if _compute_sha256(file.index) != file.index_sha256:
        raise ValueError(f"{_INDEX_NAME} is damaged: its content does not match its sha256")
    try:
        return CheckpointIndex.model_validate(json.loads(file.index))
    except ValidationError as error:
        raise ValueError(f"{_INDEX_NAME} is not a checkpoint index{_describe_problem(error)}") from error


def _describe_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    return f": {where}: {problem['msg']}" if where else f": {problem['msg']}"


def _compute_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
