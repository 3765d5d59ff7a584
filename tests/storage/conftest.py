"""Fixtures of the storage tests: servers of other clouds."""

from collections.abc import Iterator

import pytest

from tests.storage.azurite import Azurite, find_azurite


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    try:
        find_azurite()
    except FileNotFoundError as error:  # A skip would go unnoticed.
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    with Azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server
