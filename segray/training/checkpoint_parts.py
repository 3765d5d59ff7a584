"""The tensors of a checkpoint in several files: each rank of a sharded model writes those with its own rows.

A rank writes files of at most about 1 GiB, then ``rank-<number>.json``, which lists them with their sha256 and says
which rows of each parameter they hold. A reader downloads only the files with rows that it needs, but these whole,
because their sha256 can only be verified from all bytes.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load as load_safetensors

from segray.errors import MissingFileError
from segray.models.bundle import pack_tensors
from segray.storage import join_uri, list_names, read_bytes, write_bytes

OPTIMIZER = "optimizer"
_MAX_FILE_BYTES = 2**30
_POLL_S = 0.5

Tensors = dict[str, torch.Tensor]


class Rows(NamedTuple):
    """A range of rows (indices of the first dimension) of a parameter."""

    first: int
    end: int

    def intersect(self, other: "Rows") -> "Rows":
        """Return the rows that are in both; ``first`` is not below ``end`` if there are none."""
        return Rows(max(self.first, other.first), min(self.end, other.end))


_ALL_ROWS = Rows(0, 2**63 - 1)


class PartFile(BaseModel):
    """A file of tensors.

    Attributes:
        name: Name of the file.
        sha256: sha256 of the file.
        owner: ``model``, ``average`` or ``optimizer``, which all keys of the tensors begin with.
        is_sharded: Whether it holds rows of the tensors, and not whole tensors.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str
    owner: str
    is_sharded: bool


class Part(BaseModel):
    """What one rank wrote.

    Attributes:
        files: Its files.
        rows: Its rows of each sharded parameter. The optimizer's tensors of a parameter have the same rows.
    """

    model_config = ConfigDict(frozen=True)

    files: list[PartFile]
    rows: dict[str, Rows]


def get_owner(key: str) -> str:
    """Return what a tensor belongs to, from its key in a checkpoint."""
    return key.partition(".")[0]


def get_parameter(key: str) -> str:
    """Return the parameter that a tensor belongs to: ``optimizer.<parameter>.exp_avg``, ``model.<parameter>``."""
    owner, _, name = key.partition(".")
    return name.rpartition(".")[0] if owner == OPTIMIZER else name


def is_sharded(key: str, tensor: torch.Tensor, parameters: Collection[str]) -> bool:
    """Return whether a tensor is divided by rows: that of a sharded parameter is, unless it is a scalar."""
    return tensor.ndim > 0 and get_parameter(key) in parameters


def write_part(uri: str, tensors: Tensors, rows: Mapping[str, Rows], rank: int = 0) -> Part:
    """Write a rank's tensors, and then its record, into the folder ``uri``; rank 0 also writes those that are whole.

    Args:
        uri: Folder of the checkpoint.
        tensors: On CPUs and contiguous; of sharded parameters, the rank's rows.
        rows: This rank's rows of each sharded parameter.
        rank: Number of the rank.

    Raises:
        StorageError: Permissions, network or disk error.
    """
    divided = {key for key, tensor in tensors.items() if is_sharded(key, tensor, rows)}
    chosen = [key for key in tensors if (tensors[key].numel() > 0 if key in divided else rank == 0)]

    def get_group(key: str) -> tuple[str, bool]:
        return get_owner(key), key in divided

    files: list[PartFile] = []
    for (owner, has_rows), group in groupby(sorted(chosen, key=get_group), get_group):
        for batch in _divide(group, tensors):
            name = f"rank-{rank:05d}-{len(files):03d}.safetensors"
            content = pack_tensors({key: tensors[key] for key in batch})
            write_bytes(join_uri(uri, name), content)
            digest = hashlib.sha256(content).hexdigest()
            files.append(PartFile(name=name, sha256=digest, owner=owner, is_sharded=has_rows))
    part = Part(files=files, rows=dict(rows))
    write_bytes(join_uri(uri, _name_record(rank)), part.model_dump_json().encode())
    return part


def _divide(keys: Iterable[str], tensors: Tensors) -> Iterator[list[str]]:
    """Yield the keys in groups whose tensors have at most ``_MAX_FILE_BYTES``, or of a single tensor."""
    batch: list[str] = []
    num_bytes = 0
    for key in keys:
        num_bytes += tensors[key].nbytes
        if batch and num_bytes > _MAX_FILE_BYTES:
            yield batch
            batch, num_bytes = [], tensors[key].nbytes
        batch.append(key)
    yield batch


def _name_record(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def wait_for_parts(uri: str, num_ranks: int) -> list[Part]:
    """Wait until all ranks have written their parts, and return them in the order of the ranks.

    If one of them dies, so does the process that waits: Ray Train restarts all workers.

    Raises:
        StorageError: Permissions, network or disk error.
    """
    names = [_name_record(rank) for rank in range(num_ranks)]
    while not list_names(uri).issuperset(names):
        time.sleep(_POLL_S)
    return [Part.model_validate_json(read_bytes(join_uri(uri, name))) for name in names]


def read_verified(uri: str, sha256: str) -> bytes:
    """Read a file of a checkpoint.

    Raises:
        ValueError: It is missing, or has another sha256.
        StorageError: Permissions, network or disk error.
    """
    try:
        content = read_bytes(uri)
    except MissingFileError as error:
        raise ValueError(f"incomplete: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{uri.rpartition('/')[2]} has sha256 {found[:12]}… instead of {sha256[:12]}…")
    return content


def read_parts(
    uri: str,
    parts: Sequence[Part],
    wanted: Mapping[str, Rows],
    owners: Collection[str],
    announce: Callable[[], None] = lambda: None,
) -> Tensors:
    """Read the tensors that a rank needs.

    Args:
        uri: Folder of the checkpoint.
        parts: What the ranks wrote.
        wanted: The rows to return of some parameters; of all others, the whole tensors are returned. A tensor without
            rows is left out.
        owners: Owners whose tensors are returned.
        announce: Called before each file is read.

    Raises:
        ValueError: A file or a row is missing, or a file is damaged.
        StorageError: Permissions, network or disk error.
    """
    pieces: dict[str, list[tuple[Rows, torch.Tensor]]] = {}
    tensors: Tensors = {}
    for part in parts:
        chosen = {name: rows.intersect(wanted.get(name, _ALL_ROWS)) for name, rows in part.rows.items()}
        has_rows = any(rows.first < rows.end for rows in chosen.values())
        for file in part.files:
            if file.owner not in owners or (file.is_sharded and not has_rows):
                continue
            announce()
            for key, tensor in load_safetensors(read_verified(join_uri(uri, file.name), file.sha256)).items():
                if not file.is_sharded:
                    tensors[key] = take_rows(key, tensor, wanted)
                    continue
                name = get_parameter(key)
                rows, first = chosen[name], part.rows[name].first
                if rows.first < rows.end:
                    pieces.setdefault(key, []).append((rows, tensor[rows.first - first : rows.end - first]))
    ends = {name: max(part.rows[name].end for part in parts) for name in (parts[0].rows if parts else ())}
    return tensors | {key: _join(key, found, wanted, ends) for key, found in pieces.items()}


def take_rows(key: str, tensor: torch.Tensor, wanted: Mapping[str, Rows]) -> torch.Tensor:
    """Return the wanted rows of a whole tensor; see ``read_parts``."""
    if not is_sharded(key, tensor, wanted):
        return tensor
    rows = wanted[get_parameter(key)]
    return tensor[rows.first : rows.end]


def _join(
    key: str, pieces: list[tuple[Rows, torch.Tensor]], wanted: Mapping[str, Rows], ends: Mapping[str, int]
) -> torch.Tensor:
    """Return the rows of a tensor, from pieces of several ranks."""
    name = get_parameter(key)
    expected = Rows(0, ends[name]).intersect(wanted.get(name, _ALL_ROWS))
    pieces = sorted(pieces, key=lambda piece: piece[0])
    at = expected.first
    for rows, _ in pieces:
        if rows.first != at:
            raise ValueError(f"incomplete: {key} lacks row {at}")
        at = rows.end
    if at != expected.end:
        raise ValueError(f"incomplete: {key} lacks row {at}")
    return pieces[0][1] if len(pieces) == 1 else torch.cat([piece for _, piece in pieces])
