"""A complete training run that several test files compare with."""

from pathlib import Path

import pytest

from tests.training.ray_runs import MakeConfig, make_config, train


@pytest.fixture(scope="session")
def uninterrupted_run(
    make_train_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, ray_session: None
) -> Path:
    """The output folder of a run that was not interrupted; printed.txt holds what it printed."""
    output = tmp_path_factory.mktemp("uninterrupted")
    printed = train(make_config(make_train_config, output))
    (output / "printed.txt").write_text(printed)
    return output
