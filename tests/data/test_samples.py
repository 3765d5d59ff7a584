"""Reading one image or mask by URI: which errors are faults of the image, and which are environment errors."""

import copy
from pathlib import Path

import pytest
from PIL import Image

from segray.data.samples import read_image, read_truth
from segray.errors import FaultKind, ImageFault, StorageError
from segray.storage import find_file
from tests.conftest import PET_CLASSES


def get_kind(act: object, *arguments: object) -> FaultKind:
    with pytest.raises(ImageFault) as caught:
        act(*arguments)  # type: ignore[operator]
    return caught.value.kind


def test_a_removed_or_changed_file_is_a_fault_of_the_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (5, 4), 1).save(path)
    found = find_file(str(path))
    assert found is not None
    assert read_image(str(path), etag=found.etag).shape == (4, 5, 3)
    path.write_bytes(path.read_bytes() + b" ")
    assert get_kind(read_image, str(path), 100, found.etag) == FaultKind.CHANGED
    assert get_kind(read_truth, str(path), (4, 5), PET_CLASSES, 100, found.etag) == FaultKind.CHANGED
    path.unlink()
    assert get_kind(read_image, str(path)) == FaultKind.MISSING
    assert get_kind(read_truth, str(path), (4, 5), PET_CLASSES) == FaultKind.MASK_MISSING


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "folder", "nul\0.png"])
def test_a_name_that_cannot_be_opened_is_a_fault_of_the_image(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    assert get_kind(read_image, f"{tmp_path}/{name}") == FaultKind.UNSUPPORTED
    assert get_kind(read_truth, f"{tmp_path}/{name}", None, PET_CLASSES) == FaultKind.MASK_MISMATCH


def test_a_folder_that_is_missing_on_this_node_is_an_environment_error(tmp_path: Path) -> None:
    uri = f"{tmp_path}/disk/sub/a.png"
    for act in (lambda etag: read_image(uri, etag=etag), lambda etag: read_truth(uri, None, PET_CLASSES, etag=etag)):
        with pytest.raises(
            StorageError, match=r"the folder .*/disk/sub does not exist on this node; mount it on every"
        ):
            act("entity tag of a listing")
    assert get_kind(read_image, uri) == FaultKind.MISSING  # Without an entity tag: a list may name it wrongly.
    assert get_kind(read_truth, uri, None, PET_CLASSES) == FaultKind.MASK_MISSING


def test_a_fault_keeps_its_kind_and_remedy_when_it_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (5, 4), 1).save(path)
    with pytest.raises(ImageFault) as caught:
        read_truth(str(path), (4, 6), PET_CLASSES)
    fault = copy.copy(caught.value)  # A copy is made in the same way as pickle does it.
    assert (fault.kind, fault.message) == (FaultKind.MASK_MISMATCH, "mask of 5x4 pixels for an image of 6x4")
    assert str(fault) == f"{fault.message}; {fault.remedy}" == str(caught.value)
