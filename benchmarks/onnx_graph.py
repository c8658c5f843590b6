"""GPT-2 as an ONNX graph, fused by hand: what an exporter gives is slower. One token or many in, the last logits out.

`FUSED` uses ONNX Runtime's own operators: grouped-query attention on key and value buffers of all positions (bound
once as input and output, nothing is copied), LayerNorm with the addition before it, GELU with its bias. `STANDARD`
has standard operators only, with a past that grows, for other runtimes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

OWN = "com.microsoft"
FUSED, STANDARD = "fused", "standard"


class Graph:
    """Nodes and initializers in the order of the computation; methods return the name of their output."""

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        self.config = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")
        self.weights = {name.removeprefix("transformer."): values for name, values in stored.items()}
        self.nodes, self.constants, self.inputs, self.outputs = [], [], [], []

    def op(self, kind: str, inputs: Sequence[str], outputs: str | Sequence[str], domain: str = "", **attributes) -> str:
        """Add a node."""
        from onnx import helper

        outputs = [outputs] if isinstance(outputs, str) else list(outputs)
        node = helper.make_node(kind, inputs, outputs, name=f"{outputs[0]}.node", domain=domain, **attributes)
        self.nodes.append(node)
        return outputs[0]

    def constant(self, name: str, values) -> str:
        """Add an initializer."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def weight(self, name: str) -> str:
        """Add one of the model's weights."""
        return self.constant(name, self.weights[name])

    def input(self, name: str, kind: str, shape: Sequence[int | str]) -> str:
        """Declare an input of the graph."""
        from onnx import TensorProto, helper

        self.inputs.append(helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> str:
        """Declare an output of the graph."""
        from onnx import TensorProto, helper

        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def linear(self, x: str, name: str, y: str) -> str:
        """Add x @ weight + bias."""
        product = self.op("MatMul", [x, self.weight(f"{name}.weight")], f"{y}.product")
        return self.op("Add", [product, self.weight(f"{name}.bias")], y)

    def save(self, path: Path) -> None:
        """Write the file."""
        import onnx
        from onnx import helper

        graph = helper.make_graph(self.nodes, "gpt2", self.inputs, self.outputs, self.constants)
        versions = [helper.make_opsetid("", 20), helper.make_opsetid(OWN, 1)]
        onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=10), path)


def write(folder: Path, path: Path, flavour: str = FUSED) -> None:
    """Write the model of a Hugging Face folder to an .onnx file."""
    g = Graph(folder)
    n_head, head_dim = g.config["n_head"], g.config["n_embd"] // g.config["n_head"]
    ids, positions = g.input("input_ids", "INT64", [1, "n"]), g.input("position_ids", "INT64", [1, "n"])
    if flavour == FUSED:
        g.input("seqlens_k", "INT32", [1])
        g.input("total_len", "INT32", [1])
    else:
        g.input("mask", "FLOAT", [1, 1, "n", "all"])  # 0 where a token may look, a large negative number elsewhere
        g.constant("head_shape", np.array([1, -1, n_head, head_dim], np.int64))
        g.constant("flat_shape", np.array([1, -1, n_head * head_dim], np.int64))
        g.constant("scale", np.float32(head_dim**-0.5))
    token = g.op("Gather", [g.weight("wte.weight"), ids], "token")
    x = g.op("Add", [token, g.op("Gather", [g.weight("wpe.weight"), positions], "position")], "x")
    for i in range(g.config["n_layer"]):
        h = f"h.{i}"
        x, a = _norm(g, flavour, h + ".ln_1", x, "" if i == 0 else f"h.{i - 1}.mlp.y")
        qkv = g.linear(a, f"{h}.attn.c_attn", f"{h}.qkv")
        for kind in ("key", "value"):
            g.input(f"past.{i}.{kind}", "FLOAT", [1, n_head, "past", head_dim])
            g.output(f"present.{i}.{kind}", [1, n_head, "present", head_dim])
        y = _attention(g, flavour, i, qkv, n_head)
        x, a = _norm(g, flavour, f"{h}.ln_2", x, g.linear(y, f"{h}.attn.c_proj", f"{h}.attn.y"))
        hidden = g.op("MatMul", [a, g.weight(f"{h}.mlp.c_fc.weight")], f"{h}.hidden")
        bias = g.weight(f"{h}.mlp.c_fc.bias")
        if flavour == FUSED:
            hidden = g.op("FastGelu", [hidden, bias], f"{h}.gelu", OWN)
        else:
            hidden = g.op("Gelu", [g.op("Add", [hidden, bias], f"{h}.biased")], f"{h}.gelu", approximate="tanh")
        g.linear(hidden, f"{h}.mlp.c_proj", f"{h}.mlp.y")
    _, a = _norm(g, flavour, "ln_f", x, f"{h}.mlp.y")
    last = g.op("Gather", [a, g.constant("last", np.array([-1], np.int64))], "last_hidden", axis=1)
    head = g.constant("lm_head", g.weights.get("lm_head.weight", g.weights["wte.weight"]).T)
    g.output(g.op("MatMul", [last, head], "logits"), [1, 1, g.config["vocab_size"]])
    g.save(path)


def _norm(g: Graph, flavour: str, name: str, x: str, y: str) -> tuple[str, str]:
    """Return x + y (y may be missing) and its LayerNorm."""
    affine = [g.weight(f"{name}.weight"), g.weight(f"{name}.bias")]
    epsilon = g.config["layer_norm_epsilon"]
    if y and flavour == FUSED:
        outputs = [f"{name}.norm", "", "", f"{name}.sum"]
        g.op("SkipLayerNormalization", [x, y, *affine], outputs, OWN, epsilon=epsilon)
        return f"{name}.sum", f"{name}.norm"
    total = g.op("Add", [x, y], f"{name}.sum") if y else x
    return total, g.op("LayerNormalization", [total, *affine], f"{name}.norm", axis=-1, epsilon=epsilon)


def _attention(g: Graph, flavour: str, i: int, qkv: str, n_head: int) -> str:
    q, k, v = (f"h.{i}.{part}" for part in "qkv")
    past, present = ([f"{when}.{i}.{kind}" for kind in ("key", "value")] for when in ("past", "present"))
    g.op("Split", [qkv], [q, k, v], axis=-1, num_outputs=3)
    if flavour == FUSED:
        inputs = [q, k, v, *past, "seqlens_k", "total_len"]
        heads = {"num_heads": n_head, "kv_num_heads": n_head}
        return g.op("GroupQueryAttention", inputs, [f"h.{i}.attended", *present], OWN, **heads)
    by_head = [
        g.op(
            "Transpose", [g.op("Reshape", [part, "head_shape"], f"{part}.heads")], f"{part}.by_head", perm=[0, 2, 1, 3]
        )
        for part in (q, k, v)
    ]
    for new, before, all_so_far in zip(by_head[1:], past, present, strict=True):
        g.op("Concat", [before, new], all_so_far, axis=2)
    turned = g.op("Transpose", [present[0]], f"{k}.turned", perm=[0, 1, 3, 2])
    scores = g.op("Mul", [g.op("MatMul", [by_head[0], turned], f"h.{i}.products"), "scale"], f"h.{i}.scores")
    shares = g.op("Softmax", [g.op("Add", [scores, "mask"], f"h.{i}.masked")], f"h.{i}.shares", axis=-1)
    mixed = g.op("MatMul", [shares, present[1]], f"h.{i}.mixed")
    rows = g.op("Transpose", [mixed], f"h.{i}.rows", perm=[0, 2, 1, 3])
    return g.op("Reshape", [rows, "flat_shape"], f"h.{i}.attended")
