"""Sums over chosen rows of a tile as one matrix product; shared by the kernels of the scans."""

# mypy: disable-error-code="no-untyped-def"
# The parameters of a kernel are pointers and numbers of the device.

import triton
import triton.language as tl

# exp2 of it is zero in float32; a sum of exponents must not be swallowed by what is far below.
LEAST: tl.constexpr = tl.constexpr(-150.0)


@triton.jit
def sum_rows(chosen, terms, OPERAND: tl.constexpr, BITS: tl.constexpr = 24):
    """chosen @ terms in float32, for a boolean chosen [C, C]: row i sums the rows j with chosen[i, j].

    With operands of bfloat16, terms are split into bfloat16 of 8 bits each, as many as keep BITS, whose products with
    0 and 1 are exact; this takes half the time of tf32x3, which stays for kernels of float32 operands.
    """
    chosen = tl.where(chosen, 1.0, 0.0)
    rest = terms.to(tl.float32)
    if OPERAND == tl.bfloat16:  # noqa: SIM300 - a constant of the compiler is no literal
        part = rest.to(tl.bfloat16)
        sums = tl.dot(chosen.to(tl.bfloat16), part)
        for _ in tl.static_range((8 if terms.dtype == tl.bfloat16 else BITS) // 8 - 1):
            rest -= part.to(tl.float32)
            part = rest.to(tl.bfloat16)
            sums = tl.dot(chosen.to(tl.bfloat16), part, sums)
    else:
        sums = tl.dot(chosen, rest, input_precision="tf32x3")
    return sums
