"""Unexpected exceptions in each kind of worker of training: the error names the cause and the file. Without Ray."""

import queue
import tempfile
import threading
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
import ray.train
from ray.train import Checkpoint, WorkerGroupError

from segray.data.sample_list import Sample
from segray.errors import ClusterError
from segray.training import fit
from segray.training.checkpoint import TrainingState
from segray.training.labels import inspect
from segray.training.pretrained import WeightsError
from segray.training.tuning.trial import TrialRun
from segray.training.worker import loop, sample_store
from segray.training.worker.non_finite import NonFiniteLossError
from tests.conftest import PET_CLASSES

SAMPLE = Sample("a.png", "b.png")


def fail(*_: Any) -> None:
    raise ValueError("odd\nmore lines")


def test_in_the_label_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "read_image", fail)
    expected = "^the label check of a.png and its mask failed: ValueError: odd; rerun with SEGRAY_WORKER_LOGS=1"
    with pytest.raises(ClusterError, match=expected):
        inspect.check_samples([SAMPLE], PET_CLASSES)


def test_while_a_sample_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_store, "fetch_image", fail)
    with pytest.raises(ClusterError, match=r"^reading a.png and its mask failed: ValueError: odd; rerun with"):
        sample_store.load_labelled_image(SAMPLE, PET_CLASSES)


def test_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray repeats an upload after some errors; then the error must be the same again."""
    report = MagicMock()
    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(loop, "save_state", fail)
    trainer = MagicMock(num_steps_done=8, world_rank=0, world_size=1)
    trainer.job.run_uri = "s3://bucket/run"
    trainer.gather_state.return_value = TrainingState(8, {}, {}, {})
    loop._save(trainer, {})
    expected = "^writing the checkpoint s3://bucket/run/checkpoint_8 failed: ValueError: odd; rerun with"
    for _ in range(2):
        with pytest.raises(ClusterError, match=expected):
            report.call_args.kwargs["checkpoint_upload_fn"](Checkpoint("/folder"), "checkpoint_8")


def test_in_a_trial() -> None:
    trial = object.__new__(TrialRun)
    trial._scores, trial._permissions, trial._is_waiting = queue.Queue(), queue.Queue(), False
    trial._run = fail  # type: ignore[method-assign]
    threading.Thread(target=trial._train).start()
    with pytest.raises(ClusterError, match=r"^the trial failed: ValueError: odd; rerun with"):
        trial.step()


@pytest.mark.parametrize("error", [NonFiniteLossError("loss is nan"), WeightsError("missing")])
def test_an_error_that_a_restart_would_not_fix_is_returned(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda reference: None)
    monkeypatch.setattr(ray.train, "get_context", MagicMock())
    monkeypatch.setattr(loop, "Heartbeat", MagicMock())
    monkeypatch.setattr(loop, "set_up", MagicMock(side_effect=error))
    assert loop.run_loop(MagicMock()) == {"error": error}


def test_in_training_workers() -> None:
    failures = {2: RuntimeError("connection closed by peer"), 3: RuntimeError("connection closed by peer")}
    error = WorkerGroupError("text", {**failures, 1: ValueError("odd\nmore lines")})
    explained = str(fit._explain_failure(error, None, max_failures=3))
    assert explained.startswith("workers failed more than 3 times (train.max_failures); to resume")
    assert explained.endswith("rank 1: ValueError: odd; rank 2: RuntimeError: connection closed by peer")
