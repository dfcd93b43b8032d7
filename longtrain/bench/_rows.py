"""Rows of a table on the standard output, each as soon as it is known: columns have fixed widths."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

Columns = Sequence[tuple[str, int]]
"""Header and width of each."""


def wide_console(columns: Columns) -> Console:
    """The standard output; as wide as the columns need where that is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = sum(width + 2 for _, width in columns)
    return console


def print_row(console: Console, cells: Iterable[str | Text], columns: Columns, left: int) -> None:
    """The first `left` columns hold words, the others numbers; cells that are missing stay empty."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for position, (_, width) in enumerate(columns):
        table.add_column(width=width, no_wrap=True, justify="left" if position < left else "right")
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    console.print(table)


def print_head(console: Console, columns: Columns, left: int) -> None:
    """The columns' names."""
    print_row(console, (Text(name, style="bold") for name, _ in columns), columns, left)
