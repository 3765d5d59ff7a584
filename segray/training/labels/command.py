"""Check labels before training; ``segray check`` runs this check alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from rich.console import Console

from segray.config import OxfordPetLayout, TrainConfig
from segray.data.manifest import Unpaired, describe_groups, load_folds, load_splits, name_images
from segray.data.sample_list import Folds, Sample, Splits
from segray.errors import StorageError
from segray.progress import build_bar
from segray.runtime.connect import connect_ray
from segray.storage import join_uri, normalize_uri, write_bytes
from segray.training.job import get_classes
from segray.training.labels.duplicates import CheckedImages, find_duplicates
from segray.training.labels.heuristics import NO_DIGEST
from segray.training.labels.inspect import ReportBuilder, check_dataset, suggest_declarations
from segray.training.labels.name_groups import suspect_groups
from segray.training.labels.near_duplicates import NO_THUMBPRINT
from segray.training.labels.record import LabelRecord, remove_record
from segray.training.labels.report import LabelReport, print_findings
from segray.training.labels.split_report import LabelFault, SplitReport, WarningKind, join_reports, require_labelled
from segray.training.sampling import compute_image_weights, needs_presence


def check_labels(config: TrainConfig, samples: Sequence[Sample], split: str, console: Console) -> SplitReport:
    """Check the labels of one split and show progress; return the report."""
    with build_bar(console, "images") as bar:
        task = bar.add_task(f"check {split}", total=len(samples), note="")

        def show(builder: ReportBuilder) -> None:
            bar.update(task, completed=builder.num_samples, note=f"{builder.num_faults} faults")

        return check_dataset(samples, get_classes(config), show, needs_presence(config))


def check_splits(config: TrainConfig, splits: Splits, console: Console) -> dict[str, SplitReport]:
    """Check the labels of all splits; return the reports by split name."""
    reports = {name: check_labels(config, samples, name, console) for name, samples in splits._asdict().items()}
    reports = suggest_declarations(reports, get_classes(config))
    train, val = reports["train"], reports["val"]
    others = CheckedImages(splits.train, train.digests, train.thumbprints, lambda _: "train")
    found = suspect_shared_groups(config, splits) + val.warnings + find_duplicates(splits.val, val, others)
    return {**reports, "val": replace(val, warnings=found)}


def check_folds(config: TrainConfig, folds: Folds, console: Console) -> dict[str, SplitReport]:
    """Check the labels of all folds of a cross-validation; return the reports by name, ``fold 1`` and so on.

    Each fold is compared with those before it, so that two images that look alike are one warning.
    """
    order = folds.order
    samples = folds.samples.take(order)
    stops = np.cumsum(folds.sizes).tolist()
    parts = [samples[stop - size : stop] for stop, size in zip(stops, folds.sizes, strict=True)]
    reports = {
        f"fold {number}": check_labels(config, part, f"fold {number}", console)
        for number, part in enumerate(parts, start=1)
    }
    reports = suggest_declarations(reports, get_classes(config))
    digests = memoryview(b"".join(report.digests for report in reports.values()))
    thumbprints = memoryview(b"".join(report.thumbprints for report in reports.values()))
    suspicion = suspect_shared_groups(config, folds.hold_out(0))
    for (name, report), part, stop in zip(list(reports.items()), parts, stops, strict=True):
        start = stop - len(part)
        before = CheckedImages(
            samples,
            digests[: start * len(NO_DIGEST)],
            thumbprints[: start * len(NO_THUMBPRINT)],
            lambda other: f"fold {folds.numbers[order[other]] + 1}",
        )
        found = find_duplicates(part, report, before) if start else suspicion
        reports[name] = replace(report, warnings=report.warnings + found)
    return reports


def suspect_shared_groups(config: TrainConfig, splits: Splits) -> list[LabelFault]:
    """Return a warning if the names suggest that groups, such as videos, are in train and in val; else an empty list.

    Nothing is suspected if ``data.val.group_by`` says what the groups are, or the layout defines the splits. In a
    cross-validation val is the first fold.
    """
    data = config.data
    if isinstance(data.layout, OxfordPetLayout) or data.val is None or data.val.group_by is not None:
        return []
    shared = suspect_groups(*(list(name_images(data, samples)) for samples in splits))
    if shared is None:
        return []
    group, num_train, num_val = shared.example
    train, val = ("train", "val") if config.train.folds is None else ("other folds", "fold 1")
    message = (
        f"one of {shared.num_val:,} images in {val} whose names suggest groups that are in {train} too, such as "
        f"{group!r} with {num_train:,} images in {train} and {num_val:,} in {val}"
    )
    remedy = (
        "if a group is a video, scene or patient, the validation score is too high, because it rewards memorising: "
        f"add group_by: '{shared.expression}' to data.val"
    )
    if config.train.folds is None and data.val.fraction is None:
        remedy += ", and move whole groups to one side, or set train.folds"
    return [LabelFault(splits.val[shared.first].image_uri, WarningKind.SHARED_GROUP, message, remedy)]


class _Checked(NamedTuple):
    """What was checked, and the result.

    Attributes:
        report: The result.
        splits: The samples; with ``train.folds`` those of the run on all images.
        folds: The samples by fold, or None.
        listing: sha256 of the samples.
    """

    report: LabelReport
    splits: Splits
    folds: Folds | None
    listing: str


def check_config(config: TrainConfig, console: Console) -> LabelReport:
    """Check the labels of all splits of a configuration, and show progress.

    If there are no faults, the output folder gets a record, and training on the same files does not check them again.

    Raises:
        DataError: The images and masks cannot be listed or paired.
        StorageError: Environment error: permissions, network or disk.
    """
    checked = _check(config, console)
    _keep_record(config, checked, console)
    return checked.report


def _check(config: TrainConfig, console: Console) -> _Checked:
    unpaired: list[Unpaired] = []
    check: Callable[[], dict[str, SplitReport]]
    folds = None
    if config.train.folds is not None:
        folds = load_folds(config.data, config.train.folds, unpaired)
        splits, listing = folds.join(), folds.compute_sha256(with_version=True)
        check = partial(check_folds, config, folds, console)
    else:
        splits = load_splits(config.data, unpaired)
        listing = splits.compute_sha256(with_version=True)
        check = partial(check_splits, config, splits, console)
        for line in describe_groups(config.data, splits):
            console.print(line, highlight=False)
    with connect_ray():
        return _Checked(LabelReport(check(), unpaired, get_classes(config)), splits, folds, listing)


def _keep_record(config: TrainConfig, checked: _Checked, console: Console) -> None:
    """Write the record of a check without faults to the output folder, or remove an earlier one.

    If that fails, a warning is printed: the result of a check that may have taken hours must not be lost.
    """
    report, output = checked.report, normalize_uri(config.output)
    try:
        if report.ok and all(split.pixel_count.any() for split in report.splits.values()):
            LabelRecord.of(report.splits, checked.listing, report.classes).write(output)
        else:
            remove_record(output)
    except StorageError as error:
        console.print(f"warning: the result is not kept for training: {error}", highlight=False)


def run_check(
    config: TrainConfig,
    console: Console,
    *,
    list_all: bool = False,
    num_drawn: int | None = None,
    draw_to: str | None = None,
) -> bool:
    """Check all labels, print the findings and the labelled pixels of each class; return whether there are no faults.

    Args:
        config: Where the labels are, and what their values mean.
        console: Where the findings are printed.
        list_all: List every finding, not only the first hundred of a kind.
        num_drawn: Number of augmented training samples to draw if there are no faults.
        draw_to: URI of that picture; None writes ``augmented.png`` under the output.

    Raises:
        SegrayError: The images and masks cannot be listed or paired, no pixel of a split is labelled, or storage
            cannot be accessed.
    """
    checked = _check(config, console)
    report = checked.report
    print_findings(report, console, list_all)
    _keep_record(config, checked, console)
    if not report.ok:
        return False
    for name, split in report.splits.items():
        require_labelled(split, name)
    if num_drawn:
        uri = normalize_uri(draw_to) if draw_to else join_uri(normalize_uri(config.output), "augmented.png")
        write_bytes(uri, _draw_samples(config, checked, num_drawn))
        console.print(f"augmented samples: {uri}", highlight=False)
    return True


def _draw_samples(config: TrainConfig, checked: _Checked, num_drawn: int) -> bytes:
    from segray.training.labels.preview import draw_training  # It imports matplotlib.

    weights, reports = None, checked.report.splits
    if config.train.sampling == "class_balanced":
        train = reports["train"] if checked.folds is None else join_reports(list(reports.values()), checked.folds)
        weights = compute_image_weights(train.presence, train.image_count)
    return draw_training(config, checked.splits.train, checked.report.classes, num_drawn, weights)
