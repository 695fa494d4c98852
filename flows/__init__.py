"""Prefect flows: each reads top to bottom like its own description."""

import os

# Where there is no server Prefect starts one, and for the first flow ever makes a database: half a minute on a slow
# disk. It reads its settings when it is imported, and those of a project only in that project's directory.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
