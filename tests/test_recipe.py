"""The recipe trains within its constraints and keeps Hugging Face's layout."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

sys.path.insert(0, str(Path(__file__).parents[1]))

from weights.recipe import constraints, data, model, shrink  # noqa: E402
from weights.recipe.__main__ import parser  # noqa: E402
from weights.recipe.sample import sample  # noqa: E402
from weights.recipe.train import Options, cross_entropy, evaluate, train  # noqa: E402

CONFIG = {
    "vocab_size": 67, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4, "eos_token_id": 0,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
}  # fmt: skip


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    return model.GPT2(CONFIG)


@pytest.fixture
def tokens():
    """Documents that count upwards from random starts: something to learn."""
    starts = np.random.default_rng(0).integers(1, 50, 200)
    return np.concatenate([np.r_[start : start + 9, 0] for start in starts]).astype(np.uint16)


def run(gpt2, tokens, teacher=None, **options):
    fixed = {"steps": 30, "batch": 8, "micro": 4, "warmup": 2, "eval_every": 10, "muon_lr": 0.02, "adam_lr": 0.01}
    return train(gpt2, tokens, tokens[:500], Options(**fixed | options), io.StringIO(), teacher)


def logits(gpt2):
    with torch.no_grad():
        return gpt2(torch.arange(16)[None] * 3)


def nats(gpt2, tokens):
    return evaluate(partial(cross_entropy, gpt2), tokens, 16, torch.device("cpu"))


def test_training_learns_and_stops_at_the_best_evaluation(gpt2, tokens):
    before = nats(gpt2, tokens[:500])
    best = run(gpt2, tokens)
    after = nats(gpt2, tokens[:500])
    assert after < before - 0.5
    assert after == pytest.approx(best["held_out"], abs=0.02)  # in bfloat16 while training


def test_training_stops_early_and_in_time(gpt2, tokens):
    assert run(gpt2, tokens, minutes=0.0001, steps=10**6)["step"] < 10**4
    wild = run(gpt2, tokens, muon_lr=10.0, adam_lr=10.0, steps=10**6, patience=2, eval_every=2)
    assert wild["step"] < 10**3


def test_diverged_training_is_reported(gpt2, tokens):
    gpt2.ln_f.weight.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="loss nan at step 10; lower"):
        run(gpt2, tokens)


def test_evaluation_is_the_mean_over_all_targets(gpt2, tokens):
    x, y = data.windows(tokens, 16)
    with torch.no_grad():
        chosen = gpt2(x).log_softmax(-1).gather(2, y[..., None].long())
    assert nats(gpt2, tokens) == pytest.approx(-chosen.mean().item(), rel=1e-5)


@pytest.mark.parametrize("criterion", shrink.CRITERIA)
def test_pruned_weights_stay_zero_through_healing(gpt2, tokens, criterion):
    x, _ = data.windows(tokens, 16)
    shrink.prune(gpt2, 0.4, criterion, x[:4])
    zeros = {name: module.weight == 0 for name, module in gpt2.matrices()}
    assert all(zero.float().mean() == pytest.approx(0.4, abs=0.03) for zero in zeros.values())
    before = {name: module.weight.detach().clone() for name, module in gpt2.matrices()}
    constraints.keep_zeros(gpt2)
    constraints.quantize(gpt2)
    run(gpt2, tokens)
    constraints.bake(gpt2)
    for name, module in gpt2.matrices():
        assert (module.weight[zeros[name]] == 0).all()
        assert not torch.equal(module.weight, before[name])


def test_wanda_weighs_inputs_where_magnitude_does_not():
    w, x_norm = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 1.0])
    assert shrink.wanda(w, x_norm).argmin(1).tolist() == [1, 1]
    assert shrink.magnitude(w, x_norm).argmin(1).tolist() == [0]


def test_quantized_forward_equals_dequantized_int8(gpt2):
    plain = model.GPT2(CONFIG)
    plain.load_state_dict(gpt2.state_dict())
    constraints.quantize(gpt2)
    for module in plain.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            w = module.weight.detach().numpy()
            scales = np.abs(w).max(1, keepdims=True) / np.float32(127)
            codes = np.rint(w / scales).astype(np.int8)
            module.weight.data = torch.from_numpy(codes * scales)
    assert torch.equal(logits(gpt2), logits(plain))
    assert torch.equal(logits(constraints.bake(gpt2)), logits(plain))


def test_gradient_passes_straight_through_the_grid():
    w = torch.randn(3, 5, requires_grad=True)
    (constraints.Int8Grid()(w) * torch.arange(15.0).view(3, 5)).sum().backward()
    assert torch.equal(w.grad, torch.arange(15.0).view(3, 5))


def test_adapter_trains_alone_and_merges(gpt2, tokens, tmp_path):
    base = model.GPT2(CONFIG)
    base.load_state_dict(gpt2.state_dict())
    constraints.add_lora(gpt2, rank=2, alpha=4)
    run(gpt2, tokens)
    for _, module in gpt2.matrices():  # bfloat16 is how an adapter is stored
        for leaf in (module.parametrizations.weight[0].lora_A, module.parametrizations.weight[0].lora_B):
            leaf.data = leaf.data.bfloat16().float()
    constraints.save_adapter(gpt2, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    assert not torch.allclose(logits(gpt2), logits(base), atol=1e-3)
    torch.testing.assert_close(logits(constraints.merge(base, tmp_path)), logits(gpt2))
    torch.testing.assert_close(logits(constraints.bake(gpt2)), logits(base))


def test_folder_round_trip(gpt2, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    (source / "merges.txt").write_text("#version: 0.2\n")
    model.save(gpt2, folder, source, torch.float32)
    assert torch.equal(logits(model.load(folder)), logits(gpt2))
    assert (folder / "merges.txt").exists()
    tensors = model.load_file(folder / "model.safetensors")
    assert tensors["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64)  # Conv1D's [n_in, n_out]


def test_foreign_configuration_is_refused():
    with pytest.raises(ValueError, match="activation_function is 'relu'"):
        model.GPT2(CONFIG | {"activation_function": "relu"})


def test_cut_keeps_what_matters(gpt2):
    assert torch.equal(logits(shrink.cut(gpt2, 2, 16)), logits(gpt2))
    small = shrink.cut(gpt2, 1, 8)
    assert small.config["n_head"] == 2
    assert logits(small).shape == (1, 16, 67)
    with pytest.raises(ValueError, match="cannot keep 3 layers"):
        shrink.cut(gpt2, 3, 16)


def test_cut_layers_go_from_the_centre():
    twelve = model.GPT2(CONFIG | {"n_layer": 12})
    for i, block in enumerate(twelve.h):
        block.ln_1.bias.data.fill_(i)
    small = shrink.cut(twelve, 6, 16)
    assert [int(block.ln_1.bias[0]) for block in small.h] == [0, 1, 2, 9, 10, 11]


def test_distillation_alone_follows_the_teacher(gpt2, tokens):
    teacher = model.GPT2(CONFIG)
    run(teacher, tokens)

    def distance():
        return torch.nn.functional.kl_div(
            logits(gpt2).log_softmax(-1), logits(teacher).log_softmax(-1), log_target=True, reduction="sum"
        )

    before = distance()
    run(gpt2, tokens, teacher.requires_grad_(False), distill_weight=1.0)
    assert distance() < before / 2


def test_cached_forward_equals_the_whole(gpt2):
    ids, caches = torch.arange(16)[None] * 3, [model.Cache(16) for _ in gpt2.h]
    with torch.no_grad():
        steps = [gpt2(ids[:, i : i + 1], caches) for i in range(16)]
    torch.testing.assert_close(torch.cat(steps, 1), logits(gpt2))


def test_sampled_documents_begin_with_their_prompt_and_end(gpt2, tokens):
    run(gpt2, tokens)
    torch.manual_seed(0)
    documents = sample(gpt2, torch.tensor([[0, 5, 6]] * 64), 13)
    assert documents
    for document in documents:
        assert document[:2].tolist() == [5, 6]
        assert document[-1] == 0
        assert 0 not in document[:-1]


def test_validation_shares_neither_feature_nor_statement_with_training():
    records = [f"Feature: F{i % 40}\nType: Data\nRequirement: The system shall {i}." for i in range(400)]
    bare = [f"The system shall {i}." for i in range(400)] + [f"Loose {i}." for i in range(100)]
    training, validation = data.split(records + bare, 0.2)
    assert len(training) + len(validation) == 900
    assert 90 < len(validation) < 300
    held = "\n".join(validation)
    for i in range(400):
        assert (records[i] in validation) == (bare[i] in validation) == (f"Feature: F{i % 40}\n" in held)


def test_windows_pair_each_token_with_the_next():
    x, y = data.windows(np.arange(40, dtype=np.uint16), 16)
    assert x.shape == (2, 16)
    assert (y == x + 1).all()
    with pytest.raises(ValueError, match="less than one window"):
        data.windows(np.arange(16, dtype=np.uint16), 16)


def test_every_epoch_has_all_documents_in_a_new_order(tokens):
    feed = data.batches(tokens, 0, 16, 4, seed=1)
    first, second = next(feed)[0], next(feed)[0]
    assert first.shape == (4, 16)
    assert not torch.equal(first, second)


def test_commands_chain_on_folders(gpt2, tokens, tmp_path, capsys):
    model.save(gpt2, tmp_path / "base", tmp_path, torch.float32)
    tokens.tofile(tmp_path / "text.bin")

    def command(*words):
        args = parser().parse_args([word.replace("@", f"{tmp_path}/") for word in words])
        args.run(args)

    command("prune", "@base", "@pruned", "@text.bin", "--windows", "4")
    command("heal", "@pruned", "@healed", "@text.bin", "--valid", "@text.bin", "--teacher", "@base",
            "--steps", "2", "--batch", "4", "--micro", "4", "--no-compile")  # fmt: skip
    command("evaluate", "@healed", "@text.bin")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ppl"] > 1
    healed, pruned = model.load(tmp_path / "healed"), model.load(tmp_path / "pruned")
    for (_, after), (_, before) in zip(healed.matrices(), pruned.matrices(), strict=True):
        assert (after.weight[before.weight == 0] == 0).all()
        grid = constraints.Int8Grid()(after.weight)
        torch.testing.assert_close(grid, after.weight, rtol=1e-6, atol=0)
