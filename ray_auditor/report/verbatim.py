"""A stranger's text and tables of it as a terminal shows them: as it is, moving nothing."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from ray_auditor.report.printable import printable

NAME_CHARS = 60


def verbatim(value: str, style: str = "", max_chars: int = 2000) -> Text:
    """A stranger's text as rich shows it verbatim: no markup, no control or bidirectional characters."""
    return Text(printable(value, max_chars), style=style)


def table_of(title: str, names: Iterable[str], numbers: Iterable[str]) -> Table:
    """A table with text columns first, then number columns; headings may be a stranger's suite names."""
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=None, header_style="underline"
    )
    for heading in names:
        table.add_column(verbatim(heading, max_chars=NAME_CHARS), overflow="fold")
    for heading in numbers:
        table.add_column(verbatim(heading, max_chars=NAME_CHARS), justify="right", no_wrap=True)
    return table
