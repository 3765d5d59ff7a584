"""Where a soak has its images and results, and the command that runs there."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import MEMORY, keeps_attributes
from tests.faults.object_store import ObjectStore
from tests.faults.proxy import Action, FaultProxy, Rule
from tests.faults.scene import ROOT, build_environment
from tests.faults.soak.images import ImageSet
from tests.faults.soak.processes import kill_tree

_BUCKET = "soak"
_FAILING_SHARE = 0.05
_FAILURES = (Action.UNAVAILABLE, Action.RESET, Action.CUT_BODY, Action.LOST_ANSWER)


@dataclass(frozen=True)
class Place:
    """Where images and results are.

    Attributes:
        folder: Local folder of the bundle and the logs.
        images_uri: Folder of the images.
        output_uri: Output of the run that is disturbed.
        environment: Environment variables of ``segray segment``.
        proxy: What lets requests fail; None for a local disk.
    """

    folder: Path
    images_uri: str
    output_uri: str
    environment: dict[str, str]
    proxy: FaultProxy | None = None

    @contextmanager
    def start_segment(
        self, settings: Sequence[str], log: str, images: str = "", output: str = ""
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Start ``segray segment`` with a private Ray; at the end of the block, kill what still runs of it.

        Args:
            settings: Arguments of ``--set``.
            log: Name of the file, in ``folder``, to which the output is appended.
            images: ``--images``, if not those of this place.
            output: ``--output``, if not that of this place.
        """
        command = [sys.executable, "-m", "segray", "segment", "--bundle", str(self.folder / "bundle")]
        command += ["--images", images or self.images_uri, "--output", output or self.output_uri]
        command += [part for setting in settings for part in ("--set", setting)]
        with (self.folder / log).open("ab") as printed:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=printed, stderr=printed, start_new_session=True
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_tree(psutil.Process(process.pid))
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def local_place(folder: Path, images: ImageSet) -> Iterator[Place]:
    """Write the images that do not exist yet below a local folder."""
    images.write_files(folder)
    yield Place(folder, str(folder / "images"), str(folder / "run"), build_environment())


@contextmanager
def store_place(folder: Path, images: ImageSet) -> Iterator[Place]:
    """Start the object store, upload missing images, and let 5% of the requests of ``segray segment`` fail.

    This process reads results from the store directly. What the store holds is kept, so that a soak can be resumed,
    unless it has to be in memory.
    """
    root = (folder if keeps_attributes(folder) else MEMORY) / "segray-soak-store"
    root.mkdir(exist_ok=True)
    try:
        with ObjectStore(root) as store, FaultProxy(store.endpoint) as proxy:
            os.environ.update(store.environment)
            if _BUCKET not in {bucket["Name"] for bucket in store.client().list_buckets()["Buckets"]}:
                store.make_bucket(_BUCKET)
            images.upload(store.client(), _BUCKET)
            # The first matching rule applies, so the shares nearly add up.
            proxy.set_rules(*(Rule(action, probability=_FAILING_SHARE / len(_FAILURES)) for action in _FAILURES))
            environment = build_environment(**{**store.environment, "AWS_ENDPOINT_URL": proxy.endpoint})
            yield Place(folder, f"s3://{_BUCKET}/images", f"s3://{_BUCKET}/run", environment, proxy)
    finally:
        if root.parent == MEMORY:
            shutil.rmtree(root)
