"""Kernels of the diagonal scan with one decay per token and head.

With b the sum of log-decays in the chunk and document, head_t = exp(b_t) in the document of the chunk's incoming state
and tail_t = exp(b_last - b_t) in the document of its last row, both zero elsewhere, one kernel computes

    out_r = sum_{c <= r} exp(b_r - b_c) (x_r . y_c) z_c + head_r x_r^T S,   S <- decay S + y^T (tail z)     forward
    out_r = sum_{c >= r} exp(b_c - b_r) (x_r . y_c) z_c + tail_r x_r^T S,   S <- decay S + y^T (head z)     reverse

which is the output for (x, y, z) = (q, k, v), and every gradient: dq for (do, v, k) with S transposed; in reverse, with
the cotangent of S, dk for (v, do, q), transposed, and dv for (k, q, do).
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from longtrain_kernels.diagonal_scan.chunk import boundary_state, describe, load_tile
from longtrain_kernels.row_sums import LEAST


@triton.jit
def _add_within(left_sum, left_edge, left_cut, left_chunk, right_sum, right_edge, right_cut, right_chunk):
    """Sums that start anew at edges, and whether a cut lies between the start of the chunk and here."""
    total = tl.where(right_edge, right_sum, left_sum + right_sum)
    return total, left_edge | right_edge, right_cut | (left_cut & ~right_chunk), left_chunk | right_chunk


@triton.jit
def weigh_chunks(
    log_decay, documents, weights, factors, length, heads, chunks, stride_b, stride_l, stride_h,
    UNIT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log_decay [B, L, H] -> weights [B H, chunks, 3, CHUNK]: b in units of `UNIT`, head, tail; factors [B H, chunks].

    Sums never run over an edge of documents: one document's rounding would enter the next. BLOCK is whole chunks.
    """
    row = tl.program_id(1)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    documents += batch * length
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < length
    pointers = log_decay + batch * stride_b + rows.to(tl.int64) * stride_l + head * stride_h
    terms = tl.maximum(tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * UNIT, LEAST)
    own = tl.load(documents + tl.minimum(rows, length - 1))
    before = tl.load(documents + tl.minimum(rows, length) - 1, mask=rows > 0, other=0)
    starts, chunk_starts = own != before, rows % CHUNK == 0
    b, _, cut, _ = tl.associative_scan((terms, starts | chunk_starts, starts, chunk_starts), 0, _add_within)
    # Decays behind each row, to the end of its chunk or document.
    after = tl.load(documents + tl.minimum(rows + 1, length - 1))
    ends, chunk_ends = own != after, rows % CHUNK == CHUNK - 1
    stops = ends | chunk_ends
    pointers += stride_l
    later = tl.load(pointers, mask=(rows + 1 < length) & ~stops, other=0.0).to(tl.float32)
    later = tl.maximum(later * UNIT, LEAST)
    rest, _, cut_behind, _ = tl.associative_scan(
        (later, stops, ends & ~chunk_ends, chunk_ends), 0, _add_within, reverse=True
    )
    at = row.to(tl.int64) * chunks + rows // CHUNK
    stored = rows < chunks * CHUNK
    tl.store(weights + at * 3 * CHUNK + rows % CHUNK, b, mask=stored)
    tl.store(weights + (at * 3 + 1) * CHUNK + rows % CHUNK, tl.where(cut, 0.0, tl.exp2(b)), mask=stored)
    tl.store(weights + (at * 3 + 2) * CHUNK + rows % CHUNK, tl.where(cut_behind, 0.0, tl.exp2(rest)), mask=stored)
    tl.store(factors + at, tl.where(cut, 0.0, tl.exp2(b)), mask=stored & chunk_ends)


@triton.jit
def summarize_segments(
    y, z, weights, factors, state, decay, length, heads, chunks, segment_chunks,
    y_b, y_l, y_h, z_b, z_l, z_h, state_y, state_z,
    WIDTH_Y: tl.constexpr, WIDTH_Z: tl.constexpr, Y_GROUP: tl.constexpr, Z_GROUP: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_Z: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The affine map of every segment: state [B H, G, WIDTH_Y, WIDTH_Z] by strides, decay [B H, G]."""
    tile, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // heads, row % heads
    y = describe(y, batch, head // Y_GROUP, y_b, y_l, y_h, length, WIDTH_Y, CHUNK, BLOCK_Y)
    z = describe(z, batch, head // Z_GROUP, z_b, z_l, z_h, length, WIDTH_Z, CHUNK, BLOCK_Z)
    rows = tl.arange(0, CHUNK)
    accumulated = tl.zeros([BLOCK_Y, BLOCK_Z], tl.float32)
    product = 1.0
    first = segment * segment_chunks
    count = tl.minimum(segment_chunks, chunks - first)
    for step in range(count):
        chunk = first + count - 1 - step if REVERSE else first + step
        at = row.to(tl.int64) * chunks + chunk
        factor = tl.load(factors + at)
        write = tl.load(weights + (at * 3 + (1 if REVERSE else 2)) * CHUNK + rows)
        y_tile, z_tile = y.load([chunk * CHUNK, 0]), z.load([chunk * CHUNK, tile * BLOCK_Z])
        weighted = (z_tile * write[:, None]).to(OPERAND)
        accumulated = tl.dot(tl.trans(y_tile.to(OPERAND)), weighted, accumulated * factor, input_precision=PRECISION)
        product *= factor
    columns_y, columns_z = tl.arange(0, BLOCK_Y), tile * BLOCK_Z + tl.arange(0, BLOCK_Z)
    at = row.to(tl.int64) * tl.num_programs(1) + segment
    pointers = state + at * WIDTH_Y * WIDTH_Z + columns_y[:, None] * state_y + columns_z[None, :] * state_z
    tl.store(pointers, accumulated, mask=(columns_y < WIDTH_Y)[:, None] & (columns_z < WIDTH_Z)[None, :])
    if tile == 0:
        tl.store(decay + at, product)


@triton.jit
def scan_segments(
    x, y, z, out, partner, weights, bounds, factors, state, decay, incoming, products,
    length, heads, chunks, segment_chunks,
    x_b, x_l, x_h, y_b, y_l, y_h, z_b, z_l, z_h, out_b, out_l, out_h, partner_b, partner_l, partner_h,
    WIDTH_Y: tl.constexpr, WIDTH_Z: tl.constexpr,
    X_GROUP: tl.constexpr, Y_GROUP: tl.constexpr, Z_GROUP: tl.constexpr, PARTNER_GROUP: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_Z: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_PARTNER: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The recurrence of the module's docstring, every segment from the state at its boundary.

    The state at boundary g is state[g] + decay[g] incoming, [B H, G + 1, K, V]; TRANSPOSED reads it as [V, K]. With a
    partner [B, L, H, WIDTH_Z], products [tiles, B H, chunks CHUNK] receives the rows' dot products of it with `out`.
    """
    tile, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // heads, row % heads
    x = describe(x, batch, head // X_GROUP, x_b, x_l, x_h, length, WIDTH_Y, CHUNK, BLOCK_Y)
    y = describe(y, batch, head // Y_GROUP, y_b, y_l, y_h, length, WIDTH_Y, CHUNK, BLOCK_Y)
    z = describe(z, batch, head // Z_GROUP, z_b, z_l, z_h, length, WIDTH_Z, CHUNK, BLOCK_Z)
    out = describe(out, batch, head, out_b, out_l, out_h, length, WIDTH_Z, CHUNK, BLOCK_Z)
    partner += batch.to(tl.int64) * partner_b + (head // PARTNER_GROUP).to(tl.int64) * partner_h
    products += (tile * tl.num_programs(2) + row).to(tl.int64) * chunks * CHUNK
    rows = tl.arange(0, CHUNK)
    columns_y, columns_z = tl.arange(0, BLOCK_Y), tile * BLOCK_Z + tl.arange(0, BLOCK_Z)
    boundary = row.to(tl.int64) * (tl.num_programs(1) + 1) + segment + (1 if REVERSE else 0)
    if TRANSPOSED:
        accumulated = boundary_state(
            state, decay, incoming, row, boundary, columns_z[None, :], columns_y[:, None], WIDTH_Z, WIDTH_Y, False
        )
    else:
        accumulated = boundary_state(
            state, decay, incoming, row, boundary, columns_y[:, None], columns_z[None, :], WIDTH_Y, WIDTH_Z, False
        )
    first = segment * segment_chunks
    count = tl.minimum(segment_chunks, chunks - first)
    for step in range(count):
        chunk = first + count - 1 - step if REVERSE else first + step
        begin = chunk * CHUNK
        at = row.to(tl.int64) * chunks + chunk
        b = tl.load(weights + at * 3 * CHUNK + rows)
        read = tl.load(weights + (at * 3 + (2 if REVERSE else 1)) * CHUNK + rows)
        write = tl.load(weights + (at * 3 + (1 if REVERSE else 2)) * CHUNK + rows)
        bound = tl.load(bounds + ((batch.to(tl.int64) * chunks + chunk) * 2 + (1 if REVERSE else 0)) * CHUNK + rows)
        factor = tl.load(factors + at)
        x_tile, y_tile = x.load([begin, 0]).to(OPERAND), y.load([begin, 0]).to(OPERAND)
        z_tile = z.load([begin, tile * BLOCK_Z]).to(OPERAND)
        if HAS_PARTNER:  # early, to be there when it is needed
            other = load_tile(partner, begin, length, partner_l, columns_z, WIDTH_Z, CHUNK)
        weighted = (z_tile * write[:, None]).to(OPERAND)
        result = tl.dot(x_tile, accumulated.to(OPERAND), input_precision=PRECISION)
        scores = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
        accumulated = tl.dot(tl.trans(y_tile), weighted, accumulated * factor, input_precision=PRECISION)
        # Where nothing is visible the distance is positive and its exponential may overflow.
        if REVERSE:
            visible = (rows[None, :] >= rows[:, None]) & (rows[None, :] <= bound[:, None])
            scores = tl.where(visible, scores * tl.exp2(b[None, :] - b[:, None]), 0.0)
        else:
            visible = (rows[None, :] <= rows[:, None]) & (rows[None, :] >= bound[:, None])
            scores = tl.where(visible, scores * tl.exp2(b[:, None] - b[None, :]), 0.0)
        result = tl.dot(scores.to(OPERAND), z_tile, result * read[:, None], input_precision=PRECISION)
        out.store([begin, tile * BLOCK_Z], result.to(out.dtype))
        if HAS_PARTNER:
            tl.store(products + begin + rows, tl.sum(result * other, axis=1))


@triton.jit
def decay_gradients(
    products_q, products_k, ends, documents, grad, length, heads, padded, segment_tokens, tiles_q, tiles_k,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """d log_decay [B H, padded]: within a document the sum from t on of q_s . dq_s - k_s . dk_s.

    products [tiles, B H, padded]. What a segment passes on contributes <S, dS> at its end, `ends` [B H, G + 1] at
    boundaries.
    """
    segment, row = tl.program_id(0), tl.program_id(1)
    before_row = row.to(tl.int64) * padded
    plane = tl.num_programs(1).to(tl.int64) * padded
    documents += (row // heads).to(tl.int64) * length
    carried = tl.load(ends + row * (tl.num_programs(0) + 1) + segment + 1)
    first = segment * segment_tokens
    blocks = tl.cdiv(tl.minimum(segment_tokens, length - first), BLOCK)
    for step in range(blocks):
        rows = first + (blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        inside = rows < tl.minimum(first + segment_tokens, length)
        terms = tl.zeros([BLOCK], tl.float32)
        for tile in range(tiles_q):
            terms += tl.load(products_q + tile * plane + before_row + rows, mask=inside, other=0.0)
        for tile in range(tiles_k):
            terms -= tl.load(products_k + tile * plane + before_row + rows, mask=inside, other=0.0)
        own = tl.load(documents + tl.minimum(rows, length - 1))
        after = tl.load(documents + tl.minimum(rows + 1, length - 1))
        edges = inside & (own != after)
        sums, ended, _, _ = tl.associative_scan((terms, edges, edges, rows < 0), 0, _add_within, reverse=True)
        sums = tl.where(ended, sums, sums + carried)
        before = tl.load(documents + tl.minimum(rows, length) - 1, mask=rows > 0, other=0)
        # the decay of a document's first token multiplies nothing
        tl.store(grad + before_row + rows, tl.where(own == before, sums, 0.0), mask=inside)
        begins = (rows == first + (blocks - 1 - step) * BLOCK) & (own == before)
        carried = tl.sum(tl.where(begins, sums, 0.0), axis=0)
