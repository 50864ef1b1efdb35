"""The one writer of pages: sections of tables and figures, as self-contained HTML, Markdown or text.

The HTML (templates/page.html.j2, page.css) needs no network and no script, and every value is escaped. The
Markdown holds headings, leads and tables; figures are left to the HTML.

What is not covered: what a page says (`report`, and `results` of the programs), figures (`figures`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from versatune_ds.foundations.files import require_own, write_text_atomic, writing
from versatune_ds.foundations.text import in_columns
from versatune_ds.report.measures import MINUS, NOTHING

SIGN = "· VersaTune</title>"
"""What every page has near its beginning."""
TEMPLATES = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False
    """The lowest of its row: printed bold."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: a head, and rows of a label and cells."""

    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | str]]]
    caption: str = ""
    kind: str = "numbers"
    """CSS classes: `numbers` align to the right, `texts` to the left, `texts log` has a wide last column."""
    color_rows: bool = False
    """A row's label gets the colour of its number."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure and the words beside it."""

    title: str
    svg: Markup
    color: int | None = None
    """Number of the domain or run that the whole picture is about."""
    note: str = ""
    narrow: Markup | None = None
    """Another drawing of it for a narrow page."""


@dataclasses.dataclass(frozen=True)
class Stretch:
    text: str
    kind: str = ""
    """`thought`, `tool result`, or empty."""
    weight: float | None = None
    """What its tokens count in the loss, 0: context; None: it is no sample."""


@dataclasses.dataclass(frozen=True)
class MarkedText:
    """A sample's text, coloured by what is trained on."""

    title: str
    runs: Sequence[Stretch]


@dataclasses.dataclass(frozen=True)
class Fold:
    """A part that is shown on a click: a table or a text as it is."""

    title: str
    table: Table | None = None
    text: str = ""


@dataclasses.dataclass(frozen=True)
class PageSection:
    """A part of the page. Empty parts say why in `lead`."""

    key: str
    title: str
    lead: str = ""
    pictures: Sequence[Picture] = ()
    panels: Sequence[Picture] = ()
    """Small pictures, several in a row."""
    texts: Sequence[MarkedText] = ()
    tables: Sequence[Table] = ()
    has_legend: bool = False
    """Show the page's legend here too."""
    notes: Sequence[str] = ()
    """Small print after the tables."""
    folds: Sequence[Fold] = ()
    links: Sequence[tuple[str, Path]] = ()
    """Words and the file that they lead to, beside the page."""


@dataclasses.dataclass(frozen=True)
class Card:
    """A number to see first."""

    label: str
    value: str
    note: str


@dataclasses.dataclass(frozen=True)
class Page:
    title: str
    sections: Sequence[PageSection]
    lead: str = ""
    legend: Sequence[str] = ()
    """Names that the colours stand for, from colour 0 on."""
    remarks: Sequence[tuple[str, Sequence[str]]] = ()
    """What to know before reading: a title and lines each."""
    cards: Sequence[Card] = ()
    states: Sequence[str] = ()
    """Whether what the page is about still goes on, a line each."""
    refresh_s: int | None = None
    """The page is written again: a browser loads it anew after so many seconds. None: it stays as it is."""


def to_html(page: Page, folder: Path = Path()) -> str:
    """The page as one HTML file, with its figures; links are as seen from `folder`, where it will lie."""
    from versatune_ds.report import figures  # Markdown needs no matplotlib

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["from_page"] = lambda path: quote(os.path.relpath(path, folder))
    environment.globals.update(dash=figures.dash_index, colors=figures.NUM_COLORS, dashes=figures.DASHES)
    style = figures.palette_css() + (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(page=page, style=Markup(style))


def write_html(path: Path, text: str, option: str) -> None:
    """Write a page's text, in place of an earlier page.

    Args:
        option: that names the place, for the error text.

    Raises:
        StateError: it cannot be written, or something else is there.
    """
    cure = f"give another place with {option}"
    require_own(path.parent, {path.name: SIGN}, cure)
    with writing(path, cure):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, text)


def to_markdown(page: Page) -> str:
    """Headings, leads and tables of the page."""
    parts = [f"# {page.title}", page.lead]
    for section in page.sections:
        parts += [f"## {section.title}" if section.title else "", section.lead]
        for table in section.tables:
            parts += [table.caption, table_to_markdown(table)]
        parts += section.notes
    return "\n\n".join(filter(None, parts)) + "\n"


def table_to_markdown(table: Table) -> str:
    """A table without its caption."""
    rows = [[label, *(_text(cell) for cell in cells)] for label, cells in table.rows]
    lines = [table.head, ["---"] * len(table.head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_text(table: Table) -> str:
    """A table for a console, in ASCII as far as its cells are: a dash and a minus become hyphens."""
    rows = [table.head, *([label, *map(_text, cells)] for label, cells in table.rows)]
    rows = [[cell.replace(NOTHING, "-").replace(MINUS, "-") for cell in row] for row in rows]
    return "\n".join(in_columns(rows))


def _text(cell: Cell | str) -> str:
    return cell if isinstance(cell, str) else f"**{cell.text}**" if cell.best else cell.text
