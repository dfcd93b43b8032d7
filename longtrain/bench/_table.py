"""The rows of `longtrain bench kernels` on the screen, each as soon as it is measured."""

from typing import Any

import torch
from rich.text import Text

from longtrain.bench._rows import print_head, print_row, wide_console
from longtrain.bench._timing import Ceilings
from longtrain.core.units import format_token_count

COLUMNS = (
    ("operation", 11),
    ("shape", 16),
    ("by", 20),
    ("direction", 9),
    ("ms", 9),
    ("p20 - p80", 19),
    ("of I/O", 7),
    ("TFLOP/s", 8),
    ("MiB", 8),
    ("vs peer", 8),
)
LEFT = 4  # columns of words


class Table:
    """Prints to the standard output; as wide as its columns need where that is not a terminal."""

    def __init__(self) -> None:
        self._console = wide_console(COLUMNS)

    def head(self, machine: dict[str, Any], ceilings: Ceilings, dtype: torch.dtype) -> None:
        """What the rows are measured on and against, and the columns' names."""
        where = "" if machine["device"] == "cuda" else " (CPU: times say little about the algorithms)"
        self._console.print(f"{machine['name']}{where}, torch {machine['torch']}, triton {machine['triton']}")
        copy, size = ceilings.copy_bytes_per_second / 1e12, ceilings.copy_buffer_bytes / 2**30
        self._console.print(f"matrix product {ceilings.matmul_tflops:.4g} TFLOP/s ({ceilings.matmul})")
        self._console.print(f"copy {copy:.3g} TB/s ({size:.3g} GiB, reads and writes counted)")
        self._console.print(f"inputs {str(dtype).removeprefix('torch.')}; shape: sequences x tokens x heads x width")
        print_head(self._console, COLUMNS, LEFT)

    def row(self, row: dict[str, Any]) -> None:
        """One row, as it is in the JSON file."""
        shape = row["shape"]
        tokens = format_token_count(shape["length"])
        begin = [
            row["operation"],
            f"{shape['batch']}x{tokens}x{shape['heads']}x{shape['width']}",
            row["implementation"],
        ]
        if row["status"] != "ok":
            style = "bold red" if row["ours"] else "yellow"
            print_row(self._console, begin, COLUMNS, LEFT)
            self._console.print(Text(f"    {row['status'].upper()} {row['detail']}", style=style))
            return
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        figures = [
            row["direction"],
            f"{row['median_ms']:.3f}",
            f"{row['p20_ms']:.3f} - {row['p80_ms']:.3f}",
            f"{row['io_fraction']:.1%}",
            f"{row['tflops']:.3g}",
            memory,
            f"{row['speedup']:.2f}x" if "speedup" in row else "",
        ]
        print_row(self._console, [*begin, *figures], COLUMNS, LEFT)
