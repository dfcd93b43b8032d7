"""The rows of `longtrain bench sequence-parallel` on the screen, each as soon as it is measured."""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from longtrain.bench._rows import print_head, print_row, wide_console
from longtrain.bench._sequence_parallel_cases import Plan
from longtrain.bench._sequence_parallel_projection import RANKS
from longtrain.comm.links import Link
from longtrain.core.units import format_token_count

COLUMNS = (
    ("operation", 17),
    ("by", 17),
    ("layout", 10),
    ("docs", 6),
    ("scaling", 7),
    ("tokens", 6),
    ("pass", 7),
    ("1 rank ms", 10),
    ("ms", 10),
    ("speed-up", 8),
    ("efficiency", 10),
    ("sent MiB", 9),
    ("exposed ms", 10),
)
LEFT = 7  # columns of words
PROJECTION = (("operation", 11), ("by", 17), ("link", 14), ("KiB", 9), *((f"{ranks} ranks", 10) for ranks in RANKS))


class Table:
    """Prints to the standard output; as wide as its columns need where that is not a terminal."""

    def __init__(self) -> None:
        self._console = wide_console(COLUMNS)

    def head(self, machine: dict[str, Any], plan: Plan, peers: dict[str, dict[str, str | None]]) -> None:
        """What is measured, and where."""
        where = "" if plan.device == "cuda" else " (CPU: times say little about the algorithms)"
        self._console.print(f"{plan.ranks} ranks on {machine['name']}{where}, torch {machine['torch']}")
        self._console.print(f"inputs {plan.dtype}, {plan.heads} heads of {plan.width}; a layer is {_wide(plan)} wide")
        for name, found in peers.items():
            if found["missing"]:
                self._console.print(f"{name}: {found['missing']}")

    def links(self, links: tuple[Link, Link]) -> None:
        """What ranks reach each other through, and the head of the rows."""
        names = ("all-gather", "two ranks")
        parts = [
            f"{n} {link.latency * 1e6:.3g} us and {link.bandwidth / 1e9:.3g} GB/s"
            for n, link in zip(names, links, strict=True)
        ]
        self._console.print(f"links: {', '.join(parts)}, of each rank")
        print_head(self._console, COLUMNS, LEFT)

    def row(self, row: dict[str, Any]) -> None:
        """One row, as it is in the JSON file."""
        begin = [
            f"{row['operation']}{' layer' if row['kind'] == 'layer' else ''}",
            row["algorithm"],
            row["layout"],
            "packed" if row["packed"] else "one",
            row["scaling"],
            format_token_count(row["tokens"]),
        ]
        if row["status"] != "ok":
            print_row(self._console, begin, COLUMNS, LEFT)
            style = "yellow" if row["peer"] else "bold red"
            self._console.print(Text(f"    {row['status'].upper()} {row['detail']}", style=style))
            return
        ours = not row["peer"]
        figures = [
            row["direction"],
            f"{row['single_ms']:.3f}",
            f"{row['median_ms']:.3f}",
            f"{row['speedup']:.2f}x",
            f"{row['efficiency']:.1%}",
            f"{max(row['sent_bytes']) / 2**20:.4g}" if ours else "",
            f"{row['exposed_ms']:.3f}" if ours else "",
        ]
        print_row(self._console, [*begin, *figures], COLUMNS, LEFT)

    def projection(self, rows: Sequence[dict[str, Any]], heads: int, width: int, blocks: int) -> None:
        """A scan's forward exchange on more ranks."""
        if not rows:
            return
        self._console.print(
            f"\nprojected ms of one scan's forward exchange, {heads} heads of {width}, pipeline in {blocks} blocks; "
            "nothing hides it, one link for each rank:"
        )
        print_head(self._console, PROJECTION, 3)
        for row in rows:
            begin = [row["operation"], row["algorithm"], row["link"], f"{row['bytes'] / 2**10:.4g}"]
            times = [f"{row['milliseconds'][ranks]:.3f}" for ranks in RANKS]
            print_row(self._console, [*begin, *times], PROJECTION, 3)


def _wide(plan: Plan) -> int:
    return plan.heads * plan.width
