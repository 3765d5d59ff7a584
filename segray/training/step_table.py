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
        self._rows: dict[float | None, StepRow] = {}

    @property
    def rows(self) -> list[StepRow]:
        """The rows in the order of the steps."""
        return [self._rows[step] for step in sorted(self._rows, key=float)]  # type: ignore[arg-type]

    def add(self, rows: Sequence[StepRow]) -> None:
        """Add rows."""
        self._rows |= {row["step"]: row for row in rows}

    def format(self) -> bytes:
        """Return the table as CSV; an undefined value is an empty cell."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return buffer.getvalue().encode()


def read_steps(uri: str) -> StepTable:
    """Read ``steps.csv``; the table is empty if there is no such file.

    Raises:
        StorageError: Permissions, network or disk error.
    """
    table = StepTable()
    try:
        content = read_bytes(uri).decode()
    except MissingFileError:
        return table
    integers = ("step", "epoch")
    table.add(
        [
            {name: (int if name in integers else float)(row[name]) if row[name] else None for name in COLUMNS}
            for row in csv.DictReader(io.StringIO(content))
        ]
    )
    return table
