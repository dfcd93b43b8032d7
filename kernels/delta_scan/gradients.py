"""Kernels that turn the states around a chunk, and their cotangents, into gradients of its inputs; see README.md.

One program is one chunk of one head and BLOCK_K key channels. Gradients of beta and of a scalar decay are sums over key
channels: each block of channels stores its share.
"""

# mypy: disable-error-code="no-untyped-def"
# The parameters of a kernel are pointers and numbers of the device.

import triton
import triton.language as tl

from longtrain_kernels.delta_scan.prepare import anchored, chunk_documents


@triton.jit
def scalar_gradients(
    grads, queries, keys, beta, documents, sums, states, errors, grad_states, grad_values,
    grad_queries, grad_keys, grad_beta, grad_decay,
    d_batch, d_token, d_head, q_batch, q_token, q_head, k_batch, k_token, k_head, b_batch, b_token, b_head,
    length, chunks, first_chunk, window_chunks, heads, ratio, shares,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """With a scalar decay or none."""
    chunk = first_chunk + tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    group = head // ratio
    dtype: tl.constexpr = keys.dtype.element_ty
    row = tl.arange(0, C)
    token = chunk * C
    inside = row < length - token
    width = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = inside[:, None] & (width < K)[None, :]
    document, carried, last = chunk_documents(documents, batch, chunk, length, C)
    b = tl.load(sums + (sequence * chunks + chunk) * C + row)
    total = tl.sum(tl.where(row == C - 1, b, 0.0), 0)
    read = tl.where(document == carried, tl.exp2(b), 0.0)
    write = tl.where(document == last, tl.exp2(tl.minimum(total - b, 0.0)), 0.0)
    carry = tl.where(last == carried, tl.exp2(total), 0.0)

    local = sequence * window_chunks + tl.program_id(0)
    at = (batch * length + token) * heads + head
    grads += batch * d_batch + head * d_head + token * d_token
    grad_values += at * V
    errors += local * C * V
    states += local * V * K
    grad_states += local * V * K
    score = tl.zeros([C, C], tl.float32)  # cotangent of P, then of A, then both transposed
    overlap = tl.zeros([C, C], tl.float32)
    score_t = tl.zeros([C, C], tl.float32)
    overlap_t = tl.zeros([C, C], tl.float32)
    write_key = tl.zeros([C, BLOCK_K], tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        value_mask = inside[:, None] & (column < V)[None, :]
        grad = tl.load(grads + row[:, None] * d_token + column[None, :], value_mask, 0.0).to(dtype)
        residual = tl.load(grad_values + row[:, None] * (heads * V) + column[None, :], value_mask, 0.0)
        error = tl.load(errors + row[:, None] * V + column[None, :], (column < V)[None, :], 0.0)
        tile = column[:, None] * K + width[None, :]
        grad_state = tl.load(grad_states + tile, (column < V)[:, None] & (width < K)[None, :], 0.0)
        score = tl.dot(grad, tl.trans(error), score, input_precision=PRECISION)
        overlap = tl.dot(residual, tl.trans(error), overlap, input_precision=PRECISION)
        score_t = tl.dot(error, tl.trans(grad), score_t, input_precision=PRECISION)
        overlap_t = tl.dot(error, tl.trans(residual), overlap_t, input_precision=PRECISION)
        scaled = (error.to(tl.float32) * write[:, None]).to(dtype)
        write_key = tl.dot(scaled, grad_state, write_key, input_precision=PRECISION)
    queries += batch * q_batch + group * q_head + token * q_token
    keys += batch * k_batch + group * k_head + token * k_token
    q = tl.load(queries + row[:, None] * q_token + width[None, :], mask, 0.0)
    k = tl.load(keys + row[:, None] * k_token + width[None, :], mask, 0.0)
    step = tl.load(beta + batch * b_batch + head * b_head + token * b_token + row * b_token, inside, 0.0).to(tl.float32)
    grad_total = tl.sum(write_key * k.to(tl.float32) * step[:, None])

    same = document[:, None] == document[None, :]
    weight = tl.where(same, tl.exp2(tl.minimum(b[:, None] - b[None, :], 0.0)), 0.0)
    weight_t = tl.where(same, tl.exp2(tl.minimum(b[None, :] - b[:, None], 0.0)), 0.0)
    p = tl.where(row[:, None] >= row[None, :], score * weight, 0.0).to(dtype)
    a = tl.where(row[:, None] > row[None, :], -overlap * weight, 0.0).to(dtype)
    p_t = tl.where(row[:, None] <= row[None, :], score_t * weight_t, 0.0).to(dtype)
    a_t = tl.where(row[:, None] < row[None, :], -overlap_t * weight_t, 0.0).to(dtype)
    write_key = tl.dot(p_t, q, write_key, input_precision=PRECISION)
    write_key = tl.dot(a_t, k, write_key, input_precision=PRECISION)
    grad_step = tl.sum(write_key * k.to(tl.float32), 1)
    stepped = (k.to(tl.float32) * step[:, None]).to(dtype)
    grad_query = tl.dot(p, stepped, input_precision=PRECISION)
    grad_key = tl.dot(a, stepped, write_key * step[:, None], input_precision=PRECISION)

    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        value_mask = inside[:, None] & (column < V)[None, :]
        grad = tl.load(grads + row[:, None] * d_token + column[None, :], value_mask, 0.0).to(tl.float32)
        residual = tl.load(grad_values + row[:, None] * (heads * V) + column[None, :], value_mask, 0.0).to(tl.float32)
        tile = column[:, None] * K + width[None, :]
        inner = (column < V)[:, None] & (width < K)[None, :]
        state = tl.load(states + tile, inner, 0.0)
        grad_state = tl.load(grad_states + tile, inner, 0.0)
        grad_query = tl.dot((grad * read[:, None]).to(dtype), state, grad_query, input_precision=PRECISION)
        grad_key = tl.dot((-residual * read[:, None]).to(dtype), state, grad_key, input_precision=PRECISION)
        grad_total += carry * tl.sum(state.to(tl.float32) * grad_state.to(tl.float32))

    target = row[:, None] * (heads * K) + width[None, :]
    tl.store(grad_queries + at * K + target, grad_query.to(dtype), mask)
    tl.store(grad_keys + at * K + target, grad_key.to(dtype), mask)
    change = tl.sum(q.to(tl.float32) * grad_query + k.to(tl.float32) * grad_key, 1) - 2.0 * step * grad_step
    later = tl.where(same & (row[:, None] >= row[None, :]), change[:, None], 0.0)
    grad_gate = tl.sum(later, 0) + tl.where(document == last, grad_total, 0.0)
    before = tl.load(documents + batch * length + token + row - 1, inside & (token + row > 0), 0)
    grad_gate = tl.where(document == before, grad_gate, 0.0)  # the decay of a document's first token multiplies zero
    share = at * shares + row * (heads * shares) + tl.program_id(2)
    tl.store(grad_beta + share, grad_step, inside)
    tl.store(grad_decay + share, grad_gate, inside)


@triton.jit
def pair_gradients(
    grads, documents, errors, grad_values, grad_scores, grad_overlaps, d_batch, d_token, d_head,
    length, chunks, first_chunk, window_chunks, heads,
    V: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The cotangents of P and A of one chunk, before they are weighted with decays."""
    chunk = first_chunk + tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    dtype: tl.constexpr = errors.dtype.element_ty
    row = tl.arange(0, C)
    inside = row < length - chunk * C
    local = sequence * window_chunks + tl.program_id(0)
    grads += batch * d_batch + head * d_head + chunk * C * d_token
    grad_values += ((batch * length + chunk * C) * heads + head) * V
    errors += local * C * V
    score = tl.zeros([C, C], tl.float32)
    overlap = tl.zeros([C, C], tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        mask = inside[:, None] & (column < V)[None, :]
        grad = tl.load(grads + row[:, None] * d_token + column[None, :], mask, 0.0).to(dtype)
        residual = tl.load(grad_values + row[:, None] * (heads * V) + column[None, :], mask, 0.0)
        error = tl.load(errors + row[:, None] * V + column[None, :], (column < V)[None, :], 0.0)
        score = tl.dot(grad, tl.trans(error), score, input_precision=PRECISION)
        overlap = tl.dot(residual, tl.trans(error), overlap, input_precision=PRECISION)
    document, _, _ = chunk_documents(documents, batch, chunk, length, C)
    same = document[:, None] == document[None, :]
    target = local * C * C + (row[:, None] * C + row[None, :])
    tl.store(grad_scores + target, tl.where(same & (row[:, None] >= row[None, :]), score, 0.0).to(dtype))
    tl.store(grad_overlaps + target, tl.where(same & (row[:, None] > row[None, :]), -overlap, 0.0).to(dtype))


@triton.jit
def vector_gradients(
    grads, queries, keys, beta, documents, sums, states, errors, grad_states, grad_values,
    grad_scores, grad_overlaps, grad_queries, grad_keys, grad_beta, grad_decay,
    d_batch, d_token, d_head, q_batch, q_token, q_head, k_batch, k_token, k_head, b_batch, b_token, b_head,
    length, chunks, first_chunk, window_chunks, heads, ratio, shares,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """With a vector decay; pairs of tokens as in `vector_pairs`."""
    chunk = first_chunk + tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    dtype: tl.constexpr = keys.dtype.element_ty
    row = tl.arange(0, C)
    token = chunk * C
    inside = row < length - token
    width = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    known = (width < K)[None, :]
    mask = inside[:, None] & known
    queries += batch * q_batch + (head // ratio) * q_head + token * q_token
    keys += batch * k_batch + (head // ratio) * k_head + token * k_token
    beta += batch * b_batch + head * b_head + token * b_token
    sums += (sequence * chunks + chunk) * C * K
    document, carried, last = chunk_documents(documents, batch, chunk, length, C)

    local = sequence * window_chunks + tl.program_id(0)
    at = (batch * length + token) * heads + head
    grads += batch * d_batch + head * d_head + token * d_token
    grad_values += at * V
    errors += local * C * V
    states += local * V * K
    grad_states += local * V * K
    grad_scores += local * C * C
    grad_overlaps += local * C * C
    grad_query = tl.zeros([C, BLOCK_K], tl.float32)
    read_key = tl.zeros([C, BLOCK_K], tl.float32)
    write_key = tl.zeros([C, BLOCK_K], tl.float32)
    grad_total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        value_mask = inside[:, None] & (column < V)[None, :]
        grad = tl.load(grads + row[:, None] * d_token + column[None, :], value_mask, 0.0).to(dtype)
        residual = tl.load(grad_values + row[:, None] * (heads * V) + column[None, :], value_mask, 0.0)
        error = tl.load(errors + row[:, None] * V + column[None, :], (column < V)[None, :], 0.0)
        tile = column[:, None] * K + width[None, :]
        state = tl.load(states + tile, (column < V)[:, None] & known, 0.0)
        grad_state = tl.load(grad_states + tile, (column < V)[:, None] & known, 0.0)
        grad_query = tl.dot(grad, state, grad_query, input_precision=PRECISION)
        read_key = tl.dot(residual, state, read_key, input_precision=PRECISION)
        write_key = tl.dot(error, grad_state, write_key, input_precision=PRECISION)
        grad_total += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), 0)

    q = tl.load(queries + row[:, None] * q_token + width[None, :], mask, 0.0).to(tl.float32)
    k = tl.load(keys + row[:, None] * k_token + width[None, :], mask, 0.0).to(tl.float32)
    step = tl.load(beta + row * b_token, inside, 0.0).to(tl.float32)[:, None]
    b = tl.load(sums + row[:, None] * K + width[None, :], known, 0.0)
    total = tl.load(sums + (C - 1) * K + width, width < K, 0.0)
    read = tl.where((document == carried)[:, None], tl.exp2(b), 0.0)
    grad_query = grad_query * read
    read_key = -read_key * read
    write_key *= tl.where((document == last)[:, None], tl.exp2(tl.minimum(total[None, :] - b, 0.0)), 0.0)
    grad_total = tl.where(last == carried, tl.exp2(total), 0.0) * grad_total + tl.sum(write_key * k * step, 0)

    same = document[:, None] == document[None, :]
    square = row[:, None] * C + row[None, :]
    p = tl.load(grad_scores + square)
    a = tl.load(grad_overlaps + square)
    for block in range(1, C // 16):
        later, earlier = anchored(b, tl.load(sums + 16 * block * K + width, width < K, 0.0), block, C)
        decayed = (k * step * earlier).to(dtype)
        grad_query += later * tl.dot(p, decayed, input_precision=PRECISION)
        read_key += later * tl.dot(a, decayed, input_precision=PRECISION)
        pairs = tl.dot(tl.trans(p), (q * later).to(dtype), input_precision=PRECISION)
        write_key += earlier * tl.dot(tl.trans(a), (k * later).to(dtype), pairs, input_precision=PRECISION)
    first = row // 16 * 16
    for j in range(16):
        other = first + j  # of the same block of 16, once as the earlier and once as the later token
        there = other < length - token
        query = tl.load(queries + other[:, None] * q_token + width[None, :], there[:, None] & known, 0.0).to(tl.float32)
        key = tl.load(keys + other[:, None] * k_token + width[None, :], there[:, None] & known, 0.0).to(tl.float32)
        distance = b - tl.load(sums + other[:, None] * K + width[None, :], known, 0.0)
        stepped = key * tl.load(beta + other * b_token, there, 0.0).to(tl.float32)[:, None]
        stepped *= tl.exp2(tl.minimum(distance, 0.0))
        grad_query += tl.load(grad_scores + row * C + other).to(tl.float32)[:, None] * stepped
        read_key += tl.load(grad_overlaps + row * C + other).to(tl.float32)[:, None] * stepped
        pairs = tl.load(grad_scores + other * C + row).to(tl.float32)[:, None] * query
        pairs += tl.load(grad_overlaps + other * C + row).to(tl.float32)[:, None] * key
        write_key += pairs * tl.exp2(tl.minimum(-distance, 0.0))

    target = at * K + (row[:, None] * (heads * K) + width[None, :])
    tl.store(grad_queries + target, grad_query.to(dtype), mask)
    tl.store(grad_keys + target, (read_key + write_key * step).to(dtype), mask)
    share = at * shares + row * (heads * shares) + tl.program_id(2)
    tl.store(grad_beta + share, tl.sum(write_key * k, 1), inside)
    change = q * grad_query + k * (read_key - step * write_key)
    later = (same & (row[:, None] <= row[None, :])).to(tl.float32)
    grad_gate = tl.dot(later, change, input_precision="tf32x3")
    grad_gate += tl.where((document == last)[:, None], grad_total[None, :], 0.0)
    before = tl.load(documents + batch * length + token + row - 1, inside & (token + row > 0), 0)
    grad_gate = tl.where((document == before)[:, None], grad_gate, 0.0)  # a document's first token decays nothing
    tl.store(grad_decay + target, grad_gate.to(grad_decay.dtype.element_ty), mask)
