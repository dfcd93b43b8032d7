"""Kernels that turn the states around a chunk, and their cotangents, into gradients of its inputs; see README.md.

One program is one chunk of one head and BLOCK_K key channels. Gradients of beta and of a scalar decay are sums over key
channels: each block of channels stores its share.
"""

# mypy: disable-error-code="no-untyped-def"
# The parameters of a kernel are pointers and numbers of the device.

import triton
import triton.language as tl

from longtrain_kernels.delta_scan.prepare import anchored, chunk_documents, diagonal_blocks


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
    token = chunk * C + row
    inside = token < length
    width = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = inside[:, None] & (width < K)[None, :]
    q = tl.load(queries + batch * q_batch + group * q_head + token[:, None] * q_token + width[None, :], mask, 0.0)
    k = tl.load(keys + batch * k_batch + group * k_head + token[:, None] * k_token + width[None, :], mask, 0.0)
    step = tl.load(beta + batch * b_batch + head * b_head + token * b_token, inside, 0.0).to(tl.float32)
    document, carried, last = chunk_documents(documents, batch, chunk, length, C)
    b = tl.load(sums + (sequence * chunks + chunk) * C + row)
    total = tl.sum(tl.where(row == C - 1, b, 0.0), 0)
    read = tl.where(document == carried, tl.exp2(b), 0.0)
    write = tl.where(document == last, tl.exp2(tl.minimum(total - b, 0.0)), 0.0)
    carry = tl.where(last == carried, tl.exp2(total), 0.0)

    local = sequence * window_chunks + tl.program_id(0)
    grads += batch * d_batch + head * d_head
    grad_values += (batch * length * heads + head) * V
    score = tl.zeros([C, C], tl.float32)  # cotangent of P, then of A, then both transposed
    overlap = tl.zeros([C, C], tl.float32)
    score_t = tl.zeros([C, C], tl.float32)
    overlap_t = tl.zeros([C, C], tl.float32)
    write_key = tl.zeros([C, BLOCK_K], tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        value_mask = inside[:, None] & (column < V)[None, :]
        grad = tl.load(grads + token[:, None] * d_token + column[None, :], value_mask, 0.0).to(dtype)
        residual = tl.load(grad_values + token[:, None] * heads * V + column[None, :], value_mask, 0.0)
        error = tl.load(errors + (local * C + row[:, None]) * V + column[None, :], (column < V)[None, :], 0.0)
        tile = local * V * K + column[:, None] * K + width[None, :]
        grad_state = tl.load(grad_states + tile, (column < V)[:, None] & (width < K)[None, :], 0.0)
        score = tl.dot(grad, tl.trans(error), score, input_precision=PRECISION)
        overlap = tl.dot(residual, tl.trans(error), overlap, input_precision=PRECISION)
        score_t = tl.dot(error, tl.trans(grad), score_t, input_precision=PRECISION)
        overlap_t = tl.dot(error, tl.trans(residual), overlap_t, input_precision=PRECISION)
        scaled = (error.to(tl.float32) * write[:, None]).to(dtype)
        write_key = tl.dot(scaled, grad_state, write_key, input_precision=PRECISION)
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
        grad = tl.load(grads + token[:, None] * d_token + column[None, :], value_mask, 0.0).to(tl.float32)
        residual = tl.load(grad_values + token[:, None] * heads * V + column[None, :], value_mask, 0.0).to(tl.float32)
        tile = local * V * K + column[:, None] * K + width[None, :]
        inner = (column < V)[:, None] & (width < K)[None, :]
        state = tl.load(states + tile, inner, 0.0)
        grad_state = tl.load(grad_states + tile, inner, 0.0)
        grad_query = tl.dot((grad * read[:, None]).to(dtype), state, grad_query, input_precision=PRECISION)
        grad_key = tl.dot((-residual * read[:, None]).to(dtype), state, grad_key, input_precision=PRECISION)
        grad_total += carry * tl.sum(state.to(tl.float32) * grad_state.to(tl.float32))

    target = ((batch * length + token[:, None]) * heads + head) * K + width[None, :]
    tl.store(grad_queries + target, grad_query.to(dtype), mask)
    tl.store(grad_keys + target, grad_key.to(dtype), mask)
    change = tl.sum(q.to(tl.float32) * grad_query + k.to(tl.float32) * grad_key, 1) - 2.0 * step * grad_step
    later = tl.where(same & (row[:, None] >= row[None, :]), change[:, None], 0.0)
    grad_gate = tl.sum(later, 0) + tl.where(document == last, grad_total, 0.0)
    before = tl.load(documents + batch * length + token - 1, inside & (token > 0), 0)
    grad_gate = tl.where(document == before, grad_gate, 0.0)  # the decay of a document's first token multiplies zero
    share = ((batch * length + token) * heads + head) * shares + tl.program_id(2)
    tl.store(grad_beta + share, grad_step, inside)
    tl.store(grad_decay + share, grad_gate, inside)


@triton.jit
def vector_gradients(
    grads, queries, keys, beta, documents, sums, states, errors, grad_states, grad_values,
    grad_queries, grad_keys, grad_beta, grad_decay,
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
    token = chunk * C + row
    inside = token < length
    width = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    known = (width < K)[None, :]
    mask = inside[:, None] & known
    queries += batch * q_batch + (head // ratio) * q_head
    keys += batch * k_batch + (head // ratio) * k_head
    beta += batch * b_batch + head * b_head
    sums += (sequence * chunks + chunk) * C * K
    document, carried, last = chunk_documents(documents, batch, chunk, length, C)

    local = sequence * window_chunks + tl.program_id(0)
    grads += batch * d_batch + head * d_head
    grad_values += (batch * length * heads + head) * V
    score = tl.zeros([C, C], tl.float32)  # cotangent of P, then of A, then both transposed
    overlap = tl.zeros([C, C], tl.float32)
    score_t = tl.zeros([C, C], tl.float32)
    overlap_t = tl.zeros([C, C], tl.float32)
    grad_query = tl.zeros([C, BLOCK_K], tl.float32)
    read_key = tl.zeros([C, BLOCK_K], tl.float32)
    write_key = tl.zeros([C, BLOCK_K], tl.float32)
    grad_total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        value_mask = inside[:, None] & (column < V)[None, :]
        grad = tl.load(grads + token[:, None] * d_token + column[None, :], value_mask, 0.0).to(dtype)
        residual = tl.load(grad_values + token[:, None] * heads * V + column[None, :], value_mask, 0.0)
        error = tl.load(errors + (local * C + row[:, None]) * V + column[None, :], (column < V)[None, :], 0.0)
        tile = local * V * K + column[:, None] * K + width[None, :]
        state = tl.load(states + tile, (column < V)[:, None] & known, 0.0)
        grad_state = tl.load(grad_states + tile, (column < V)[:, None] & known, 0.0)
        score = tl.dot(grad, tl.trans(error), score, input_precision=PRECISION)
        overlap = tl.dot(residual, tl.trans(error), overlap, input_precision=PRECISION)
        score_t = tl.dot(error, tl.trans(grad), score_t, input_precision=PRECISION)
        overlap_t = tl.dot(error, tl.trans(residual), overlap_t, input_precision=PRECISION)
        grad_query = tl.dot(grad, state, grad_query, input_precision=PRECISION)
        read_key = tl.dot(residual, state, read_key, input_precision=PRECISION)
        write_key = tl.dot(error, grad_state, write_key, input_precision=PRECISION)
        grad_total += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), 0)

    q = tl.load(queries + token[:, None] * q_token + width[None, :], mask, 0.0).to(tl.float32)
    k = tl.load(keys + token[:, None] * k_token + width[None, :], mask, 0.0).to(tl.float32)
    step = tl.load(beta + token * b_token, inside, 0.0).to(tl.float32)[:, None]
    b = tl.load(sums + row[:, None] * K + width[None, :], known, 0.0)
    total = tl.load(sums + (C - 1) * K + width, width < K, 0.0)
    read = tl.where((document == carried)[:, None], tl.exp2(b), 0.0)
    grad_query = grad_query * read
    read_key = -read_key * read
    write_key *= tl.where((document == last)[:, None], tl.exp2(tl.minimum(total[None, :] - b, 0.0)), 0.0)
    grad_total = tl.where(last == carried, tl.exp2(total), 0.0) * grad_total + tl.sum(write_key * k * step, 0)

    same = document[:, None] == document[None, :]
    p = tl.where(same & (row[:, None] >= row[None, :]), score, 0.0).to(dtype)
    a = tl.where(same & (row[:, None] > row[None, :]), -overlap, 0.0).to(dtype)
    p_t = tl.where(same & (row[:, None] <= row[None, :]), score_t, 0.0).to(dtype)
    a_t = tl.where(same & (row[:, None] < row[None, :]), -overlap_t, 0.0).to(dtype)
    for block in range(1, C // 16):
        later, earlier = anchored(b, tl.load(sums + 16 * block * K + width, width < K, 0.0), block, C)
        decayed = (k * step * earlier).to(dtype)
        grad_query += later * tl.dot(p, decayed, input_precision=PRECISION)
        read_key += later * tl.dot(a, decayed, input_precision=PRECISION)
        pairs = tl.dot(p_t, (q * later).to(dtype), input_precision=PRECISION)
        write_key += earlier * tl.dot(a_t, (k * later).to(dtype), pairs, input_precision=PRECISION)
    p_own, a_own = diagonal_blocks(p.to(tl.float32), C), diagonal_blocks(a.to(tl.float32), C)
    p_own_t, a_own_t = diagonal_blocks(p_t.to(tl.float32), C), diagonal_blocks(a_t.to(tl.float32), C)
    first = row // 16 * 16
    for j in range(16):
        other = chunk * C + first + j
        there = (other < length)[:, None] & known
        query = tl.load(queries + other[:, None] * q_token + width[None, :], there, 0.0).to(tl.float32)
        key = tl.load(keys + other[:, None] * k_token + width[None, :], there, 0.0).to(tl.float32)
        stepped = key * tl.load(beta + other * b_token, other < length, 0.0).to(tl.float32)[:, None]
        distance = b - tl.load(sums + (first + j)[:, None] * K + width[None, :], known, 0.0)
        own = (tl.arange(0, 16) == j)[None, :]
        stepped *= tl.exp2(tl.minimum(distance, 0.0))
        grad_query += tl.sum(tl.where(own, p_own, 0.0), 1)[:, None] * stepped
        read_key += tl.sum(tl.where(own, a_own, 0.0), 1)[:, None] * stepped
        pairs = tl.sum(tl.where(own, p_own_t, 0.0), 1)[:, None] * query
        pairs += tl.sum(tl.where(own, a_own_t, 0.0), 1)[:, None] * key
        write_key += pairs * tl.exp2(tl.minimum(-distance, 0.0))

    target = ((batch * length + token[:, None]) * heads + head) * K + width[None, :]
    tl.store(grad_queries + target, grad_query.to(dtype), mask)
    tl.store(grad_keys + target, (read_key + write_key * step).to(dtype), mask)
    share = ((batch * length + token) * heads + head) * shares + tl.program_id(2)
    tl.store(grad_beta + share, tl.sum(write_key * k, 1), inside)
    change = q * grad_query + k * (read_key - step * write_key)
    later = (same & (row[:, None] <= row[None, :])).to(tl.float32)
    grad_gate = tl.dot(later, change, input_precision="tf32x3")
    grad_gate += tl.where((document == last)[:, None], grad_total[None, :], 0.0)
    before = tl.load(documents + batch * length + token - 1, inside & (token > 0), 0)
    grad_gate = tl.where((document == before)[:, None], grad_gate, 0.0)  # a document's first token decays nothing
    tl.store(grad_decay + target, grad_gate.to(grad_decay.dtype.element_ty), mask)
