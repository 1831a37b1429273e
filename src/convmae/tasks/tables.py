"""Tables of figures on the terminal: shares in per cent."""

import math
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text


def percent(share: float) -> str:
    """A share for a table, "-" where there is none."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def shares_table(
    title: str, names: Sequence[str], rows: Iterable[tuple[str, *tuple[float, ...]]], first: str = ""
) -> Table:
    """A row for each name and its shares, in per cent. names: of the columns of shares. first: of that of the names."""
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    for name, *shares in rows:
        table.add_row(Text(name), *map(percent, shares))  # a class may be called anything, rich's markup too
    return table
