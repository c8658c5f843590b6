"""`Program`: a Checkpoint laid out for the compiled `forward`, as records of addresses (`layout.py`).

It owns the scratch memory and the team of threads, keeps alive every array whose address it handed out, and does
no arithmetic. Callers must have checked ids, positions and sequences: the kernels do not.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minigpt import layout, ops
from minigpt.cache import WORTH, KVCache
from minigpt.checkpoint import Checkpoint
from minigpt.encodings import Encoding, Weight
from minigpt.errors import BackendError
from minigpt.reference import activation_levels
from minigpt.team import Team

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

CHUNKS_PER_THREAD = 4  # of a matrix: few enough to cost nothing, enough for a slower thread to take fewer
TILE, PANEL = 12, 32  # tokens and rows of a tile on the machine with the widest vectors: scratch must suffice there
FEW = 6  # tokens of a tile on other machines: so many no longer count as few
LINE = 64  # bytes


class Program:
    """A model ready for `forward`.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its arrays are used where they are; a matrix without kernels is expanded to one with them (`Encoding.expand`).
    n_threads : int, optional
        See `Team`.
    expand : bool
        Expand sparse matrices too, which have kernels: more memory, and the speed of dense ones.

    Attributes
    ----------
    weights : mapping of str to Weight
        What the kernels read: those of the checkpoint, or what they were expanded to.
    """

    def __init__(self, checkpoint: Checkpoint, n_threads: int | None = None, expand: bool = False) -> None:
        self.team = Team(n_threads)
        self._config, self.weights = checkpoint.config, expanded(checkpoint.weights, expand)
        self._worth = int(WORTH * self._config.vocab_size)
        self._forward, self._follow = _address("forward"), _entry("follow").call
        self._matrices: dict[int, NDArray[np.int64]] = {}  # descriptors, by identity of the weight
        self._layers = np.zeros((self._config.n_layer, layout.L_SIZE), np.int64)
        self._fields = np.zeros(layout.P_SIZE, np.int64)
        self._address: int = self._fields.ctypes.data
        self._room = 0  # tokens that there is scratch memory for
        self._cache: Any = lambda: None  # weak reference to the cache that the layers point to
        self._describe_layers()
        self._describe_model()
        self._rough = self._room_for_bounds()
        self._rough_address = 0 if self._rough is None else self._rough.ctypes.data

    def run(
        self, ids: Ids, positions: Ids, sequences: Ids, cache: KVCache, keep: Ids, margin: float | None = None
    ) -> Floats:
        """Run tokens through the network and write their keys and values to the cache.

        Parameters
        ----------
        ids, positions, sequences : ndarray of shape (n_tokens,), dtype=int64
            Tokens of one sequence stand next to each other, at successive positions.
        cache : KVCache
            Its lengths are left to the caller, its arrays must stay the same.
        keep : ndarray of shape (n_keep,), dtype=int64
            The tokens whose logits are wanted, ascending.
        margin : float, optional
            See `GPT2.forward`.

        Returns
        -------
        ndarray of shape (n_keep, vocab_size), dtype=float32
        """
        n_tokens, n_keep = len(ids), len(keep)
        with self.team.lock:
            self._prepare(n_tokens, cache)
            tokens = self._tokens
            tokens[0, :n_tokens], tokens[1, :n_tokens], tokens[2, :n_tokens] = ids, positions, sequences
            tokens[3, :n_keep] = keep
            n_runs = 1
            if n_tokens > 1:
                starts = np.flatnonzero(np.diff(sequences)) + 1
                n_runs = len(starts) + 1
                self._runs[1:n_runs] = starts
            self._runs[n_runs] = n_tokens
            return self._call(n_tokens, n_runs, n_keep, cache, margin)

    def run_one(self, id: int, position: int, cache: KVCache, margin: float | None = None) -> Floats:
        """Do the same for one token of sequence 0, its logits wanted: [1, vocab_size].

        Between two tokens nothing is in the processor's caches but weights, so what counts is how little is touched.
        """
        with self.team.lock:
            self._take_one(id, position, cache)
            return self._call(1, 1, 1, cache, margin)

    def run_greedily(self, id: int, position: int, cache: KVCache, n_tokens: int, stop_ids: Ids) -> list[int]:
        """Do the same for one token and then for the likeliest next one, and so on, in compiled code.

        Returns
        -------
        list of int
            The likeliest next ones: `n_tokens`, or up to one of `stop_ids`, or fewer if the next is better found by
            `run_one`: none where logits are not finite.
        """
        with self.team.lock:
            self._take_one(id, position, cache)
            logits, rough = self._ask(1, 1, 1, cache, 0.0)
            n = n_tokens if rough or self._rough is None else 1  # in between, the cache decides what may be rough
            found = np.zeros((1 + n, layout.F_SIZE), np.int64)
            stops = stop_ids.ctypes.data, len(stop_ids)
            rows: list[list[int]] = []

            def series() -> list[float]:
                n_found = self._follow(self._address, self._forward, found.ctypes.data, n, *stops, self._worth)
                rows.extend(found[1 : 1 + n_found].tolist())
                return [1e-9 * row[layout.F_SPENT] for row in rows]

            self.team.run_series(series)
            if rough:
                cache.note_exact(self._fields.data[layout.P_N_EXACT] / logits.size)
        return [row[layout.F_ID] for row in rows if row[layout.F_ID] >= 0]

    def _take_one(self, id: int, position: int, cache: KVCache) -> None:
        self._prepare(1, cache)
        tokens = self._tokens.data  # a memoryview: quicker to write single numbers to
        tokens[0, 0], tokens[1, 0], tokens[2, 0], tokens[3, 0] = id, position, 0, 0
        self._runs.data[1] = 1

    def _prepare(self, n_tokens: int, cache: KVCache) -> None:
        if n_tokens > self._room:
            self._allocate(n_tokens)
        if self._cache() is not cache:
            self._point_to(cache)

    def _ask(
        self, n_tokens: int, n_runs: int, n_keep: int, cache: KVCache, margin: float | None
    ) -> tuple[Floats, bool]:
        """Say what is wanted of the tokens that are in place: return memory for it, and whether it may be rough."""
        rough = margin is not None and self._rough is not None and 0 < n_keep < FEW and cache.may_be_rough()
        logits = np.empty((n_keep, self._config.vocab_size), np.float32)
        fields = self._fields.data
        fields[layout.P_N_TOKENS], fields[layout.P_N_KEEP], fields[layout.P_N_RUNS] = n_tokens, n_keep, n_runs
        fields[layout.P_LOGITS] = logits.__array_interface__["data"][0]  # at half the cost of `.ctypes`
        fields[layout.P_SCREEN], fields[layout.P_N_EXACT] = self._rough_address if rough else 0, 0
        fields[layout.P_MARGIN] = _bits(margin) if margin else 0
        return logits, rough

    def _call(self, n_tokens: int, n_runs: int, n_keep: int, cache: KVCache, margin: float | None) -> Floats:
        """Call the kernel for the tokens that are in place."""
        logits, rough = self._ask(n_tokens, n_runs, n_keep, cache, margin)
        self.team.run(self._forward, self._address, alike=n_tokens == 1)
        if rough:
            cache.note_exact(self._fields.data[layout.P_N_EXACT] / logits.size)
        return logits

    @contextmanager
    def laps(self) -> Iterator[NDArray[np.int64]]:
        """Let threads note for what their time goes: int64 [n_threads, LAP_SIZE], nanoseconds (see `layout.py`)."""
        if not self._fields[layout.P_CLOCK]:
            raise BackendError("the system's C library has no clock (timespec_get) to time parts with")
        record = aligned((self.team.n_threads, layout.LAP_SIZE), np.int64)
        record[:] = 0
        with self.team.lock:
            self._fill(P_LAPS=record.ctypes.data)
        try:
            yield record
        finally:
            with self.team.lock:
                self._fill(P_LAPS=0)

    def _room_for_bounds(self) -> Floats | None:
        """Return memory for what is known of rough logits, if the head's encoding has any: [chunks of rows, S_SIZE]."""
        head = self.weights["lm_head.weight"]
        n_chunks = max(self._fields[layout.P_CHUNKS], -(-head.shape[0] // layout.CHUNK_ROWS))
        return np.zeros((n_chunks, layout.S_SIZE), np.float32) if head.encoding.first else None

    def _describe_model(self) -> None:
        """Fill in what stays the same from call to call."""
        config = self._config
        self._fill(
            P_TEAM=self.team.address,
            P_CLOCK=_clock_address(),
            P_N_LAYER=config.n_layer,
            P_LAYERS=self._layers.ctypes.data,
            P_WTE=self._matrix("wte.weight"),
            P_WPE=self._matrix("wpe.weight"),
            P_LN_F=self._vector("ln_f.weight"),
            P_LN_F_BIAS=self._vector("ln_f.bias"),
            P_LM_HEAD=self._matrix("lm_head.weight"),
            P_N_EMBD=config.n_embd,
            P_HEAD_DIM=config.head_dim,
            P_N_POSITIONS=config.n_positions,
            P_EPSILON=_bits(config.layer_norm_epsilon),
            P_ACTIVATION=layout.ACTIVATION_FUNCTIONS.index(config.activation_function),
            P_CHUNKS=1 if self.team.n_threads == 1 else CHUNKS_PER_THREAD * self.team.n_threads,
        )

    def _describe_layers(self) -> None:
        for i, layer in enumerate(self._layers):
            name = f"h.{i}."
            layer[: layout.L_N_HEAD] = [
                self._vector(name + "ln_1.weight"),
                self._vector(name + "ln_1.bias"),
                self._matrix(name + "attn.c_attn.weight"),
                self._vector(name + "attn.c_attn.bias"),
                self._matrix(name + "attn.c_proj.weight"),
                self._vector(name + "attn.c_proj.bias"),
                self._vector(name + "ln_2.weight"),
                self._vector(name + "ln_2.bias"),
                self._matrix(name + "mlp.c_fc.weight"),
                self._vector(name + "mlp.c_fc.bias"),
                self._matrix(name + "mlp.c_proj.weight"),
                self._vector(name + "mlp.c_proj.bias"),
            ]
            layer[layout.L_N_HEAD] = self._config.n_head[i]
            layer[layout.L_ATTN_SCALE] = _bits(self._config.attn_scale[i])

    def _vector(self, name: str) -> int:
        (values,) = self.weights[name].parts.values()
        return values.ctypes.data

    def _matrix(self, name: str) -> int:
        """Return the address of a matrix's descriptor."""
        weight = self.weights[name]
        if id(weight) not in self._matrices:
            self._matrices[id(weight)] = describe(weight)
        return self._matrices[id(weight)].ctypes.data

    def _fill(self, **fields: int) -> None:
        for name, value in fields.items():
            self._fields[getattr(layout, name)] = value

    def _allocate(self, n_tokens: int) -> None:
        """Make scratch memory for this many tokens."""
        config, n_threads = self._config, self.team.n_threads
        room = max(n_tokens, TILE)
        n_attention = max(config.n_head) * config.head_dim
        # a line more, so that the distance of rows is no power of 2 and they share no set
        n_y = _padded(max(3 * n_attention, config.n_embd, *config.n_inner)) + LINE // 4
        n_z = _padded(max(n_attention, config.n_embd, *config.n_inner))
        # decoded keys and values, keys by lanes, a tile of scores, a factor for each of its rows
        n_scores = _padded(config.n_positions) * (3 * config.head_dim + TILE) + PANEL
        self._tokens = np.zeros((4, room), np.int64)
        self._runs = np.zeros(room + 1, np.int64)
        self._x, self._y, self._z = aligned((room, config.n_embd)), aligned((room, n_y)), aligned((room, n_z))
        self._scores = aligned((n_threads, n_scores))
        panels, tiles = aligned((n_threads, n_z * PANEL)), aligned((n_threads, (TILE + 1) * PANEL))
        self._own = [Activations(TILE, n_z, config.n_embd, *scratch) for scratch in zip(panels, tiles, strict=True)]
        shared = Activations(room, n_z, config.n_embd, panels[0], tiles[0])
        self._shared = [shared.with_scratch(*scratch) for scratch in zip(panels, tiles, strict=True)]
        self._activations = np.array([[a.record for a in self._own], [a.record for a in self._shared]])
        ids, positions, sequences, keep = (row.ctypes.data for row in self._tokens)
        self._fill(
            P_IDS=ids,
            P_POSITIONS=positions,
            P_SEQUENCES=sequences,
            P_KEEP=keep,
            P_RUNS=self._runs.ctypes.data,
            P_X=self._x.ctypes.data,
            P_Y=self._y.ctypes.data,
            P_Y_STRIDE=n_y,
            P_Z=self._z.ctypes.data,
            P_Z_STRIDE=n_z,
            P_OWN=self._activations[0].ctypes.data,
            P_SHARED=self._activations[1].ctypes.data,
            P_SCORES=self._scores.ctypes.data,
            P_SCORES_STRIDE=n_scores,
        )
        self._room = room

    def _point_to(self, cache: KVCache) -> None:
        self._fill(P_ATTEND=_address(f"attend_{cache.kind}"))
        for field, stores in ((layout.L_KEYS, cache.k), (layout.L_VALUES, cache.v)):
            for layer, store in zip(self._layers, stores, strict=True):
                layer[field : field + len(store.parts)] = [part.ctypes.data for part in store.parts]
        self._cache = weakref.ref(cache)


class Activations:
    """Memory for what a matrix is multiplied with, and its record for the kernels.

    Parameters
    ----------
    n_tokens, n_in, n_embd : int
        The most that must fit; n_in is a multiple of 128.
    panel, tile : ndarray, dtype=float32
        Scratch of a thread: an unpacked tile of the matrix, n_in * PANEL, and its products, (TILE + 1) * PANEL.
    """

    def __init__(self, n_tokens: int, n_in: int, n_embd: int, panel: Floats, tile: Floats) -> None:
        self._codes, self._scales = aligned((n_tokens, n_in), np.int16), aligned((n_tokens,))
        self._group_scales, self._sums = aligned((n_tokens, n_in // 32)), aligned((n_tokens, n_in // 32))
        self._norm = aligned((n_tokens, n_embd))
        self.record = np.zeros(layout.X_SIZE, np.int64)
        self.record[layout.X_CODES] = self._codes.ctypes.data
        self.record[layout.X_SCALES] = self._scales.ctypes.data
        self.record[layout.X_GROUP_SCALES] = self._group_scales.ctypes.data
        self.record[layout.X_SUMS] = self._sums.ctypes.data
        self.record[layout.X_STRIDE] = n_in
        self.record[layout.X_NORM] = self._norm.ctypes.data
        self.record[layout.X_PANEL] = panel.ctypes.data
        self.record[layout.X_TILE] = tile.ctypes.data
        self._scratch = panel, tile

    def with_scratch(self, panel: Floats, tile: Floats) -> Activations:
        """Return the same memory with another thread's scratch."""
        other = Activations.__new__(Activations)
        other.__dict__.update(self.__dict__, _scratch=(panel, tile), record=self.record.copy())
        other.record[layout.X_PANEL] = panel.ctypes.data
        other.record[layout.X_TILE] = tile.ctypes.data
        return other


def can_run(checkpoint: Checkpoint) -> bool:
    """Tell whether every matrix has an encoding with compiled kernels, or expands to one."""
    matrices = [weight.encoding for weight in checkpoint.weights.values() if len(weight.shape) == 2]
    return all(ops.has_kernel(f"matmul_{e.name}") or ops.has_kernel(f"matmul_{e.twin}") for e in matrices)


def expanded(weights: Mapping[str, Weight], wanted: bool) -> dict[str, Weight]:
    """Return the weights as the kernels take them; what was one object is one object again."""
    matrices = {id(weight): weight for weight in weights.values() if len(weight.shape) == 2}
    plain = {i: weight.expand() for i, weight in matrices.items() if _to_expand(weight.encoding, wanted)}
    return {name: plain.get(id(weight), weight) for name, weight in weights.items()}


def _to_expand(encoding: Encoding, wanted: bool) -> bool:
    """Tell whether a matrix must be expanded, or is to be and has a twin: f32 would be slower than what becomes it."""
    has_twin = encoding.twin not in (encoding.name, "f32") and not encoding.first
    return not ops.has_kernel(f"matmul_{encoding.name}") or (wanted and has_twin)


def describe(weight: Weight) -> NDArray[np.int64]:
    """Return the descriptor of a matrix, its kernels compiled; the Weight must outlive it."""
    n_out, n_in = weight.shape
    name = weight.encoding.name
    record = np.zeros(layout.W_SIZE, np.int64)
    record[layout.W_MATMUL], record[layout.W_ROWS] = _address(f"matmul_{name}"), _address(f"rows_{name}")
    record[layout.W_N_OUT], record[layout.W_N_IN] = n_out, n_in
    record[layout.W_LEVELS] = 0 if weight.encoding.activation == "f32" else activation_levels(n_in)
    record[layout.W_IN_32S] = weight.encoding.activation == "i8"
    if weight.encoding.first:
        record[layout.W_SCREEN], record[layout.W_REFINE] = _address(f"screen_{name}"), _address(f"refine_{name}")
    for i, part in enumerate(weight.encoding.part_dtypes):
        record[layout.W_PART_0 + i] = weight.parts[part].ctypes.data
    return record


def product(weight: Weight) -> Callable[[], None]:
    """Return a function that multiplies a matrix by a vector on the calling thread: something to time.

    Raises
    ------
    BackendError
        If the encoding has no kernel.
    """
    n_out, n_in = weight.shape
    width = _padded(n_in)
    memory = Activations(1, width, n_in, aligned((width * PANEL,)), aligned(((TILE + 1) * PANEL,)))
    for array in (memory._codes, memory._scales, memory._group_scales, memory._sums):
        array[:] = 1
    descriptor, x, y = describe(weight), np.ones(n_in, np.float32), aligned((n_out,))
    memory.record[layout.X_FLOAT], memory.record[layout.X_FLOAT_STRIDE] = x.ctypes.data, n_in
    kernel = _entry(f"matmul_{weight.encoding.name}")

    def multiply(owners: object = (weight, memory, descriptor, x, y)) -> None:
        kernel.call(descriptor.ctypes.data, memory.record.ctypes.data, y.ctypes.data, n_out, 1, 0, n_out)

    return multiply


def aligned(shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Return an empty array that begins with a cache line; memory is claimed where it is written."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + LINE, np.uint8)
    begin = -memory.ctypes.data % LINE
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _entry(name: str) -> ops.Kernel:
    kernel = ops.kernel(name)
    assert kernel is not None, "the NumPy backend has no programs"
    return kernel


def _address(name: str) -> int:
    return _entry(name).address


def _clock_address() -> int:
    """Return the address of C's `timespec_get`, or 0; Windows has it under another name, old Androids not at all."""
    windows = sys.platform == "win32"
    function = getattr(
        *(ctypes.cdll.ucrtbase, "_timespec64_get") if windows else (ctypes.CDLL(None), "timespec_get"), None
    )
    return (function and ctypes.cast(function, ctypes.c_void_p).value) or 0


def _bits(value: float) -> int:
    """Return the bits of a float32 as an integer."""
    return int(np.float32(value).view(np.int32))


def _padded(n: int) -> int:
    """Round up to a multiple of 128, the widest group of columns."""
    return -(-n // 128) * 128
