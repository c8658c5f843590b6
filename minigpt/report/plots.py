"""Pictures of a report: each a row of `PLOTS`, a function from the report to a matplotlib figure.

Colours are Okabe and Ito's, told apart by the colour-blind and, with markers and fillings, in grey print. The report is
the JSON object alone: whatever is drawn is also in `report.json`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minigpt.errors import MinigptError
from minigpt.report.curves import TECHNIQUES
from minigpt.report.figures import FIGURES, FIVE
from minigpt.report.resistance import MEASURES

Report = Mapping[str, Any]

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
MODELS = {"fine-tuned": (BLUE, "o"), "raw": (VERMILLION, "s")}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.alpha": 0.3,
    "svg.fonttype": "path",
    "svg.hashsalt": "minigpt",  # the same report gives the same bytes
}


def library() -> Any:
    """Return pyplot, drawing into files.

    Raises
    ------
    MinigptError
        Without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise MinigptError("a report has plots, which need matplotlib; pip install 'minigpt[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def drawn(report: Report, kind: str = "svg") -> dict[str, bytes]:
    """Return every plot for which the report has something, as SVG or PNG.

    Raises
    ------
    MinigptError
        Without matplotlib.
    """
    pyplot, images = library(), {}
    with pyplot.rc_context(STYLE):
        for name, plot in PLOTS.items():
            if (figure := plot.draw(pyplot, report)) is not None:
                figure.savefig(
                    file := io.BytesIO(), format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {}
                )
                pyplot.close(figure)
                images[name] = file.getvalue()
    return images


# ---- stages ------------------------------------------------------------------------------------------------


def five_metrics(pyplot: Any, report: Report) -> Any:
    """Draw a panel per metric, a row per stage, the value written beside it."""
    stages = report["stages"]
    figure, panels = pyplot.subplots(
        1, len(FIVE), sharey=True, figsize=(13, 1.3 + 0.42 * len(stages)), layout="constrained"
    )
    for panel, name in zip(panels, FIVE, strict=True):
        figure_of, values = FIGURES[name], [stage["figures"][name] for stage in stages]
        shown = [(row, v) for row, v in enumerate(values) if "absent" not in v]
        highest = max(v["value"] for _, v in shown)
        logarithmic = highest > 20 * min(v["value"] for _, v in shown)
        for row, v in shown:
            colour = GREY if row == 0 else BLUE
            errors = [[v["value"] - v["low"]], [v["high"] - v["value"]]]
            if logarithmic:
                panel.errorbar(v["value"], row, xerr=errors, fmt="o", color=colour, capsize=2)
            else:
                panel.barh(
                    row, v["value"], xerr=errors, color=colour, height=0.6, capsize=2, error_kw={"linewidth": 0.8}
                )
            panel.annotate(
                f"{v['value']:,.{_digits(v['value'])}f}",
                (v["high"], row),
                (6, 0),
                textcoords="offset points",
                va="center",
            )
        panel.set(title=_title(figure_of.title), xlabel=figure_of.unit + (", log scale" if logarithmic else ""))
        if logarithmic:
            panel.set_xscale("log")
            _plain_ticks(panel.xaxis)
            low = min(v["low"] for _, v in shown)
            panel.set_xlim(low / 2, low * (max(v["high"] for _, v in shown) / low) ** 1.45)
        else:
            panel.set_xlim(0, 1.4 * max(v["high"] for _, v in shown))
        panel.grid(axis="x")
        panel.set_axisbelow(True)
    panels[0].set_yticks(range(len(stages)), [stage["name"] for stage in stages])
    panels[0].invert_yaxis()
    return figure


def pareto(pyplot: Any, report: Report) -> Any:
    """Draw perplexity against size, and the front of the stages that no other one beats in both."""
    points = [
        (stage["name"], stage["figures"]["file_mb"]["value"], stage["figures"]["perplexity"])
        for stage in report["stages"]
        if "absent" not in stage["figures"]["perplexity"]
    ]
    figure, panel = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    front = front_of([(size, v["value"]) for _, size, v in points])
    panel.step(*zip(*front, strict=True), where="post", color=GREEN, linewidth=1.5, label="Pareto front", zorder=1)
    for _, size, v in points:
        best = (size, v["value"]) in front
        errors = [[v["value"] - v["low"]], [v["high"] - v["value"]]]
        panel.errorbar(
            size, v["value"], yerr=errors, fmt="o" if best else "s", color=GREEN if best else GREY, capsize=2, zorder=2
        )
    panel.set(xscale="log", yscale="log", xlabel="file size, MB", ylabel="perplexity per token of the original")
    panel.margins(x=0.22, y=0.12)
    _label(panel, [(name, (size, v["value"])) for name, size, v in points])
    _plain_ticks(panel.xaxis, (1, 2, 5))
    _plain_ticks(panel.yaxis)
    panel.grid(which="major")
    panel.legend(loc="upper right")
    return figure


def _label(panel: Any, points: list[tuple[str, tuple[float, float]]]) -> None:
    """Write names beside points, from left to right, each as far up as it must be to stand clear of the others."""
    panel.figure.draw_without_rendering()  # only now is it known where points lie
    width, height, per_point = 6.5, 14, 72 / panel.figure.dpi  # of a letter and of a line, in points
    taken: list[tuple[float, float, float]] = []
    for name, place in sorted(points, key=lambda point: point[1]):
        x, y = (per_point * float(v) for v in panel.transData.transform(place))
        up = 5
        while any(
            x < right + width and left < x + width * len(name) and abs(y + up - at) < height
            for left, right, at in taken
        ):
            up += height
        taken.append((x, x + width * len(name), y + up))
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6} if up > height else None
        panel.annotate(name, place, (7, up), textcoords="offset points", arrowprops=line)


def front_of(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one beats in both numbers, by the first of them."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


# ---- models ------------------------------------------------------------------------------------------------


def degradation(pyplot: Any, report: Report) -> Any:
    """Draw perplexity and the rise of its logarithm along each technique, steps evenly spaced, for all models."""
    figure, panels = pyplot.subplots(2, len(TECHNIQUES), figsize=(12, 6.4), layout="constrained", sharex="col")
    for column, (name, technique) in enumerate(TECHNIQUES.items()):
        above, below = panels[:, column]
        curves = {model: report["curves"][model][name] for model in MODELS if model in report["curves"]}
        steps = sorted({(p["removed"], p["value"]) for points in curves.values() for p in points})
        places = {removed: place for place, (removed, _) in enumerate(steps)}
        highest = 0.0
        for model, points in curves.items():
            colour, marker = MODELS[model]
            x, logs = [places[p["removed"]] for p in points], [math.log(p["perplexity"]) for p in points]
            rises = [100 * (value / logs[0] - 1) for value in logs]
            highest = max(highest, *rises)
            style = {"color": colour, "marker": marker, "markersize": 5, "label": model}
            above.plot(x, [p["perplexity"] for p in points], **style)
            below.plot(x, rises, **style)
        above.set(title=_title(technique.title), yscale="log")
        below.axhline(10, color="black", linewidth=0.8, linestyle=":")
        below.set_yscale("symlog", linthresh=10)
        below.set(ylim=(-2, max(20, 1.6 * highest)), xlabel=technique.axis)
        below.set_xticks(range(len(places)), [technique.label.format(value) for _, value in steps])
        for panel in (above, below):
            _plain_ticks(panel.yaxis)
            panel.grid()
    panels[0, 0].set_ylabel("perplexity")
    panels[1, 0].set_ylabel("log-perplexity, rise in %")
    panels[0, 0].legend()
    return figure


def resistances(pyplot: Any, report: Report) -> Any:
    """Draw each measure of resistance with its interval."""
    rows = report["resistance"]
    figure, panels = pyplot.subplots(1, len(MEASURES), figsize=(12, 2.6), sharey=True, layout="constrained")
    techniques = list(dict.fromkeys(row["technique"] for row in rows))
    for panel, (measure, row_of) in zip(panels, MEASURES.items(), strict=True):
        for row in (row for row in rows if row["measure"] == measure):
            for shift, (model, value) in zip((-0.12, 0.12), row["values"].items(), strict=False):
                colour, marker = MODELS[model]
                height = techniques.index(row["technique"]) + shift
                errors = [[max(0, value["value"] - value["low"])], [max(0, value["high"] - value["value"])]]
                panel.errorbar(value["value"], height, xerr=errors, fmt=marker, color=colour, capsize=2, label=model)
        panel.set(title=_title(row_of.title), xlim=(-0.03, 1.03))
        panel.grid(axis="x")
    panels[0].set_yticks(range(len(techniques)), [TECHNIQUES[name].title for name in techniques])
    panels[0].invert_yaxis()
    panels[0].margins(y=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside right upper")
    return figure


def heat_map(pyplot: Any, report: Report) -> Any:
    """Draw the KL that damage to each part of each layer does."""
    from matplotlib.colors import LogNorm

    maps = report["sensitivity"]
    everything = [max(kl, 1e-5) for rows in maps.values() for row in rows.values() for kl in row]
    norm = LogNorm(min(everything), max(max(everything), 2 * min(everything)))
    n_layer = max(len(row) for rows in maps.values() for row in rows.values())
    figure, panels = pyplot.subplots(
        len(maps), 1, figsize=(3.5 + 0.62 * n_layer, 0.6 + 2.1 * len(maps)), squeeze=False, layout="constrained"
    )
    for panel, (model, rows) in zip(panels[:, 0], maps.items(), strict=True):
        image = panel.imshow(
            [[max(kl, 1e-5) for kl in row] for row in rows.values()], norm=norm, cmap="cividis", aspect="auto"
        )
        for i, row in enumerate(rows.values()):
            for j, kl in enumerate(row):
                dark = norm(max(kl, 1e-5)) < 0.55
                panel.text(j, i, _short(kl), ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
        panel.set_yticks(range(len(rows)), list(rows))
        panel.set_xticks(range(len(next(iter(rows.values())))))
        panel.set(title=f"{model} model", xlabel="layer")
        panel.spines[:].set_visible(False)
    figure.colorbar(image, ax=panels[:, 0].tolist(), label="KL from the untouched model, nats a token", shrink=0.8)
    return figure


@dataclass(frozen=True)
class Plot:
    """A row of `PLOTS`.

    Attributes
    ----------
    title, caption : str
    draw : callable
        Pyplot and report -> figure.
    """

    title: str
    caption: str
    draw: Callable[[Any, Report], Any]


PLOTS = {
    "metrics": Plot(
        "The five metrics by stage",
        "Bars and dots: medians; whiskers: lowest and highest run, for perplexity the 95 % confidence interval.",
        five_metrics,
    ),
    "pareto": Plot(
        "Size against perplexity",
        "Green: stages that no other stage beats in both. Both axes are logarithmic.",
        pareto,
    ),
    "degradation": Plot(
        "How the models degrade",
        "Each model on the text it is meant for, without calibration or healing. Above: perplexity. Below: how "
        "far its logarithm has risen, linear up to 10 %, logarithmic beyond; resistance asks where 10 % are reached.",
        degradation,
    ),
    "resistance": Plot(
        "Resistance",
        "Further right: resists more. Whiskers: 95 % confidence, bootstrap over windows of text.",
        resistances,
    ),
    "sensitivity": Plot(
        "Which layers are sensitive",
        "What damage to one part of one layer does to the predictions, all else untouched. Brighter: more.",
        heat_map,
    ),
}


# ---- words and ticks ---------------------------------------------------------------------------------------


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain_ticks(axis: Any, multiples: tuple[int, ...] = ()) -> None:
    """Write 1,000 instead of a power of ten, and at several multiples of these where there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if multiples:
        axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.{0 if abs(value) >= 1 or not value else 2}f}"))
    axis.set_minor_formatter(NullFormatter())


def _digits(value: float) -> int:
    return max(0, 2 - int(math.log10(max(value, 1))))


def _short(value: float) -> str:
    return f"{value:.3f}".lstrip("0") if value < 0.1 else f"{value:.2g}" if value < 10 else f"{value:.0f}"
