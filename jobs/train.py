"""Train on a Ray cluster: ``ray job submit --working-dir . -- python jobs/train.py jobs/train.yaml``."""

from segray.cli import run_job

if __name__ == "__main__":
    run_job("train")
