"""Kernels of the diagonal scan with a decay per token, head and key channel.

With b the sum of log-decays in the chunk and document, a pair of rows c <= r of one document weighs exp(b_r - b_c) in
each channel, which is never above one. `scale_chunks` splits it between the operands,

    q'_r = q_r exp(b_r + ANCHOR),    k'_c = k_c exp(-ANCHOR - b_c),

whose range bfloat16 and float32 share; then the scan has no decay inside a chunk. With S' = exp(-ANCHOR) S and d the
decay of each channel over the chunk, `scan_segments` computes

    out_r = sum_{c <= r} (x_r . y_c) z_c + [r in the head] x_r^T S',   S' <- d (S' + y^T [tail] z)           forward
    S' <- d S',   out_r = sum_{c >= r} (x_r . y_c) z_c + [r in the tail] x_r^T S',   S' <- S' + y^T [head] z    reverse

head and tail being the documents of the incoming state and of the last row. It yields the outputs from (q', k', v), dv
from (k', q', do), and the cotangents of q' from (do, v, k') and of k' from (v, do, q'), which `finish_gradients` turns
into those of q, k and the decays. All this holds as long as b > -REACH, where every factor is a normal
float32: for 64 tokens that forget less than 72 % of a channel each, on average. Other segments are left to
`far_kernels`.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from longtrain_kernels.diagonal_scan.chunk import boundary_state, describe, load_tile, store_tile
from longtrain_kernels.row_sums import sum_rows

ANCHOR: tl.constexpr = tl.constexpr(60.0)
EXP_ANCHOR: tl.constexpr = tl.constexpr(2.0**60)
REACH: tl.constexpr = tl.constexpr(120.0)
UNIT: tl.constexpr = tl.constexpr(1.4426950408889634)  # log2(e): decays are exponents of two


@triton.jit
def load_bounds(bounds, continues, at, CHUNK: tl.constexpr):
    """First and last rows of the rows' documents; the rows in the incoming state's document; those in the last one."""
    rows = tl.arange(0, CHUNK)
    first = tl.load(bounds + at * 2 * CHUNK + rows)
    last = tl.load(bounds + (at * 2 + 1) * CHUNK + rows)
    goes_on = tl.load(continues + at) != 0
    return first, last, (first == 0) & goes_on, last == CHUNK - 1


@triton.jit
def sum_decays(gates, first, CHUNK: tl.constexpr, OPERAND: tl.constexpr):
    """b [CHUNK, channels]: a product with the visible pairs, so that documents do not share a running sum."""
    rows = tl.arange(0, CHUNK)
    visible = (rows[:, None] >= rows[None, :]) & (rows[None, :] >= first[:, None])
    return sum_rows(visible, gates, OPERAND) * UNIT


@triton.jit
def last_row(b, head, tail, CHUNK: tl.constexpr):
    """b of the last row, and what the chunk multiplies the state with."""
    rows = tl.arange(0, CHUNK)
    total = tl.sum(tl.where(rows[:, None] == CHUNK - 1, b, 0.0), axis=0)
    passes = tl.max((head & tail).to(tl.int32), axis=0) == 1
    return total, tl.where(passes, tl.exp2(total), 0.0), passes


@triton.jit
def scale_chunks(
    q, k, gates, bounds, continues, scaled_q, scaled_k, decays, far, length, heads, chunks,
    q_b, q_l, q_h, k_b, k_l, k_h, gates_b, gates_l, gates_h, out_b, out_l, out_h,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """q', k' [B, L, H, K]; decays [B H, chunks, K] over each chunk; far [B H, chunks]: whether b leaves the reach."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    begin = chunk * CHUNK
    columns = tl.arange(0, BLOCK)
    key_head = (head // GROUP).to(tl.int64)
    q_tile = load_tile(q + batch.to(tl.int64) * q_b + key_head * q_h, begin, length, q_l, columns, WIDTH, CHUNK)
    k_tile = load_tile(k + batch.to(tl.int64) * k_b + key_head * k_h, begin, length, k_l, columns, WIDTH, CHUNK)
    gates += batch.to(tl.int64) * gates_b + head.to(tl.int64) * gates_h
    gate_tile = load_tile(gates, begin, length, gates_l, columns, WIDTH, CHUNK)
    start, _, head_rows, tail_rows = load_bounds(bounds, continues, batch.to(tl.int64) * chunks + chunk, CHUNK)
    b = sum_decays(gate_tile, start, CHUNK, OPERAND)
    offset = batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h
    store_tile(scaled_q + offset, q_tile * tl.exp2(b + ANCHOR), begin, length, out_l, columns, WIDTH, CHUNK)
    store_tile(scaled_k + offset, k_tile * tl.exp2(-b - ANCHOR), begin, length, out_l, columns, WIDTH, CHUNK)
    total, _, _ = last_row(b, head_rows, tail_rows, CHUNK)
    at = row.to(tl.int64) * chunks + chunk
    tl.store(decays + at * WIDTH + columns, tl.exp2(total), mask=columns < WIDTH)
    tl.store(far + at, (tl.min(tl.min(b, axis=1), axis=0) < -REACH).to(tl.int32))


@triton.jit
def _chunk(bounds, continues, at, CHUNK: tl.constexpr):
    """`load_bounds`, and whether the chunk's incoming state reaches its end."""
    first, last, head_rows, tail_rows = load_bounds(bounds, continues, at, CHUNK)
    return first, last, head_rows, tail_rows, tl.max((head_rows & tail_rows).to(tl.int32), axis=0) == 1


@triton.jit
def summarize_segments(
    y, z, decays, bounds, continues, far, state, decay, length, heads, chunks, segment_chunks,
    y_b, y_l, y_h, z_b, z_l, z_h,
    WIDTH_Y: tl.constexpr, WIDTH_Z: tl.constexpr, Z_GROUP: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_Z: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The affine map of every near segment: state [B H, G, WIDTH_Y, WIDTH_Z], decay [B H, G, WIDTH_Y]."""
    tile, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at_segment = row.to(tl.int64) * tl.num_programs(1) + segment
    if tl.load(far + at_segment) == 1:
        return
    batch, head = row // heads, row % heads
    y = describe(y, batch, head, y_b, y_l, y_h, length, WIDTH_Y, CHUNK, BLOCK_Y)
    z = describe(z, batch, head // Z_GROUP, z_b, z_l, z_h, length, WIDTH_Z, CHUNK, BLOCK_Z)
    columns_y, columns_z = tl.arange(0, BLOCK_Y), tile * BLOCK_Z + tl.arange(0, BLOCK_Z)
    accumulated = tl.zeros([BLOCK_Y, BLOCK_Z], tl.float32)
    product = tl.full([BLOCK_Y], 1.0, tl.float32)
    first = segment * segment_chunks
    count = tl.minimum(segment_chunks, chunks - first)
    for step in range(count):
        chunk = first + count - 1 - step if REVERSE else first + step
        at = batch.to(tl.int64) * chunks + chunk
        _, _, head_rows, tail_rows, passes = _chunk(bounds, continues, at, CHUNK)
        at = row.to(tl.int64) * chunks + chunk
        factor = tl.load(decays + at * WIDTH_Y + columns_y, mask=columns_y < WIDTH_Y, other=0.0)
        y_tile = y.load([chunk * CHUNK, 0]).to(OPERAND)
        z_tile = z.load([chunk * CHUNK, tile * BLOCK_Z]).to(OPERAND)
        z_tile = tl.where((head_rows if REVERSE else tail_rows)[:, None], z_tile, 0.0)
        accumulated = tl.where(passes, accumulated, 0.0)
        if REVERSE:
            accumulated = tl.dot(tl.trans(y_tile), z_tile, accumulated * factor[:, None], input_precision=PRECISION)
        else:
            accumulated = tl.dot(tl.trans(y_tile), z_tile, accumulated, input_precision=PRECISION) * factor[:, None]
        product *= tl.where(passes, factor, 0.0)
    accumulated = accumulated * (1 / EXP_ANCHOR if REVERSE else EXP_ANCHOR)
    pointers = state + at_segment * WIDTH_Y * WIDTH_Z + columns_y[:, None] * WIDTH_Z + columns_z[None, :]
    tl.store(pointers, accumulated, mask=(columns_y < WIDTH_Y)[:, None] & (columns_z < WIDTH_Z)[None, :])
    if tile == 0:
        tl.store(decay + at_segment * WIDTH_Y + columns_y, product, mask=columns_y < WIDTH_Y)


@triton.jit
def scan_segments(
    x, y, z, out, decays, bounds, continues, far, state, decay, incoming, length, heads, chunks, segment_chunks,
    x_b, x_l, x_h, y_b, y_l, y_h, z_b, z_l, z_h, out_b, out_l, out_h,
    WIDTH_Y: tl.constexpr, WIDTH_Z: tl.constexpr, X_GROUP: tl.constexpr, Y_GROUP: tl.constexpr, Z_GROUP: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_Z: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The recurrence of the module's docstring, every near segment from the state at its boundary.

    The state at boundary g is state[g] + decay[g] incoming, [B H, G + 1, K, V]; TRANSPOSED reads it as [V, K], and its
    columns decay instead of its rows.
    """
    tile, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tl.load(far + row.to(tl.int64) * tl.num_programs(1) + segment) == 1:
        return
    batch, head = row // heads, row % heads
    x = describe(x, batch, head // X_GROUP, x_b, x_l, x_h, length, WIDTH_Y, CHUNK, BLOCK_Y)
    y = describe(y, batch, head // Y_GROUP, y_b, y_l, y_h, length, WIDTH_Y, CHUNK, BLOCK_Y)
    z = describe(z, batch, head // Z_GROUP, z_b, z_l, z_h, length, WIDTH_Z, CHUNK, BLOCK_Z)
    out = describe(out, batch, head, out_b, out_l, out_h, length, WIDTH_Z, CHUNK, BLOCK_Z)
    rows = tl.arange(0, CHUNK)
    columns_y, columns_z = tl.arange(0, BLOCK_Y), tile * BLOCK_Z + tl.arange(0, BLOCK_Z)
    boundary = row.to(tl.int64) * (tl.num_programs(1) + 1) + segment + (1 if REVERSE else 0)
    if TRANSPOSED:
        accumulated = boundary_state(
            state, decay, incoming, row, boundary, columns_z[None, :], columns_y[:, None], WIDTH_Z, WIDTH_Y, True
        )
        channels, width = columns_z, WIDTH_Z
    else:
        accumulated = boundary_state(
            state, decay, incoming, row, boundary, columns_y[:, None], columns_z[None, :], WIDTH_Y, WIDTH_Z, True
        )
        channels, width = columns_y, WIDTH_Y
    accumulated = accumulated * (EXP_ANCHOR if REVERSE else 1 / EXP_ANCHOR)
    first = segment * segment_chunks
    count = tl.minimum(segment_chunks, chunks - first)
    for step in range(count):
        chunk = first + count - 1 - step if REVERSE else first + step
        begin = chunk * CHUNK
        at = batch.to(tl.int64) * chunks + chunk
        start, end, head_rows, tail_rows, passes = _chunk(bounds, continues, at, CHUNK)
        at = row.to(tl.int64) * chunks + chunk
        factor = tl.load(decays + at * width + channels, mask=channels < width, other=0.0)
        factor = factor[None, :] if TRANSPOSED else factor[:, None]
        x_tile, y_tile = x.load([begin, 0]).to(OPERAND), y.load([begin, 0]).to(OPERAND)
        z_tile = z.load([begin, tile * BLOCK_Z]).to(OPERAND)
        if REVERSE:
            accumulated = accumulated * factor
            visible = (rows[None, :] >= rows[:, None]) & (rows[None, :] <= end[:, None])
            read, write = tail_rows, head_rows
        else:
            visible = (rows[None, :] <= rows[:, None]) & (rows[None, :] >= start[:, None])
            read, write = head_rows, tail_rows
        written = tl.where(write[:, None], z_tile, 0.0)
        result = tl.dot(x_tile, accumulated.to(OPERAND), input_precision=PRECISION)
        scores = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
        accumulated = tl.where(passes, accumulated, 0.0)
        accumulated = tl.dot(tl.trans(y_tile), written, accumulated, input_precision=PRECISION)
        if not REVERSE:
            accumulated = accumulated * factor
        scores = tl.where(visible, scores, 0.0).to(OPERAND)
        result = tl.where(read[:, None], result, 0.0)
        result = tl.dot(scores, z_tile, result, input_precision=PRECISION)
        out.store([begin, tile * BLOCK_Z], result.to(out.dtype))


@triton.jit
def finish_gradients(
    q, k, gates, bounds, continues, far, query_grads, key_grads, gate_grads, ends,
    length, heads, chunks, segment_chunks,
    q_b, q_l, q_h, k_b, k_l, k_h, gates_b, gates_l, gates_h, out_b, out_l, out_h, grads_b, grads_l, grads_h,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GATE_GRADS: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Cotangents of q' and k', in place, into those of q and k (which they are in far segments), and of the decays.

    The latter, where GATE_GRADS, sum q dq - k dk over later rows of the document, plus `ends` [B H, G + 1, K] from what
    follows a segment.
    """
    tile, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    is_far = tl.load(far + row.to(tl.int64) * tl.num_programs(1) + segment) == 1
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    q = describe(q, batch, head // GROUP, q_b, q_l, q_h, length, WIDTH, CHUNK, BLOCK)
    k = describe(k, batch, head // GROUP, k_b, k_l, k_h, length, WIDTH, CHUNK, BLOCK)
    gates = describe(gates, batch, head, gates_b, gates_l, gates_h, length, WIDTH, CHUNK, BLOCK)
    query_grads = describe(query_grads, batch, head, out_b, out_l, out_h, length, WIDTH, CHUNK, BLOCK)
    key_grads = describe(key_grads, batch, head, out_b, out_l, out_h, length, WIDTH, CHUNK, BLOCK)
    if GATE_GRADS:
        gate_grads = describe(gate_grads, batch, head, grads_b, grads_l, grads_h, length, WIDTH, CHUNK, BLOCK)
    rows, columns = tl.arange(0, CHUNK), tile * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * (tl.num_programs(1) + 1) + segment + 1
    later_sums = tl.load(ends + at * WIDTH + columns, mask=(columns < WIDTH) & GATE_GRADS, other=0.0)
    first = segment * segment_chunks
    count = tl.minimum(segment_chunks, chunks - first)
    for step in range(count):
        chunk = first + count - 1 - step
        place = [chunk * CHUNK, tile * BLOCK]
        start, end, head_rows, tail_rows, passes = _chunk(bounds, continues, batch * chunks + chunk, CHUNK)
        b = sum_decays(gates.load(place), start, CHUNK, OPERAND)
        query_grad = query_grads.load(place) * tl.where(is_far, 1.0, tl.exp2(b + ANCHOR))
        query_grads.store(place, query_grad.to(query_grads.dtype))
        if GATE_GRADS:
            terms = q.load(place) * query_grad
        key_grad = key_grads.load(place) * tl.where(is_far, 1.0, tl.exp2(-b - ANCHOR))
        key_grads.store(place, key_grad.to(key_grads.dtype))
        if GATE_GRADS:
            terms -= k.load(place) * key_grad
            later = (rows[None, :] >= rows[:, None]) & (rows[None, :] <= end[:, None])
            sums = sum_rows(later, terms, OPERAND, 16)
            sums += tl.where(tail_rows[:, None], later_sums[None, :], 0.0)
            # the decay of a document's first token multiplies nothing
            sums = tl.where(((rows != start) | head_rows)[:, None], sums, 0.0)
            gate_grads.store(place, sums.to(gate_grads.dtype))
            passed = tl.where(passes, later_sums, 0.0)
            later_sums = tl.sum(tl.where(head_rows[:, None], terms, 0.0), axis=0) + passed
