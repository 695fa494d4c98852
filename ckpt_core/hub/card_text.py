"""Markdown of a template and facts, in which text from anywhere stays text."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import ArgumentError
from ckpt_core.printable import printable

if TYPE_CHECKING:
    from jinja2 import Environment

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~&$])")
_LIST_START = re.compile(r"^(\d*)([-+=.)])")


class Markdown(str):
    """Text that is Markdown already; joined with any other it is plain text again."""

    __slots__ = ()


def line(text: str) -> Markdown:
    """Return plain text as one line of Markdown that shows it as it is, in a heading or a cell too."""
    return Markdown(_SPECIAL.sub(r"\\\1", _one_line(text)))


def _one_line(text: str) -> str:
    """Return text on one line, with escapes for what is not printable; half a character is refused later."""
    joined = " ".join(text.split())
    return joined if any("\ud800" <= character <= "\udfff" for character in joined) else printable(joined)


def paragraphs(text: str) -> Markdown:
    """Return plain text as paragraphs, which do not begin like lists or underline what is above them."""
    parts = re.split(r"\n\s*\n", text.strip())
    return Markdown("\n\n".join(_LIST_START.sub(r"\1\\\2", line(part)) for part in parts))


def quoted(text: str) -> Markdown:
    """Return plain text as a string of Python code, of one line."""
    return Markdown('"' + re.sub(r'(["\\])', r"\\\1", _one_line(text)) + '"')


def render_template(path: Path, facts: dict[str, Any]) -> str:
    """Return what a Jinja2 template makes of facts of JSON types. It can reach nothing else.

    Raises:
        ArgumentError: it cannot be read, or has an error; the message names file and line.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    environment = _environment()
    try:
        source = path.read_text(encoding="utf-8")
        code = environment.compile(source, name=str(path), filename=str(path))
        return environment.template_class.from_code(environment, code, environment.make_globals(None)).render(facts)
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path}: cannot be read as a template of a card ({error})") from error
    except TemplateSyntaxError as error:
        raise ArgumentError(f"{path}, line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template can fail in any way that an expression can
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise ArgumentError(f"{path}, line {_line_of(error, path)}: {kind}{error}") from error


def _environment() -> "Environment":
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Any] = {"paragraphs": paragraphs, "quoted": quoted, "safe": Markdown, "escape": line, "e": line}
    environment.filters.update(filters)  # pyright: ignore[reportUnknownMemberType] jinja2 types them as a bare dict
    return environment


def _shown(value: object) -> str:
    """Return what a template prints for a value."""
    if isinstance(value, Markdown):
        return value
    if value is None:
        return "not measured"
    return line(f"{value:.6g}" if isinstance(value, float) else str(value))


def _line_of(error: BaseException, path: Path) -> int | str:
    """Return the line of the template that raised an error."""
    trace, found = error.__traceback__, None
    while trace is not None:
        found = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(path) else found
        trace = trace.tb_next
    return "?" if found is None else found
