"""What a compression step is: one function under `@step`, which makes it one row of `STEPS`.

A step is called with a checkpoint, calibration text or None, and parameters by name; it returns another
checkpoint whose history has grown by one entry. Parameters are declared where the function is, checked here,
and read by the command line.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import Checkpoint, Vocabulary, encoding_for
from minigpt.encodings import Weight, encode
from minigpt.errors import OptionError

if TYPE_CHECKING:
    from minigpt.compress.calibration import Calibration

Floats = NDArray[np.float32]
Changes = Mapping[str, NDArray[np.floating] | Weight]  # tensors by full name


@dataclass(frozen=True)
class Parameter:
    """Which values a parameter takes.

    Attributes
    ----------
    parse : callable
        Text of the command line -> value; a ValueError means that there is none.
    valid : callable
        Whether a value is allowed.
    allowed : str
        The same in words, after "must be".
    """

    parse: Callable[[str], Any]
    valid: Callable[[Any], bool]
    allowed: str


def whole(low: int) -> Parameter:
    """Return a parameter for whole numbers from `low` on."""
    return Parameter(int, lambda v: type(v) is int and v >= low, f"a whole number from {low} on")


def wholes(low: int) -> Parameter:
    """Return a parameter for lists of whole numbers from `low` on, written 0+1+5 on the command line."""

    def valid(values: Any) -> bool:
        return isinstance(values, (list, tuple)) and bool(values) and all(map(whole(low).valid, values))

    return Parameter(lambda t: [int(v) for v in t.split("+")], valid, f"whole numbers from {low} on, as 1+2")


def number(low: float, below: float = math.inf) -> Parameter:
    """Return a parameter for numbers with low <= value < below."""
    words = f"a number from {low:g} on" + (f", below {below:g}" if below < math.inf else "")
    return Parameter(float, lambda v: type(v) in (int, float) and low <= v < below, words)


def choice(names: Collection[str]) -> Parameter:
    """Return a parameter for one of several names."""
    return Parameter(str, lambda v: isinstance(v, str) and v in names, f"one of {', '.join(names)}")


def switch() -> Parameter:
    """Return a parameter for yes or no."""
    words = {"yes": True, "true": True, "no": False, "false": False}
    return Parameter(lambda t: words.get(t, t), lambda v: isinstance(v, bool), "yes or no")


def text(meaning: str) -> Parameter:
    """Return a parameter for any non-empty text, such as a file name."""
    return Parameter(str, lambda v: isinstance(v, str) and bool(v), meaning)


@dataclass(frozen=True)
class Step:
    """A row of `STEPS`: call it as `step(checkpoint, calibration, **parameters)`.

    Attributes
    ----------
    name : str
        In `STEPS`, recipes and histories.
    function : callable
        What computes; calling the Step instead checks the parameters and writes the history.
    parameters : dict of str to Parameter
        In the order of the signature; the flag's first value, when it has no name, is the first of them.
    defaults : dict of str to Any
        Of the parameters that may be left out.
    """

    name: str
    function: Callable[..., Checkpoint]
    parameters: dict[str, Parameter]
    defaults: dict[str, Any]

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return self.name.replace("_", "-")

    @property
    def summary(self) -> str:
        """The first line of the function's documentation."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    def checked(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return all parameters, defaults filled in.

        Raises
        ------
        OptionError
            If one is unknown, missing, or out of its range.
        """
        if unknown := [name for name in parameters if name not in self.parameters]:
            known = ", ".join(self.parameters)
            raise OptionError(f"{self.name} has no parameter {unknown[0]!r}; it has {known}")
        if missing := [name for name in self.parameters if name not in self.defaults | dict(parameters)]:
            raise OptionError(f"{self.name} needs {missing[0]}: {self.parameters[missing[0]].allowed}")
        for name, value in parameters.items():
            parameter, default = self.parameters[name], self.defaults.get(name, value is None)
            if value is not default and not parameter.valid(value):  # a default may be None: "not given"
                raise OptionError(f"{name} of {self.name} must be {parameter.allowed}, not {value!r}")
        return {name: parameters.get(name, self.defaults.get(name)) for name in self.parameters}

    def __call__(self, checkpoint: Checkpoint, calibration: Calibration | None = None, **parameters: Any) -> Checkpoint:
        """Take the step and append {"step", "parameters", and what the function noted} to the history.

        Raises
        ------
        OptionError
            If a parameter is unknown, missing or out of range, or calibration text is needed but missing.
        """
        given = self.checked(parameters)
        result = self.function(checkpoint, calibration, **given)
        entry: dict[str, Any] = {"step": self.name, "parameters": given}
        for facts in result.history[len(checkpoint.history) :]:
            entry |= facts
        return replace(result, history=(*checkpoint.history, entry))


STEPS: dict[str, Step] = {}


def step(**parameters: Parameter) -> Callable[[Callable[..., Checkpoint]], Step]:
    """Make a step of a function `(checkpoint, calibration, *, parameters)`; name and defaults are its own.

    To add a step, write such a function in one of the modules that `minigpt.compress` imports. It returns a
    new Checkpoint and leaves the old one as it is; what it found out on the way it tells with `noted`.
    """

    def register(function: Callable[..., Checkpoint]) -> Step:
        defaults = {name: inspect.signature(function).parameters[name].default for name in parameters}
        defaults = {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty}
        STEPS[function.__name__] = row = Step(function.__name__, function, parameters, defaults)
        return row

    return register


def noted(checkpoint: Checkpoint, **facts: Any) -> Checkpoint:
    """Return a checkpoint with facts (JSON values) for the history entry of the step at hand."""
    return replace(checkpoint, history=(*checkpoint.history, facts))


def updated(
    checkpoint: Checkpoint,
    changes: Changes,
    vocabulary: Vocabulary | None = None,
    **config: Any,
) -> Checkpoint:
    """Return a checkpoint with some tensors replaced, arrays stored as in f32 files; a tied head follows its table.

    Parameters
    ----------
    checkpoint : Checkpoint
    changes : mapping of str to ndarray or Weight
        By full name, such as h.0.mlp.c_fc.weight. A new lm_head.weight unties the head.
    vocabulary : Vocabulary, optional
        The new one.
    **config
        Fields of the configuration that change; heads and neurons of each layer are read off the tensors.
        Tensors of layers beyond a smaller n_layer are dropped.
    """
    old = checkpoint.config
    weights = dict(checkpoint.weights)
    weights |= {n: w if isinstance(w, Weight) else encode(w, encoding_for(n, "f32")) for n, w in changes.items()}
    if checkpoint.tied and "lm_head.weight" not in changes:
        weights["lm_head.weight"] = weights["wte.weight"]
    blocks = [f"h.{i}" for i in range(config.get("n_layer", old.n_layer))]
    config["n_head"] = tuple(weights[f"{b}.attn.c_proj.weight"].shape[1] // old.head_dim for b in blocks)
    config["n_inner"] = tuple(weights[f"{b}.mlp.c_proj.weight"].shape[1] for b in blocks)
    new = replace(old, **config)
    weights = {name: weights[name] for name in new.shapes()}
    return replace(checkpoint, config=new, vocabulary=vocabulary or checkpoint.vocabulary, weights=weights)
