"""Plans in writing -> lists of (step, parameters): TOML recipes and flags of the command line.

A recipe has one table per step, in order::

    [[step]]
    name = "vocabulary"
    size = 16384

    [[step]]
    name = "depth"
    layers = [0, 1, 4, 5]

A flag has the step's name and comma-separated parameters; the step's first parameter needs no name, and
numbers of a list are joined by plus signs: ``--vocabulary 16384 --depth layers=0+1+4+5``.
"""

from __future__ import annotations

import importlib
import sys
from os import PathLike
from pathlib import Path
from typing import Any

from minigpt.compress.step import STEPS, Step
from minigpt.errors import OptionError

Plan = list[tuple[str, dict[str, Any]]]


def named(name: str) -> Step:
    """Return a step by name.

    Raises
    ------
    OptionError
        If there is none.
    """
    if name not in STEPS:
        raise OptionError(f"there is no step {name!r}; there are {', '.join(sorted(STEPS))}")
    return STEPS[name]


def read_recipe(path: str | PathLike[str]) -> Plan:
    """Read a TOML recipe.

    Raises
    ------
    OptionError
        If the file cannot be read, is no TOML, or anything in it is no step or no parameter.
    """
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        document = toml.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"cannot read the recipe {path}: {error.strerror}") from None
    except ValueError as error:  # of TOML or of UTF-8
        raise OptionError(f"{path} is not TOML: {' '.join(str(error).split())}") from None
    tables = document.pop("step", None)
    if document or not isinstance(tables, list) or not all(isinstance(t, dict) and "name" in t for t in tables):
        raise OptionError(f"the recipe {path} must consist of [[step]] tables, each with a name")
    plan = [(str(table.pop("name")), table) for table in tables]
    for name, parameters in plan:
        named(name).checked(parameters)
    return plan


def from_flag(name: str, text: str) -> tuple[str, dict[str, Any]]:
    """Read the value of a step's flag.

    Raises
    ------
    OptionError
        If a parameter is unknown, given twice, unreadable or out of range.
    """
    step = named(name)
    first, parameters = next(iter(step.parameters)), {}
    for position, item in enumerate(text.split(",")):
        key, equals, value = item.partition("=")
        if not equals and position == 0:
            key, value = first, item
        if key not in step.parameters or key in parameters:
            known = ", ".join(step.parameters)
            raise OptionError(f"--{step.flag} {text}: {item!r} must be name=value, once each, of {known}")
        try:
            parameters[key] = step.parameters[key].parse(value)
        except ValueError:
            allowed = step.parameters[key].allowed
            raise OptionError(f"{key} of {name} must be {allowed}, not {value!r}") from None
    step.checked(parameters)
    return name, parameters
