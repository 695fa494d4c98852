"""What runs in each training rank: `torchrun -m tasks.worker JOB.json`. Knows nothing of Prefect."""
