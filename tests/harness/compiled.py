"""Every kernel that an operation launches, compiled for an H200 on any machine, and what is wrong with the result.

    python -m tests.harness.compiled OPERATION WIDTH DTYPE

prints a line of JSON a kernel. Launches compile and do not run, so that no GPU is needed; what the compilers make is
read instead. Compilers have made wrong programs of right kernels without a word, and Triton's interpreter, which runs
the kernels on CPUs, shows none of it:

- Triton 3.6 keeps one copy of a pipelined tile that feeds a matrix product and is looked at by itself in the same loop.
  The copy of the next iteration then lands in it while the product may still read it (`refilled_slots`).
- ptxas 12.8 took a product's negated and multiplied result for unused and removed the product (`removed_products`).
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

SHARED_MEMORY = 227 * 2**10  # bytes that a program may have

Compiled = dict[str, Any]
# By threads, or by the copy engine: the buffer comes before the barrier that it completes.
_COPY = re.compile(r"async_copy_global_to_local %[\w#]+, (%\w+)|async_tma_copy_global_to_local .*\] (%\w+),")


def refilled_slots(ttgir: str) -> list[str]:
    """Buffers that a loop refills for a later iteration while its asynchronous products may read them."""
    slots: dict[str, int] = {}  # copies that a buffer of pipelined tiles holds
    buffer_of: dict[str, str] = {}
    ahead: dict[str, int] = {}  # iterations that were copied before the loop began
    body: list[str] = []
    loop_end = ""
    found: set[str] = set()
    for line in ttgir.splitlines():
        if match := re.search(r"(%\w+) = ttg\.local_alloc : .*memdesc<(\d+)x\d+x", line):
            slots[match[1]], buffer_of[match[1]] = int(match[2]), match[1]
        elif match := re.search(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", line):
            buffer_of[match[1]] = buffer_of.get(match[2], "")
        if loop_end:
            body.append(line)
            if line.startswith(loop_end):
                full = {buffer for buffer, copies in slots.items() if copies <= ahead.get(buffer, 0)}
                found |= _read_when_copied(body, buffer_of) & full
                loop_end, ahead = "", {}
        elif "= scf.for" in line:
            loop_end, body = re.sub(r"\S.*", "}", line), []
        elif match := _COPY.search(line):
            buffer = buffer_of.get(match[1] or match[2], "")
            ahead[buffer] = ahead.get(buffer, 0) + 1
    return sorted(found)


def _read_when_copied(body: list[str], buffer_of: dict[str, str]) -> set[str]:
    """Buffers that a copy of a loop's body writes to while a product that reads them is in flight."""
    in_flight: list[list[str]] = []
    found = set()
    for line in body * 2:  # products may still be in flight when the next iteration begins
        if match := re.search(r"warp_group_dot (%\w+)\S*, (%\w+)\S*,.*isAsync = true", line):
            in_flight.append([buffer_of.get(operand, "") for operand in match.groups()])
        elif match := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line):
            in_flight = in_flight[max(0, len(in_flight) - int(match[1])) :]
        elif match := _COPY.search(line):
            found |= {buffer_of.get(match[1] or match[2], "")} & {buffer for product in in_flight for buffer in product}
    return found


def removed_products(sass: str) -> int:
    """Matrix products of which the assembler left a placeholder that multiplies nothing."""
    return len(re.findall(r"HGMMA\S* RZ, gdesc\[URZ\]", sass))


def _tool(name: str, cubin: bytes, option: str) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _describe(name: str, kernel: Any) -> Compiled:
    usage = _tool("cuobjdump", kernel.asm["cubin"], "--dump-resource-usage")
    # Disassembling takes 0.8 s each time; where Triton has asked for no product, none can be missing.
    multiplies = re.search(r"warp_group_dot|tt\.dot", kernel.asm["ttgir"])
    sass = _tool("cuobjdump", kernel.asm["cubin"], "--dump-sass") if multiplies else ""
    registers, stack = (int(re.findall(rf"{field}:(\d+)", usage)[-1]) for field in ("REG", "STACK"))
    return {
        "kernel": name,
        "refilled_slots": refilled_slots(kernel.asm["ttgir"]),
        "removed_products": removed_products(sass),
        "products": len(re.findall(r"\bHG?MMA", sass)),
        "registers": registers,
        "spilled_bytes": stack,
        "shared_bytes": kernel.metadata.shared,
    }


def launched(operation: str, width: int, dtype: torch.dtype) -> list[Compiled]:
    """The kernels of a forward and a backward pass of `convolution`, or of a scan as `scan_inputs` names it.

    For a process of its own in which Triton compiles: it is left without a device to run on.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Offline:
        """As much of a driver as compiling asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    kernels: dict[int, tuple[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels[id(kernel)] = self.__name__, kernel
        return kernel

    triton.runtime.driver.set_active(Offline())
    JITFunction.run = compile_only
    try:
        _forward_and_backward(operation, width, dtype)
    finally:
        JITFunction.run = run
    return [_describe(name, kernel) for name, kernel in kernels.values()]


def _forward_and_backward(operation: str, width: int, dtype: torch.dtype) -> None:
    from longtrain_kernels.backend import Backend
    from longtrain_kernels.delta_scan import DeltaScan
    from longtrain_kernels.diagonal_scan import DiagonalScan
    from longtrain_kernels.short_convolution import short_convolution
    from tests.harness.scans import scan_inputs

    length, heads = 512, 2
    documents = torch.zeros(1, length, dtype=torch.int32)
    if operation == "convolution":
        rows = torch.zeros(1, length + 3, heads * width, dtype=dtype, requires_grad=True)
        weight = torch.zeros(heads * width, 4, requires_grad=True)
        short_convolution(rows, weight, documents, "silu", Backend.TRITON).sum().backward()
        return
    inputs = scan_inputs(operation, (1, length, heads, heads, width, width), dtype)
    scan = DeltaScan if operation.startswith("delta") else DiagonalScan
    state = torch.zeros(1, heads, width, width, requires_grad=True)
    output, final = scan(**inputs, backend=Backend.TRITON).apply(documents, state)
    (output.float().sum() + final.sum()).backward()


if __name__ == "__main__":
    for found in launched(sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])):
        print(json.dumps(found), flush=True)
