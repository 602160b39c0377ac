"""What a user gives as `MODULE:FUNCTION` or `FILE.py:FUNCTION`: their own model, loss and data."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from natgrad.checks.errors import UserError
from natgrad.curvature.problem import Forward

EXPECTED = "expected (model, loss, data), as for natgrad.residual(model, loss, data), or (model, loss, data, forward)"


def load_problem(target: str) -> tuple[nn.Module, nn.Module, Any, Forward | None]:
    """Import the module, from the current directory or from Python's path, and call the function. It returns a model, a
    loss, data, and optionally a function for batches that are not pairs.

    Raises:
        UserError: if there is no such module or function, or it raises, or it returns something else.
    """
    problem, forward = call(target), None
    if isinstance(problem, (tuple, list)) and len(problem) == 4:
        *problem, forward = problem
        if not callable(forward):
            raise UserError(
                f"{target} returned a {type(forward).__name__} as its forward; {EXPECTED}; return a function "
                "forward(model, batch) that gives (output, target) there, or three values."
            )
    return *checked(target, problem), forward


def call(target: str) -> Any:
    """The function's return value.

    Raises:
        UserError: if there is no such module or function, or it raises.
    """
    module_name, function_name, file = parsed(target)
    function = getattr(_load_module(module_name, file), function_name, None)
    if not callable(function):
        what = "is not a function" if function is not None else "does not exist"
        raise UserError(
            f"{function_name!r} {what} in module {module_name!r}; expected a function without arguments that returns "
            "(model, loss, data); define it there, or use another name."
        )
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{target} raised {words(error)}; expected it to return (model, loss, data) when called without "
            "arguments; correct the function."
        ) from error


class Target(NamedTuple):
    """The names of a module and of its function, and the module's file if the user gave that."""

    module: str
    function: str
    file: Path | None = None


def parsed(target: str) -> Target:
    """The module and function that the user means. `folder/training.py:problem` is the function `problem` in the module
    `training`; from now on, modules are also found in that folder.

    Raises:
        UserError: if it is neither `MODULE:FUNCTION` nor `FILE.py:FUNCTION`, or there is no such file.
    """
    module_name, _, function_name = target.rpartition(":")
    path = Path(module_name)
    is_file = path.suffix == ".py"
    if not (module_name and function_name) or (":" in module_name and not is_file):
        raise UserError(
            f"{target!r} has no function name; expected MODULE:FUNCTION, such as training:problem for the function "
            "problem() in training.py."
        )
    if not is_file:
        look_in(Path.cwd())
        return Target(module_name, function_name)
    if not path.is_file():
        raise UserError(
            f"there is no file {module_name!r} in {os.getcwd()}; expected FILE.py:FUNCTION; change to its folder, or "
            "give the path of the file."
        )
    if not path.stem.isidentifier():
        raise UserError(
            f"{module_name!r} cannot be imported, as {path.stem!r} is not a Python name; expected a file whose name "
            "has letters, digits and underscores only; rename it."
        )
    look_in(path.resolve().parent)
    return Target(path.stem, function_name, path.resolve())


def look_in(folder: Path) -> None:
    """Make Python look for modules in this folder first."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()


def _load_module(name: str, file: Path | None) -> Any:
    module = _import(name)
    found = getattr(module, "__file__", None)
    if file is not None and (found is None or Path(found).resolve() != file):
        raise UserError(
            f"{str(file)!r} cannot be imported, because Python has another module {name!r} ({found or 'built in'}); "
            "expected a unique name; rename the file."
        )
    return module


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"module {name!r} imports {error.name!r}, which is not installed; expected a module that can be "
                "imported; install what it needs."
            ) from error
        raise UserError(
            f"there is no module {name!r} in {os.getcwd()} or on sys.path; expected the name of a module, or the path "
            "of its file ending in .py; change to its folder, or set PYTHONPATH."
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"importing module {name!r} raised {words(error)}; expected a module that can be imported; correct it."
        ) from error


def checked(target: str, problem: Any, form: str = EXPECTED) -> tuple[nn.Module, nn.Module, Any]:
    """Model, loss and data.

    Raises:
        UserError: if they are something else.
    """
    if not isinstance(problem, (tuple, list)) or len(problem) != 3:
        came = f"a {type(problem).__name__}"
        if isinstance(problem, (tuple, list)):
            came += f" of {len(problem)}"
        raise UserError(f"{target} returned {came}; {form}; return these three values.")
    model, loss, data = problem
    for name, value in (("model", model), ("loss", loss)):
        if not isinstance(value, nn.Module):
            raise UserError(
                f"{target} returned a {type(value).__name__} as its {name}; {form}; return a torch.nn.Module there."
            )
    return model, loss, data


def words(error: BaseException) -> str:
    """An exception as text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
