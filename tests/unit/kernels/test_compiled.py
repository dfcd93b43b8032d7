"""What the compilers make of the kernels for an H200; the interpreter cannot show it. See tests/harness/compiled.py."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.compiled import SHARED_MEMORY, refilled_slots, removed_products

OPERATIONS = ("scalar", "vector", "delta scalar", "delta vector")


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Of every operation one, all at work at once, in processes in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.harness.compiled"]
    processes = {
        operation: subprocess.Popen(
            [*command, operation, "128", "bfloat16"],
            cwd=Path(__file__).parents[3], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for operation in OPERATIONS
    }  # fmt: skip
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_kernel_compiles_to_what_it_says(compilers: dict[str, subprocess.Popen[str]], operation: str) -> None:
    output, errors = compilers[operation].communicate()
    assert compilers[operation].returncode == 0, errors[-2000:]
    kernels = [json.loads(line) for line in output.splitlines()]
    assert len(kernels) > 5
    for kernel in kernels:
        assert not kernel["refilled_slots"], kernel
        assert kernel["removed_products"] == 0, kernel
        assert kernel["shared_bytes"] <= SHARED_MEMORY, kernel
        # Spills cost time, not results; this much would say that a kernel has lost its shape.
        assert kernel["spilled_bytes"] <= 512, kernel


LOOP = """
    %tile = ttg.local_alloc : () -> !ttg.memdesc<{slots}x32x64xbf16, #shared, #smem, mutable>
    %at = ttg.memdesc_index %tile[%c0] : !ttg.memdesc<{slots}x32x64xbf16>
    %first = ttg.async_copy_global_to_local %pointer, %at mask %mask
    %loop = scf.for %i = %c0 to %c128 step %c32 iter_args(%arg = %zero) {{
      %read = ttg.memdesc_index %tile[%extract] : !ttg.memdesc<{slots}x32x64xbf16>
      %dot = ttng.warp_group_dot %left, %read, %arg {{isAsync = true}}
      %into = ttg.memdesc_index %tile[%insert] : !ttg.memdesc<{slots}x32x64xbf16>
      %next = ttg.async_copy_global_to_local %pointer, %into mask %mask
    }}
"""


def test_a_slot_that_is_refilled_under_a_product_is_found() -> None:
    assert refilled_slots(LOOP.format(slots=1)) == ["%tile"]
    assert refilled_slots(LOOP.format(slots=2)) == []


def test_a_product_that_has_been_waited_for_reads_no_more() -> None:
    copy = "      %into ="
    waited = LOOP.replace(copy, f"      %done = ttng.warp_group_dot_wait %dot {{{{pendings = 0 : i32}}}}\n{copy}")
    assert refilled_slots(waited.format(slots=1)) == []


def test_a_placeholder_of_a_product_is_found() -> None:
    kept = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT ;"
    removed = "HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0 ;"
    assert removed_products(f"{kept}\n{removed}\n{kept}") == 1
