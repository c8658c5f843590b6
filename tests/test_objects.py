"""Kernels kept between processes: found again without numba, compiled again when they cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from minigpt import objects, ops

if ops.backend() == "numpy":
    pytest.skip("needs the compiled backend", allow_module_level=True)

USE = """
import sys
from minigpt import ops
told = []
ops.COMPILING.append(lambda: told.append(1))
kernel = ops.kernel("rows_f32")
print(len(told), "numba" in sys.modules, kernel.address != 0, ops.backend())
"""


def use(tmp_path, **environment):
    environment = {**os.environ, "MINIGPT_CACHE_DIR": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def stored(tmp_path):
    return [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_second_process_does_without_numba(tmp_path):
    assert use(tmp_path) == ["1", "True", "True", "numba"]
    path = stored(tmp_path)[0]
    path.with_name("forward").write_bytes(path.read_bytes())  # tells `ops.backend` that numba has worked here
    assert use(tmp_path) == ["0", "False", "True", "numba"]


def test_the_digest_covers_every_source_of_the_code():
    names = """
import sys, minigpt
before = set(sys.modules)
from minigpt import kernels
print(*[sys.modules[name].__file__ for name in {*sys.modules} - before if name.startswith("minigpt.")], sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == sorted(map(str, objects.SOURCES))


def test_another_source_gets_its_own(tmp_path, monkeypatch):
    folder = objects.folder.__wrapped__()  # the function behind its cache
    assert objects.folder.__wrapped__() == folder
    changed = tmp_path / "layout.py"
    changed.write_text("# another")
    monkeypatch.setattr(objects, "SOURCES", (*objects.SOURCES[:-1], changed))
    assert objects.folder.__wrapped__() != folder


def test_another_processor_gets_its_own(tmp_path):
    use(tmp_path, NUMBA_CPU_NAME="", NUMBA_CPU_FEATURES="")
    use(tmp_path, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert len({path.parent for path in stored(tmp_path)}) == 2


@pytest.mark.parametrize(
    "content", [b"", b"\x03", b"\x03not code", b"\x03" + bytes(100)], ids=["empty", "1", "text", "0"]
)
def test_what_is_not_code_is_compiled_again(tmp_path, content):
    use(tmp_path)
    path = stored(tmp_path)[0]
    path.write_bytes(content)
    assert use(tmp_path)[0] == "1"
    assert path.read_bytes()[1:5] != content[1:5]


def test_folders_are_private(tmp_path):
    use(tmp_path)
    assert stored(tmp_path)[0].parent.stat().st_mode & 0o077 == 0


def test_closing_leaves_only_intrinsics():
    module = """
@PyExc_RuntimeError = external global i8
@other = external local_unnamed_addr constant { i32, ptr }, align 8
declare float @llvm.fabs.f32(float)
declare ptr @PyErr_Format(ptr, ...) local_unnamed_addr #1
declare noundef i32 @numba_gil_ensure(ptr nocapture) local_unnamed_addr
"""
    text = objects.closed(module)
    assert "external" not in text
    assert text.count("declare") == 1
    assert text.count("unreachable") == 2
    from llvmlite import binding

    binding.parse_assembly(text).verify()


def test_kernels_tell_how_many_arguments_they_take():
    assert ops.kernel("rows_f32").call.__class__._argtypes_ == ops.kernel("run_team").call.__class__._argtypes_
    assert len(ops.kernel("forward").call.__class__._argtypes_) == 2
