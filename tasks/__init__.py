"""Prefect tasks, and the processes they start."""
