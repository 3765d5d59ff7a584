"""``train.json``: it binds an output folder to the settings and images of one run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from segray.errors import RunMismatchError
from segray.training.binding import Binding


@pytest.fixture
def binding(tmp_path: Path) -> Binding:
    return Binding(str(tmp_path / "train.json"), {"train": {"seed": 1}, "data": {"class_names": ["a", "b"]}}, "abc")


def test_a_folder_without_the_file_is_free_and_then_bound(binding: Binding) -> None:
    binding.require_same()
    binding.write()
    assert json.loads(Path(binding.uri).read_text()) == {"config": binding.settings, "listing": "abc"}
    binding.require_same()


def test_every_difference_is_named(binding: Binding, tmp_path: Path) -> None:
    binding.write()
    other = replace(binding, settings={**binding.settings, "train": {"seed": 2}}, listing="abd")
    with pytest.raises(RunMismatchError) as caught:
        other.require_same()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} belongs to another run (different listing: images or masks were added")
    assert "train.seed: " in message
    assert message.endswith("; choose another output")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": {}, "listing": 3}'])
def test_an_invalid_file_is_refused(binding: Binding, content: str) -> None:
    Path(binding.uri).write_text(content)
    with pytest.raises(RunMismatchError, match=r"train\.json: not written by this version of segray"):
        binding.require_same()


def test_settings_that_an_earlier_version_recorded_but_that_bind_no_run_are_not_compared(binding: Binding) -> None:
    earlier = {**binding.settings, "augmentation": {"preset": "light"}, "train": {"seed": 1, "num_epochs": 15}}
    replace(binding, settings=earlier).write()
    binding.require_same()
    with pytest.raises(RunMismatchError, match=r"train\.seed: the run has 1, got 2"):
        replace(binding, settings={**binding.settings, "train": {"seed": 2}}).require_same()


def test_a_setting_that_an_earlier_version_did_not_have_is_compared_with_its_default(binding: Binding) -> None:
    binding.write()
    replace(binding, settings={**binding.settings, "train": {"seed": 1, "sampling": "uniform"}}).require_same()
    with pytest.raises(RunMismatchError, match=r"train\.sampling: the run has 'uniform', got 'class_balanced'"):
        replace(
            binding, settings={**binding.settings, "train": {"seed": 1, "sampling": "class_balanced"}}
        ).require_same()
