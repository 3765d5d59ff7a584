"""How many predictors a run has when nobody says."""

import pytest
import ray

from segray.config import SegmentSettings
from segray.segment.pipeline import choose_num_predictors


@pytest.mark.usefixtures("ray_session")
def test_predictors_leave_room_for_decoding_and_have_something_to_do() -> None:
    settings = SegmentSettings()
    assert choose_num_predictors(settings, 1) == choose_num_predictors(settings, 7) == 1
    assert choose_num_predictors(settings, 8) == 2
    assert 2 <= choose_num_predictors(settings, 10_000) <= ray.cluster_resources()["CPU"] - 2
    assert choose_num_predictors(SegmentSettings(num_predictors=3), 1) == 3
