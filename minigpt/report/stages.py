"""The stages of a report: model files made of the original by recipes, and finished files beside them.

A recipe of `RECIPES` adapts to the model (half of the layers, half of the width), so that any GPT-2 can take it.
Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minigpt import api
from minigpt import checkpoint as mgpt
from minigpt.checkpoint import Checkpoint, Config
from minigpt.compress import STEPS, Calibration, compress
from minigpt.compress.recipe import Plan, read_recipe
from minigpt.errors import OptionError

Progress = Callable[[str], None]

ORIGINAL = "original"
SPARSITY = 0.4  # the talk's


# ---- recipes -----------------------------------------------------------------------------------------------


def halved(config: Config) -> Plan:
    """Take half of the layers out of the centre, and half of the channels, heads and neurons."""
    return [
        ("depth", {"n_layer": max(1, config.n_layer // 2)}),
        ("width", {"n_embd": max(2, config.n_embd // 2)}),
        ("heads", {"remove": 0.5, "score": "norm"}),
        ("neurons", {"remove": 0.5, "score": "norm"}),
    ]


def pruned(config: Config) -> Plan:
    """Set the smallest weights to zero."""
    return [("prune", {"sparsity": SPARSITY, "criterion": "magnitude"})]


def rounded(config: Config) -> Plan:
    """Round to int8."""
    return [("quantize", {"encoding": "int8"})]


def combined(config: Config) -> Plan:
    """Do all three; pruned matrices are stored in the smallest form of their int8 codes."""
    return [*halved(config), *pruned(config), ("quantize", {"encoding": "sparse"})]


def careful(config: Config) -> Plan:
    """Keep all layers: fewer tokens, pruning and rounding by sweeps in which later weights make up for earlier ones."""
    return [
        ("vocabulary", {"minimum": 2}),
        ("prune", {"sparsity": SPARSITY, "criterion": "sparsegpt", "encoding": "sparse"}),
        ("quantize", {"encoding": "int8", "only": "w?e.weight"}),
    ]


@dataclass(frozen=True)
class Recipe:
    """A row of `RECIPES`.

    Attributes
    ----------
    plan : callable
        Configuration of the original -> steps.
    calibrated : bool
        Whether the steps get calibration text and each is followed by closed-form refits.
    """

    plan: Callable[[Config], Plan]
    calibrated: bool = False


RECIPES = {
    "trimmed": Recipe(halved),
    "pruned": Recipe(pruned),
    "int8": Recipe(rounded),
    "combined": Recipe(combined),
    "gradient-free": Recipe(careful, calibrated=True),
}


def from_files(paths: Sequence[str], calibrated: bool) -> dict[str, Recipe]:
    """Read TOML recipes, named as their files.

    Raises
    ------
    OptionError
        As `read_recipe`, or if two have one name.
    """
    recipes = {}
    for path in paths:
        if (name := Path(path).stem) in recipes or name == ORIGINAL:
            raise OptionError(f"two stages would be called {name!r}; rename the recipe {path}")
        recipes[name] = Recipe(partial(_the_same, read_recipe(path)), calibrated)
    return recipes


def _the_same(plan: Plan, config: Config) -> Plan:
    return plan


# ---- stages ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A model file of the report.

    Attributes
    ----------
    name : str
    path : Path
    made : str
        How, as options of `minigpt compress`, or that it was given.
    """

    name: str
    path: Path
    made: str

    @property
    def checkpoint(self) -> Checkpoint:
        """The model, mapped anew each time: nothing here keeps it mapped."""
        return mgpt.load(self.path)


def given(texts: Sequence[str]) -> list[Stage]:
    """Return the stages of NAME=FILE; a file that is not there may be one of the package's own.

    Raises
    ------
    OptionError
        If a text has another form or a name occurs twice.
    FormatError
        If a file is not a readable model.
    """
    stages = []
    for text in texts:
        name, equals, file = text.rpartition("=")
        if not equals or not name or not file:
            raise OptionError(f"a stage must be of the form NAME=FILE.mgpt, not {text!r}")
        own = Path(api.default_path()).parent / Path(file).name
        path = Path(file) if Path(file).exists() or not own.exists() else own
        steps = ", ".join(str(entry.get("step")) for entry in mgpt.load(path).history)
        stages.append(Stage(name, path, f"finished file {path.name}" + (f" (last steps: {steps})" if steps else "")))
    return stages


def build(
    original: Checkpoint,
    recipes: Mapping[str, Recipe],
    calibration: Calibration | None,
    folder: Path,
    progress: Progress,
) -> list[Stage]:
    """Make one file after the other in a folder.

    Raises
    ------
    MinigptError
        If a step fails.
    """
    stages = []
    for number, (name, recipe) in enumerate(recipes.items()):
        progress(f"building {name}")
        plan = recipe.plan(original.config)
        text = calibration if recipe.calibrated else None
        checkpoint = compress(original, plan, text, recipe.calibrated, prefixed(f"building {name}", progress))
        mgpt.save(checkpoint, path := folder / f"{number}.mgpt")
        flags = " ".join([*(flag(*step) for step in plan), *(["--heal"] if recipe.calibrated else [])])
        stages.append(Stage(name, path, flags))
    return stages


def prefixed(prefix: str, progress: Progress) -> Progress:
    """Return a listener that passes every message on with a prefix."""
    return lambda message: progress(f"{prefix}: {message}")


def flag(name: str, parameters: Mapping[str, Any]) -> str:
    """Return a step as it is written on the command line of `minigpt compress`."""
    values = {k: "+".join(map(str, v)) if isinstance(v, list) else v for k, v in parameters.items()}
    words = {True: "yes", False: "no"}
    given = ",".join(f"{k}={words[v] if isinstance(v, bool) else v}" for k, v in values.items())
    return f"--{STEPS[name].flag} {given}"
