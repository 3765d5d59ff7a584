"""Search settings on a Ray cluster: ``ray job submit --working-dir . -- python jobs/tune.py CONFIG.yaml``."""

from segray.cli import run_job

if __name__ == "__main__":
    run_job("tune")
