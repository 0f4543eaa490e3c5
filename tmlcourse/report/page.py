"""A report as figures and as one HTML page that needs neither a network nor a kernel."""

from __future__ import annotations

import base64
import html
import io
import math

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .. import plot
from ..widgets import _webp

TITLES = {
    "clean": "Without an attacker", "attacked": "Under attack", "certified": "Proved", "backdoor": "Backdoors",
    "leakage": "What it tells of its training data", "calibration": "Does it know when it errs?",
    "gaps": "For whom it errs", "explanations": "Can it be explained?",
}  # fmt: skip
BLIND = (
    "Attacks are upper bounds of what is left, certificates lower bounds; between the two nobody has looked.",
    "Only the threat named above was tried: no rotation, no patch, no new kind of image.",
    "The backdoor scan looks for one small trigger for all images; large, moving or clever ones pass.",
    "The leakage attack is the simplest there is; shadow models find more, above all about single records.",
    "Gaps are measured for the groups that were given; nobody was asked which groups matter.",
    "The images came from one place. What the model does elsewhere, and whether it should be used at all, is not here.",
)
_LARGE = 40_000  # bytes of an SVG beyond which a WebP is tried
_SIGNS = {"measured": "·", "fine": "✓", "caution": "!", "alarm": "✗", "not measured": "–"}
_STYLE = """
:root{color-scheme:light}
body{margin:0;background:#fff;color:#1f1f1f;font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1rem}
h1{line-height:1.2}h2{margin-top:2.2rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.93rem}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{padding:.35rem .6rem;border-bottom:1px solid #c8c8c8;text-align:left;vertical-align:top}
td.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
th[scope=row]{font-weight:500}code{overflow-wrap:anywhere}
.verdict{white-space:nowrap;font-weight:600}
.fine{color:#00563f}.caution{color:#7a4300}.alarm{color:#9b1c1c}.measured,.not-measured{color:#444}
figure{margin:1.2rem 0}img{max-width:100%;height:auto}figcaption{color:#444;font-size:.93rem}
dt{font-weight:600}dd{margin:0 0 .5rem}
@media print{.scroll{overflow:visible}figure,tr{break-inside:avoid}}
"""


def number(value: float) -> str:
    """A number of a row as text: a dash where there is none, no decimals for a count.

    Example: `number(0.1234)`.
    """
    if math.isnan(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def written(row) -> str:
    """A row in one cell: value, interval, sign of the verdict.

    Example: `written(tmlcourse.report.trust_report(model, test, n=4).rows[0])`.
    """
    if row.verdict == "not measured":
        return "not measured"
    interval = "" if math.isnan(row.low) else f" [{row.low:.2f}, {row.high:.2f}]"
    return f"{number(row.value)}{interval} {_SIGNS[row.verdict]}"


# ---- figures


def accuracies(reports: dict) -> pd.DataFrame:
    """Clean, attacked and certified shares in percent, one row a measurement and report, for `plot.group_intervals`.

    Example: `accuracies({"a": tmlcourse.report.trust_report(model, test, n=4)})`.
    """
    rows = []
    for name, report in reports.items():
        for r in report.rows:
            if (
                r.section in ("clean", "attacked", "certified")
                and r.verdict != "not measured"
                and "neither" not in r.what
            ):
                what = f"clean {r.what}" if r.section == "clean" else r.what
                rows.append((what, name, 100 * r.value, 100 * r.low, 100 * r.high))
    return pd.DataFrame(rows, columns=["row", "group", "value", "low", "high"])


def figures(report) -> dict[str, tuple[Figure, str]]:
    """Every figure that there is evidence for, with the sentence that describes it.

    Example: `list(figures(tmlcourse.report.trust_report(model, test, n=4)))[0]` is "accuracy".
    """
    seen, model, name = report.seen, report.settings["model"], report.settings["data"]
    table, found = accuracies({model: report}), {}
    said = "; ".join(f"{r.row} {r.value:.0f} percent" for r in table.itertuples())
    found["accuracy"] = (
        plot.group_intervals(table, title="Right answers", data_name=name),
        f"Dots with intervals. {said}.",
    )
    drawable = seen["x"].dim() == 4 and seen["x"].shape[1] in (1, 3)
    if drawable and "broken" in seen and seen["broken"].any():
        broken = seen["broken"].nonzero().squeeze(1)[:6]
        before, after = seen["x"][broken], seen["x_adv"][broken]
        options = dict(labels=seen["y"][broken], labels_adv=seen["y_adv"][broken], classes=seen["classes"])
        found["attacked"] = (plot.perturbations(before.cpu(), after.cpu(), data_name=name, **options),
                             f"{len(broken)} images, the changes an attacker made, magnified, and the results, which the "
                             "model misreads.")  # fmt: skip
    if drawable and "cleansed" in seen:
        scan = seen["cleansed"]
        norms = scan.table["norm"]
        titles = [f"{c}: {v:.0f} px" for c, v in zip(seen["classes"], norms, strict=True)]
        flagged = ", ".join(seen["classes"][k] for k in scan.flagged) or "none"
        found["backdoor"] = (plot.images((scan.mask * scan.pattern).cpu(), titles=titles, columns=5, data_name=name),
                             f"The smallest trigger found for each class, from {norms.min():.0f} to {norms.max():.0f} "
                             f"pixels; flagged: {flagged}.")  # fmt: skip
    if "membership" in seen:
        leak = seen["membership"]
        figure = plot.roc_log({"loss attack": leak.roc}, least=0.01, title="Members against others", data_name=name)
        found["leakage"] = figure, f"A ROC curve on logarithmic axes with area {leak.auc:.2f}; one half is guessing."
    if "calibration" in seen:
        figure = plot.calibration(seen["calibration"], xlabel="confidence", data_name=name)
        figure.axes[0].set(ylabel="right (%)")
        figure.axes[0].set_title(f"Confidence and accuracy, {name}", loc="left", fontsize=12, fontweight="bold")
        figure.axes[0].get_legend().remove()
        low, high = seen["calibration"]["score"].agg(["min", "max"])
        found["calibration"] = figure, (f"Share of right answers against confidence, from {low:.2f} to {high:.2f}, with the "
                                        "diagonal on which confidence means what it says.")  # fmt: skip
    for kind in ("class", "group"):
        if (groups := seen.get(f"by {kind}")) is not None:
            percent = groups.assign(**{c: 100 * groups[c] for c in ("value", "low", "high")})
            worst = groups.loc[groups["value"].idxmin()]
            title = f"Right answers by {kind}"
            found[f"by {kind}"] = (plot.group_intervals(percent, title=title, data_name=name),
                                   f"Dots with intervals, one a {kind}; the lowest is {worst['row']} with "
                                   f"{100 * worst['value']:.0f} percent.")  # fmt: skip
    if drawable and "maps" in seen:
        image, before, after = (v[:3].cpu() for v in seen["maps"].values())
        found["explanations"] = (plot.heatmaps({"trained": before, "forgotten": after}, images=image, data_name=name),
                                 f"{len(image)} images, each with the gradient map of the trained network and of the same "
                                 "network with all weights forgotten.")  # fmt: skip
    return found


def _picture(figure: Figure) -> str:
    """The figure as a data URI: SVG, or WebP where that is much smaller; the same figure gives the same text."""
    buffer = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "trust report", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    kind, data = "svg+xml", buffer.getvalue()
    if len(data) > _LARGE:
        kind, data = min((kind, data), ("webp", _webp(figure)), key=lambda v: len(v[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ---- HTML


def _rows(report, section: str) -> str:
    lines = []
    for row in (r for r in report.rows if r.section == section):
        interval = "–" if math.isnan(row.low) else f"{row.low:.3f} to {row.high:.3f}"
        kind = row.verdict.replace(" ", "-")
        lines.append(
            f'<tr><th scope="row">{html.escape(row.what)}</th><td class="number">{number(row.value)}</td>'
            f'<td class="number">{interval}</td><td class="number">{row.n or "–"}</td>'
            f'<td class="verdict {kind}"><span aria-hidden="true">{_SIGNS[row.verdict]} </span>{row.verdict}</td>'
            f"<td>{html.escape(row.comment)}</td></tr>"
        )
    head = "".join(f'<th scope="col">{c}</th>' for c in ("Measured", "Value", "95 % interval", "Images", "Verdict", ""))
    head = head.replace('<th scope="col"></th>', '<th scope="col">What it means</th>')
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"


def _table(report, section: str) -> str:
    title = html.escape(TITLES[section])
    return (
        f'<div class="scroll" role="region" aria-label="{title}" tabindex="0"><table>'
        f'<caption class="hidden">{title}</caption>'
        f"{_rows(report, section)}</table></div>"
    )


def fragment(report) -> str:
    """The tables alone, for a notebook.

    Example: `fragment(tmlcourse.report.trust_report(model, test, n=4))[:4]`.
    """
    return f"<div>{''.join(_table(report, section) for section in _sections(report))}</div>"


def _sections(report) -> list[str]:
    return list(dict.fromkeys(row.section for row in report.rows))


def page(report, date: str) -> str:
    """The whole page as text.

    Example: `page(tmlcourse.report.trust_report(model, test, n=4), "2026-01-01")[:15]`.
    """
    pictures, parts = figures(report), []
    places = {"accuracy": "clean", "by class": "gaps", "by group": "gaps"}
    for section in _sections(report):
        shown = "".join(
            f'<figure><img src="{_picture(figure)}" alt="{html.escape(alt)}">'
            f'<figcaption aria-hidden="true">{html.escape(alt)}</figcaption></figure>'
            for name, (figure, alt) in pictures.items() if places.get(name, name) == section
        )  # fmt: skip
        parts.append(
            f'<section id="{section}"><h2>{html.escape(TITLES[section])}</h2>{_table(report, section)}{shown}</section>'
        )
    settings = "".join(f"<dt>{html.escape(k)}</dt><dd><code>{html.escape(v)}</code></dd>"
                       for k, v in report.settings.items())  # fmt: skip
    alarms = [r for r in report.rows if r.verdict == "alarm"]
    first = "".join(f"<li>{html.escape(f'{TITLES[r.section]}: {r.comment}')}</li>" for r in alarms)
    first = f"<ul>{first}</ul>" if alarms else "<p>No alarm. That is not a promise: see the end of the page.</p>"
    title = html.escape(f"Trust report: {report.settings['model']} on {report.settings['data']}")
    blind = "".join(f"<li>{html.escape(text)}</li>" for text in BLIND)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main><h1>{title}</h1><p>{html.escape(date)}. {len(report.rows)} measurements, "
        f"{len(alarms)} alarm{'' if len(alarms) == 1 else 's'}.</p>"
        f"<h2>First of all</h2>{first}{''.join(parts)}"
        f'<section id="blind"><h2>What this report cannot see</h2><ul>{blind}</ul></section>'
        f'<section id="settings"><h2>How it was made</h2><dl>{settings}</dl></section></main></body></html>\n'
    )
