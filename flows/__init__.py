"""Prefect flows: each reads top to bottom like its own description."""
