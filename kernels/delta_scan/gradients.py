"""Kernels that turn the states around a chunk, and their cotangents, into gradients of its inputs; see README.md.

One program is one chunk of one head and BLOCK_K key channels. Gradients of beta and of a scalar decay are sums over key
channels: each block of channels stores its share.
"""

# mypy: disable-error-code="no-untyped-def"
# The parameters of a kernel are pointers and numbers of the device.

import triton
import triton.language as tl

from longtrain_kernels.delta_scan.prepare import ANCHOR, HEAD_SCALE, anchored, chunk_document, chunk_documents, is_far
from longtrain_kernels.row_sums import sum_rows


@triton.jit
def state_products(
    states, grad_states, width, K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr
):
    """<S, dS'> of one chunk for each key channel of `width`.

    Reads the tiles again: one that feeds a matrix product must not be looked at in the same pipelined loop. Triton (3.6
    at least) then keeps a single copy of it in shared memory, and refills that while the product may still read it.
    """
    products = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        tile = column[:, None] * K + width[None, :]
        mask = (column < V)[:, None] & (width < K)[None, :]
        state = tl.load(states + tile, mask, 0.0).to(tl.float32)
        products += tl.sum(state * tl.load(grad_states + tile, mask, 0.0).to(tl.float32), 0)
    return products


@triton.jit
def chunk_gradients(
    grads, queries, keys, beta, documents, sums, far, states, errors, grad_states, grad_values,
    grad_scores, grad_overlaps, grad_queries, grad_keys, grad_beta, grad_decay,
    d_batch, d_token, d_head, q_batch, q_token, q_head, k_batch, k_token, k_head, b_batch, b_token, b_head,
    length, chunks, first_chunk, window_chunks, heads, ratio, shares, far_blocks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With a scalar decay or none; or with a vector decay that is not far, whose operands are scaled as in
    `near_pairs`."""
    chunk = first_chunk + tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    if VECTOR:  # noqa: SIM102 - a constant of the compiler decides whether the flags are there
        if is_far(far, sequence * chunks + chunk, far_blocks):
            return
    batch, head = sequence // heads, sequence % heads
    dtype: tl.constexpr = keys.dtype.element_ty
    row = tl.arange(0, C)
    token = chunk * C
    inside = row < length - token
    width = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    known = (width < K)[None, :]
    mask = inside[:, None] & known
    local = sequence * window_chunks + tl.program_id(0)
    at = (batch * length + token) * heads + head
    grads += batch * d_batch + head * d_head + token * d_token
    grad_values += at * V
    errors += local * C * V
    states += local * V * K
    grad_states += local * V * K
    queries += batch * q_batch + (head // ratio) * q_head + token * q_token
    keys += batch * k_batch + (head // ratio) * k_head + token * k_token
    query_tile, key_tile = row[:, None] * q_token + width[None, :], row[:, None] * k_token + width[None, :]
    square = local * C * C + (row[:, None] * C + row[None, :])
    step = tl.load(beta + batch * b_batch + head * b_head + token * b_token + row * b_token, inside, 0.0).to(tl.float32)
    sums += (sequence * chunks + chunk) * C * (K if VECTOR else 1)
    sum_tile = row[:, None] * K + width[None, :]
    # Operands of the products of pairs go to shared memory; what is needed again behind the loop is loaded again there,
    # so that registers do not hold it (the policies tell the loads apart for the compiler).
    query = tl.load(queries + query_tile, mask, 0.0, eviction_policy="evict_last")
    key = tl.load(keys + key_tile, mask, 0.0, eviction_policy="evict_last")
    written = key.to(tl.float32) * step[:, None]
    if VECTOR:
        b = tl.load(sums + sum_tile, known, 0.0, eviction_policy="evict_last")
        written *= tl.exp2(-b - ANCHOR)
        up = tl.exp2(b + ANCHOR)
        query, key = (query.to(tl.float32) * up).to(dtype), (key.to(tl.float32) * up).to(dtype)
    written = written.to(dtype)
    grad_query = tl.zeros([C, BLOCK_K], tl.float32)
    read_key = tl.zeros([C, BLOCK_K], tl.float32)
    write_key = tl.zeros([C, BLOCK_K], tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        value_mask = inside[:, None] & (column < V)[None, :]
        grad = tl.load(grads + (row[:, None] * d_token + column[None, :]), value_mask, 0.0).to(dtype)
        residual = tl.load(grad_values + (row[:, None] * (heads * V) + column[None, :]), value_mask, 0.0)
        error = tl.load(errors + (row[:, None] * V + column[None, :]), (column < V)[None, :], 0.0)
        tile = column[:, None] * K + width[None, :]
        state = tl.load(states + tile, (column < V)[:, None] & known, 0.0)
        grad_state = tl.load(grad_states + tile, (column < V)[:, None] & known, 0.0)
        grad_query = tl.dot(grad, state, grad_query, input_precision=PRECISION)
        read_key = tl.dot(residual, state, read_key, input_precision=PRECISION)
        write_key = tl.dot(error, grad_state, write_key, input_precision=PRECISION)
    products = state_products(states, grad_states, width, K, V, BLOCK_V, BLOCK_K)

    p = tl.load(grad_scores + square)
    a = tl.load(grad_overlaps + square)
    target = at * K + (row[:, None] * (heads * K) + width[None, :])
    if VECTOR:
        carried, last = chunk_document(documents, batch, chunk, length, C)
        b = tl.load(sums + sum_tile, known, 0.0, eviction_policy="evict_first")
        total = tl.load(sums + (C - 1) * K + width, width < K, 0.0)
        scale = tl.exp2(b + ANCHOR)
        read = tl.where(last == carried, HEAD_SCALE, 0.0)
    else:
        document, carried, last = chunk_documents(documents, batch, chunk, length, C)
        b = tl.load(sums + row)
        total = tl.sum(tl.where(row == C - 1, b, 0.0), 0)
        scale = 1.0
        read = tl.where(document == carried, tl.exp2(b), 0.0)[:, None]
    grad_query = tl.dot(p, written, grad_query * read, input_precision=PRECISION) * scale
    tl.store(grad_queries + target, grad_query.to(dtype), mask)
    change = tl.load(queries + query_tile, mask, 0.0, eviction_policy="evict_first").to(tl.float32) * grad_query
    read_key = tl.dot(a, written, read_key * -read, input_precision=PRECISION) * scale
    k = tl.load(keys + key_tile, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
    change += k * read_key
    stepped = k * step[:, None]
    if VECTOR:
        down = 1.0 / scale
        write_key *= tl.exp2(total + ANCHOR)[None, :]
    else:
        down = 1.0
        write_key *= tl.where(document == last, tl.exp2(tl.minimum(total - b, 0.0)), 0.0)[:, None]
    grad_total = tl.where(last == carried, tl.exp2(total), 0.0) * products + tl.sum(write_key * down * stepped, 0)
    write_key = tl.dot(tl.trans(p), query, write_key, input_precision=PRECISION)
    write_key = tl.dot(tl.trans(a), key, write_key, input_precision=PRECISION) * down
    tl.store(grad_keys + target, (read_key + write_key * step[:, None]).to(dtype), mask)
    grad_step = tl.sum(write_key * k, 1)
    share = at * shares + row * (heads * shares) + tl.program_id(2)
    tl.store(grad_beta + share, grad_step, inside)

    # The decay of a document's first token multiplies zero.
    if VECTOR:
        later = row[:, None] <= row[None, :]
        grad_gate = sum_rows(later, change - write_key * stepped, dtype, 16) + grad_total[None, :]
        grad_gate = tl.where(((row > 0) | (last == carried))[:, None], grad_gate, 0.0)
        tl.store(grad_decay + target, grad_gate.to(grad_decay.dtype.element_ty), mask)
    else:
        change_row = tl.sum(change, 1) - step * grad_step
        later = (document[:, None] == document[None, :]) & (row[:, None] >= row[None, :])
        grad_gate = tl.sum(tl.where(later, change_row[:, None], 0.0), 0)
        grad_gate += tl.where(document == last, tl.sum(grad_total, 0), 0.0)
        before = tl.load(documents + batch * length + token + row - 1, inside & (token + row > 0), 0)
        tl.store(grad_decay + share, tl.where(document == before, grad_gate, 0.0), inside)


@triton.jit
def pair_gradients(
    grads, documents, sums, errors, grad_values, grad_scores, grad_overlaps, d_batch, d_token, d_head,
    length, chunks, first_chunk, window_chunks, heads,
    V: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The cotangents of P and A of one chunk; those of a vector decay before they are weighted with it."""
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
    weight = tl.where(document[:, None] == document[None, :], 1.0, 0.0)
    if not VECTOR:
        b = tl.load(sums + (sequence * chunks + chunk) * C + row)
        weight *= tl.exp2(tl.minimum(b[:, None] - b[None, :], 0.0))
    # The sign of A is in its weight: where a product's result was negated and then multiplied, ptxas 12.8 has taken it
    # for unused and removed the product.
    score *= tl.where(row[:, None] >= row[None, :], weight, 0.0)
    overlap *= tl.where(row[:, None] > row[None, :], -weight, 0.0)
    target = local * C * C + (row[:, None] * C + row[None, :])
    tl.store(grad_scores + target, score.to(dtype))
    tl.store(grad_overlaps + target, overlap.to(dtype))


@triton.jit
def far_gradients(
    grads, queries, keys, beta, documents, sums, far, states, errors, grad_states, grad_values,
    grad_scores, grad_overlaps, grad_queries, grad_keys, grad_beta, grad_decay,
    d_batch, d_token, d_head, q_batch, q_token, q_head, k_batch, k_token, k_head, b_batch, b_token, b_head,
    length, chunks, first_chunk, window_chunks, heads, ratio, shares, far_blocks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """With a vector decay, where a chunk is far; pairs of tokens as in `far_pairs`."""
    chunk = first_chunk + tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    if not is_far(far, sequence * chunks + chunk, far_blocks):
        return
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

    q = tl.load(queries + row[:, None] * q_token + width[None, :], mask, 0.0).to(tl.float32)
    k = tl.load(keys + row[:, None] * k_token + width[None, :], mask, 0.0).to(tl.float32)
    step = tl.load(beta + row * b_token, inside, 0.0).to(tl.float32)[:, None]
    b = tl.load(sums + row[:, None] * K + width[None, :], known, 0.0)
    total = tl.load(sums + (C - 1) * K + width, width < K, 0.0)
    read = tl.where((document == carried)[:, None], tl.exp2(b), 0.0)
    grad_query = grad_query * read
    read_key *= -read
    write_key *= tl.where((document == last)[:, None], tl.exp2(tl.minimum(total[None, :] - b, 0.0)), 0.0)
    products = state_products(states, grad_states, width, K, V, BLOCK_V, BLOCK_K)
    grad_total = tl.where(last == carried, tl.exp2(total), 0.0) * products + tl.sum(write_key * k * step, 0)

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
    grad_gate = sum_rows(same & (row[:, None] <= row[None, :]), change, dtype, 16)
    grad_gate += tl.where((document == last)[:, None], grad_total[None, :], 0.0)
    before = tl.load(documents + batch * length + token + row - 1, inside & (token + row > 0), 0)
    grad_gate = tl.where((document == before)[:, None], grad_gate, 0.0)  # a document's first token decays nothing
    tl.store(grad_decay + target, grad_gate.to(grad_decay.dtype.element_ty), mask)
