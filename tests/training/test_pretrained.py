"""Pretrained weights are downloaded by the driver alone; ranks and resumed runs need no model hub."""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.file_download
import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file, save_file

from segray.config import TrainConfig
from segray.data.preprocessing import Preprocessing
from segray.errors import ConfigError, TrainingError
from segray.models.build import build_model
from segray.training.checkpoint import TrainingState, name_checkpoint, save_state
from segray.training.pretrained import copy_pretrained, find_preprocessing, load_pretrained, save_pretrained

MakeConfig = Callable[..., TrainConfig]
EXPECTED = Preprocessing(mean=(0.0, 51.0, 102.0), std=(255.0, 255.0, 255.0))


@pytest.fixture
def weights(make_hub_snapshot: Callable[..., Path]) -> dict[str, torch.Tensor]:
    """Random weights of resnet18 in the cache of the model hub, written by the library itself."""
    snapshot = make_hub_snapshot("resnet18", "imagenet")
    torch.manual_seed(1)
    state: dict[str, torch.Tensor] = smp.encoders.get_encoder("resnet18").state_dict()
    state = {name: value.clone() for name, value in state.items()}
    save_file(state, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({"mean": [0, 0.2, 0.4], "std": [1, 1, 1]}))
    return state


@pytest.fixture
def config(make_train_config: MakeConfig, tmp_path: Path) -> TrainConfig:
    values = make_train_config(tmp_path / "run").model_dump(mode="json")
    return TrainConfig.model_validate({**values, "model": {"encoder_name": "resnet18", "encoder_weights": "imagenet"}})


def forbid_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model hub was accessed")

    for module in (huggingface_hub.file_download, smp.encoders):
        monkeypatch.setattr(module, "hf_hub_download", fail)


def build_on_rank(config: TrainConfig) -> dict[str, torch.Tensor]:
    model = build_model(config.model.model_copy(update={"encoder_weights": None}), 3, config.image_size)
    load_pretrained(config, model)
    return model.network.get_submodule("encoder").state_dict()


def test_only_the_driver_accesses_the_hub(
    weights: dict[str, torch.Tensor], config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_preprocessing(config) == EXPECTED
    save_pretrained(config)
    forbid_hub(monkeypatch)
    loaded = build_on_rank(config)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    save_pretrained(config)  # As when the run is resumed.
    assert find_preprocessing(config) == EXPECTED


def test_a_run_with_a_checkpoint_needs_neither_the_folder_nor_the_hub(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_hub(monkeypatch)
    state = TrainingState(
        num_steps_done=1, model={}, optimizer={"state": {}, "param_groups": []}, schedule={}, scaler={}, average=None
    )
    save_state(f"{config.output}/ray_train/{name_checkpoint(1)}", state)
    save_pretrained(config)
    assert not (Path(config.output) / "pretrained").exists()


def test_folds_and_trials_get_a_copy_without_the_hub(
    weights: dict[str, torch.Tensor], config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(config)
    forbid_hub(monkeypatch)
    fold = config.model_copy(update={"output": f"{config.output}/folds/1"})
    copy_pretrained(config.output, fold)
    assert find_preprocessing(fold) == EXPECTED
    save_pretrained(fold)
    loaded = build_on_rank(fold)
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    other = fold.model_copy(
        update={"output": f"{config.output}/2", "model": fold.model.model_copy(update={"encoder_name": "resnet34"})}
    )
    copy_pretrained(config.output, other)  # A trial of another encoder.
    assert not (Path(config.output) / "2").exists()


def test_the_file_holds_the_encoder_only(weights: dict[str, torch.Tensor], config: TrainConfig) -> None:
    save_pretrained(config)
    (path,) = (Path(config.output) / "pretrained").glob("*.safetensors")
    assert load_file(path).keys() == {f"network.encoder.{name}" for name in weights}


def test_another_model_in_the_same_output_gets_its_own_file(
    weights: dict[str, torch.Tensor], config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(config)
    other = config.model_copy(update={"model": config.model.model_copy(update={"encoder_name": "resnet34"})})
    with pytest.raises(ConfigError, match=r"model\.encoder_weights: cannot look up what 'imagenet' of resnet34"):
        save_pretrained(other)


@pytest.mark.parametrize("damage", ["weights", "index", "missing"])
def test_damaged_weights_are_an_error_with_a_remedy(
    weights: dict[str, torch.Tensor], config: TrainConfig, damage: str
) -> None:
    save_pretrained(config)
    folder = Path(config.output) / "pretrained"
    (file,), (index,) = folder.glob("*.safetensors"), folder.glob("*.json")
    if damage == "missing":
        file.unlink()
    else:
        path = file if damage == "weights" else index
        content = bytearray(path.read_bytes())
        content[-3] ^= 255
        path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"resnet18.*\.safetensors: .*remove the folder .*pretrained and rerun"):
        build_on_rank(config)


def test_without_pretrained_weights_nothing_is_written(config: TrainConfig) -> None:
    random = config.model_copy(update={"model": config.model.model_copy(update={"encoder_weights": None})})
    save_pretrained(random)
    assert not Path(config.output).exists()
    assert find_preprocessing(random) == Preprocessing()
