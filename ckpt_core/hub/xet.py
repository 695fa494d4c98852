"""A deadline for transfers in Xet, whose client is not Python's: no hook on a request sees them."""

import threading
from collections.abc import Generator
from contextlib import contextmanager

from ckpt_core.errors import HubError

SPARE_SECONDS = 600.0
SLOWEST_BYTES_PER_SECOND = 100_000


@contextmanager
def xet_deadline(size: int) -> Generator[None]:
    """End a transfer of `size` bytes that takes longer than it would at 100 kB/s, and 10 minutes.

    The client gives up a read after two minutes by itself, but waits for ever for the answer to the last request of an
    upload. Without Xet there is nothing to do: `connection` gives each request its deadline.

    Raises:
        HubError: it was ended.
    """
    from huggingface_hub.utils._runtime import is_xet_available
    from huggingface_hub.utils._xet import abort_xet_session

    if not is_xet_available():
        yield
        return
    seconds = SPARE_SECONDS + size / SLOWEST_BYTES_PER_SECOND
    expired = threading.Event()

    def end() -> None:
        expired.set()
        abort_xet_session()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except BaseException:  # what the end of its session raises differs with what was under way
        if not expired.is_set():
            raise
    finally:
        timer.cancel()
    if expired.is_set():
        raise HubError(
            f"a transfer of {size:,} bytes in Xet did not end within {seconds:g} s; run it again: what arrived is found"
            " and not sent twice. Or set HF_HUB_DISABLE_XET=1 before Python starts"
        )
