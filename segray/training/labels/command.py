"""Labels checked before anything is learned from them, and ``segray check``, which does nothing else."""

from collections.abc import Sequence

from rich.console import Console

from segray.config import TrainConfig
from segray.data.classes import ClassMap
from segray.data.manifest import Sample, Splits, Unpaired, load_splits
from segray.progress import build_bar
from segray.runtime.connect import connect_ray
from segray.storage import join_uri, normalize_uri, write_bytes
from segray.training.job import get_classes
from segray.training.labels.inspect import LabelReport, check_dataset, conclude, require_labelled
from segray.training.labels.report import Finding, print_findings


def check_labels(samples: Sequence[Sample], classes: ClassMap, split: str, console: Console) -> LabelReport:
    """Check the labels of a split with a progress display."""
    report = LabelReport.empty(classes.num_classes)
    with build_bar(console, "images") as bar:
        task = bar.add_task(f"check {split}", total=len(samples), note="")
        for report in check_dataset(samples, classes):
            bar.update(task, completed=report.num_samples, note=f"{len(report.faults)} faults")
    return report


def check_splits(splits: Splits, classes: ClassMap, console: Console) -> dict[str, LabelReport]:
    """Check the labels of all splits; return the reports by name."""
    reports = {name: check_labels(samples, classes, name, console) for name, samples in splits._asdict().items()}
    return conclude(reports, splits, classes)


def run_check(
    config: TrainConfig,
    console: Console,
    *,
    list_all: bool = False,
    num_drawn: int | None = None,
    draw_to: str | None = None,
) -> bool:
    """Check all labels, print what is found and what is labelled; return whether there is no fault.

    Args:
        config: Where the labels are, and what their values mean.
        console: What is printed to.
        list_all: Also list what is found beyond the first hundred of a kind.
        num_drawn: Samples to draw as training is fed with them, if there is no fault.
        draw_to: URI of that picture; None: ``augmented.png`` under the output.

    Raises:
        SegrayError: The images and masks cannot be listed or paired, no pixel of a split is labelled, or the store
            failed.
    """
    unpaired: list[Unpaired] = []
    splits = load_splits(config.data, unpaired)
    classes = get_classes(config)
    with connect_ray():
        reports = check_splits(splits, classes, console)
    faults: list[Finding] = [*unpaired, *(fault for report in reports.values() for fault in report.faults)]
    print_findings(reports, faults, classes, console, list_all)
    if faults:
        return False
    for name, report in reports.items():
        require_labelled(report, name)
    if num_drawn:
        from segray.training.labels.preview import (
            draw_training,  # matplotlib and torchvision, which nothing else here needs
        )

        uri = normalize_uri(draw_to) if draw_to else join_uri(normalize_uri(config.output), "augmented.png")
        write_bytes(uri, draw_training(config, splits.train, classes, num_drawn))
        console.print(f"augmented samples: {uri}", highlight=False)
    return True
