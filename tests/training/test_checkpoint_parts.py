"""Checkpoints in several files: any rows are read from what any number of ranks wrote, and damage is refused."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from segray.training import checkpoint, checkpoint_parts
from segray.training.checkpoint import (
    find_best_state,
    find_last_state,
    find_newest_state,
    load_state,
    save_sharded_state,
    save_state,
)
from segray.training.checkpoint_parts import Part, Rows, Tensors, read_parts, write_part
from tests.training.test_checkpoint import make_state, name_folder

NUM_ROWS = {"a.weight": 7, "b.bias": 2}
OWNERS = ("model", "average", "optimizer")


def make_tensors() -> Tensors:
    torch.manual_seed(0)
    weight, bias = torch.randn(7, 3, 2), torch.randn(2)
    return {
        "model.a.weight": weight,
        "model.b.bias": bias,
        "model.norm.running_mean": torch.randn(5),
        "model.norm.num_batches": torch.tensor(12),
        "model.empty": torch.zeros(0, 4),
        "average.a.weight": weight.double() + 1,
        "optimizer.a.weight.exp_avg": weight.half(),
        "optimizer.a.weight.step": torch.tensor(3.0),
        "optimizer.b.bias.exp_avg": bias * 2,
    }


def divide(num_ranks: int, rank: int) -> dict[str, Rows]:
    """Return a rank's rows, divided as ``torch.chunk`` does: the last ranks may have none."""
    found = {}
    for name, num_rows in NUM_ROWS.items():
        size = -(-num_rows // num_ranks)
        found[name] = Rows(min(rank * size, num_rows), min((rank + 1) * size, num_rows))
    return found


def take(tensors: Tensors, rows: dict[str, Rows]) -> Tensors:
    """Return the rows of the three tensors of ``a.weight``, and of the two of ``b.bias``."""
    keys = {key: name for key in tensors for name in rows if name in key and not key.endswith("step")}
    return {
        key: tensor[rows[keys[key]].first : rows[keys[key]].end].contiguous() if key in keys else tensor
        for key, tensor in tensors.items()
    }


def write(folder: Path, num_ranks: int) -> list[Part]:
    rows = [divide(num_ranks, rank) for rank in range(num_ranks)]
    return [write_part(str(folder), take(make_tensors(), own), own, rank) for rank, own in enumerate(rows)]


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("max_bytes", [1, 100, 2**30])
@pytest.mark.parametrize("num_writers", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_what_any_number_wrote(
    num_writers: int, max_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_parts, "_MAX_FILE_BYTES", max_bytes)
    parts = write(tmp_path, num_writers)
    assert_equal(read_parts(str(tmp_path), parts, {}, OWNERS), make_tensors())
    for num_readers in (1, 2, 3, 4):
        for rank in range(num_readers):
            rows = divide(num_readers, rank)
            expected = take(make_tensors(), rows)
            expected = {key: value for key, value in expected.items() if value.numel() or key == "model.empty"}
            assert_equal(read_parts(str(tmp_path), parts, rows, OWNERS), expected)


def test_a_reader_needs_only_the_files_with_its_rows_and_owners(tmp_path: Path) -> None:
    parts = write(tmp_path, 4)
    rows = divide(4, 1)
    for part in (parts[2], parts[3]):
        for file in part.files:
            (tmp_path / file.name).unlink()
    assert_equal(read_parts(str(tmp_path), parts, rows, OWNERS), take(make_tensors(), rows))
    for part in parts:
        for file in part.files:
            if file.owner == "optimizer":
                (tmp_path / file.name).unlink(missing_ok=True)
    assert read_parts(str(tmp_path), parts, rows, ["average"]).keys() == {"average.a.weight"}


def test_missing_and_damaged_files_and_missing_rows_are_refused(tmp_path: Path) -> None:
    parts = write(tmp_path, 3)
    with pytest.raises(ValueError, match=r"incomplete: average\.a\.weight lacks row 3"):
        read_parts(str(tmp_path), [parts[0], parts[2]], {}, OWNERS)
    path = tmp_path / parts[1].files[0].name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank-00001-000\.safetensors has sha256 .* instead of"):
        read_parts(str(tmp_path), parts, {}, OWNERS)
    path.unlink()
    with pytest.raises(ValueError, match=r"incomplete: .*rank-00001-000\.safetensors"):
        read_parts(str(tmp_path), parts, {}, OWNERS)


def test_a_large_state_is_divided_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_MAX_STATE_BYTES", 10_000)
    monkeypatch.setattr(checkpoint_parts, "_MAX_FILE_BYTES", 5000)
    state = make_state(3, [0.25], [0.5])
    save_state(str(tmp_path), state)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < 10_000
    reads: list[None] = []
    loaded = load_state(str(tmp_path), announce=lambda: reads.append(None))
    assert len(reads) == len(files)
    assert state.average is not None
    assert loaded.average is not None
    assert_equal(loaded.model, state.model)
    assert_equal(loaded.average, state.average)
    assert loaded.optimizer["param_groups"] == state.optimizer["param_groups"]
    for parameter, values in state.optimizer["state"].items():
        assert_equal(loaded.optimizer["state"][parameter], values)
    for name in ("num_steps_done", "schedule", "scaler", "epoch_losses", "history", "num_skipped", "phases"):
        assert getattr(loaded, name) == getattr(state, name)


def test_a_checkpoint_is_complete_once_all_ranks_have_written_and_the_weights_are_read_alone(tmp_path: Path) -> None:
    state = make_state(2, [0.5])
    save_state(str(name_folder(tmp_path, 1)), make_state(1, [0.1]))
    rows = {name: Rows(0, len(tensor)) for name, tensor in state.model.items() if name.endswith("weight")}
    nothing = {name: Rows(len(tensor), len(tensor)) for name, tensor in state.model.items() if name in rows}
    folder = name_folder(tmp_path, 2)
    writer = threading.Thread(
        target=save_sharded_state, args=(str(folder), replace(state, rows=rows), 0, 2), daemon=True
    )
    writer.start()
    writer.join(1)
    assert writer.is_alive()
    found = find_newest_state(str(tmp_path), lambda message: None)
    assert found is not None
    assert found[1].num_steps_done == 1
    empty = replace(state, model={}, average=None, optimizer={"state": {}, "param_groups": []}, rows=nothing)
    save_sharded_state(str(folder), empty, 1, 2)
    writer.join()
    found = find_newest_state(str(tmp_path), print)
    assert found is not None
    assert found[1].num_steps_done == 2
    assert_equal(found[1].model, state.model)
    assert state.average is not None
    for find in (find_best_state, find_last_state):
        chosen = find(str(tmp_path), print)
        assert_equal(chosen.weights, state.average)
        assert (chosen.model, chosen.optimizer["state"], chosen.history) == ({}, {}, state.history)
