"""Conventions that a reader relies on, checked by reading the source: one-way imports, a light package, no print."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import minigpt

PACKAGE = Path(minigpt.__file__).parent

FLOORS = [  # a module imports only from the rows above its own, or from its own package
    {"errors", "layout", "kernels", "reference", "image"},
    {"objects"},
    {"ops"},
    {"team"},
    {"format"},
    {"encodings"},
    {"checkpoint"},
    {"cache"},
    {"layers", "program", "sampling", "tokenizer"},
    {"model"},
    {"generator", "evaluate", "measure", "parts"},
    {"api", "compress"},
    {"report"},
    {"commands", "cli", "__main__"},
]
ROOF = {"__init__", "converters", "weights"}  # the public face and what stands beside the house
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor}
WITHIN = {("kernels", "layout"), ("parts", "measure"), ("cli", "commands"), ("__main__", "cli")}  # allowed on one floor


def sources():
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in ROOF]


def module_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree):
    """Yield the first-floor name of every minigpt module that is imported at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minigpt":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("minigpt.")]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    module = module_of(path)
    if module in ROOF:
        return
    for other in imported(ast.parse(path.read_text())):
        if other in ROOF or other == module or (module, other) in WITHIN:
            continue
        assert other in FLOOR_OF, f"{path} imports minigpt.{other}, which has no floor"
        assert FLOOR_OF[other] < FLOOR_OF[module], f"{path} imports minigpt.{other} from its own floor or above"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_command_line_prints(path):
    if FLOOR_OF.get(module_of(path), 0) < FLOOR_OF["cli"]:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import minigpt", {"numpy", "numba", "tokenizers", "psutil", "safetensors"}),
        ("import minigpt; minigpt.load", {"numba", "tokenizers", "psutil", "safetensors"}),
        ("from minigpt.cli import run; run(['--help'])", {"numpy", "numba", "tokenizers"}),
        ("from minigpt.cli import run; run(['generate', '--help'])", {"numba", "tokenizers"}),
    ],
)
def test_light(statement, absent):
    script = f"{statement}\nimport sys; print(sorted(set(sys.modules) & {absent!r}))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"
