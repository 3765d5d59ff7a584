"""An output folder belongs to one run: the same settings, the same images."""

import json
from dataclasses import dataclass
from typing import Any

from segray.config import find_differences
from segray.errors import RunMismatchError
from segray.storage import exists, read_bytes, write_bytes


@dataclass(frozen=True)
class Binding:
    """What an output is bound to.

    Attributes:
        uri: The file under the output that says so.
        settings: Those that decide what comes out.
        listing: sha256 of which images, with which masks, in which split.
    """

    uri: str
    settings: dict[str, Any]
    listing: str

    def require_same(self) -> None:
        """Refuse an output that is bound to something else; one that is not bound is free.

        Raises:
            RunMismatchError: Names each difference.
        """
        if not exists(self.uri):
            return
        theirs = json.loads(read_bytes(self.uri))
        differences = find_differences(theirs["config"], self.settings)
        if theirs["listing"] != self.listing:
            differences.append("another listing: images or masks were added, removed or renamed")
        if differences:
            output = self.uri.rpartition("/")[0]
            raise RunMismatchError(f"{output} holds another run ({'; '.join(differences)}); choose another output")

    def write(self) -> None:
        """Bind the output."""
        write_bytes(self.uri, json.dumps({"config": self.settings, "listing": self.listing}, indent=2).encode())
