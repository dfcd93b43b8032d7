"""The scan with a vector decay, a token at a time, for segments that decay beyond the reach of `vector_kernels`.

Exact for any decay, and slow: no matrix products. The roles of x, y and z are those of `vector_kernels.scan_segments`,
with q and k as they are.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from longtrain_kernels.diagonal_scan.chunk import boundary_state


@triton.jit
def scan_tokens(
    x, y, z, out, gates, documents, far, state, decay, incoming, local_state, local_decay,
    length, heads, segment_tokens,
    x_b, x_l, x_h, y_b, y_l, y_h, z_b, z_l, z_h, out_b, out_l, out_h, gates_b, gates_l, gates_h,
    WIDTH_Y: tl.constexpr, WIDTH_Z: tl.constexpr,
    X_GROUP: tl.constexpr, Y_GROUP: tl.constexpr, Z_GROUP: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_Z: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
    SUMMARIZE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Forward: S <- a S + y z^T, out = x^T S. Reverse: S <- S + y z^T, out = x^T S, S <- a S.

    a decays the rows of S, or where TRANSPOSED its columns. SUMMARIZE starts from zero and stores the map of the
    segment instead of `out`.
    """
    tile, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at_segment = row.to(tl.int64) * tl.num_programs(1) + segment
    if tl.load(far + at_segment) == 0:
        return
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    columns_y, columns_z = tl.arange(0, BLOCK_Y), tile * BLOCK_Z + tl.arange(0, BLOCK_Z)
    inside_y, inside_z = columns_y < WIDTH_Y, columns_z < WIDTH_Z
    x += batch * x_b + (head // X_GROUP) * x_h + columns_y
    y += batch * y_b + (head // Y_GROUP) * y_h + columns_y
    z += batch * z_b + (head // Z_GROUP) * z_h + columns_z
    out += batch * out_b + head * out_h + columns_z
    if TRANSPOSED:
        channels, inside = columns_z, inside_z
    else:
        channels, inside = columns_y, inside_y
    gates += batch * gates_b + head * gates_h + channels
    documents += batch * length
    if SUMMARIZE:
        accumulated = tl.zeros([BLOCK_Y, BLOCK_Z], tl.float32)
    else:
        boundary = row.to(tl.int64) * (tl.num_programs(1) + 1) + segment + (1 if REVERSE else 0)
        if TRANSPOSED:
            accumulated = boundary_state(
                state, decay, incoming, row, boundary, columns_z[None, :], columns_y[:, None], WIDTH_Z, WIDTH_Y, True
            )
        else:
            accumulated = boundary_state(
                state, decay, incoming, row, boundary, columns_y[:, None], columns_z[None, :], WIDTH_Y, WIDTH_Z, True
            )
    product = tl.where(inside, 1.0, 0.0)
    first = segment * segment_tokens
    count = tl.minimum(segment_tokens, length - first)
    for step in range(count):
        token = (first + count - 1 - step if REVERSE else first + step).to(tl.int64)
        before = tl.load(documents + token - 1, mask=token > 0, other=0)
        goes_on = tl.load(documents + token) == before
        factor = tl.exp2(tl.load(gates + token * gates_l, mask=inside, other=0.0).to(tl.float32) * UNIT)
        factor = tl.where(goes_on, factor, 0.0)
        product *= factor
        factor = factor[None, :] if TRANSPOSED else factor[:, None]
        y_row = tl.load(y + token * y_l, mask=inside_y, other=0.0).to(tl.float32)
        z_row = tl.load(z + token * z_l, mask=inside_z, other=0.0).to(tl.float32)
        if not REVERSE:
            accumulated *= factor
        accumulated += y_row[:, None] * z_row[None, :]
        if not SUMMARIZE:
            x_row = tl.load(x + token * x_l, mask=inside_y, other=0.0).to(tl.float32)
            result = tl.sum(x_row[:, None] * accumulated, axis=0)
            tl.store(out + token * out_l, result.to(out.dtype.element_ty), mask=inside_z)
        if REVERSE:
            accumulated *= factor
    if SUMMARIZE:
        pointers = local_state + at_segment * WIDTH_Y * WIDTH_Z + columns_y[:, None] * WIDTH_Z + columns_z[None, :]
        tl.store(pointers, accumulated, mask=inside_y[:, None] & inside_z[None, :])
        if tile == 0:
            tl.store(local_decay + at_segment * WIDTH_Y + channels, product, mask=inside)
