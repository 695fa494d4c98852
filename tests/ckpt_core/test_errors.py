"""The exception tree is what its picture says."""

import pickle
import re

import pytest

from ckpt_core import errors

DRAWN = re.compile(r"^([│├└─ ]*)([A-Z]\w+Error)(?: +[^(\n]*?)?(?:\((.+)\))?$", re.MULTILINE)


def drawn_tree():
    """Return each drawn class's drawn parent and standard base classes, by name."""
    parents, tree = [], {}
    for indent, name, bases in DRAWN.findall(errors.__doc__):
        depth = len(indent) // 4 if indent else 0
        del parents[depth:]
        tree[name] = (parents[-1] if parents else "Exception", *re.split(r",\s*", bases or "")) if parents else ()
        tree[name] = tuple(base for base in tree[name] if base)
        parents.append(name)
    return tree


DEFINED = {name: value for name, value in vars(errors).items() if isinstance(value, type)}


def test_every_class_is_drawn_where_it_stands():
    """The picture in the module's docstring names every class, its parent and its standard base classes."""
    found = {name: tuple(base.__name__ for base in kind.__bases__) for name, kind in DEFINED.items()}
    found["CkptError"] = ()
    assert drawn_tree() == found


def test_the_root_is_an_ordinary_exception():
    """One `except CkptError` catches all of them, and `except Exception` too."""
    assert errors.CkptError.__bases__ == (Exception,)
    assert all(issubclass(kind, errors.CkptError) for kind in DEFINED.values())


@pytest.mark.parametrize("kind", DEFINED.values(), ids=list(DEFINED))
def test_every_error_survives_pickling(kind):
    """An error that crosses processes keeps its class, its text and its arguments."""
    error = kind("step_0000000001: a\nb; do c")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.args) == (kind, str(error), error.args)


@pytest.mark.parametrize(
    ("kind", "standard"),
    [
        (errors.NotACheckpointError, FileNotFoundError),
        (errors.StepExistsError, FileExistsError),
        (errors.DamagedError, ValueError),
        (errors.UntrustedError, ValueError),
        (errors.MismatchError, ValueError),
        (errors.CommitError, RuntimeError),
        (errors.ArgumentError, TypeError),
        (errors.ArgumentError, ValueError),
        (errors.ExportExistsError, FileExistsError),
        (errors.HubContentError, RuntimeError),
    ],
)
def test_errors_are_standard_ones_too(kind, standard):
    """Whoever catches the standard library's error catches ours, with its text whole."""
    with pytest.raises(standard, match=r"^where: what$"):
        raise kind("where: what")
