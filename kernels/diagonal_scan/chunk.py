"""What the kernels of the diagonal scan share: the documents of a chunk, and the fold of segments.

Decays are exponents of two. Tiles of [chunk, columns] are read and written by the copy engine, which fills rows and
columns outside with zeros. `begin` is a chunk's first row; rows behind the end repeat the last document and decay
nothing, so that the sums of the last chunk need no case of their own.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def describe(base, batch, head, stride_b, stride_l, stride_h, length, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One head of a tensor [B, L, H, width] as a matrix, for the copy engine."""
    start = base + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return tl.make_tensor_descriptor(start, [length, width], [stride_l, 1], [ROWS, COLUMNS])


@triton.jit
def load_tile(base, begin, length, stride, columns, width, CHUNK: tl.constexpr):
    """[CHUNK, len(columns)] of a [length, width] matrix with rows `stride` apart; zero outside."""
    rows = tl.arange(0, CHUNK)
    pointers = base + begin.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=(begin + rows < length)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def store_tile(base, tile, begin, length, stride, columns, width, CHUNK: tl.constexpr):
    """The inverse of `load_tile`, in the element type of `base`."""
    rows = tl.arange(0, CHUNK)
    pointers = base + begin.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    inside = (begin + rows < length)[:, None] & (columns < width)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_documents(documents, begin, length, CHUNK: tl.constexpr):
    """Documents of the chunk's rows, of the row before it (0 for the incoming state's) and of its last row."""
    rows = begin + tl.arange(0, CHUNK)
    own = tl.load(documents + tl.minimum(rows, length - 1))
    before = tl.load(documents + begin - 1, mask=begin > 0, other=0)
    last = tl.load(documents + tl.minimum(begin + CHUNK, length) - 1)
    return own, before, last


@triton.jit
def bound_documents(documents, bounds, continues, length, chunks, CHUNK: tl.constexpr):
    """bounds [B, chunks, 2, CHUNK]: first and last row in the chunk of each row's document.

    continues [B, chunks]: whether the chunk's first row goes on with the document of the row before it.
    """
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = chunk * CHUNK
    rows = tl.arange(0, CHUNK)
    own, before, _ = load_documents(documents + batch * length, begin, length, CHUNK)
    same = own[:, None] == own[None, :]
    at = batch * chunks + chunk
    tl.store(bounds + at * 2 * CHUNK + rows, tl.min(tl.where(same, rows[None, :], CHUNK), axis=1))
    tl.store(bounds + (at * 2 + 1) * CHUNK + rows, tl.max(tl.where(same, rows[None, :], 0), axis=1))
    tl.store(continues + at, (tl.min(own, axis=0) == before).to(tl.int32))


@triton.jit
def fold_segments(
    local_state,
    local_decay,
    state,
    decay,
    segments,
    size,
    columns,
    VECTOR: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Boundary states of a row of segments from their maps: state[g+1] = decay_g state[g] + state_g, state[0] = 0.

    local_state [BH, G, K V], local_decay [BH, G, K or 1] -> state [BH, G + 1, K V], decay [BH, G + 1, K or 1], both at
    boundaries; decay[g] is the product that multiplies what comes in at the start. REVERSE folds from the last
    segment: state[g] = decay_g state[g+1] + state_g, state[G] = 0.
    """
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = offsets < size
    if VECTOR:
        channels = offsets // columns
        width = size // columns
    else:
        channels = offsets * 0
        width = 1
    accumulated = tl.zeros([BLOCK], tl.float32)
    product = tl.full([BLOCK], 1.0, tl.float32)
    for step in range(segments + 1):
        boundary = segments - step if REVERSE else step
        at = row * (segments + 1) + boundary
        tl.store(state + at * size + offsets, accumulated, mask=inside)
        tl.store(decay + at * width + channels, product, mask=inside & (offsets == channels * columns))
        if step < segments:
            at = row * segments + (boundary - 1 if REVERSE else boundary)
            factor = tl.load(local_decay + at * width + channels, mask=inside, other=0.0)
            accumulated = factor * accumulated + tl.load(local_state + at * size + offsets, mask=inside, other=0.0)
            product = factor * product


@triton.jit
def boundary_products(
    state, decay, incoming, cotangent, cotangent_decay, outgoing, result, width, columns, VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """<S, dS> over V at every boundary, per channel or over all: the cotangent of the log of a common factor.

    S = state + decay incoming and dS = cotangent + cotangent_decay outgoing; result [BH, G + 1, K or 1].
    """
    boundary, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = row * tl.num_programs(0) + boundary
    k, v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    channels = k if VECTOR else k * 0
    factors = width if VECTOR else 1
    total = tl.zeros([BLOCK_K], tl.float32)
    left = tl.load(decay + at * factors + channels, mask=k < width, other=0.0)
    right = tl.load(cotangent_decay + at * factors + channels, mask=k < width, other=0.0)
    for begin in range(0, columns, BLOCK_V):
        offsets = k[:, None] * columns + (begin + v)[None, :]
        inside = (k < width)[:, None] & (begin + v < columns)[None, :]
        area = width * columns
        s = tl.load(state + at * area + offsets, mask=inside, other=0.0)
        s += left[:, None] * tl.load(incoming + row * area + offsets, mask=inside, other=0.0)
        d = tl.load(cotangent + at * area + offsets, mask=inside, other=0.0)
        d += right[:, None] * tl.load(outgoing + row * area + offsets, mask=inside, other=0.0)
        total += tl.sum(s * d, axis=1)
    if VECTOR:
        tl.store(result + at * width + k, total, mask=k < width)
    else:
        tl.store(result + at, tl.sum(total, axis=0))


@triton.jit
def boundary_state(state, decay, incoming, row, at, columns_k, columns_v, width, columns, VECTOR: tl.constexpr):
    """The state at a boundary, [width, columns] in memory, in the orientation of the two column vectors' shapes."""
    inside = (columns_k < width) & (columns_v < columns)
    offsets = columns_k * columns + columns_v
    carried = tl.load(incoming + row.to(tl.int64) * width * columns + offsets, mask=inside, other=0.0)
    if VECTOR:
        factor = tl.load(decay + at * width + columns_k, mask=columns_k < width, other=0.0)
    else:
        factor = tl.load(decay + at)
    return factor * carried + tl.load(state + at * width * columns + offsets, mask=inside, other=0.0)
