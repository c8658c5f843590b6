"""The network: each thread calls `forward` with the same program, and the phases share the work out."""

from __future__ import annotations

from numba import njit

from minigpt.kernels.elementwise import activate, layer_norm, quantize, quantize_in_32s, quantize_to_bytes
from minigpt.kernels.entry import HELP, entry, int32, int64
from minigpt.kernels.intrinsics import (
    call_attend,
    call_clock,
    call_matmul,
    call_rows,
    call_screen,
    f32,
    float_of_bits,
    i64,
    never_inline,
)
from minigpt.kernels.phases import atomic_add, finish_phase, is_over, next_chunk, take_chunk
from minigpt.kernels.target import BYTE_PAIRS, PANEL, TILE
from minigpt.layout import *


@njit(**HELP)
def lap(program, thread, part):
    """Put the time since the thread's last lap to the account of a part, if somebody measures."""
    if i64(program)[P_LAPS]:
        take_time(program, thread, part)


@njit(**HELP)
def take_time(program, thread, part):
    """Do so."""
    never_inline()
    p = i64(program)
    laps = p[P_LAPS] + thread * LAP_SIZE * 8
    call_clock(p[P_CLOCK], (laps + LAP_SECONDS * 8, 1))  # UTC
    record = i64(laps)
    now = record[LAP_SECONDS] * 1_000_000_000 + record[LAP_NANOSECONDS]
    record[part] += now - record[LAP_LAST]
    record[LAP_LAST] = now


@njit(**HELP)
def finish(program, thread, phase, part):
    """End a phase in which this thread was busy with a part: wait for the others and return the next phase."""
    lap(program, thread, part)
    phase = finish_phase(i64(program)[P_TEAM], phase)
    lap(program, thread, LAP_WAITING)
    return phase


@njit(**HELP)
def take_input(program, thread, phase, n_tokens, source, stride, gain, bias, matrix):
    """Make the activations that a matrix takes: LayerNorm if there is a gain, integers if the matrix wants them.

    A few tokens are done by every thread for itself, which is sooner than meeting twice; many are shared out.
    Returns the address of the thread's activation record and the next phase.
    """
    never_inline()
    p = i64(program)
    few = n_tokens < TILE
    address = (p[P_OWN] if few else p[P_SHARED]) + thread * X_SIZE * 8
    x = i64(address)
    x[X_FLOAT], x[X_FLOAT_STRIDE] = source, stride
    if gain:
        x[X_FLOAT], x[X_FLOAT_STRIDE] = x[X_NORM], p[P_N_EMBD]
    if few:
        if not is_over(p[P_TEAM], phase):
            for token in range(n_tokens):
                make_activation(p, address, source + token * stride * 4, gain, bias, matrix, token, False)
        lap(program, thread, LAP_INPUT)
        return address, phase
    n_chunks = (n_tokens + TILE - 1) // TILE
    chunk = take_chunk(p[P_TEAM], phase, n_chunks)
    while chunk >= 0:
        for token in range(chunk * TILE, min(chunk * TILE + TILE, n_tokens)):
            make_activation(p, address, source + token * stride * 4, gain, bias, matrix, token, True)
        chunk = next_chunk(p[P_TEAM], phase, n_chunks)
    return address, finish(program, thread, phase, LAP_INPUT)


@njit(**HELP)
def make_activation(p, x, source, gain, bias, matrix, token, many):
    """Do one token of `take_input`."""
    never_inline()
    w = i64(matrix)
    if gain:
        epsilon = float_of_bits(int32(p[P_EPSILON]))
        layer_norm(source, gain, bias, epsilon, i64(x)[X_NORM] + token * w[W_N_IN] * 4, w[W_N_IN])
    if w[W_LEVELS] and BYTE_PAIRS and many:
        quantize_to_bytes(x, token, w[W_N_IN])
    elif w[W_IN_32S] and not many:
        quantize_in_32s(x, token, w[W_N_IN])
    elif w[W_LEVELS]:
        quantize(x, token, w[W_N_IN], w[W_LEVELS])


@njit(**HELP)
def rows_of_chunk(p, matrix, n_tokens):
    """Return how many rows a chunk has: an even share for few tokens, a few panels at most for many."""
    n_chunks = 1 if i64(p[P_TEAM])[T_ALONE] else p[P_CHUNKS]
    share = (i64(matrix)[W_N_OUT] + n_chunks - 1) // n_chunks
    return min((share + PANEL - 1) // PANEL * PANEL, 4 * PANEL if n_tokens >= TILE else CHUNK_ROWS)


@njit(**HELP)
def multiply(matrix, x, y, y_stride, n_tokens, row_begin, row_end):
    """Call the matrix's own kernel."""
    call_matmul(i64(matrix)[W_MATMUL], (matrix, x, y, y_stride, n_tokens, row_begin, row_end))


@njit(**HELP)
def embed(program, thread, phase):
    """X = wte[id] + wpe[position]."""
    p = i64(program)
    n_embd, n_tokens = p[P_N_EMBD], p[P_N_TOKENS]
    n_chunks = (n_tokens + TILE - 1) // TILE
    chunk = take_chunk(p[P_TEAM], phase, n_chunks)
    while chunk >= 0:
        for token in range(chunk * TILE, min(chunk * TILE + TILE, n_tokens)):
            x, y = p[P_X] + token * n_embd * 4, p[P_Y] + token * p[P_Y_STRIDE] * 4
            call_rows(i64(p[P_WTE])[W_ROWS], (p[P_WTE], i64(p[P_IDS])[token], x))
            call_rows(i64(p[P_WPE])[W_ROWS], (p[P_WPE], i64(p[P_POSITIONS])[token], y))
            for i in range(n_embd):
                f32(x)[i] += f32(y)[i]
        chunk = next_chunk(p[P_TEAM], phase, n_chunks)
    return finish(program, thread, phase, LAP_EMBEDDING)


# The rows of a matrix are shared out in chunks; `use(p, n_tokens, y, bias, begin, end)` takes the products of a chunk
# while they are in the cache. They lie together in Y, y [n_tokens, end - begin]: in its rows they would share sets.


def _linear(use):
    """Return `linear(program, thread, phase, n_tokens, x, matrix, bias, part)`: the matrix times x, chunk by chunk."""

    @njit(**HELP)
    def linear(program, thread, phase, n_tokens, x, matrix, bias, part):
        never_inline()
        p, n_out = i64(program), i64(matrix)[W_N_OUT]
        step = rows_of_chunk(p, matrix, n_tokens)
        n_chunks = (n_out + step - 1) // step
        chunk = take_chunk(p[P_TEAM], phase, n_chunks)
        while chunk >= 0:
            begin, end = chunk * step, min(chunk * step + step, n_out)
            if use is None:
                multiply(matrix, x, p[P_Y], p[P_Y_STRIDE], n_tokens, begin, end)
            else:
                y = p[P_Y] + begin * n_tokens * 4
                multiply(matrix, x, y - begin * 4, end - begin, n_tokens, begin, end)
                use(p, n_tokens, y, bias, begin, end)
            chunk = next_chunk(p[P_TEAM], phase, n_chunks)
        return finish(program, thread, phase, part)

    return linear


products = _linear(None)  # Y = W x, without the bias


@_linear
@njit(**HELP)
def add_products(p, n_tokens, y, bias, begin, end):
    """X += W x + bias."""
    for token in range(n_tokens):
        x, products = f32(p[P_X] + (token * p[P_N_EMBD] + begin) * 4), f32(y + token * (end - begin) * 4)
        for i in range(end - begin):
            x[i] += products[i] + f32(bias)[begin + i]


@_linear
@njit(**HELP)
def activate_products(p, n_tokens, y, bias, begin, end):
    """Z = activation_function(W x + bias)."""
    for token in range(n_tokens):
        z = p[P_Z] + (token * p[P_Z_STRIDE] + begin) * 4
        activate(p[P_ACTIVATION], y + token * (end - begin) * 4, bias + begin * 4, z, end - begin)


@njit(**HELP)
def attention(program, layer, thread, phase, short):
    """Z = attention(c_attn(ln_1(x))); the kernel of the cache's kind does what follows the products, head by head.

    If it is cut short, only the tokens to keep are done, and come to the front of Z and of X.
    """
    p, block = i64(program), i64(layer)
    n_tokens, n_head = p[P_N_TOKENS], block[L_N_HEAD]
    x, phase = take_input(
        program, thread, phase, n_tokens, p[P_X], p[P_N_EMBD], block[L_LN_1], block[L_LN_1_BIAS], block[L_C_ATTN]
    )
    phase = products(program, thread, phase, n_tokens, x, block[L_C_ATTN], 0, LAP_C_ATTN)
    n_chunks = n_head + 1 if short else n_head
    chunk = take_chunk(p[P_TEAM], phase, n_chunks)
    while chunk >= 0:
        if chunk < n_head:
            call_attend(p[P_ATTEND], (program, layer, thread, chunk, int64(short)))
        else:
            move_kept(p)
        chunk = next_chunk(p[P_TEAM], phase, n_chunks)
    return finish(program, thread, phase, LAP_ATTENTION)


@njit(**HELP)
def move_kept(p):
    """Move the rows of X that are to be kept, which ascend, to its front."""
    n_embd = p[P_N_EMBD]
    for i in range(p[P_N_KEEP]):
        source, to = f32(p[P_X] + i64(p[P_KEEP])[i] * n_embd * 4), f32(p[P_X] + i * n_embd * 4)
        for j in range(n_embd):
            to[j] = source[j]


@njit(**HELP)
def add_projection(program, thread, phase, n_tokens, matrix, bias, part):
    """X += c_proj(z) + bias, the end of both halves of a block."""
    never_inline()
    p = i64(program)
    x, phase = take_input(program, thread, phase, n_tokens, p[P_Z], p[P_Z_STRIDE], 0, 0, matrix)
    return add_products(program, thread, phase, n_tokens, x, matrix, bias, part)


@njit(**HELP)
def mlp_hidden(program, layer, thread, phase, n_tokens):
    """Z = activation_function(c_fc(ln_2(x)))."""
    p, block = i64(program), i64(layer)
    x, phase = take_input(
        program, thread, phase, n_tokens, p[P_X], p[P_N_EMBD], block[L_LN_2], block[L_LN_2_BIAS], block[L_C_FC]
    )
    return activate_products(program, thread, phase, n_tokens, x, block[L_C_FC], block[L_C_FC_BIAS], LAP_C_FC)


@njit(**HELP)
def logits(program, thread, phase):
    """Logits = lm_head(ln_f(x)) of the tokens to keep, which the last layer has put to the front."""
    p = i64(program)
    n_keep, matrix = p[P_N_KEEP], p[P_LM_HEAD]
    x, phase = take_input(program, thread, phase, n_keep, p[P_X], p[P_N_EMBD], p[P_LN_F], p[P_LN_F_BIAS], matrix)
    rough = p[P_SCREEN] and n_keep < TILE
    n_out, step = i64(matrix)[W_N_OUT], rows_of_chunk(p, matrix, n_keep)
    n_chunks = (n_out + step - 1) // step
    chunk = take_chunk(p[P_TEAM], phase, n_chunks)
    while chunk >= 0:
        begin, end = chunk * step, min(chunk * step + step, n_out)
        if rough:
            known = p[P_SCREEN] + chunk * S_SIZE * 4
            bounds = known + S_TOPS * 4, known + S_WIDTHS * 4
            call_screen(i64(matrix)[W_SCREEN], (matrix, x, p[P_LOGITS], n_out, n_keep, begin, end, *bounds))
        else:
            multiply(matrix, x, p[P_LOGITS], n_out, n_keep, begin, end)
        chunk = next_chunk(p[P_TEAM], phase, n_chunks)
    phase = finish(program, thread, phase, LAP_LM_HEAD)
    return refine(program, thread, phase, step, n_chunks) if rough else phase


@njit(**HELP)
def refine(program, thread, phase, step, n_chunks):
    """Make logits exact that may be within the margin of the highest."""
    never_inline()
    p = i64(program)
    n_keep, matrix, n_out = p[P_N_KEEP], p[P_LM_HEAD], i64(p[P_LM_HEAD])[W_N_OUT]
    # again, for a thread that came too late to make it for the phase before
    x, phase = take_input(program, thread, phase, n_keep, p[P_X], p[P_N_EMBD], p[P_LN_F], p[P_LN_F_BIAS], matrix)
    chunk = take_chunk(p[P_TEAM], phase, n_chunks)
    while chunk >= 0:
        known = p[P_SCREEN] + chunk * S_SIZE * 4
        for token in range(n_keep):
            top = f32(p[P_SCREEN])[S_TOPS + token]
            for other in range(n_chunks):
                top = max(top, f32(p[P_SCREEN])[other * S_SIZE + S_TOPS + token])
            f32(known)[S_LIMITS + token] = top - float_of_bits(int32(p[P_MARGIN]))
        bounds = known + S_LIMITS * 4, known + S_WIDTHS * 4
        begin, end = chunk * step, min(chunk * step + step, n_out)
        call_screen(i64(matrix)[W_REFINE], (matrix, x, p[P_LOGITS], n_out, n_keep, begin, end, *bounds))
        for token in range(n_keep):
            atomic_add(program + P_N_EXACT * 8, int64(f32(known)[S_LIMITS + token]))
        chunk = next_chunk(p[P_TEAM], phase, n_chunks)
    return finish(program, thread, phase, LAP_LM_HEAD)


@entry(2)
def forward(program, thread):
    """GPT-2 over the program's tokens: writes their keys and values to the cache and the wanted logits."""
    p = i64(program)
    lap(program, thread, LAP_BETWEEN)
    phase = embed(program, thread, 0)
    for i in range(p[P_N_LAYER]):
        layer = p[P_LAYERS] + i * L_SIZE * 8
        block = i64(layer)
        n = p[P_N_KEEP] if i == p[P_N_LAYER] - 1 else p[P_N_TOKENS]
        short = n < p[P_N_TOKENS]  # of tokens whose logits nobody wants, the last layer has keys and values alone
        phase = attention(program, layer, thread, phase, short)
        if n:
            phase = add_projection(
                program, thread, phase, n, block[L_ATTN_C_PROJ], block[L_ATTN_C_PROJ_BIAS], LAP_ATTN_C_PROJ
            )
            phase = mlp_hidden(program, layer, thread, phase, n)
            phase = add_projection(
                program, thread, phase, n, block[L_MLP_C_PROJ], block[L_MLP_C_PROJ_BIAS], LAP_MLP_C_PROJ
            )
    if p[P_N_KEEP]:
        logits(program, thread, phase)
