"""What a user names by `MODULE:FUNCTION`: a model, a loss and data of their own."""

import importlib
import os
import sys
from typing import Any

from torch import nn

from natgrad.cli.errors import UserError
from natgrad.curvature.problem import Forward

EXPECTED = "expected (model, loss, data), as for natgrad.residual(model, loss, data), or (model, loss, data, forward)"


def load_problem(target: str) -> tuple[nn.Module, nn.Module, Any, Forward | None]:
    """Import the module, from the current directory or from where Python finds it, and call the function: a model, a
    loss and data, and a function for batches of another form than pairs, if there is one.

    Raises:
        UserError: if there is no such module or function, or it raises, or what it returns is something else.
    """
    problem, forward = call(target), None
    if isinstance(problem, (tuple, list)) and len(problem) == 4:
        *problem, forward = problem
        if not callable(forward):
            raise UserError(
                f"{target} returned a {type(forward).__name__} as its forward; {EXPECTED}; return a function "
                "forward(model, batch) that gives (output, target) in its place, or three things."
            )
    return *checked(target, problem), forward


def call(target: str) -> Any:
    """What the function returns.

    Raises:
        UserError: if there is no such module or function, or it raises.
    """
    module_name, _, function_name = target.partition(":")
    if not (module_name and function_name) or ":" in function_name:
        raise UserError(
            f"{target!r} names no function; expected MODULE:FUNCTION, say training:problem for the function problem() "
            "in training.py; give such a name."
        )
    function = getattr(_load_module(module_name), function_name, None)
    if not callable(function):
        what = "is not a function" if function is not None else "does not exist"
        raise UserError(
            f"{function_name!r} {what} in module {module_name!r}; expected a function without arguments that returns "
            "(model, loss, data); define it there, or give another name."
        )
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{target} raised {words(error)}; expected it to return (model, loss, data) when called without "
            "arguments; mend the function."
        ) from error


def look_here() -> str:
    """Let modules be found in the current directory first; return it."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    return here


def _load_module(name: str) -> Any:
    here = look_here()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"module {name!r} imports {error.name!r}, which is not installed; expected a module that can be "
                "imported; install what it needs."
            ) from error
        raise UserError(
            f"there is no module {name!r} in {here} or on sys.path; expected one, without the ending .py; change to "
            "its folder, or set PYTHONPATH."
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"importing module {name!r} raised {words(error)}; expected a module that can be imported; mend it."
        ) from error


def checked(target: str, problem: Any, form: str = EXPECTED) -> tuple[nn.Module, nn.Module, Any]:
    """The three of them.

    Raises:
        UserError: if they are something else.
    """
    if not isinstance(problem, (tuple, list)) or len(problem) != 3:
        came = f"a {type(problem).__name__}"
        if isinstance(problem, (tuple, list)):
            came += f" of {len(problem)}"
        raise UserError(f"{target} returned {came}; {form}; return these three.")
    model, loss, data = problem
    for name, value in (("model", model), ("loss", loss)):
        if not isinstance(value, nn.Module):
            raise UserError(
                f"{target} returned a {type(value).__name__} as its {name}; {form}; return a torch.nn.Module "
                "in its place."
            )
    return model, loss, data


def words(error: BaseException) -> str:
    """An exception in words."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
