"""The label check warns about groups that names suggest, unless the configuration says what the groups are."""

from typing import Any

from segray.config import DataConfig
from segray.data.sample_list import Sample, Splits
from segray.training.labels.command import suspect_shared_groups
from segray.training.labels.inspect import WarningKind


def build_config(**val: Any) -> DataConfig:
    folders = {"images": "/d/images", "masks": "/d/masks"}
    return DataConfig.model_validate({"train": folders, "val": {**folders, **val}, "class_names": ["a", "b"]})


def build_samples(*names: str) -> list[Sample]:
    return [Sample(f"/d/images/{name}.png", f"/d/masks/{name}.png") for name in names]


def test_suspected_groups_are_one_warning_with_the_setting_that_separates_them() -> None:
    splits = Splits(build_samples("a_1", "a_2", "b_1"), build_samples("c_1", "a_3", "a_4"))
    (warning,) = suspect_shared_groups(build_config(), splits)
    assert (warning.uri, warning.kind) == ("/d/images/a_3.png", WarningKind.SHARED_GROUP)
    assert warning.message == (
        "one of 2 images in val whose names suggest groups that are in train too, such as 'a' with 2 images in train "
        "and 2 in val"
    )
    assert warning.remedy.endswith(r"set data.val: {fraction: 0.2, group_by: '^(.+?)(?:[-_]\d+)+$'}")
    assert suspect_shared_groups(build_config(group_by="^."), splits) == []
    oxford = DataConfig.model_validate({"layout": {"oxford_iiit_pet": {"root": "/d"}}})
    assert suspect_shared_groups(oxford, splits) == []
