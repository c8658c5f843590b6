"""A report in words: Markdown tables, and one HTML page that needs nothing outside itself."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minigpt.errors import MinigptError
from minigpt.report.curves import TECHNIQUES
from minigpt.report.figures import FIGURES
from minigpt.report.plots import PLOTS, Report, drawn
from minigpt.report.resistance import MEASURES

Rows = list[list[str]]

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #555; vertical-align: bottom; }
td small { color: #555; display: block; white-space: nowrap; }
.texts td, .texts th { text-align: left; } .texts td { white-space: pre-wrap; min-width: 12rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #444; font-size: 0.9rem; }
dt { font-weight: 600; } dd { margin: 0 0 0.4rem 1.5rem; }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  body { max-width: none; margin: 0; font-size: 11px; } .wide { overflow: visible; }
  table { font-size: 9px; } th, td { padding: 0.2rem 0.3rem; }
  h2 { break-after: avoid; } figure, tr { break-inside: avoid; }
}
"""


def write(report: Report, folder: str | os.PathLike[str]) -> None:
    """Write report.json, report.md and report.html, all or none.

    Raises
    ------
    MinigptError
        If the folder cannot be made or written, or matplotlib is missing.
    """
    texts = {
        "report.json": json.dumps(report, indent=1) + "\n",
        "report.md": markdown(report),
        "report.html": html(report, drawn(report)),
    }
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target, prefix=".report-") as unfinished:
            for name, text in texts.items():
                Path(unfinished, name).write_text(text, encoding="utf-8")
            for name in texts:
                os.replace(Path(unfinished, name), target / name)
    except OSError as error:
        raise MinigptError(f"cannot write the report to {target}: {error.strerror}; check the folder") from None


# ---- tables: a head and rows of text -----------------------------------------------------------------------


def stage_table(report: Report, bounds: bool = True) -> Rows:
    """Return a row per figure, a column per stage, with or without the figures' bounds; "-" for what is absent."""
    stages = report["stages"]
    rows = [["", *(stage["name"] for stage in stages)]]
    for name, figure in FIGURES.items():
        title = f"{figure.title}, {figure.unit}" if figure.unit else figure.title
        rows.append([title, *(said(stage["figures"][name], figure.digits, bounds) for stage in stages)])
    first = stages[0]
    rows.append(["times smaller than the original", *(f"{first['bytes'] / stage['bytes']:.1f}" for stage in stages)])
    for title, name in (("CPU time", "token_cpu_ms"), ("peak memory", "peak_rss_mb")):
        whole = first["figures"][name]["value"]
        rows.append([f"times less {title}", *(f"{whole / stage['figures'][name]['value']:.1f}" for stage in stages)])
    return rows


def resistance_table(report: Report) -> Rows:
    """Return a row per technique and measure, a column per model."""
    models = list(report["curves"])
    rows = [["technique", "measure", *models, *(["fine-tuned resists"] if len(models) == 2 else [])]]
    for row in report["resistance"]:
        cells = [
            f"{'> ' if v['beyond'] else ''}{v['value']:.3f} ({v['low']:.3f} to {v['high']:.3f})"
            for v in row["values"].values()
        ]
        names = [TECHNIQUES[row["technique"]].title, MEASURES[row["measure"]].title]
        rows.append([*names, *cells, *([row["finding"]] if "finding" in row else [])])
    return rows


def sample_table(report: Report, number: int) -> Rows:
    """Return what each stage wrote after one prompt."""
    samples = [(stage["name"], stage["samples"][number]) for stage in report["stages"]]
    return [["stage", "text"], ["prompt", samples[0][1]["prompt"]], *([name, s["text"]] for name, s in samples)]


def said(value: Mapping[str, Any], digits: int, bounds: bool = True) -> str:
    """Return a value with its bounds where they differ."""
    if "absent" in value:
        return "-"
    middle, low, high = (f"{value[bound]:,.{digits}f}" for bound in ("value", "low", "high"))
    return middle if low == high or not bounds else f"{middle} ({low} to {high})"


def reasons(report: Report) -> list[str]:
    """Return why there are no figures where there are none."""
    found: dict[str, list[str]] = {}
    for stage in report["stages"]:
        for name, value in stage["figures"].items():
            if "absent" in value:
                found.setdefault(f"{FIGURES[name].title}: {value['absent']}", []).append(stage["name"])
    notes = [f"{reason} ({', '.join(names)})" for reason, names in found.items()]
    return notes + [f"left out, for want of calibration text: {name}" for name in report["left_out"]]


def conditions(report: Report) -> list[str]:
    """Return where and how the figures were measured, line by line."""
    effort, machine = report["protocol"]["effort"], report["machine"]
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in machine.items() if value not in (None, [], {})]
    return [
        f"{effort['tokens']:,} tokens of the text, spread over it, in windows of {effort['context']:,} for the stages; "
        f"{effort['curve_tokens']:,} in windows of {effort['short_context']} for the curves; "
        f"{effort['sensitivity_tokens']:,} for the sensitivity",
        f"cost: {effort['runs']} fresh processes after one that does not count, {effort['generated']} tokens each",
        f"samples: seed {effort['seed']}, temperature 0.7, top-p 0.9",
        f"made in {report['seconds'] / 60:.1f} minutes by minigpt {machine['minigpt']}",
        *lines,
    ]


# ---- Markdown ----------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """Return the report as Markdown."""
    parts = ["# How a model bears compression"]
    parts += ["\n".join(f"- {sentence}" for sentence in report["verdicts"])]
    parts += ["## Stages", _markdown_table(stage_table(report))]
    parts += ["\n".join(f"- {note}" for note in reasons(report))]
    parts += ["\n".join(f"- **{stage['name']}**: `{stage['made']}`" for stage in report["stages"])]
    parts += ["## Resistance", _markdown_table(resistance_table(report))]
    parts += ["## Samples"]
    for number in range(len(report["stages"][0]["samples"])):
        parts.append(_markdown_table(sample_table(report, number)))
    parts += ["## Conditions", "\n".join(f"- {line}" for line in conditions(report))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(rows: Rows) -> str:
    head, *body = ([cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- HTML --------------------------------------------------------------------------------------------------


def html(report: Report, images: Mapping[str, bytes]) -> str:
    """Return the report as one page, plots (SVG) embedded."""
    pictures = {name: _figure(name, images[name]) for name in PLOTS if name in images}
    samples = [
        _html_table(sample_table(report, number), "texts") for number in range(len(report["stages"][0]["samples"]))
    ]
    tuned = report["models"]["fine-tuned"]
    intro = (
        f"A GPT-2 of {tuned['parameters']:,} parameters ({tuned['n_layer']} layers of {tuned['n_embd']}), made smaller "
        f"in {len(report['stages']) - 1} ways: what it costs, what is left, and how far each technique can be pushed."
    )
    sections = [
        ("What came out", _list(report["verdicts"])),
        (
            PLOTS["metrics"].title,
            pictures["metrics"] + _html_table(stage_table(report)) + _list(reasons(report), "note"),
        ),
        ("How each stage was made", _terms((stage["name"], stage["made"]) for stage in report["stages"])),
        *((PLOTS[name].title, pictures[name]) for name in ("pareto", "degradation")),
        (PLOTS["resistance"].title, pictures["resistance"] + _html_table(resistance_table(report), "texts")),
        (PLOTS["sensitivity"].title, pictures["sensitivity"]),
        ("The same prompts, the same seed", "".join(samples)),
        ("How it was measured", _terms((f.title, f.protocol) for f in FIGURES.values()) + _list(conditions(report))),
    ]
    body = "\n".join(f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in sections if content)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>How a model bears compression</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>How a model bears compression</h1><p>{escape(intro)}</p>\n{body}\n</body></html>\n"
    )


def _figure(name: str, image: bytes) -> str:
    source, plot = base64.b64encode(image).decode("ascii"), PLOTS[name]
    return (
        f'<figure><img alt="{escape(plot.title)}" src="data:image/svg+xml;base64,{source}">'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _html_table(rows: Rows, kind: str = "") -> str:
    head, *body = rows
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = (f'<th scope="row">{escape(row[0])}</th>' + "".join(_cell(c) for c in row[1:]) for row in body)
    inner = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{inner}</tbody></table></div>'


def _cell(text: str) -> str:
    value, bracket, bounds = text.partition(" (")
    numeric = bracket and value.lstrip("> ")[:1].isdigit() and bounds.endswith(")")
    return f"<td>{escape(value)}<small>{escape(bounds[:-1])}</small></td>" if numeric else f"<td>{escape(text)}</td>"


def _list(lines: Sequence[str], kind: str = "") -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{items}</ul>' if items else ""


def _terms(pairs: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in pairs) + "</dl>"
