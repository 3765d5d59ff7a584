"""The ``segray`` command: one function for each verb. The two job files run the same functions.

Modules that import torch or Ray are imported inside the verbs, so that a mistake is answered at once.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from segray.config import ExportFormat, SegmentFile, TrainConfig, load_config, require_absolute
from segray.errors import ConfigError, SegrayError, flatten_message
from segray.progress import build_console
from segray.runtime.connect import find_segray_error, is_submitted_job, keep_on_loopback

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a segmentation model on labelled images, and apply it to a whole bucket. Both run on Ray.",
)
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Configuration; a path or URI.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: train.num_epochs=3.")
]


@app.command()
def train(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Train a model on labelled images, and leave a bundle."""
    settings = load_config(TrainConfig, config, overrides or [])
    if is_submitted_job():
        require_absolute(settings.uris)
    console = build_console()
    from segray.training.driver import run_training

    console.print(f"bundle: {run_training(settings, console)}", highlight=False)


@app.command()
def tune(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Search settings (section tune), and leave the best configuration. The same call goes on with a search."""
    settings = load_config(TrainConfig, config, overrides or [])
    if is_submitted_job():
        require_absolute(settings.uris)
    console = build_console()
    from segray.training.tuning.search import run_search

    best = run_search(settings, console)
    console.print(f"best configuration: {best} (segray train with it leaves its bundle)", highlight=False)


@app.command()
def segment(
    bundle: Annotated[str, typer.Option(metavar="URI", help="Bundle that segray train made.")],
    images: Annotated[
        list[str],
        typer.Option(
            metavar="URI", help="Folder, prefix, glob or image; .txt list; .csv or .parquet manifest. May be repeated."
        ),
    ],
    output: Annotated[str, typer.Option(metavar="URI", help="Run folder; the same call goes on with it.")],
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG.yaml]", help="Configuration; its segment section is used.")
    ] = None,
    masks: Annotated[
        list[str] | None,
        typer.Option(metavar="URI", help="Ground truth, paired by name, to score; one for each --images."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print where the time went, what held the run up, and what to turn.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Segment every image, and leave Parquet. Exit code 3 if too many images are error rows, 4 if the world failed."""
    settings = load_config(SegmentFile, config, overrides or []).segment
    if is_submitted_job():
        require_absolute({"--bundle": bundle, "--output": output})
        for name, uris in (("--images", images), ("--masks", masks or ())):
            for uri in uris:
                require_absolute({name: uri})
    console = build_console()
    from segray.segmentation.driver import print_outcome, require_few_errors, run_segmentation
    from segray.segmentation.job import SegmentJob

    job = SegmentJob(bundle, tuple(images), output, tuple(masks or ()), settings)
    outcome = run_segmentation(job, console, with_profile=profile)
    print_outcome(outcome, console)
    require_few_errors(outcome, settings)


@app.command()
def status(output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Run folder of segray segment.")]) -> None:
    """Say how far a run of segment is: planned, done, errors by kind, what remains, rate."""
    console = build_console()
    from segray.results.status import print_status, read_status

    print_status(read_status(output), console)


@app.command()
def check(
    config: ConfigArgument,
    overrides: SetOption = None,
    list_all: Annotated[bool, typer.Option("--all", help="List every fault, also beyond 100 of a kind.")] = False,
    draw: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=32, help="Draw the first N training samples, augmented as training will."),
    ] = None,
    draw_to: Annotated[
        str | None, typer.Option(metavar="URI", help="PNG to draw to; default: augmented.png under the output.")
    ] = None,
) -> None:
    """Open every image and mask, and list every fault with what mends it. Exit code 1 if there is any."""
    settings = load_config(TrainConfig, config, overrides or [])
    if draw_to and not draw:
        raise ConfigError("--draw-to: nothing is drawn; say how many samples with --draw N")
    console = build_console()
    from segray.training.labels.command import run_check

    if not run_check(settings, console, list_all=list_all, num_drawn=draw, draw_to=draw_to):
        raise typer.Exit(1)


@app.command()
def export(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Bundle that segray train made.")],
    export_format: Annotated[
        ExportFormat, typer.Option("--format", help="onnx for ONNX Runtime and others; torch_export for torch alone.")
    ],
    output: Annotated[
        str | None, typer.Option(metavar="URI", help="File to write; default: model.onnx or model.pt2 in the bundle.")
    ] = None,
) -> None:
    """Write a bundle's model as one file that needs no segray, once it was found equal to the bundle."""
    console = build_console()
    from segray.models.export import export_bundle

    console.print(f"exported: {export_bundle(bundle, export_format, output)}", highlight=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder to work in.")] = Path("runs/demo"),
    only_data: Annotated[bool, typer.Option("--only-data", help="Only make the labelled images.")] = False,
) -> None:
    """Run the whole job on drawn shapes: labels, training, segmentation, scores, pictures."""
    console = build_console()
    from segray.demo import run_demo, run_demo_data

    if only_data:
        run_demo_data(output, console)
    else:
        run_demo(output, console)


def run(command: Callable[[], object]) -> NoReturn:
    """Run a command line and exit: an error of segray is one line on standard error and an exit code."""
    keep_on_loopback()
    try:
        command()
    except SegrayError as error:
        known = find_segray_error(error) or error
        print(f"error: {flatten_message(known)}", file=sys.stderr)
        sys.exit(known.exit_code)
    sys.exit(0)


def main() -> NoReturn:
    """Entry point of the ``segray`` command."""
    run(app)


def run_job(verb: str) -> NoReturn:
    """Entry point of a job file: ``segray VERB`` with the job's own arguments."""
    run(lambda: app([verb, *sys.argv[1:]], prog_name=f"jobs/{verb}.py"))
