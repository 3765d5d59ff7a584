"""The time limit of an image: the process ends, unless the block ends in time."""

import subprocess
import sys
import time

import pytest

from segray.segmentation.stages.time_limit import limited_time


def test_a_block_that_takes_too_long_ends_the_process() -> None:
    script = """
import time
from segray.segmentation.stages.time_limit import limited_time
print("begin", flush=True)
with limited_time(0.5):
    time.sleep(60)
print("end")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "begin\n", "")


def test_the_limit_ends_with_the_block_even_if_it_raises() -> None:
    for _ in range(2):
        with pytest.raises(KeyError), limited_time(0.2):
            raise KeyError
    with limited_time(0.2):
        pass
    time.sleep(0.5)  # The process would end here.


def test_two_blocks_at_once_are_refused_and_the_first_stays_limited() -> None:
    with limited_time(1e30):
        with pytest.raises(RuntimeError, match="at once in one process"), limited_time(0.1):
            pass
        time.sleep(0.3)
    with limited_time(10):
        pass
