"""Load a user's own class or function, named by import path or by file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fedtrain.errors import FedtrainError, InputError, nearest, shorten

__all__ = ["blame", "load_object", "raised"]

Error = TypeVar("Error", bound=FedtrainError)

_FORMS = '"package.module:Name" or "file.py:Name"'
_LIBRARIES = ("<frozen", str(Path(__file__).parent), *(sysconfig.get_path(p) for p in ("stdlib", "purelib", "platlib")))


def load_object(reference: str, base: Path, error: type[InputError]) -> Any:
    """Load what a reference names; the same reference gives the same object, in worker processes too.

    Args:
        reference: "package.module:Name", also from the current directory, or "file.py:Name".
        base: folder against which a relative file is resolved: the experiment file's.
        error: class of the error to raise, such as `TaskError`.

    Returns:
        The named attribute of the module or file.

    Raises:
        error: the module, file or name does not exist, or the code raises while it is imported.
    """
    source, _, name = reference.rpartition(":")
    if not source or not name.isidentifier():
        raise error("this names no class or function", got=reference, expected=_FORMS)
    module = _load_file((base / source).resolve(), error) if source.endswith(".py") else _load_module(source, error)
    if hasattr(module, name):
        return getattr(module, name)
    public = [known for known in vars(module) if not known.startswith("_")]
    raise error(
        f"{source} defines no {name!r}",
        got=reference,
        hint=nearest(name, public, otherwise=""),
    )


def _load_module(name: str, error: type[InputError]) -> ModuleType:
    # Last, so that a file here cannot take the place of an installed package.
    _search(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{name}.".startswith(f"{exc.name}."):
            raise raised(f"importing {name}", exc, error) from exc
        raise error(
            f"there is no module {exc.name!r}",
            got=name,
            hint='Install its package, run from the folder that holds it, or name its file: "path/to/file.py:Name"',
        ) from exc
    except (Exception, SystemExit) as exc:
        raise raised(f"importing {name}", exc, error) from exc


def _load_file(path: Path, error: type[InputError]) -> ModuleType:
    # A name made from the path: two loads share one module, and equal file names in two folders do not clash.
    name = f"_fedtrain_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise error("there is no such Python file", got=path, hint="Paths are relative to the experiment file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a path that ends in .py has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _search(path.parent)
    # Dataclasses and pickle look a class's module up by name, already while it is being executed.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        del sys.modules[name]
        raise raised(f"importing {path}", exc, error) from exc
    return module


def _search(folder: Path) -> None:
    """Let the code import its neighbours, now and later."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def raised(doing: str, exc: BaseException, error: type[Error]) -> Error:
    """Say in one line what a user's code raised, and on which of its lines.

    Args:
        doing: what was being done, such as "importing task.py".
        exc: what the code raised.
        error: class of the error to make.

    Returns:
        The error, to be raised from `exc`.
    """
    where = blame(exc).rstrip(".")
    if where.startswith(_LIBRARIES):
        return error(f"{doing} failed at {where}", hint="That is a library's line: look at what it is given")
    return error(f"{doing} failed at {where}", hint="Correct that line and start again")


def blame(exc: BaseException) -> str:
    """Name the line of the user's code that raised, and what it raised, in one line."""
    if isinstance(exc, SyntaxError):
        file, line, problem = exc.filename, exc.lineno, exc.msg
    else:
        frames = traceback.extract_tb(exc.__traceback__)
        # The line to correct is the user's last one, not one deep in the libraries that it calls.
        last = ([frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames)[-1]
        file, line, problem = last.filename, last.lineno, str(exc)
    problem = shorten(" ".join(f"{type(exc).__name__}: {problem}".split()), limit=300)
    return f"{file}, line {line}: {problem}"
