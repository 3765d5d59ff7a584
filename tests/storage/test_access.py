"""Tests of segray.storage.access: access that is denied to one file, or to all of a folder."""

import builtins
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from segray import storage
from segray.errors import ForbiddenFileError
from segray.storage import access


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    access._readable_folders.clear()
    yield
    access._readable_folders.clear()


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that denies reading the files whose path ends in a suffix, also to root."""
    real = builtins.open

    def deny(suffix: str) -> None:
        def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path).endswith(suffix):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(builtins, "open", refuse)

    return deny


def write(folder: Path, *names: str) -> None:
    for name in names:
        storage.write_bytes(str(folder / name), b"1")


def test_a_file_is_forbidden_although_others_of_its_folder_can_be_read(
    tmp_path: Path, deny: Callable[[str], None]
) -> None:
    write(tmp_path, "a.png", "b.png", "sub/c.png")
    deny("b.png")
    with pytest.raises(ForbiddenFileError, match=r"^cannot read .*b\.png: permission denied"):
        storage.read_bytes(str(tmp_path / "b.png"))
    assert storage.can_read_beside(str(tmp_path / "b.png"))
    assert storage.can_read_beside(f"file://{tmp_path}/b.png")


def test_a_folder_that_is_forbidden_as_a_whole_is_no_proof(tmp_path: Path, deny: Callable[[str], None]) -> None:
    write(tmp_path, *(f"{number}.png" for number in range(30)))
    deny(".png")
    assert not storage.can_read_beside(str(tmp_path / "3.png"))
    deny("3.png")
    assert storage.can_read_beside(str(tmp_path / "3.png"))  # A failure is not remembered.


def test_a_file_alone_in_its_folder_is_compared_with_the_folder_above(
    tmp_path: Path, deny: Callable[[str], None]
) -> None:
    write(tmp_path, "1/image.png", "2/image.png")
    (tmp_path / "1" / "empty").touch()
    deny("1/image.png")
    assert storage.can_read_beside(str(tmp_path / "1" / "image.png"))
    assert not storage.can_read_beside(str(tmp_path / "gone" / "image.png"))


def test_a_success_holds_for_a_minute(
    tmp_path: Path, deny: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.png", "b.png")
    now_s = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    assert storage.can_read_beside(str(tmp_path / "a.png"))
    deny(".png")
    now_s += 59
    assert storage.can_read_beside(str(tmp_path / "b.png"))
    now_s += 2
    assert not storage.can_read_beside(str(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("uri", "folder"),
    [("s3://b/x/y.png", "s3://b/x"), ("s3://b/y.png", "s3://b"), ("s3://b", "s3://b"), ("/y.png", "/"), ("/", "/")],
)
def test_the_folder_of_a_file(uri: str, folder: str) -> None:
    assert access._get_folder(uri) == folder
