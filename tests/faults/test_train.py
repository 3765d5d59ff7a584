"""Tests of a training run that loses a node: it continues with the remaining workers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from segray.config import TrainConfig
from segray.models.bundle import load_bundle
from segray.training.checkpoint import find_newest_state
from tests.faults.scene import TIMEOUT_S, Cluster, build_environment

NUM_EPOCHS = 8


@pytest.mark.slow
def test_training_continues_with_fewer_workers_after_a_lost_node_and_skips_no_epoch(
    make_train_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    config = make_train_config(
        output, num_epochs=NUM_EPOCHS, num_train_workers=4, min_train_workers=2, global_batch_size=12, precision="fp32"
    )
    content = {**config.model_dump(mode="json"), "model": {"arch": "classic_unet", "widths": [8, 16]}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    with Cluster({}, num_nodes=1) as cluster:
        driver = subprocess.Popen(
            [sys.executable, "-c", "from segray.cli import main; main()", "train", str(path)],
            env=build_environment(RAY_ADDRESS=cluster.address),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline_s = time.monotonic() + TIMEOUT_S
        while find_newest_state(str(output / "ray_train"), lambda _: None) is None:
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < deadline_s, "no checkpoint was written in time"
            time.sleep(0.05)
        os.kill(cluster.raylets[0], signal.SIGKILL)
        printed, _ = driver.communicate(timeout=TIMEOUT_S)
    assert driver.returncode == 0, printed
    assert "training on 3 of 4 workers" in printed, printed
    manifest = load_bundle(str(output / "bundle")).manifest
    assert json.loads((output / "bundle" / "bundle.json").read_text())["config"]["train"]["num_train_workers"] == 4
    epochs = [line.split(",")[0] for line in (output / "metrics.csv").read_text().splitlines()[1:]]
    assert epochs == [str(epoch) for epoch in range(1, NUM_EPOCHS + 1)]
    assert sum(map(sum, manifest.metrics["val_confusion"])) == 7 * 64 * 64
