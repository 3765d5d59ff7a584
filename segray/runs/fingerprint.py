"""Fingerprint of a run: the settings and input hashes that decide its results and bind an output folder to it."""

import json
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from segray.config import find_differences
from segray.errors import MissingFileError, RunMismatchError
from segray.storage import read_bytes


class Record(BaseModel):
    """Base of the JSON records in an output folder. Unknown fields are ignored, so that fields can be added."""

    model_config = ConfigDict(frozen=True, strict=True, protected_namespaces=())
    newest_format: ClassVar[int] = 1  # newest ``format_version`` that this version of segray reads


RecordT = TypeVar("RecordT", bound=Record)


class Fingerprint(Record):
    """Settings and input hashes that decide the results of a run.

    Attributes:
        config: Resolved settings, as JSON values.
    """

    hash_messages: ClassVar[Mapping[str, str]] = {}  # what to report if the field of this name differs
    config_section: ClassVar[str] = ""  # prefix of the settings' names in messages
    output_setting: ClassVar[str] = "--output"

    config: dict[str, JsonValue]

    def list_differences(self, current: "Fingerprint") -> list[str]:
        """Return one phrase for each hash and each setting in which ``current`` differs from this fingerprint."""
        hashes = [
            message for name, message in self.hash_messages.items() if getattr(self, name) != getattr(current, name)
        ]
        return hashes + find_differences(self.config, current.config, self.config_section)

    def require_same(self, current: "Fingerprint", output_uri: str) -> None:
        """Compare the fingerprint recorded in an output folder with that of the current call.

        Raises:
            RunMismatchError: They differ; names every difference.
        """
        if differences := self.list_differences(current):
            raise build_mismatch_error(output_uri, differences, output_setting=self.output_setting)


def build_mismatch_error(
    output_uri: str, differences: Sequence[str], remedy: str = "", output_setting: str = "--output"
) -> RunMismatchError:
    """Return the error for an output folder that belongs to another run.

    Args:
        output_uri: The folder.
        differences: What differs between the two runs, one phrase each.
        remedy: What to do instead of choosing another folder; empty if there is nothing else.
        output_setting: Name of the option or setting with which the folder is chosen.
    """
    choices = f"{remedy}, or choose another {output_setting}" if remedy else f"choose another {output_setting}"
    return RunMismatchError(f"{output_uri} belongs to another run ({'; '.join(differences)}); {choices}")


def read_record(uri: str, kind: type[RecordT], output_setting: str = "--output") -> RecordT | None:
    """Read and validate a JSON record; return None if there is no file.

    Raises:
        RunMismatchError: The file is not JSON, is not a record of this kind, or has a newer format version.
        StorageError: The store refused the request or failed.
    """
    try:
        content = json.loads(read_bytes(uri))
    except MissingFileError:
        return None
    except ValueError as error:
        raise _build_invalid_error(uri, output_setting) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > kind.newest_format:
        raise RunMismatchError(
            f"{uri}: format version {version}, but this version of segray reads up to {kind.newest_format}; upgrade "
            f"segray, or choose another {output_setting}"
        )
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _build_invalid_error(uri, output_setting) from error


def _build_invalid_error(uri: str, output_setting: str) -> RunMismatchError:
    return RunMismatchError(f"{uri}: not written by this version of segray; choose another {output_setting}")
