"""A flow that does nothing until it is killed."""

import time

from prefect import flow


@flow
def idle() -> None:
    """Wait."""
    time.sleep(3600)


if __name__ == "__main__":
    idle()
