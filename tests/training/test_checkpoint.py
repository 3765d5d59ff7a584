"""Checkpoints: save and load, selection of the newest and the best, damage, and removal of old ones."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from segray.config import ModelConfig, TrainSettings
from segray.errors import TrainingError
from segray.models.build import build_model
from segray.training.checkpoint import (
    TrainingState,
    find_best_state,
    find_last_state,
    find_newest_history,
    find_newest_phases,
    find_newest_state,
    list_checkpoints,
    load_state,
    remove_surplus,
    save_state,
)
from segray.training.phases import Phase
from segray.training.worker.optimisation import build_optimizer, build_schedule


def make_state(
    num_steps_done: int, scores: Sequence[float | None], epoch_losses: list[float] | None = None
) -> TrainingState:
    torch.manual_seed(num_steps_done)
    model = build_model(ModelConfig(arch="classic_unet", widths=(4, 8)), 2)
    settings = TrainSettings(encoder_lr_factor=0.1)
    optimizer = build_optimizer(model, settings)
    schedule = build_schedule(optimizer, settings, 10)
    model(torch.randn(2, 3, 64, 64)).mean().backward()
    optimizer.step()
    schedule.step()
    history = [{"epoch": index + 1, "val_mean_iou": score} for index, score in enumerate(scores)]
    return TrainingState(
        num_steps_done=num_steps_done,
        model=model.state_dict(),
        optimizer=get_optimizer_state_dict(model, optimizer),
        schedule=schedule.state_dict(),
        scaler={"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000},
        average={name: value + 1 for name, value in model.state_dict().items()},
        epoch_losses=epoch_losses or [],
        history=history,
        num_skipped=2,
        phases=[Phase(num_steps_done=0, epoch=1, num_workers=4, settings={"train": {"num_epochs": 3}})],
    )


def name_folder(run: Path, step: int) -> Path:
    return run / f"checkpoint_{step:09d}_abcdef01"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three epochs, of which the second has the highest score, and Ray Train's own list of checkpoints."""
    for step, scores in ((1, [0.1]), (2, [0.1, 0.5]), (3, [0.1, 0.5, 0.3])):
        save_state(str(name_folder(tmp_path, step)), make_state(step, scores))
    (tmp_path / "checkpoint_manager_snapshot.json").touch()
    return tmp_path


def damage(run: Path, step: int, name: str = "state.safetensors", position: int = 5000) -> None:
    path = name_folder(run, step) / name
    content = bytearray(path.read_bytes())
    content[min(position, len(content) // 2)] ^= 1
    path.write_bytes(content)


def pack_index(text: str) -> str:
    """Return the content of a checkpoint.json with a correct sha256."""
    return json.dumps({"index_sha256": hashlib.sha256(text.encode()).hexdigest(), "index": text})


def test_loading_returns_the_saved_state(tmp_path: Path) -> None:
    state = make_state(3, [0.25, 1 / 3], [0.5, 0.25])
    save_state(str(tmp_path), state)
    loaded = load_state(str(tmp_path))
    for name in ("num_steps_done", "schedule", "scaler", "epoch_losses", "history", "num_skipped", "phases"):
        assert getattr(loaded, name) == getattr(state, name)
    assert state.average is not None
    assert loaded.average is not None
    for got, expected in ((loaded.model, state.model), (loaded.average, state.average)):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert loaded.optimizer["param_groups"] == state.optimizer["param_groups"]
    assert loaded.optimizer["state"].keys() == state.optimizer["state"].keys()
    for parameter, values in state.optimizer["state"].items():
        for name, value in values.items():
            assert torch.equal(loaded.optimizer["state"][parameter][name], value)


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    state = make_state(1, [0.5])
    assert state.weights is state.average


def test_newest_and_best_checkpoint(run: Path) -> None:
    warnings: list[str] = []
    newest = find_newest_state(str(run), warnings.append)
    assert newest is not None
    assert newest[1].num_steps_done == 3
    assert find_best_state(str(run), warnings.append).num_steps_done == 2
    assert warnings == []


def test_a_mid_epoch_checkpoint_can_be_the_newest_but_not_the_best(run: Path) -> None:
    save_state(str(name_folder(run, 4)), make_state(4, [0.1, 0.5, 0.9], [0.7]))
    newest = find_newest_state(str(run), print)
    assert newest is not None
    assert newest[1].num_steps_done == 4
    assert newest[1].score is None
    assert find_best_state(str(run), print).num_steps_done == 2


def test_an_epoch_without_evaluation_is_never_best(run: Path) -> None:
    save_state(str(name_folder(run, 4)), make_state(4, [0.1, 0.5, 0.3, None]))
    assert find_best_state(str(run), print).num_steps_done == 2
    assert len(find_newest_history(str(run))) == 4


def test_the_best_of_equal_scores_is_the_latest(run: Path) -> None:
    for step in (1, 3):
        save_state(str(name_folder(run, step)), make_state(step, [0.1] * (step - 1) + [0.5]))
    assert find_best_state(str(run), print).num_steps_done == 3


def test_the_last_state_is_that_of_the_last_epoch_or_an_error(run: Path) -> None:
    assert find_last_state(str(run), print).num_steps_done == 3
    damage(run, 3)
    with pytest.raises(TrainingError, match=r"^no intact checkpoint of the last epoch under .*; rerun the same"):
        find_last_state(str(run), print)


def test_the_phases_are_those_of_the_checkpoint_with_the_most_steps(run: Path) -> None:
    phases = [Phase(num_steps_done=3, epoch=2, num_workers=2, settings={})]
    save_state(str(name_folder(run, 4)), replace(make_state(4, [0.1]), phases=phases))
    assert find_newest_phases(str(run)) == phases


def test_a_damaged_checkpoint_is_skipped_with_a_warning(run: Path) -> None:
    warnings: list[str] = []
    damage(run, 3)
    newest = find_newest_state(str(run), warnings.append)
    assert newest is not None
    assert newest[1].num_steps_done == 2
    assert len(warnings) == 1
    assert "skipping a damaged checkpoint" in warnings[0]
    assert "000000003" in warnings[0]
    damage(run, 2)
    assert find_best_state(str(run), warnings.append).num_steps_done == 1


@pytest.mark.parametrize("position", [0, 30, 90, 400, 10**9])
def test_a_flipped_bit_anywhere_in_the_index_is_detected(run: Path, position: int) -> None:
    warnings: list[str] = []
    damage(run, 3, "checkpoint.json", position)
    newest = find_newest_state(str(run), warnings.append)
    assert newest is not None
    assert newest[1].num_steps_done == 2
    assert len(warnings) == 1


@pytest.mark.parametrize(
    "content",
    ["[]", '"text"', '{"index": "{}"}', '{"index": {}, "index_sha256": "0"}', pack_index("[]"), pack_index("{}")],
)
def test_a_file_that_is_not_an_index_is_skipped_with_a_warning(run: Path, content: str) -> None:
    warnings: list[str] = []
    (name_folder(run, 3) / "checkpoint.json").write_text(content)
    newest = find_newest_state(str(run), warnings.append)
    assert newest is not None
    assert newest[1].num_steps_done == 2
    assert len(warnings) == 1
    assert "checkpoint.json is not a checkpoint index" in warnings[0]
    assert "\n" not in warnings[0]


def test_the_index_is_json_text_beside_its_sha256(run: Path) -> None:
    """Runs are resumed from checkpoints that an earlier version wrote, so the format must not change."""
    content = json.loads((name_folder(run, 2) / "checkpoint.json").read_text())
    assert content.keys() == {"index", "index_sha256"}
    assert hashlib.sha256(content["index"].encode()).hexdigest() == content["index_sha256"]
    index = json.loads(content["index"])
    assert list(index) == [
        "state_sha256",
        "num_steps_done",
        "optimizer_scalars",
        "optimizer_groups",
        "schedule",
        "scaler",
        "epoch_losses",
        "history",
        "num_skipped",
        "phases",
    ]
    assert index["history"] == [{"epoch": 1, "val_mean_iou": 0.1}, {"epoch": 2, "val_mean_iou": 0.5}]


def test_an_interrupted_upload_is_skipped_with_a_warning(run: Path) -> None:
    warnings: list[str] = []
    (name_folder(run, 3) / "checkpoint.json").write_text("{")
    (name_folder(run, 2) / "state.safetensors").unlink()
    found = find_newest_state(str(run), warnings.append)
    assert found is not None
    assert found[1].num_steps_done == 1
    assert len(warnings) == 2


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert find_newest_state(str(tmp_path / "none"), print) is None
    with pytest.raises(TrainingError, match=r"no intact evaluated checkpoint under .*; choose another output"):
        find_best_state(str(tmp_path), print)


def test_the_newest_two_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    scores = [0.5, 0.9, 0.3, 0.8, 0.1, 0.2]
    for step in range(1, 7):
        save_state(str(name_folder(tmp_path, step)), make_state(step, scores[:step]))
    remove_surplus(str(tmp_path), num_best=2)
    kept = [load_state(uri).num_steps_done for uri in list_checkpoints(str(tmp_path))]
    assert kept == [2, 4, 5, 6]


def test_interrupted_uploads_older_than_the_kept_checkpoints_are_removed(run: Path) -> None:
    save_state(str(name_folder(run, 4)), make_state(4, [0.1, 0.5, 0.3, 0.2]))
    (name_folder(run, 1) / "checkpoint.json").unlink()
    remove_surplus(str(run), num_best=1)
    assert [load_state(uri).num_steps_done for uri in list_checkpoints(str(run))] == [2, 3, 4]


def test_an_interrupted_upload_does_not_count_as_one_of_the_newest_two(run: Path) -> None:
    (name_folder(run, 3) / "checkpoint.json").unlink()
    remove_surplus(str(run), num_best=1)
    assert sorted(path.name[11:20] for path in run.glob("checkpoint_*_*") if path.is_dir()) == [
        "000000001",
        "000000002",
        "000000003",
    ]
