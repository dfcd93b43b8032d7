"""The rows of `longtrain bench stream` on the screen, each as soon as it is measured."""

import math
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from longtrain.bench._rows import print_head, print_row, wide_console
from longtrain.bench._stream_gate import Verdict
from longtrain.bench._stream_memory import highest
from longtrain.bench._stream_modes import CHECKPOINTING
from longtrain.bench._stream_plan import Plan
from longtrain.core.units import format_token_count

BEGIN = (("mode", 35), ("tokens", 7))
TIMES = (("seconds", 9), ("tokens/s", 9), ("TFLOP/s", 8), (f"/ {CHECKPOINTING.name}", 15))
RANKS = (("ranks", 5),)
ALONE = (("/ 1 rank", 8), ("FLOP/s / 1", 10))
MEMORY = (("peak GiB", 9), ("rest GiB", 9), ("host GiB", 9), ("host waits, s", 13), ("bytes/token", 12))
FITS = (
    ("mode", 35),
    ("bytes/token", 12),
    ("at 0, GiB", 10),
    ("longest", 12),
    ("host GiB then", 14),
    ("decided by", 14),
)
WAITING = {
    "block_inputs": "block inputs",
    "carries": "carries",
    "keys_and_values": "keys, values",
    "key_and_value_gradients": "their grads",
    "parameter_gradients": "sums of grads",
}
CLASSES = (
    ("mode", 35),
    ("tokens", 7),
    ("at the peak of", 16),
    ("parameters", 10),
    *((title, 13) for title in WAITING.values()),
    ("rest", 10),
)
GIB = 2**30


class Table:
    """Prints to the standard output; as wide as its columns need where that is not a terminal."""

    def __init__(self, cuda: bool, ranks: int) -> None:
        several = ranks > 1
        self._ranks = ranks
        ranks_column, alone, memory = (RANKS if several else ()), (ALONE if several else ()), (MEMORY if cuda else ())
        self._columns = (*BEGIN, *ranks_column, *TIMES, *alone, *memory)
        self._console = wide_console((*BEGIN, *RANKS, *TIMES, *ALONE, *MEMORY))

    def head(self, machine: dict[str, Any], plan: Plan, held: dict[str, Any], absent: str) -> None:
        """What is measured, and where; `absent` is why StreamBP is not."""
        cuda, sizes = machine["device"] == "cuda", plan.sizes
        where = "" if cuda else " (CPU: times alone, its peak resident set being too coarse to tell memory)"
        ranks = "" if plan.ranks == 1 else f"{plan.ranks} ranks on "
        self._console.print(f"{ranks}{machine['name']}{where}, torch {machine['torch']}, triton {machine['triton']}")
        parameters, gradients = (f"{held[f'{name}_bytes'] / GIB:.4g} GiB" for name in ("parameter", "gradient"))
        self._console.print(
            f"{sizes.model}, {held['parameters'] / 1e9:.3g} billion parameters: {parameters}, and {gradients} for the "
            f"sums of their gradients; {sizes.precision}"
        )
        chunk, logits = format_token_count(sizes.chunk_tokens), format_token_count(plan.logit_tokens)
        documents = (
            "" if plan.document_tokens is None else f" of documents of {format_token_count(plan.document_tokens)}"
        )
        self._console.print(
            f"one sequence{documents}, forward and backward; chunks of {chunk}, logits of {logits} tokens at once"
        )
        if absent:
            self._console.print(f"StreamBP is not measured: {absent}")
        if plan.ranks > 1:
            self._console.print(
                f"shared among the ranks: scan={plan.scan} attend={plan.attend} layout={plan.layout}; "
                "one rank has its share of tokens and chunks"
            )

    def verdict(self, verdict: Verdict, tokens: int) -> None:
        """Of the gate."""
        if verdict.status != "ok":
            self._console.print(Text(f"{verdict.mode} {verdict.status.upper()} {verdict.detail}", style="bold red"))
        elif verdict.against == "float32":
            self._console.print(
                f"gate at {format_token_count(tokens)} tokens: {verdict.mode} and float32 differ by "
                f"{verdict.together:.1e}, {verdict.error:.1e} at most ({verdict.worst})"
            )
        else:
            self._console.print(
                f"    {verdict.mode}: {verdict.together:.1e} from {verdict.against}; nearest to its bound of "
                f"{verdict.bound:.1e} is {verdict.worst}, {verdict.error:.1e}"
            )

    def rows(self) -> None:
        """The head of the rows."""
        print_head(self._console, self._columns, 2)

    def row(self, row: dict[str, Any]) -> None:
        """One row, as it is in the JSON file."""
        several = self._ranks > 1
        begin = [row["mode"], format_token_count(row["tokens"]), *([str(row["ranks"])] if several else [])]
        if row["status"] != "ok":
            print_row(self._console, begin, self._columns, 2)
            style = "yellow" if row["status"] == "out of memory" else "bold red"
            self._console.print(Text(f"    {row['status'].upper()} {row['detail']}", style=style))
            return
        figures = [
            f"{row['seconds']:.3f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['model_tflops']:.3g}",
            _number(row["of_checkpointing"], 1, ".2f"),
            *([_number(row[name], 1, ".2f") for name in ("of_one_rank", "flops_of_one_rank")] if several else []),
            _number(row["peak_bytes"], GIB, ".2f"),
            _number(row["rest_bytes"], GIB, ".2f"),
            _number(row["host_bytes"], GIB, ".2f"),
            _number(row["host_wait_seconds"], 1, ".2f") if row["host_wait_seconds"] else "",
            _number(row["bytes_per_token"], 1, ",.0f"),
        ]
        print_row(self._console, [*begin, *figures[: len(self._columns) - len(begin)]], self._columns, 2)

    def fits(self, fits: Sequence[dict[str, Any]], memory_bytes: int) -> None:
        """Where the rows lead to."""
        if not fits:
            return
        self._console.print(
            f"\nwhere {memory_bytes / GIB:.4g} GiB end: an extrapolation by least squares over the longer half of the "
            "lengths, for the part of a step that gets there first"
        )
        print_head(self._console, FITS, 1)
        for found in fits:
            cells = [
                found["mode"],
                f"{found['bytes_per_token']:,.0f}",
                f"{found['fixed_bytes'] / GIB:.2f}",
                spell_longest(found["longest_tokens"]),
                _number(found["host_bytes_then"], GIB, ".1f"),
                found["phase"],
            ]
            print_row(self._console, cells, FITS, 1)

    def classes(self, rows: Sequence[dict[str, Any]], parameter_bytes: int) -> None:
        """What the memory of some rows is made of. The rest is a chunk's graph, its logits and what kernels use."""
        tops = [(row, top) for row in rows if (top := highest(row["phases"])) is not None]
        if not tops:
            return
        self._console.print("\nGiB by what they are, where a step needs most:")
        print_head(self._console, CLASSES, 3)
        for row, top in tops:
            known = [top["waiting"][name] if top["waiting"] else None for name in WAITING]
            sizes = [parameter_bytes, *known, top["peak_bytes"] - parameter_bytes - sum(size or 0 for size in known)]
            cells = [row["mode"], format_token_count(row["tokens"]), top["phase"]]
            print_row(self._console, [*cells, *(_number(size, GIB, ".3g") for size in sizes)], CLASSES, 3)


def spell_longest(tokens: float | None) -> str:
    """About how many tokens; None: memory does not bound them."""
    if tokens is None:
        return "any"
    unit, name = (2**20, "M") if tokens >= 2**20 else (2**10, "k")
    return f"{math.floor(10 * tokens / unit) / 10:.1f}{name}"


def _number(value: float | None, unit: float, form: str) -> str:
    return "" if value is None else f"{value / unit:{form}}"
