"""The steps in ``steps.csv``: one row every ``train.log_every_steps`` steps, kept when a run resumes."""

import csv
import io
from collections.abc import Mapping, Sequence

from segray.errors import MissingFileError
from segray.storage import read_bytes

COLUMNS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "images_per_s")

StepRow = Mapping[str, float | None]


class StepTable:
    """All logged steps of a run, each once; a step that a resumed run repeats replaces the row of the first time."""

    def __init__(self) -> None:
        self._lines: dict[int, str] = {}  # Text takes a fraction of the memory of rows, of which there can be millions.

    def add(self, rows: Sequence[StepRow]) -> None:
        """Add rows."""
        for row in rows:
            values = [row[name] for name in COLUMNS]
            self._lines[int(row["step"] or 0)] = ",".join("" if value is None else str(value) for value in values)

    def format(self) -> bytes:
        """Return the table as CSV; an undefined value is an empty cell."""
        lines = [",".join(COLUMNS), *(self._lines[step] for step in sorted(self._lines)), ""]
        return "\n".join(lines).encode()


def read_steps(uri: str) -> list[StepRow]:
    """Return the rows of ``steps.csv``; none if there is no such file.

    Raises:
        ValueError: The file has been changed.
        StorageError: Permissions, network or disk error.
    """
    try:
        content = read_bytes(uri).decode()
    except MissingFileError:
        return []
    integers = ("step", "epoch")
    table = csv.DictReader(io.StringIO(content))
    if tuple(table.fieldnames or COLUMNS) != COLUMNS:
        raise ValueError(f"expected the columns {', '.join(COLUMNS)}, got {table.fieldnames}; the file is replaced")
    return [
        {name: (int if name in integers else float)(row[name]) if row[name] else None for name in COLUMNS}
        for row in table
    ]
