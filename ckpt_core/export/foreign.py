"""The boundary to third-party parsers: whatever they raise becomes this project's error."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from ckpt_core.errors import CkptError, MismatchError

_MAX_TEXT = 600
_PANIC = "PanicException"  # of Rust extensions, by way of pyo3: a BaseException that no module exports


@contextmanager
def foreign_errors(what: str, advice: str, kind: type[CkptError] = MismatchError) -> Generator[None]:
    """Turn any exception of a library that parses `what` into an error of `kind`, which names it and says `advice`.

    transformers, tokenizers and huggingface_hub raise whatever their parsers stumble over: KeyError, ImportError of an
    optional dependency, RecursionError, validation errors of their own, a panic of Rust code.

    Raises:
        CkptError: of `kind`; errors of this project pass as they are.
    """
    try:
        yield
    except CkptError:
        raise
    except BaseException as error:
        # What stops the process, such as KeyboardInterrupt, is no parser's error.
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise kind(f"{what}: {describe(error)}; {advice}") from None


def describe(error: BaseException) -> str:
    """Return an exception's type and message in one line of bounded length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
    return f"{type(error).__name__}: {text.rstrip('.')}" if text else type(error).__name__
