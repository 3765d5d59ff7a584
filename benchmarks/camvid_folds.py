"""Compare training recipes on CamVid's sequences, each scored by a model that was trained on the two others.

    python benchmarks/camvid_folds.py today plain default [--seeds 0 1 2] [--minutes 10]

Each model is trained for `--minutes` on all cores. Pixel counts are pooled over the three sequences, so that each
image counts once. The score is that of the last epoch: no image of a sequence that is left out chooses anything. Each
result is saved as soon as it is known, and a rerun computes only the missing ones. The recipes are those of `RECIPES`,
and `plain`, which is `camvid_plain_smp.py`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from camvid import CLASS_NAMES
from measuring import describe_machine
from pyarrow import parquet as pq
from rich.console import Console
from rich.table import Table

from segray.metrics import compute_defined_mean, compute_iou, count_from_confusion

_ROOT = Path(__file__).parents[1]
_CAMVID = _ROOT / "data/camvid"
_RUNS = _ROOT / "runs/benchmarks/camvid_folds"
_RESULTS = _ROOT / "benchmarks/results/camvid_folds.json"
SEQUENCES = ("0001TP", "0006R0", "0016E5")
_TODAY = {
    "augmentation": {"preset": "none", "scale": [1.0, 1.6], "aspect": [0.8, 1.25], "horizontal_flip": 0.5},
    "train": {"global_batch_size": 8, "learning_rate": 2e-3, "ema_decay": 0.995},
}
_TRAIN = {"global_batch_size": 8, "learning_rate": 2e-3, "ema_decay": 0.99}
_NATIVE = {"image_size": [352, 480]}
_CE_DICE = {"ce": 1.0, "dice": 1.0}
# Settings that differ from the defaults.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "today": _TODAY,
    "strong": {"augmentation": "strong", "train": _TRAIN},
    "strong-dice": {"augmentation": "strong", "loss": _CE_DICE, "train": _TRAIN},
    "strong-lovasz": {"augmentation": "strong", "loss": {"ce": 1.0, "lovasz": 1.0}, "train": _TRAIN},
    "strong-weights": {"augmentation": "strong", "loss": {**_CE_DICE, "class_weights": "auto"}, "train": _TRAIN},
    "strong-balanced": {
        "augmentation": "strong",
        "loss": _CE_DICE,
        "train": {**_TRAIN, "sampling": "class_balanced"},
    },
    "light-dice": {"augmentation": "light", "loss": _CE_DICE, "train": _TRAIN},
    "native-dice": {
        **_NATIVE,
        "augmentation": {"preset": "strong", "crop_size": [192, 256], "scale": [0.5, 1.5]},
        "loss": _CE_DICE,
        "train": _TRAIN,
    },
}


def list_pairs() -> list[tuple[Path, Path]]:
    """Return image and mask of all labelled images, of both splits."""
    images = sorted((_CAMVID / "images").glob("*/*"), key=lambda path: path.name)
    return [(path, _CAMVID / "masks" / path.parent.name / path.name) for path in images]


def train_recipe(recipe: str, sequence: str, seed: int, minutes: float, folder: Path) -> dict[str, Any]:
    """Train a recipe with segray on the other sequences, and return the confusion matrix of the one left out."""
    rows = [
        {"image_uri": str(image), "mask_uri": str(mask), "split": "val" if image.name.startswith(sequence) else "train"}
        for image, mask in list_pairs()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    manifest = {"manifest": str(folder / "pairs.parquet")}
    given = RECIPES[recipe]
    train = {"eval_every_epochs": 10_000, **given.get("train", {}), "time_budget_min": minutes, "seed": seed}
    config = {
        "data": {"train": manifest, "val": manifest, "class_names": CLASS_NAMES, "ignore_values": [len(CLASS_NAMES)]},
        "image_size": [192, 256],
        "output": str(folder / "run"),
        **given,
        "train": train,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run([str(Path(sys.executable).with_name("segray")), "train", str(folder / "config.yaml")], folder / "log.txt")
    metrics = json.loads((folder / "run/bundle/bundle.json").read_text())["metrics"]
    budget = json.loads((folder / "run/time_budget.json").read_text())
    return {"confusion": metrics["val_confusion"], "num_epochs": budget["num_epochs"]}


def train_plain(sequence: str, seed: int, minutes: float, folder: Path) -> dict[str, Any]:
    """Train with the plain script on the other sequences, and return the confusion matrix of the one left out."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(_ROOT / "benchmarks/camvid_plain_smp.py"), str(_CAMVID)]
    run([*command, "--held-out", sequence, "--minutes", str(minutes), "--seed", str(seed)], folder / "log.txt")
    found: dict[str, Any] = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    return found


def run(command: list[str], log: Path) -> None:
    """Run a process whose output goes to a file.

    Raises:
        SystemExit: It failed; the message names the file.
    """
    with log.open("w") as output:
        if code := subprocess.run(command, cwd=_ROOT, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
            sys.exit(f"{command[:3]} ended with exit code {code}; see {log}")


def pool(results: dict[str, Any], recipe: str, seed: int) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Return the IoU of each class over all sequences, or None if one is missing."""
    found = [results.get(f"{recipe} {sequence} {seed}") for sequence in SEQUENCES]
    if None in found:
        return None
    confusions = np.array([one["confusion"] for one in found if one], np.int64)
    return compute_iou(count_from_confusion(confusions.sum(axis=0)))


def print_table(results: dict[str, Any], recipes: list[str]) -> None:
    """Print the scores of the recipes: means over the seeds, in percent."""
    seeds = sorted({int(key.split()[2]) for key in results})
    by_recipe = {
        recipe: [ious for seed in seeds if (ious := pool(results, recipe, seed)) is not None] for recipe in recipes
    }
    chosen = {recipe: np.mean(ious, axis=0) for recipe, ious in by_recipe.items() if ious}
    table = Table("IoU", *(f"{recipe} ({len(by_recipe[recipe])})" for recipe in chosen))
    means = {recipe: [100 * float(compute_defined_mean(iou) or 0) for iou in by_recipe[recipe]] for recipe in chosen}
    table.add_row("mean", *(f"{np.mean(values):.2f} ± {np.std(values):.2f}" for values in means.values()))
    for number, name in enumerate(CLASS_NAMES):
        table.add_row(name, *(f"{100 * iou[number]:.1f}" for iou in chosen.values()))
    Console(width=160).print(table)


def main() -> None:
    """Train what is missing, and print the scores."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="+", choices=[*RECIPES, "plain"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sequences", nargs="+", choices=SEQUENCES, default=SEQUENCES)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--results", type=Path, default=_RESULTS)
    arguments = parser.parse_args()
    conditions = {"minutes": arguments.minutes, "recipes": RECIPES}
    content = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"results": {}, **conditions}
    if {name: content[name] for name in conditions} != json.loads(json.dumps(conditions)):
        sys.exit(f"{arguments.results}: has results of other minutes or recipes; choose another file with --results")
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            for sequence in arguments.sequences:
                key = f"{recipe} {sequence} {seed}"
                if key in content["results"]:
                    continue
                folder, began_s = _RUNS / f"{key.replace(' ', '-')}-{arguments.minutes:g}", time.monotonic()
                if recipe == "plain":
                    found = train_plain(sequence, seed, arguments.minutes, folder)
                else:
                    found = train_recipe(recipe, sequence, seed, arguments.minutes, folder)
                content["results"][key] = {**found, "wall_s": round(time.monotonic() - began_s)}
                content["machine"] = describe_machine()
                arguments.results.write_text(json.dumps(content) + "\n")
                print(f"{time.strftime('%H:%M')} {key}: {score(found['confusion']):.2f}", flush=True)
    print_table(content["results"], arguments.recipes)


def score(confusion: list[list[int]]) -> float:
    """Return the mean IoU of one sequence, in percent."""
    return 100 * float(compute_defined_mean(compute_iou(count_from_confusion(np.array(confusion)))) or 0)


if __name__ == "__main__":
    main()
