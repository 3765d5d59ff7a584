"""Segment on a Ray cluster: ``ray job submit --working-dir . -- python jobs/segment.py --bundle URI …``."""

from segray.cli import run_job

if __name__ == "__main__":
    run_job("segment")
