"""Where things stand in the records of int64 that Python fills and the compiled kernels read.

A kernel takes addresses and integers only. What would be structs in C are rows of int64 here: an address,
a count, or the bits of a float32. Every name is the index of its field. Nothing here computes.
"""

from __future__ import annotations

CENTRED = 64  # neighbouring positions whose keys are kept relative to the first of them
COLUMNS = 128  # of a split matrix: byte j of so many has column j in its lower and column j + 64 in its upper half

ACTIVATION_FUNCTIONS = ("gelu_new", "gelu", "relu", "silu")

# A matrix [n_out, n_in]: the descriptor that a kernel is handed. Parts stand in the order of their encoding.
(
    W_MATMUL,  # address of the kernel `matmul_<encoding>`
    W_ROWS,  # address of the kernel `rows_<encoding>`
    W_N_OUT,
    W_N_IN,
    W_LEVELS,  # largest magnitude of its int16 activations; 0: it takes float32 ones
    W_IN_32S,  # not 0: while tokens are few it takes int8 ones instead, each 32 with a scale
    W_SCREEN,  # address of the kernel `screen_<encoding>`, or 0
    W_REFINE,  # address of the kernel `refine_<encoding>`, or 0
    W_PART_0,
    W_PART_1,
    W_PART_2,
    W_PART_3,
    W_SIZE,
) = range(13)

# Activations [n_tokens, n_in]: what a matrix is multiplied with. One record per thread.
(
    X_FLOAT,  # float32 [n_tokens, X_FLOAT_STRIDE]
    X_FLOAT_STRIDE,
    X_CODES,  # int16 [n_tokens, X_STRIDE], zeros beyond n_in up to 128, or int8 in groups; the float is code * scale
    X_SCALES,  # float32 [n_tokens]
    X_GROUP_SCALES,  # float32 [n_tokens, X_STRIDE / 32]: of int8 codes, in groups
    X_SUMS,  # [n_tokens, X_STRIDE / 32]: float32 sums of 32 int8, scaled; int32 OFFSET times sums of groups
    X_STRIDE,  # a multiple of 128, n_in or more
    X_NORM,  # float32 [n_tokens, n_embd]: where this record's LayerNorm writes
    X_PANEL,  # the thread's scratch: 4 bytes [largest n_in, PANEL], a tile of the matrix unpacked
    X_TILE,  # the thread's scratch: 4 bytes [TILE + 1, PANEL], the products of one tile, and scales of rows
    X_SIZE,
) = range(11)

# A transformer block. Matrices are addresses of descriptors, vectors addresses of float32.
(
    L_LN_1,
    L_LN_1_BIAS,
    L_C_ATTN,
    L_C_ATTN_BIAS,
    L_ATTN_C_PROJ,
    L_ATTN_C_PROJ_BIAS,
    L_LN_2,
    L_LN_2_BIAS,
    L_C_FC,
    L_C_FC_BIAS,
    L_MLP_C_PROJ,
    L_MLP_C_PROJ_BIAS,
    L_N_HEAD,
    L_ATTN_SCALE,  # bits of a float32
    L_KEYS,  # [n_sequences, n_head, n_positions, head_dim]: float32, or int8 with scales
    L_KEY_SCALES,  # float32 [n_sequences, n_head, n_positions]
    L_KEY_CENTRES,  # float32 [n_sequences, n_head, n_positions / CENTRED, head_dim]: what codes of keys are relative to
    L_VALUES,
    L_VALUE_SCALES,
    L_SIZE,
) = range(20)

# A call of `forward`.
(
    P_TEAM,  # address of the team's record
    P_N_TOKENS,
    P_IDS,  # int64 [n_tokens]
    P_POSITIONS,  # int64 [n_tokens]
    P_SEQUENCES,  # int64 [n_tokens]
    P_N_RUNS,
    P_RUNS,  # int64 [n_runs + 1]: run i is the tokens RUNS[i]..RUNS[i + 1], neighbours in one sequence
    P_N_KEEP,
    P_KEEP,  # int64 [n_keep]: the tokens whose logits are wanted, ascending
    P_LOGITS,  # float32 [n_keep, vocab_size]
    P_SCREEN,  # float32 [chunks of the head, S_SIZE]: only logits near the highest are wanted exact; or 0: all are
    P_MARGIN,  # bits of a float32: how far below the highest they are still wanted exact
    P_N_EXACT,  # how many were made so
    P_N_LAYER,
    P_LAYERS,  # int64 [n_layer, L_SIZE]
    P_WTE,
    P_WPE,
    P_LN_F,
    P_LN_F_BIAS,
    P_LM_HEAD,
    P_N_EMBD,
    P_HEAD_DIM,
    P_N_POSITIONS,  # of the cache
    P_ATTEND,  # address of the kernel `attend_<kind of cache>`
    P_EPSILON,  # bits of a float32
    P_ACTIVATION,  # index of the activation function in ACTIVATION_FUNCTIONS
    P_CHUNKS,  # into how many pieces the rows of a matrix are cut
    P_X,  # float32 [n_tokens, n_embd]: the residual stream
    P_Y,  # float32 [n_tokens, P_Y_STRIDE]: what a matrix gave
    P_Y_STRIDE,
    P_Z,  # float32 [n_tokens, P_Z_STRIDE]: what the next matrix takes
    P_Z_STRIDE,
    P_OWN,  # int64 [n_threads, X_SIZE]: activations that each thread makes for itself (few tokens)
    P_SHARED,  # int64 [n_threads, X_SIZE]: activations that the threads make together (many tokens)
    P_SCORES,  # float32 [n_threads, P_SCORES_STRIDE]: attention's scratch
    P_SCORES_STRIDE,
    P_LAPS,  # int64 [n_threads, LAP_SIZE], or 0: nobody measures
    P_CLOCK,  # address of C's timespec_get, or 0
    P_SIZE,
) = range(39)

CHUNK_ROWS = 1024  # of a matrix in a chunk, at most, while tokens are few

# What is known of a chunk of the head's rows while its logits are rough: for each token a float32
S_TOPS = 0  # the highest of the lower bounds
S_WIDTHS = 16  # an exact logit is within scale of its row * width
S_LIMITS = 32  # what upper bound makes a logit worth the work; then how many were
S_SIZE = 48

# Where a thread's time goes: nanoseconds for each part of the network, and what its clock has said.
(
    LAP_EMBEDDING,
    LAP_INPUT,  # LayerNorm, and rounding of what matrices take
    LAP_C_ATTN,
    LAP_ATTENTION,
    LAP_ATTN_C_PROJ,
    LAP_C_FC,
    LAP_MLP_C_PROJ,
    LAP_LM_HEAD,
    LAP_WAITING,  # for other threads at the end of a phase
    LAP_BETWEEN,  # from the end of a call to the next
    LAP_LAST,  # when the last lap ended
    LAP_SECONDS,  # a struct timespec
    LAP_NANOSECONDS,
) = range(13)
LAP_SIZE = 16  # fields of a thread, on cache lines of its own

# A token that was found to be the likeliest: `follow.py`.
F_SECONDS, F_NANOSECONDS = 0, 1  # a struct timespec: when
F_SPENT = 2  # nanoseconds since the one before
F_ID = 3
F_SIZE = 4

# The team of threads: fields 16 apart, so that each has cache lines of its own.
T_JOB = 0  # job number << 32 | threads inside; an odd number is open
T_TICKET = 16  # phase << 32 | next chunk to hand out
T_DONE = 32  # chunks of the phase that are finished
T_ENTRY = 48  # address of the kernel to run, called with (T_ARGUMENT, thread)
T_ARGUMENT = 49
T_YIELD = 50  # address of the operating system's "let others run"
T_PATIENCE = 51  # how many times a worker without a job yields before it parks
T_CLOSING = 52  # not 0: workers leave
T_ALONE = 53  # not 0: thread 0 does its jobs without the workers, who park at once and leave it the processors
T_STATES = 64  # one field per thread, 16 apart: 0 awake, 1 parked
T_STRIDE = 16
