"""Scores of a cross-validation: from counts pooled over the folds, with their spread over the folds."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

_SCORES = {"iou": ("val_dataset_iou", "val_mean_iou"), "dice": ("val_dataset_dice", "val_mean_dice")}


class Spread(NamedTuple):
    """A score over all images, and the same score of each fold; None where undefined.

    Attributes:
        pooled: From counts summed over the folds.
        std: Standard deviation over the folds, with n - 1; None for fewer than two folds.
        lowest: The lowest of a fold.
        highest: The highest of a fold.
        folds: One value for each fold.
    """

    pooled: float | None
    std: float | None
    lowest: float | None
    highest: float | None
    folds: tuple[float | None, ...]


@dataclass(frozen=True)
class Estimate:
    """Scores of a cross-validation.

    Attributes:
        class_names: Names of the classes.
        num_images: Number of images held out in each fold.
        folds: Scores of each fold's model on the images it held out, as ``compute_scores`` returns them.
        pooled: The same of all images, from counts summed over the folds.
        changes: A line for each fold that was trained with other settings than those of the run.
    """

    class_names: tuple[str, ...]
    num_images: tuple[int, ...]
    folds: tuple[Mapping[str, Any], ...]
    pooled: Mapping[str, Any]
    changes: tuple[str, ...] = ()

    @cached_property
    def rows(self) -> list[tuple[str, dict[str, Spread]]]:
        """The IoU and Dice (``iou``, ``dice``) of each class by name, and then their means over the classes."""
        rows = [
            (name, {score: self._spread(key, index) for score, (key, _) in _SCORES.items()})
            for index, name in enumerate(self.class_names)
        ]
        return [*rows, ("mean", {score: self._spread(key) for score, (_, key) in _SCORES.items()})]

    def _spread(self, key: str, index: int | None = None) -> Spread:
        pooled, *folds = (scores[key] if index is None else scores[key][index] for scores in (self.pooled, *self.folds))
        defined = [score for score in folds if score is not None and not np.isnan(score)]
        return Spread(
            pooled,
            float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
            min(defined, default=None),
            max(defined, default=None),
            tuple(folds),
        )

    def format_csv(self) -> bytes:
        """Return one row per class, and one of the means, as CSV; an undefined score is an empty cell."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["class", *self._name_columns()])
        for name, spreads in self.rows:
            writer.writerow([name, *(value for spread in spreads.values() for value in (*spread[:-1], *spread.folds))])
        return buffer.getvalue().encode()

    def _name_columns(self) -> Iterator[str]:
        for score in _SCORES:
            yield from (score, f"{score}_std", f"{score}_min", f"{score}_max")
            yield from (f"{score}_fold_{number}" for number in range(1, len(self.folds) + 1))

    def format_json(self) -> bytes:
        """Return the scores of all folds, and the pooled ones, as JSON."""
        folds = [
            {"fold": number, "num_images": num_images, **scores}
            for number, (num_images, scores) in enumerate(zip(self.num_images, self.folds, strict=True), start=1)
        ]
        return json.dumps({"pooled": self.pooled, "folds": folds}, indent=1).encode()


def describe_spread(spread: Spread) -> Sequence[str]:
    """Return the cells of a table: pooled score, standard deviation, lowest and highest; a dash where undefined."""
    return ["–" if value is None or np.isnan(value) else f"{value:.4f}" for value in spread[:-1]]
