"""Kernels that turn the inputs of each chunk into what the sweeps over chunks need; they know of documents.

Symbols as in README.md; G is A without beta, and beta is taken to the side of the keys that write (section "The form
that the kernels use"). Log-decays are in base 2.
"""

# mypy: disable-error-code="no-untyped-def"
# The parameters of a kernel are pointers and numbers of the device.

import triton
import triton.language as tl

from longtrain_kernels.row_sums import LEAST, sum_rows

LOG2E = tl.constexpr(1.4426950408889634)
# Pairs of a vector decay are products of q exp2(b + ANCHOR) and k exp2(-b - ANCHOR) while b > -REACH: then every
# factor is a normal number of bfloat16 and float32, whose range is the same.
ANCHOR = tl.constexpr(60.0)
HEAD_SCALE = tl.constexpr(2.0**-60)
REACH = tl.constexpr(120.0)


@triton.jit
def chunk_documents(documents, batch, chunk, length, C: tl.constexpr):
    """Documents of a chunk's tokens [C], of the token before it and of its last; padding continues the last one.

    `documents` has at least one column.
    """
    documents += batch * tl.maximum(length, 1) + chunk * C
    final = (tl.maximum(length, 1) - 1 - chunk * C).to(tl.int32)
    document = tl.load(documents + tl.minimum(tl.arange(0, C), final))
    last = tl.load(documents + tl.minimum(C - 1, final))
    carried = tl.load(documents - 1, chunk > 0, 0)
    return document, carried, last


@triton.jit
def chunk_document(documents, batch, chunk, length, C: tl.constexpr):
    """`chunk_documents`, less the first, of a chunk with one document."""
    documents += batch * tl.maximum(length, 1) + chunk * C
    last = tl.load(documents)
    carried = tl.load(documents - 1, chunk > 0, 0)
    return carried, last


@triton.jit
def diagonal_blocks(x, C: tl.constexpr):
    """[C, C] -> [C, 16]: each row's part of its own block of 16."""
    row = tl.arange(0, C)
    own = (row[:, None] // 16) == (row[None, :] // 16)
    return tl.sum(tl.reshape(tl.where(own, x, 0.0), [C, C // 16, 16]), 1)


@triton.jit
def to_diagonal_blocks(x, C: tl.constexpr):
    """[C, 16] -> [C, C]: the inverse of `diagonal_blocks`, zero elsewhere."""
    row = tl.arange(0, C)
    own = (row[:, None] // 16) == (row[None, :] // 16)
    wide = tl.reshape(tl.broadcast_to(tl.expand_dims(x, 1), [C, C // 16, 16]), [C, C])
    return tl.where(own, wide, 0.0)


@triton.jit
def unit_lower_inverse(a, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 for strictly lower a [C, C]: substitution in blocks of 16, a finite series between the blocks."""
    row = tl.arange(0, 16)
    blocks = tl.reshape(diagonal_blocks(a, C), [C // 16, 16, 16])
    zero = blocks * 0.0
    inverse = tl.where(row[None, :, None] == row[None, None, :], 1.0, zero)
    for i in range(1, 16):
        coefficients = tl.sum(tl.where(row[None, :, None] == i, blocks, 0.0), 1)
        change = tl.sum(tl.expand_dims(coefficients, 2) * inverse, 1)
        inverse = tl.where(row[None, :, None] == i, inverse - tl.expand_dims(change, 1), inverse)
    diagonal = to_diagonal_blocks(tl.reshape(inverse, [C, 16]), C)
    # I + a = diagonal^-1 (I + n) with n strictly lower in 4 blocks: (I + n)^-1 = (I - n)(I + n^2).
    token = tl.arange(0, C)
    off = tl.where((token[:, None] // 16) == (token[None, :] // 16), 0.0, a)
    n = tl.dot(diagonal, off, input_precision=PRECISION)
    square = tl.dot(n, n, input_precision=PRECISION)
    even = diagonal + tl.dot(square, diagonal, input_precision=PRECISION)
    return even - tl.dot(n, even, input_precision=PRECISION)


@triton.jit
def scalar_prepare(
    queries, keys, beta, log_decay, documents,
    inverses, scores, sums, reads, writes, carries,
    q_batch, q_token, q_head, k_batch, k_token, k_head, b_batch, b_token, b_head, g_batch, g_token, g_head,
    length, chunks, heads, ratio,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T, P and the scales of queries, keys and state for one chunk and head, with a scalar decay or none."""
    chunk = tl.program_id(0).to(tl.int64)
    batch, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1).to(tl.int64) % heads
    row = tl.arange(0, C)
    token = chunk * C
    inside = row < length - token
    width = tl.arange(0, BLOCK_K)
    mask = inside[:, None] & (width < K)[None, :]
    queries += batch * q_batch + (head // ratio) * q_head + token * q_token
    keys += batch * k_batch + (head // ratio) * k_head + token * k_token
    q = tl.load(queries + row[:, None] * q_token + width[None, :], mask, 0.0)
    k = tl.load(keys + row[:, None] * k_token + width[None, :], mask, 0.0)
    step = tl.load(beta + batch * b_batch + head * b_head + token * b_token + row * b_token, inside, 0.0).to(tl.float32)
    document, carried, last = chunk_documents(documents, batch, chunk, length, C)

    visible = (document[:, None] == document[None, :]) & (row[:, None] >= row[None, :])
    if DECAY:
        log_decay += batch * g_batch + head * g_head + token * g_token
        gate = tl.load(log_decay + row * g_token, inside, 0.0).to(tl.float32)
        gate = tl.maximum(gate * LOG2E, LEAST)
        b = tl.sum(tl.where(visible, gate[None, :], 0.0), 1)
    else:
        b = tl.zeros([C], tl.float32)
    total = tl.sum(tl.where(row == C - 1, b, 0.0), 0)
    weight = tl.where(visible, tl.exp2(tl.minimum(b[:, None] - b[None, :], 0.0)), 0.0) * step[None, :]

    at = tl.program_id(1).to(tl.int64) * chunks + chunk
    tile = at * C * C + (row[:, None] * C + row[None, :])
    p = tl.dot(q, tl.trans(k), input_precision=PRECISION) * weight
    tl.store(scores + tile, p.to(scores.dtype.element_ty))
    a = tl.dot(k, tl.trans(k), input_precision=PRECISION) * weight
    a = tl.where(row[:, None] > row[None, :], a, 0.0)
    tl.store(inverses + tile, unit_lower_inverse(a, C, PRECISION).to(inverses.dtype.element_ty))
    tl.store(sums + at * C + row, b)
    tl.store(reads + at * C + row, tl.where(document == carried, tl.exp2(b), 0.0))
    tl.store(writes + at * C + row, tl.where(document == last, tl.exp2(tl.minimum(total - b, 0.0)) * step, 0.0))
    tl.store(carries + at, tl.where(last == carried, tl.exp2(total), 0.0))


@triton.jit
def vector_decay(
    queries, keys, beta, log_decay, documents, sums, far, read_queries, read_keys, write_keys, carries,
    q_batch, q_token, q_head, k_batch, k_token, k_head, b_batch, b_token, b_head, g_batch, g_token, g_head,
    length, chunks, heads, ratio, K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Queries and keys decayed to the edges of one chunk, with a vector decay; BLOCK_K key channels.

    `far`: whether pairs need exponentials of their own. Documents that share a chunk always have them, so that the
    decays of one do not choose how another is computed.
    """
    chunk = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    row = tl.arange(0, C)
    token = chunk * C
    inside = row < length - token
    width = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = inside[:, None] & (width < K)[None, :]
    queries += batch * q_batch + (head // ratio) * q_head + token * q_token
    keys += batch * k_batch + (head // ratio) * k_head + token * k_token
    q = tl.load(queries + row[:, None] * q_token + width[None, :], mask, 0.0)
    k = tl.load(keys + row[:, None] * k_token + width[None, :], mask, 0.0)
    log_decay += batch * g_batch + head * g_head + token * g_token
    gate = tl.load(log_decay + row[:, None] * g_token + width[None, :], mask, 0.0)
    gate = tl.maximum(gate.to(tl.float32), LEAST / LOG2E)
    step = tl.load(beta + batch * b_batch + head * b_head + token * b_token + row * b_token, inside, 0.0).to(tl.float32)
    document, carried, last = chunk_documents(documents, batch, chunk, length, C)

    visible = (document[:, None] == document[None, :]) & (row[:, None] >= row[None, :])
    b = sum_rows(visible, gate.to(log_decay.dtype.element_ty), keys.dtype.element_ty) * LOG2E
    total = tl.sum(tl.where((row == C - 1)[:, None], b, 0.0), 0)
    read = tl.where((document == carried)[:, None], tl.exp2(b), 0.0)
    write = tl.where((document == last)[:, None], tl.exp2(tl.minimum(total[None, :] - b, 0.0)), 0.0) * step[:, None]
    at = sequence * chunks + chunk
    target = at * C * K + (row[:, None] * K + width[None, :])
    stored = (row >= 0)[:, None] & (width < K)[None, :]
    dtype: tl.constexpr = keys.dtype.element_ty
    near = (tl.min(tl.min(b, 1), 0) > -REACH) & (tl.min(document, 0) == last) & (dtype != tl.float16)
    tl.store(far + at * tl.num_programs(2) + tl.program_id(2), tl.where(near, 0, 1))
    tl.store(sums + target, b, stored)
    tl.store(read_queries + target, (q.to(tl.float32) * read).to(dtype), stored)
    tl.store(read_keys + target, (k.to(tl.float32) * read).to(dtype), stored)
    tl.store(write_keys + target, (k.to(tl.float32) * write).to(dtype), stored)
    tl.store(carries + at * K + width, tl.where(last == carried, tl.exp2(total), 0.0), width < K)


@triton.jit
def is_far(far, at, blocks):
    """Whether any of a chunk's blocks of channels is; at most 16 of them."""
    block = tl.arange(0, 16)
    return tl.max(tl.load(far + at * blocks + block, block < blocks, 0), 0) != 0


@triton.jit
def store_pairs(
    score, overlap, beta, documents, inverses, scores, batch, chunk, at, b_token, length,
    C: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T and P from the decayed products of keys and queries with the keys of one chunk; NEAR: of one document."""
    row = tl.arange(0, C)
    step = tl.load(beta + chunk * C * b_token + row * b_token, row < length - chunk * C, 0.0).to(tl.float32)
    visible = row[:, None] >= row[None, :]
    if not NEAR:
        document, _, _ = chunk_documents(documents, batch, chunk, length, C)
        visible &= document[:, None] == document[None, :]
    score = tl.where(visible, score * step[None, :], 0.0)
    overlap = tl.where(visible & (row[:, None] > row[None, :]), overlap * step[None, :], 0.0)
    tile = at * C * C + (row[:, None] * C + row[None, :])
    dtype: tl.constexpr = scores.dtype.element_ty
    tl.store(scores + tile, score.to(dtype))
    tl.store(inverses + tile, unit_lower_inverse(overlap, C, PRECISION).to(dtype))


@triton.jit
def near_pairs(
    queries, keys, beta, documents, sums, far, inverses, scores,
    q_batch, q_token, q_head, k_batch, k_token, k_head, b_batch, b_token, b_head,
    length, chunks, heads, ratio, far_blocks,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T and P of one chunk and head, with a vector decay that is not far: exp2(b_i - b_j) is split between operands."""
    chunk = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    at = sequence * chunks + chunk
    if is_far(far, at, far_blocks):
        return
    batch, head = sequence // heads, sequence % heads
    dtype: tl.constexpr = keys.dtype.element_ty
    row = tl.arange(0, C)
    inside = row < length - chunk * C
    queries += batch * q_batch + (head // ratio) * q_head + chunk * C * q_token
    keys += batch * k_batch + (head // ratio) * k_head + chunk * C * k_token
    sums += at * C * K
    score = tl.zeros([C, C], tl.float32)
    overlap = tl.zeros([C, C], tl.float32)
    for start in range(0, K, BLOCK_K):
        width = start + tl.arange(0, BLOCK_K)
        known = (width < K)[None, :]
        mask = inside[:, None] & known
        q = tl.load(queries + (row[:, None] * q_token + width[None, :]), mask, 0.0).to(tl.float32)
        k = tl.load(keys + (row[:, None] * k_token + width[None, :]), mask, 0.0).to(tl.float32)
        b = tl.load(sums + (row[:, None] * K + width[None, :]), known, 0.0)
        up = tl.exp2(b + ANCHOR)
        earlier = tl.trans((k * tl.exp2(-b - ANCHOR)).to(dtype))
        score = tl.dot((q * up).to(dtype), earlier, score, input_precision=PRECISION)
        overlap = tl.dot((k * up).to(dtype), earlier, overlap, input_precision=PRECISION)
    beta += batch * b_batch + head * b_head
    store_pairs(
        score, overlap, beta, documents, inverses, scores, batch, chunk, at, b_token, length, C, True, PRECISION
    )  # fmt: skip


@triton.jit
def anchored(b, anchor, block, C: tl.constexpr):
    """exp2(b_i - b_j) as a product of two factors [C, .], neither above one: i in the block of 16 rows that begins with
    the anchor's row, j in the blocks before it. Zero elsewhere; where a document starts between j and i the product is
    finite and has to be masked."""
    row = tl.arange(0, C)
    later = tl.where((row // 16 == block)[:, None], tl.exp2(tl.minimum(b - anchor[None, :], 0.0)), 0.0)
    earlier = tl.where((row // 16 < block)[:, None], tl.exp2(tl.minimum(anchor[None, :] - b, 0.0)), 0.0)
    return later, earlier


@triton.jit
def far_pairs(
    queries, keys, beta, documents, sums, far, inverses, scores,
    q_batch, q_token, q_head, k_batch, k_token, k_head, b_batch, b_token, b_head,
    length, chunks, heads, ratio, far_blocks,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T and P of one chunk and head, with a vector decay, where the chunk is far.

    Pairs in different blocks of 16 rows are matrix products of anchored factors; pairs in one block are summed with
    their own exponentials, one column of every block at a time.
    """
    chunk = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    at = sequence * chunks + chunk
    if not is_far(far, at, far_blocks):
        return
    batch, head = sequence // heads, sequence % heads
    dtype: tl.constexpr = keys.dtype.element_ty
    row = tl.arange(0, C)
    first = row // 16 * 16
    within = tl.arange(0, 16)
    token = chunk * C
    inside = row < length - token
    queries += batch * q_batch + (head // ratio) * q_head + token * q_token
    keys += batch * k_batch + (head // ratio) * k_head + token * k_token
    sums += at * C * K
    score = tl.zeros([C, C], tl.float32)
    overlap = tl.zeros([C, C], tl.float32)
    score_own = tl.zeros([C, 16], tl.float32)
    overlap_own = tl.zeros([C, 16], tl.float32)
    for start in range(0, K, BLOCK_K):
        width = start + tl.arange(0, BLOCK_K)
        known = (width < K)[None, :]
        mask = inside[:, None] & known
        q = tl.load(queries + row[:, None] * q_token + width[None, :], mask, 0.0).to(tl.float32)
        k = tl.load(keys + row[:, None] * k_token + width[None, :], mask, 0.0).to(tl.float32)
        b = tl.load(sums + row[:, None] * K + width[None, :], known, 0.0)
        for block in range(1, C // 16):
            anchor = tl.load(sums + 16 * block * K + width, width < K, 0.0)
            later, earlier = anchored(b, anchor, block, C)
            decayed = tl.trans((k * earlier).to(dtype))
            score = tl.dot((q * later).to(dtype), decayed, score, input_precision=PRECISION)
            overlap = tl.dot((k * later).to(dtype), decayed, overlap, input_precision=PRECISION)
        for j in range(16):
            other = first + j
            there = (other < length - token)[:, None] & known
            key = tl.load(keys + other[:, None] * k_token + width[None, :], there, 0.0)
            sum_ = tl.load(sums + other[:, None] * K + width[None, :], known, 0.0)
            decayed = key.to(tl.float32) * tl.exp2(tl.minimum(b - sum_, 0.0))
            score_own += tl.where((within == j)[None, :], tl.sum(q * decayed, 1)[:, None], 0.0)
            overlap_own += tl.where((within == j)[None, :], tl.sum(k * decayed, 1)[:, None], 0.0)

    beta += batch * b_batch + head * b_head
    score += to_diagonal_blocks(score_own, C)
    overlap += to_diagonal_blocks(overlap_own, C)
    store_pairs(
        score, overlap, beta, documents, inverses, scores, batch, chunk, at, b_token, length, C, False, PRECISION
    )  # fmt: skip
