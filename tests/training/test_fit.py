"""Tests of how segray configures Ray Train."""

import pytest
import ray
import ray.train
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from segray.training.fit import _Trainer


@pytest.mark.parametrize(("dashboard_url", "expected"), [("", False), ("127.0.0.1:8265", True)])
def test_rays_placement_group_cleaner_is_used_only_with_a_dashboard(
    dashboard_url: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray._private.worker, "get_dashboard_url", lambda: dashboard_url)
    trainer = _Trainer(lambda: None, scaling_config=ray.train.ScalingConfig(num_workers=1))
    callbacks = trainer._create_default_callbacks()
    assert len(callbacks) > 3
    assert any(isinstance(callback, PlacementGroupCleanerCallback) for callback in callbacks) == expected
