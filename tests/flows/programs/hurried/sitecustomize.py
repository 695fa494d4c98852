"""For the jobs of a test: no wait between tries is long, and a Hub that says nothing is given up soon."""

import os
import time

from ckpt_core.hub import connection

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, 0.02))
connection.IDLE_SECONDS = float(os.environ.get("TEST_IDLE_SECONDS", connection.IDLE_SECONDS))
