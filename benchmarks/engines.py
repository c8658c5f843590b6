"""The engines that are compared: one small class each, in the registry ENGINES. Nothing heavy is imported at the top.

An engine states its `kind` (how weights are stored: engines of one kind are compared), the packages that it
`needs`, `prepare`s its own model file from the shared random weights, and then generates greedily.
"""

# ruff: noqa: D101, D102  (Engine says what its subclasses and their methods are)

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import ClassVar

import models

ENGINES: dict[str, type[Engine]] = {}
KINDS = ("int8", "int4", "f32", "f16")


class Engine:
    """One way of running one model. A subclass with a `name` registers itself.

    Attributes
    ----------
    name, kind : str
    needs : tuple of str
        Modules that must be installed.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            ENGINES[cls.name] = cls

    @classmethod
    def prepare(cls, size: str) -> Path:
        """Return the model file or folder, made if it is missing."""
        raise NotImplementedError

    def __init__(self, path: Path, size: models.Size, n_threads: int) -> None:
        """Load."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all tokens."""

    def step(self, ids: list[int]) -> int:
        """Read tokens and return the likeliest next one."""
        raise NotImplementedError

    def generate(self, prompt: list[int], n_tokens: int) -> tuple[list[float], list[int]]:
        """Return the start and the time of each of n_tokens new tokens, and the tokens."""
        self.reset()
        times, ids, tokens = [time.perf_counter()], prompt, []
        for _ in range(n_tokens):
            ids = [self.step(ids)]
            times.append(time.perf_counter())
            tokens += ids
        return times, tokens


# ---- ours --------------------------------------------------------------------------------------------------


class MiniGPT(Engine):
    encoding: ClassVar[str]
    backend = "numba"

    @classmethod
    def prepare(cls, size):
        return models.model_file(size, cls.encoding)

    def __init__(self, path, size, n_threads):
        os.environ["MINIGPT_BACKEND"] = self.backend
        from minigpt import checkpoint, model

        self.model = model.GPT2(checkpoint.load(path), n_threads)
        self.cache = self.model.new_cache()

    def reset(self):
        self.cache.truncate(0)  # memory that is in place, as other engines keep theirs

    def step(self, ids):
        return self.model.likeliest(ids, self.cache)

    def generate(self, prompt, n_tokens):
        self.reset()
        times, tokens = [time.perf_counter()], []
        for id in self.model.follow(prompt, self.cache, n_tokens):
            times.append(time.perf_counter())
            tokens.append(id)
        return times, tokens


class MiniGPTInt8(MiniGPT):
    name, kind, encoding = "minigpt-int8", "int8", "int8"


class MiniGPTInt4(MiniGPT):
    name, kind, encoding = "minigpt-int4", "int4", "int4"


class MiniGPTF32(MiniGPT):
    name, kind, encoding = "minigpt-f32", "f32", "f32"


class MiniGPTF16(MiniGPT):
    name, kind, encoding = "minigpt-f16", "f16", "f16"


class MiniGPTNumPy(MiniGPT):
    """The backend without numba."""

    name, kind, encoding, backend = "minigpt-numpy-f32", "f32", "f32", "numpy"


OURS = {kind: f"minigpt-{kind}" for kind in KINDS}


# ---- ONNX Runtime ------------------------------------------------------------------------------------------


class OnnxRuntime(Engine):
    """The graph of `onnx_graph.FUSED`: keys and values stay in buffers that are bound as input and output at once."""

    needs = ("onnxruntime", "onnx", "onnx_ir", "safetensors")

    @classmethod
    def prepare(cls, size):
        import onnx_graph

        f32 = models.made(f"{size}-fused-f32.onnx", lambda p: onnx_graph.write(models.huggingface_folder(size), p))
        return models.made(f"{size}-{cls.name}.onnx", lambda p: cls.quantize(f32, p)) if cls.kind != "f32" else f32

    @staticmethod
    def quantize(f32: Path, path: Path) -> None:
        raise NotImplementedError

    def __init__(self, path, size, n_threads):
        import numpy as np
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        shape = (1, size.n_head, size.n_positions, 64)
        self.buffers = {  # the runtime works on NumPy's memory
            f"{i}.{kind}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for i in range(size.n_layer)
            for kind in ("key", "value")
        }
        self.np = np

    def reset(self):
        self.length = 0

    def step(self, ids):
        np, begin, end = self.np, self.length, self.length + len(ids)
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "position_ids": np.arange(begin, end)[None],
            "seqlens_k": np.array([end - 1], np.int32),
            "total_len": np.array([end], np.int32),
        }
        binding = self.session.io_binding()
        for name, values in feeds.items():
            binding.bind_cpu_input(name, values)
        for name, buffer in self.buffers.items():
            binding.bind_ortvalue_input(f"past.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        self.length = end
        return int(binding.get_outputs()[-1].numpy()[0, -1].argmax())


class OnnxRuntimeF32(OnnxRuntime):
    name, kind = "onnxruntime-f32", "f32"


class OnnxRuntimeInt8(OnnxRuntime):
    """Dynamic quantization: int8 weights, uint8 activations."""

    name, kind = "onnxruntime-int8", "int8"

    @staticmethod
    def quantize(f32, path):
        from onnx import TensorProto
        from onnxruntime.quantization import QuantType, quantize_dynamic

        extra = {"DefaultTensorType": TensorProto.FLOAT}
        quantize_dynamic(f32, path, weight_type=QuantType.QInt8, extra_options=extra)


class OnnxRuntimeBlocks(OnnxRuntime):
    """Weights in blocks of 32 with a scale each, tables too; activations int8."""

    bits: ClassVar[int]

    @classmethod
    def quantize(cls, f32, path):
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            onnx.load(f32),
            bits=cls.bits,
            block_size=32,
            is_symmetric=True,
            accuracy_level=4,
            op_types_to_quantize=("MatMul", "Gather"),
            quant_axes=(("MatMul", 0), ("Gather", 1)),
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(path))


class OnnxRuntime4Bit(OnnxRuntimeBlocks):
    name, kind, bits = "onnxruntime-4bit", "int4", 4


class OnnxRuntime8BitBlocks(OnnxRuntimeBlocks):
    name, kind, bits = "onnxruntime-8bit-blocks", "int8", 8


# ---- llama.cpp ---------------------------------------------------------------------------------------------


class LlamaCpp(Engine):
    """GGUF written with the `gguf` package and quantized by llama.cpp itself."""

    needs = ("llama_cpp", "gguf", "safetensors")
    file_type: ClassVar[str]  # LLAMA_FTYPE_...

    @classmethod
    def prepare(cls, size):
        import gguf_file

        f32 = models.made(f"{size}-f32.gguf", lambda p: gguf_file.write(models.huggingface_folder(size), p))
        return models.made(f"{size}-{cls.name}.gguf", lambda p: gguf_file.quantize(f32, p, cls.file_type))

    def __init__(self, path, size, n_threads):
        import llama_cpp
        import numpy as np

        threads = {"n_threads": n_threads, "n_threads_batch": n_threads}
        batch = {"n_ctx": size.n_positions, "n_batch": 512, "n_ubatch": 512}
        self.model = llama_cpp.Llama(str(path), **batch, **threads, verbose=False)
        self.get_logits, self.as_array = llama_cpp.llama_get_logits_ith, np.ctypeslib.as_array
        self.shape = (size.vocab_size,)

    def reset(self):
        self.model.reset()

    def step(self, ids):
        self.model.eval(ids)
        return int(self.as_array(self.get_logits(self.model.ctx, -1), self.shape).argmax())


class LlamaCppF32(LlamaCpp):
    name, kind, file_type = "llama.cpp-f32", "f32", "ALL_F32"


class LlamaCppF16(LlamaCpp):
    name, kind, file_type = "llama.cpp-f16", "f16", "MOSTLY_F16"


class LlamaCppQ80(LlamaCpp):
    name, kind, file_type = "llama.cpp-q8_0", "int8", "MOSTLY_Q8_0"


class LlamaCppQ40(LlamaCpp):
    name, kind, file_type = "llama.cpp-q4_0", "int4", "MOSTLY_Q4_0"


class LlamaCppQ4K(LlamaCpp):
    name, kind, file_type = "llama.cpp-q4_k_m", "int4", "MOSTLY_Q4_K_M"


# ---- CTranslate2 -------------------------------------------------------------------------------------------


class CTranslate2(Engine):
    needs = ("ctranslate2", "transformers", "torch")

    @classmethod
    def prepare(cls, size):
        def convert(path: Path) -> None:
            from ctranslate2.converters import TransformersConverter

            folder = str(models.huggingface_folder(size))
            TransformersConverter(folder).convert(str(path), quantization=cls.compute_type)

        return models.made(f"{size}-{cls.name}", convert)

    compute_type: ClassVar[str]

    def __init__(self, path, size, n_threads):
        import ctranslate2

        self.model = ctranslate2.Generator(
            str(path), compute_type=self.compute_type, intra_threads=n_threads, inter_threads=1
        )
        self.vocabulary = json.loads((path / "vocabulary.json").read_text())

    def generate(self, prompt, n_tokens):
        tokens, times = [self.vocabulary[id] for id in prompt], [time.perf_counter()]
        options = {"max_length": n_tokens, "min_length": n_tokens, "sampling_topk": 1, "beam_size": 1}
        (result,) = self.model.generate_batch(
            [tokens],
            **options,
            include_prompt_in_result=False,
            callback=lambda step: times.append(time.perf_counter()) and False,
        )
        return times, result.sequences_ids[0]


class CTranslate2Int8(CTranslate2):
    name, kind, compute_type = "ctranslate2-int8", "int8", "int8"


class CTranslate2F32(CTranslate2):
    name, kind, compute_type = "ctranslate2-f32", "f32", "float32"


# ---- OpenVINO ----------------------------------------------------------------------------------------------


class OpenVINO(Engine):
    """The graph of `onnx_graph.STANDARD`, its past kept inside (stateful), weights compressed by NNCF."""

    needs = ("openvino", "nncf", "onnx", "safetensors")
    mode: ClassVar[str] = ""

    @classmethod
    def prepare(cls, size):
        def convert(path: Path) -> None:
            import nncf
            import onnx_graph
            import openvino
            from openvino._offline_transformations import apply_make_stateful_transformation

            folder = models.huggingface_folder(size)
            onnx = models.made(f"{size}-standard-f32.onnx", lambda p: onnx_graph.write(folder, p, onnx_graph.STANDARD))
            graph = openvino.Core().read_model(onnx)
            names = [i.any_name for i in graph.inputs if i.any_name.startswith("past.")]
            apply_make_stateful_transformation(graph, {name: name.replace("past", "present") for name in names})
            if cls.mode:
                mode = getattr(nncf.CompressWeightsMode, cls.mode)
                graph = nncf.compress_weights(graph, mode=mode, **({"group_size": 32} if "INT4" in cls.mode else {}))
            path.mkdir()
            openvino.save_model(graph, path / "model.xml", compress_to_fp16=False)

        return models.made(f"{size}-{cls.name}", convert)

    def __init__(self, path, size, n_threads):
        import numpy as np
        import openvino

        settings = {"INFERENCE_NUM_THREADS": n_threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        self.request = openvino.Core().compile_model(path / "model.xml", "CPU", settings).create_infer_request()
        self.np = np

    def reset(self):
        self.length = 0
        self.request.reset_state()

    def step(self, ids):
        np, begin, end = self.np, self.length, self.length + len(ids)
        hidden = np.arange(end) > np.arange(begin, end)[:, None]
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "position_ids": np.arange(begin, end)[None],
            "mask": np.where(hidden, np.float32(-1e30), np.float32(0))[None, None],
        }
        self.request.infer(feeds, share_inputs=True)
        self.length = end
        return int(self.request.get_tensor("logits").data[0, -1].argmax())


class OpenVINOF32(OpenVINO):
    name, kind = "openvino-f32", "f32"


class OpenVINOInt8(OpenVINO):
    name, kind, mode = "openvino-int8", "int8", "INT8_SYM"


class OpenVINOInt4(OpenVINO):
    name, kind, mode = "openvino-int4", "int4", "INT4_ASYM"


# ---- PyTorch and NumPy -------------------------------------------------------------------------------------


class PyTorch(Engine):
    """Transformers' GPT-2, eager."""

    name, kind, needs = "pytorch-f32", "f32", ("torch", "transformers")

    @classmethod
    def prepare(cls, size):
        return models.huggingface_folder(size)

    def __init__(self, path, size, n_threads):
        import torch
        from transformers import GPT2LMHeadModel

        torch.set_num_threads(n_threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = GPT2LMHeadModel.from_pretrained(path, attn_implementation="sdpa").eval()

    def reset(self):
        self.past = None

    def step(self, ids):
        out = self.model(self.torch.tensor([ids]), past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        return int(out.logits[0, -1].argmax())


class PyTorchInt8(PyTorch):
    """Dynamic quantization; the Conv1Ds of transformers have to become Linears first."""

    name, kind = "pytorch-int8", "int8"

    def __init__(self, path, size, n_threads):
        super().__init__(path, size, n_threads)
        from torch import nn
        from torch.ao.quantization import quantize_dynamic
        from transformers.pytorch_utils import Conv1D

        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Conv1D):
                    linear = nn.Linear(*child.weight.shape)
                    linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                    setattr(module, name, linear)
        self.model = quantize_dynamic(self.model, {nn.Linear}, dtype=self.torch.qint8)


class PlainNumPy(Engine):
    """What one would write by hand."""

    name, kind, needs = "numpy-f32", "f32", ("safetensors",)

    @classmethod
    def prepare(cls, size):
        return models.huggingface_folder(size)

    def __init__(self, path, size, n_threads):
        import plain_numpy

        self.model = plain_numpy.GPT2(path)

    def reset(self):
        self.model.reset()

    def step(self, ids):
        return int(self.model.forward(ids).argmax())
