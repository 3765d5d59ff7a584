"""Binds a training or tuning output folder to one run: the same settings and the same labelled images."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from segray.config import TrainSettings
from segray.runs.fingerprint import Fingerprint, read_record
from segray.storage import write_bytes


class TrainFingerprint(Fingerprint):
    """Content of ``train.json`` and ``tune.json``.

    Attributes:
        config: The settings that bind the folder; see ``TrainConfig.bound_settings``.
        listing: sha256 of the list of images, their masks and splits.
    """

    hash_messages: ClassVar[Mapping[str, str]] = {
        "listing": "different listing: images or masks were added, removed or renamed, or divided in another way"
    }
    output_setting: ClassVar[str] = "output"

    listing: str


@dataclass(frozen=True)
class Binding:
    """The file that binds an output folder to one run, and what this call would write to it.

    Attributes:
        uri: The file, directly in the output folder.
        settings: The settings that bind the folder, as JSON values.
        listing: sha256 of the list of images, their masks and splits.
    """

    uri: str
    settings: dict[str, Any]
    listing: str

    def require_same(self) -> None:
        """Raise if the folder is bound to another run; a folder without the file is free.

        Raises:
            RunMismatchError: The settings or the listing differ (names each difference), or the file is not valid.
        """
        recorded = read_record(self.uri, TrainFingerprint, TrainFingerprint.output_setting)
        if recorded is not None:
            bound = recorded.model_copy(update={"config": _select(recorded.config, self.settings)})
            bound.require_same(self._fingerprint, self.uri.rpartition("/")[0])

    def write(self) -> None:
        """Write the file; from then on the folder belongs to this run."""
        write_bytes(self.uri, json.dumps(self._fingerprint.model_dump(mode="json"), indent=2).encode())

    @property
    def _fingerprint(self) -> TrainFingerprint:
        return TrainFingerprint(config=self.settings, listing=self.listing)


def _select(recorded: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a recorded configuration, and the settings of ``train``, that bind a folder today.

    Earlier versions also recorded settings that do not bind a run, and had fewer settings: what they did without them
    is the default.
    """
    selected = {name: value for name, value in recorded.items() if name in current}
    if isinstance(train := selected.get("train"), dict):
        train = {**TrainSettings().model_dump(mode="json"), **train}
        selected["train"] = {name: value for name, value in train.items() if name in current["train"]}
    return selected
