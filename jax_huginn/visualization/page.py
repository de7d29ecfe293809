"""One self-contained HTML page: text, tables and charts, with the drawing library inside. It needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from jax_huginn.config.checks import UserError
from jax_huginn.files import whole_file
from jax_huginn.visualization.charts import Bars, Chart, HeatMap, Lines, Section


def write_page(out: Path, title: str, head: str, sections: Sequence[Section], tail: Mapping[str, str]) -> None:
    """Write the page.

    Args:
        head: HTML above the sections.
        tail: title -> HTML of the sections without charts at the end.

    Raises:
        UserError: plotly is missing, or the file cannot be written.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("the page needs plotly: pip install plotly") from None
    from jax_huginn.visualization.plotly_figures import figure

    charts = [chart for section in sections for chart in section.charts]
    drawn = {chart.key: json.loads(str(figure(chart).to_json())) for chart in charts}
    titles = [section.title for section in sections] + list(tail)
    body = [head, *map(_section, sections)]
    body += [f'<h2 id="{_anchor(name)}">{escape(name)}</h2>\n{content}' for name, content in tail.items()]
    template = Template(files("jax_huginn.visualization").joinpath("page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(title),
        links="".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in titles),
        body="\n".join(body),
        library=get_plotlyjs(),
        figures=json.dumps(drawn, allow_nan=False).replace("<", r"\u003c"),
    )
    try:
        with whole_file(out) as unfinished:
            unfinished.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), differs: Iterable[int] = ()) -> str:
    """An HTML table; rows whose numbers are in `differs` are marked."""
    marked = set(differs)
    lines = ["<table>"]
    if head:
        lines.append(f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>")
    for number, row in enumerate(rows):
        look = ' class="differs"' if number in marked else ""
        lines.append(f"<tr{look}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    return "\n".join([*lines, "</table>"])


def notices(lines: Sequence[str]) -> str:
    return f'<ul class="notices">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _section(section: Section) -> str:
    intro = f'<p class="soft">{escape(section.intro)}</p>' if section.intro else ""
    charts = "\n".join(map(_figure, section.charts))
    title = escape(section.title)
    return f'<h2 id="{_anchor(section.title)}">{title}</h2>{intro}\n<div class="grid">\n{charts}\n</div>'


def _figure(chart: Chart) -> str:
    buttons = ""
    if isinstance(chart, Lines | Bars):
        axes = (("xaxis", "log x", chart.x), ("yaxis", "log y", chart.y))
        buttons = "".join(
            f'<button data-chart="{chart.key}" data-axis="{name}" aria-pressed="{json.dumps(axis.log)}">{text}</button>'
            for name, text, axis in axes
        )
    caption = f"<figcaption>{escape(chart.note.replace('`', ''))}</figcaption>" if chart.note else ""
    wide = ' class="wide"' if chart.wide or isinstance(chart, HeatMap) else ""
    return (
        f"<figure{wide}><header><h3>{escape(chart.title)}</h3><span>{buttons}</span></header>"
        f'<div id="chart-{chart.key}"></div>{caption}</figure>'
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
