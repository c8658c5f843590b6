"""The engine against transformers: logits and greedy continuations that `golden/make_golden.py` recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from golden.folders import GOLDEN, HOMES, assemble

from minigpt import ops
from minigpt.checkpoint import Checkpoint
from minigpt.converters import convert
from minigpt.model import GPT2, KVCache

TOLERANCE = 1e-4
REAL = {  # golden vectors -> model and adapter in the folder of real models
    "tech-gpt2-124m": ("tech-gpt2-124m", None),
    "tech-gpt2-124m+requirements-lora": ("tech-gpt2-124m", "requirements-lora"),
    "requirements-6x384": ("requirements-6x384", None),
}

Convert = Callable[..., Checkpoint]


@pytest.fixture(scope="module", params=["numpy", "numba"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "numba":
        pytest.importorskip("numba")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIGPT_BACKEND", request.param)
        _forget_backend()
        yield request.param
    _forget_backend()


def _forget_backend() -> None:
    ops.backend.cache_clear()
    ops.kernel.cache_clear()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    @cache
    def convert_once(name: str, models: Path | None = None) -> Checkpoint:
        folder = tmp_path_factory.mktemp("golden")
        if models:
            source, lora = (part and models / part for part in REAL[name])
        else:
            source, lora = assemble(name, folder / "source")
        return convert(source, folder / "model.mgpt", lora=lora)

    return convert_once


def logits(model: GPT2, ids: np.ndarray) -> np.ndarray:
    return model.forward(ids, KVCache(model.config), keep=np.arange(len(ids)))


def greedy(model: GPT2, ids: np.ndarray, n: int) -> list[int]:
    kv, chosen = KVCache(model.config), []
    for _ in range(n):
        ids = model.forward(ids, kv)[-1:].argmax(axis=-1)
        chosen.append(int(ids[0]))
    return chosen


@pytest.mark.parametrize("variant", HOMES)
def test_logits_equal_those_of_transformers(variant: str, backend: str, converted: Convert) -> None:
    golden = np.load(GOLDEN / variant / "golden.npz")
    np.testing.assert_allclose(
        logits(GPT2(converted(variant)), golden["ids"]), golden["logits"], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("variant", HOMES)
def test_an_int8_cache_stays_near_transformers(variant: str, backend: str, converted: Convert) -> None:
    golden = np.load(GOLDEN / variant / "golden.npz")
    model = GPT2(converted(variant), kv_cache="int8")
    kv = model.new_cache()
    found = np.concatenate(
        [model.forward(part, kv, keep=np.arange(len(part))) for part in np.array_split(golden["ids"], 2)]
    )
    error = np.abs(found - golden["logits"])
    assert 0 < error.mean() < 0.01 * golden["logits"].std()


@pytest.mark.parametrize("variant", ["base", "unscaled_by_layer", "everything"])
def test_cached_decode_equals_full_recompute(variant: str, backend: str, converted: Convert) -> None:
    golden, model = np.load(GOLDEN / variant / "golden.npz"), GPT2(converted(variant))
    kv = KVCache(model.config)
    stepwise = np.concatenate([model.forward([id], kv) for id in golden["ids"]])
    np.testing.assert_allclose(stepwise, logits(model, golden["ids"]), rtol=0, atol=TOLERANCE)


def test_greedy_continuation_is_that_of_transformers(backend: str, converted: Convert) -> None:
    golden = np.load(GOLDEN / "base" / "golden.npz")
    assert greedy(GPT2(converted("base")), golden["ids"], 200) == golden["greedy"].tolist()


def test_variants_differ_by_more_than_the_tolerance() -> None:
    """Else a test of one would pass with the code of another."""
    same_ids = {v: np.load(GOLDEN / v / "golden.npz")["logits"] for v, home in HOMES.items() if home == "base"}
    same_function = {"base": "gelu_pytorch_tanh", "by_layer": "reordered"}
    for a, b in ((a, b) for a in same_ids for b in same_ids if a < b and same_function.get(a) != b):
        assert np.abs(same_ids[a] - same_ids[b]).max() > 2 * TOLERANCE, (a, b)


@pytest.mark.parametrize("name", REAL)
def test_trained_models_compute_what_transformers_does(
    name: str, backend: str, converted: Convert, real_models: Path
) -> None:
    golden, model = np.load(GOLDEN / "real" / f"{name}.npz"), GPT2(converted(name, real_models))
    rows = logits(model, golden["ids"])[golden["positions"]]  # [n, vocab_size]
    kept = np.take_along_axis(rows, golden["kept"], axis=1)  # [n, 64], the 16 largest first
    np.testing.assert_allclose(kept, golden["logits"], rtol=0, atol=TOLERANCE)
    sixteenth = np.partition(rows, -16, axis=1)[:, -16]  # no other is larger
    np.testing.assert_allclose(sixteenth, golden["logits"][:, 15], rtol=0, atol=TOLERANCE)
    assert greedy(model, golden["prompt"], 200) == golden["greedy"].tolist()
