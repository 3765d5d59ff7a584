"""Checkpoints: what is read is what was written, and what is damaged is passed over and said."""

from pathlib import Path

import pytest
import torch

from segray.config import ModelConfig
from segray.errors import TrainingError
from segray.models.build import build_model
from segray.train.checkpoint import TrainingState, find_best_state, find_newest_state, load_state, save_state


def make_state(num_epochs_done: int, scores: list[float]) -> TrainingState:
    torch.manual_seed(num_epochs_done)
    model = build_model(ModelConfig(encoder_name="mobilenet_v2"), 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=10, cycle_momentum=False)
    model(torch.randn(2, 3, 64, 64)).mean().backward()
    optimizer.step()
    schedule.step()
    history = [{"epoch": index + 1, "val_mean_iou": score} for index, score in enumerate(scores)]
    return TrainingState(
        num_epochs_done, model.state_dict(), optimizer.state_dict(), schedule.state_dict(), history
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three epochs, of which the second was best, in folders as Ray Train names them, with its own file beside."""
    for epoch, scores in enumerate(([0.1], [0.1, 0.5], [0.1, 0.5, 0.3]), start=1):
        folder = tmp_path / f"checkpoint_2026-01-0{epoch}_00-00-00.000000"
        folder.mkdir()
        save_state(folder, make_state(epoch, scores))
    (tmp_path / "checkpoint_manager_snapshot.json").touch()
    return tmp_path


def damage(run: Path, epoch: int, position: int = 5000) -> None:
    path = run / f"checkpoint_2026-01-0{epoch}_00-00-00.000000" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    state = make_state(3, [0.25, 1 / 3])
    save_state(tmp_path, state)
    loaded = load_state(str(tmp_path))
    assert loaded.num_epochs_done == 3
    assert loaded.history == state.history
    assert all(torch.equal(loaded.model[name], state.model[name]) for name in state.model)
    model = build_model(ModelConfig(encoder_name="mobilenet_v2"), 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=10, cycle_momentum=False)
    optimizer.load_state_dict(loaded.optimizer)
    schedule.load_state_dict(loaded.schedule)
    assert optimizer.state_dict()["param_groups"] == state.optimizer["param_groups"]
    for index, values in state.optimizer["state"].items():
        assert all(torch.equal(optimizer.state_dict()["state"][index][name], values[name]) for name in values)
    assert schedule.state_dict() == state.schedule


def test_newest_and_best(run: Path) -> None:
    heard: list[str] = []
    newest = find_newest_state(str(run), heard.append)
    assert newest is not None
    assert newest[1].num_epochs_done == 3
    assert find_best_state(str(run), heard.append).num_epochs_done == 2
    assert heard == []


def test_the_latest_of_equals_is_the_best_as_it_is_what_ray_keeps(run: Path) -> None:
    for epoch in (1, 3):
        save_state(run / f"checkpoint_2026-01-0{epoch}_00-00-00.000000", make_state(epoch, [0.1] * (epoch - 1) + [0.5]))
    assert find_best_state(str(run), print).num_epochs_done == 3


def test_a_damaged_one_is_passed_over_and_said(run: Path) -> None:
    heard: list[str] = []
    damage(run, 3)
    newest = find_newest_state(str(run), heard.append)
    assert newest is not None
    assert newest[1].num_epochs_done == 2
    assert len(heard) == 1
    assert "passing over a damaged checkpoint" in heard[0]
    assert "2026-01-03" in heard[0]
    damage(run, 2)
    assert find_best_state(str(run), heard.append).num_epochs_done == 1


def test_an_upload_that_broke_off_is_passed_over(run: Path) -> None:
    heard: list[str] = []
    newest = run / "checkpoint_2026-01-03_00-00-00.000000"
    (newest / "checkpoint.json").write_text("{")
    (run / "checkpoint_2026-01-02_00-00-00.000000" / "state.safetensors").unlink()
    found = find_newest_state(str(run), heard.append)
    assert found is not None
    assert found[1].num_epochs_done == 1
    assert len(heard) == 2


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert find_newest_state(str(tmp_path / "none"), print) is None
    with pytest.raises(TrainingError, match="no whole checkpoint"):
        find_best_state(str(tmp_path), print)
