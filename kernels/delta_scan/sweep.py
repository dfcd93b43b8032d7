"""Kernels that run the state through the chunks of a segment, forwards or backwards, and fold segments together.

The state is kept transposed, [value column, key channel]: it and what is written are then the left operands of every
product, which stay in registers from one product to the next. Columns are independent, so a program owns BLOCK_V of
them. Documents do not appear here: the scales and tiles that `prepare` made are zero where they cut.
"""

# mypy: disable-error-code="no-untyped-def"
# The parameters of a kernel are pointers and numbers of the device.

import triton
import triton.language as tl


@triton.jit
def forward_sweep(
    queries, keys, write_keys, values, inverses, scores, reads, writes, carries,
    starts, locals_, outputs, states, errors,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    length, chunks, segments, per_segment, first_segment, window, heads, ratio,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    MODE: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment's chunks in order, for BLOCK_V columns.

    MODE "map": from zero, and for the tiles behind the values from the identity; stores the state at the end.
    MODE "outputs": from `starts`; stores the outputs. MODE "states": from `starts`; stores the state that enters each
    chunk and what its tokens write.
    """
    tile = tl.program_id(0)
    sequence, segment = (tl.program_id(1) // window).to(tl.int64), first_segment + tl.program_id(1) % window
    batch, head = sequence // heads, sequence % heads
    group = head // ratio
    dtype: tl.constexpr = keys.dtype.element_ty
    value_tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    row = tl.arange(0, C)
    width = tl.arange(0, BLOCK_K)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    value_column = column < V
    if MODE == "map":
        unit = (tile - value_tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
        state = tl.where((unit[:, None] == width[None, :]) & (width < K)[None, :], 1.0, 0.0)
    else:
        start = starts + (sequence * segments + segment) * V * K + column[:, None] * K + width[None, :]
        state = tl.load(start, value_column[:, None] & (width < K)[None, :], 0.0)

    queries += batch * q_batch + group * q_head
    keys += batch * k_batch + group * k_head
    write_keys += batch * k_batch + group * k_head
    values += batch * v_batch + head * v_head
    if MODE == "outputs":
        outputs += (batch * length * heads + head) * V
    key_tile = row[:, None] * k_token + width[None, :]  # inside a chunk 32 bits are enough
    square = row[:, None] * C + row[None, :]
    begin = segment * per_segment
    for chunk in range(begin, tl.minimum(begin + per_segment, chunks)):
        token = tl.cast(chunk, tl.int64) * C
        inside = row < length - chunk * C
        mask = inside[:, None] & (width < K)[None, :]
        at = sequence * chunks + chunk
        k = tl.load(keys + token * k_token + key_tile, mask, 0.0)
        value_mask = value_column[:, None] & inside[None, :]
        v = tl.load(values + token * v_token + (row[None, :] * v_token + column[:, None]), value_mask, 0.0)
        inverse = tl.load(inverses + at * C * C + square)
        # Loaded before the products, which then cover the wait.
        if VECTOR:
            carry = tl.load(carries + at * K + width, width < K, 0.0)[None, :]
        else:
            carry = tl.load(carries + at)
            scale = tl.load(reads + at * C + row)[None, :]
            write = tl.load(writes + at * C + row)[None, :]

        low = state.to(dtype)
        read = tl.dot(low, tl.trans(k), input_precision=PRECISION)
        if not VECTOR:
            read = read * scale
        residual = v.to(tl.float32) - read
        error = tl.dot(residual.to(dtype), tl.trans(inverse), input_precision=PRECISION)
        if MODE == "outputs":
            q = tl.load(queries + token * q_token + (row[:, None] * q_token + width[None, :]), mask, 0.0)
            output = tl.dot(low, tl.trans(q), input_precision=PRECISION)
            if not VECTOR:
                output = output * scale
            score = tl.load(scores + at * C * C + square)
            output = tl.dot(error.to(dtype), tl.trans(score), output, input_precision=PRECISION)
            target = row[None, :] * (heads * V) + column[:, None]
            tl.store(outputs + token * heads * V + target, output.to(dtype), value_mask)
        if MODE == "states":
            local = sequence * window * per_segment + chunk - first_segment * per_segment
            target = column[:, None] * K + width[None, :]
            tl.store(states + local * V * K + target, low, value_column[:, None] & (width < K)[None, :])
            target = row[None, :] * V + column[:, None]
            tl.store(errors + local * C * V + target, error.to(dtype), value_column[:, None] & (row < C)[None, :])
        if VECTOR:
            write_key = tl.load(write_keys + token * k_token + key_tile, mask, 0.0)
            state = tl.dot(error.to(dtype), write_key, state * carry, input_precision=PRECISION)
        else:
            state = tl.dot((error * write).to(dtype), k, state * carry, input_precision=PRECISION)

    if MODE == "map":
        # Rows of `locals_`: V columns of the state from zero, then K of the transition.
        rows = tl.where(tile < value_tiles, column, V + (tile - value_tiles) * BLOCK_V + tl.arange(0, BLOCK_V))
        known = rows < tl.where(tile < value_tiles, V, V + K)
        target = ((sequence * segments + segment) * (V + K) + rows[:, None]) * K + width[None, :]
        tl.store(locals_ + target, state, known[:, None] & (width < K)[None, :])


@triton.jit
def backward_sweep(
    grads, queries, keys, write_keys, inverses, scores, reads, writes, carries,
    ends, locals_, grad_values, grad_states,
    d_batch, d_token, d_head, q_batch, q_token, q_head, k_batch, k_token, k_head,
    length, chunks, segments, per_segment, first_segment, window, heads, ratio,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    MODE: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment's chunks in reverse order, for BLOCK_V columns of the state's cotangent.

    MODE "map": from zero; stores the cotangent of the incoming state. MODE "gradients": from `ends`; stores the
    gradient of the values and the cotangent of the state behind each chunk.
    """
    tile = tl.program_id(0)
    sequence, segment = (tl.program_id(1) // window).to(tl.int64), first_segment + tl.program_id(1) % window
    batch, head = sequence // heads, sequence % heads
    group = head // ratio
    dtype: tl.constexpr = keys.dtype.element_ty
    row = tl.arange(0, C)
    width = tl.arange(0, BLOCK_K)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inner = (column < V)[:, None] & (width < K)[None, :]
    edge = (sequence * segments + segment) * V * K + column[:, None] * K + width[None, :]
    state = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    if MODE == "gradients":
        state = tl.load(ends + edge, inner, 0.0)

    grads += batch * d_batch + head * d_head
    queries += batch * q_batch + group * q_head
    keys += batch * k_batch + group * k_head
    write_keys += batch * k_batch + group * k_head
    begin = segment * per_segment
    count = tl.minimum(per_segment, chunks - begin)
    if MODE == "gradients":
        grad_values += (batch * length * heads + head) * V
    key_tile = row[:, None] * k_token + width[None, :]
    square = row[:, None] * C + row[None, :]
    for step in range(0, count):
        chunk = begin + count - 1 - step
        token = tl.cast(chunk, tl.int64) * C
        inside = row < length - chunk * C
        mask = inside[:, None] & (width < K)[None, :]
        at = sequence * chunks + chunk
        value_mask = (column < V)[:, None] & inside[None, :]
        grad = tl.load(grads + token * d_token + (row[None, :] * d_token + column[:, None]), value_mask, 0.0).to(dtype)
        k = tl.load(keys + token * k_token + key_tile, mask, 0.0)
        q = tl.load(queries + token * q_token + (row[:, None] * q_token + width[None, :]), mask, 0.0)
        score = tl.load(scores + at * C * C + square)
        inverse = tl.load(inverses + at * C * C + square)
        if VECTOR:
            carry = tl.load(carries + at * K + width, width < K, 0.0)[None, :]
            write_key = tl.load(write_keys + token * k_token + key_tile, mask, 0.0)
        else:
            carry = tl.load(carries + at)
            scale = tl.load(reads + at * C + row)[None, :]
            write = tl.load(writes + at * C + row)[None, :]

        low = state.to(dtype)
        if VECTOR:
            error = tl.dot(low, tl.trans(write_key), input_precision=PRECISION)
        else:
            error = tl.dot(low, tl.trans(k), input_precision=PRECISION) * write
        error = tl.dot(grad, score, error, input_precision=PRECISION)
        residual = tl.dot(error.to(dtype), inverse, input_precision=PRECISION)
        if MODE == "gradients":
            local = sequence * window * per_segment + chunk - first_segment * per_segment
            tl.store(grad_states + local * V * K + (column[:, None] * K + width[None, :]), low, inner)
            target = row[None, :] * (heads * V) + column[:, None]
            tl.store(grad_values + token * heads * V + target, residual.to(dtype), value_mask)
        if not VECTOR:
            residual = residual * scale
            grad = (grad.to(tl.float32) * scale).to(dtype)
        state = tl.dot(grad, q, state * carry, input_precision=PRECISION)
        state = tl.dot((-residual).to(dtype), k, state, input_precision=PRECISION)

    if MODE == "map":
        tl.store(locals_ + edge, state, inner)


@triton.jit
def fold(
    maps, locals_, initial, edges, final, segments, local_rows, map_rows,
    ROWS: tl.constexpr, V: tl.constexpr, K: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr, REVERSE: tl.constexpr, IDENTITY: tl.constexpr,
):  # fmt: skip
    """Composes segments: x <- x M + local for each in turn, with x [ROWS, K] the transposed state and M the transposed
    transition (M^T where REVERSE, and the segments from the last to the first).

    `edges` receives x before each segment. IDENTITY: starts with V rows of zeros and K of the identity, which turn into
    the composed map; otherwise with `initial`.
    """
    sequence = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    width = tl.arange(0, BLOCK_K)
    inner = (row < ROWS)[:, None] & (width < K)[None, :]
    offset = row[:, None] * K + width[None, :]
    if IDENTITY:
        x = tl.where(((row - V)[:, None] == width[None, :]) & (width < K)[None, :], 1.0, 0.0)
    else:
        x = tl.load(initial + sequence * ROWS * K + offset, inner, 0.0)
    for step in range(0, segments):
        segment = segments - 1 - step if REVERSE else step
        at = sequence * segments + segment
        edge = edges + at * ROWS * K
        tl.store(edge + offset, x, inner)
        tl.debug_barrier()  # other threads of this program read it back below, in slices
        x = tl.load(locals_ + at * local_rows * K + offset, (row < V)[:, None] & (width < K)[None, :], 0.0)
        transition = maps + (at * map_rows + map_rows - K) * K
        for start in range(0, K, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            part = tl.load(edge + row[:, None] * K + j[None, :], (row < ROWS)[:, None] & (j < K)[None, :], 0.0)
            source = width[None, :] * K + j[:, None] if REVERSE else j[:, None] * K + width[None, :]
            m = tl.load(transition + source, (j < K)[:, None] & (width < K)[None, :], 0.0)
            x = tl.dot(part, m, x, input_precision="tf32x3")
    tl.store(final + sequence * ROWS * K + offset, x, inner)
