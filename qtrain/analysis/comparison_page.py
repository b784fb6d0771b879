"""comparison.html: one file that needs nothing beside it. Text and tables are plain HTML; scripts add curves to look into.

Without scripts the picture of comparison.png stands in their place. plotly.js is 4.8 MB of the page; curves are thinned so
that the whole stays below ``LIMIT_BYTES`` however many runs there are.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .comparison import Comparison
from .comparison_figures import MARKERS, band, color, loss_limits, marker
from .comparison_table import COLUMNS, headline, notes, table_rows, verdict_lines
from .curves import Array

LIMIT_BYTES = 10_000_000
# Points of all thinned curves: x and y in float32, base64, are 10.7 bytes a point: 1.6 MB
_POINTS = 150_000
_MOST_POINTS = 400  # of a curve: a pixel or two each
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #1a1a1a; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3em .7em .3em 0; border-bottom: 1px solid #ddd; white-space: pre-line; }
.healthy { color: #1b6e20; } .noisy { color: #8a5a00; } .unstable, .diverged, .failed { color: #b01010; }
code { overflow-wrap: anywhere; }
li { color: #444; } .incomplete { color: #555; } .gate { background: #fdecea; padding: .5em 1em; } img { max-width: 100%; }
"""


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ValueError(
            "the page needs plotly: pip install 'qtrain[report]', or pass html=false for table, JSON and pictures alone"
        ) from error
    return go


def check_page() -> None:
    """Raises ValueError, with the pip command, where plotly is not installed."""
    _plotly()


def _thin(x: Array, y: Array, points: int) -> tuple[Any, Any]:
    """At most ``points`` of a curve, means of equal stretches of finite values, at their ends; float32."""
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) > points:
        edges = np.linspace(0, len(x), points + 1).astype(int)
        x, y = x[edges[1:] - 1], np.add.reduceat(y, edges[:-1]) / np.diff(edges)
    return x.astype(np.float32), y.astype(np.float32)


def _layout(figure: Any, y: str, height: int = 420) -> Any:
    """The legend below, where it leaves the curves their width on a narrow screen."""
    names = len({trace.name for trace in figure.data if trace.showlegend is not False})
    below = 24 * -(-names // 4)
    figure.update_layout(
        height=height + below, template="plotly_white", margin={"l": 60, "r": 20, "t": 30, "b": 45 + below},
        hovermode="closest",
        legend={"font": {"size": 11}, "orientation": "h", "yanchor": "top", "yref": "container", "y": below / (height + below)},
    )  # fmt: skip
    figure.update_xaxes(title="tokens")
    figure.update_yaxes(title=y)
    return figure


def _symbol(number: int) -> str:
    return MARKERS[marker(number)]


def _loss_figure(go: Any, comparison: Comparison) -> Any:
    figure = go.Figure()
    for number, result in enumerate(comparison.arms):
        at, mean, low, high = (v.astype(np.float32) for v in band(result))
        name, shade = html.escape(result.label), color(number)
        if not len(at):
            continue
        ring = {"x": np.concatenate([at, at[::-1]]), "y": np.concatenate([high, low[::-1]])}
        figure.add_scatter(
            **ring, fill="toself", fillcolor=shade, opacity=0.15, line={"width": 0}, hoverinfo="skip",
            legendgroup=name, showlegend=False,
        )  # fmt: skip
        figure.add_scatter(
            x=at,
            y=mean,
            name=name,
            legendgroup=name,
            mode="lines+markers",
            line={"color": shade},
            marker={"symbol": _symbol(number)},
        )
    limits = loss_limits(comparison)
    if limits is not None:
        figure.update_yaxes(range=limits)
    return _layout(figure, "nats a token")


def _steps_figure(go: Any, comparison: Comparison, what: str, y: str) -> Any:
    runs = sum(len(r.arm.runs) for r in comparison.arms)
    points = max(10, min(_MOST_POINTS, _POINTS // max(1, 2 * runs)))
    figure = go.Figure()
    for number, result in enumerate(comparison.arms):
        name, shade = html.escape(result.label), color(number)
        first = True
        for seed, run in result.arm.runs.items():
            values = getattr(run.curves, what)
            x, thinned = _thin(run.curves.tokens, values, points)
            if not len(x):
                continue
            figure.add_scatter(
                x=x, y=thinned, name=name, legendgroup=name, showlegend=first, mode="lines", opacity=0.7,
                line={"color": shade, "width": 1.2}, hovertemplate=f"{name} seed {seed}: %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
            first = False
            spikes = [i for i in run.spikes if np.isfinite(values[i])][:200]
            if spikes:
                figure.add_scatter(
                    x=run.curves.tokens[spikes], y=values[spikes], mode="markers", legendgroup=name, showlegend=False,
                    marker={"color": shade, "symbol": "x", "size": 7},
                    hovertemplate=f"{name} seed {seed}: spike, %{{y:.3f}}<extra></extra>",
                )  # fmt: skip
    figure.update_yaxes(type="log")
    return _layout(figure, y)


def _gap_figure(go: Any, comparison: Comparison) -> Any:
    figure = go.Figure()
    for number, result in enumerate(comparison.arms):
        gap, shade = result.gap_fraction, color(number)
        if gap is None or gap.mean is None:
            continue
        name = html.escape(result.label)
        arm = None if gap.low is None or gap.high is None else 100 * (gap.high - gap.mean)
        error = None if arm is None else {"type": "data", "array": [arm], "thickness": 2.5}
        figure.add_scatter(
            x=[100 * gap.mean], y=[name], error_x=error, mode="markers", name=name, showlegend=False,
            marker={"color": shade, "size": 10, "symbol": _symbol(number)},
        )  # fmt: skip
        figure.add_scatter(
            x=[100 * v for v in gap.differences.values()], y=[name] * gap.n, mode="markers", showlegend=False,
            text=[f"seed {s}" for s in gap.differences], marker={"color": shade, "size": 6, "opacity": 0.5},
        )  # fmt: skip
    figure.add_vline(x=0, line={"color": "#404040", "width": 1})
    _layout(figure, "", 140 + 28 * len(comparison.arms))
    figure.update_xaxes(title="% of the baseline's loss")
    figure.update_yaxes(autorange="reversed")
    return figure


def _sqnr_figure(go: Any, comparison: Comparison) -> Any | None:
    """The lowest SQNR of any operand at each logged step, one run an arm; None where nothing was logged."""
    figure = go.Figure()
    for number, result in enumerate(comparison.arms):
        run = next((run for run in result.arm.runs.values() if run.curves.sqnr), None)
        if run is None:
            continue
        lowest: dict[float, tuple[float, str]] = {}
        for operand, (steps, values) in run.curves.sqnr.items():
            for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                if np.isfinite(value):
                    lowest[step] = min(lowest.get(step, (np.inf, "")), (value, html.escape(str(operand))))
        steps_seen = sorted(lowest)
        figure.add_scatter(
            x=steps_seen, y=[lowest[s][0] for s in steps_seen], text=[lowest[s][1] for s in steps_seen],
            name=html.escape(result.label), mode="lines+markers", line={"color": color(number)},
            marker={"symbol": _symbol(number)},
        )  # fmt: skip
    if not figure.data:
        return None
    _layout(figure, "dB")
    figure.update_xaxes(title="step")
    return figure


def _figures(comparison: Comparison) -> Iterator[str]:
    go = _plotly()
    gap = f"Gap to {comparison.baseline.label}: seeds and {comparison.confidence:.0%} interval"
    figures = {
        "Validation loss: mean and range over seeds": _loss_figure(go, comparison),
        gap: _gap_figure(go, comparison),
        "Training loss (means of stretches; crosses: spikes)": _steps_figure(
            go, comparison, "loss", "nats a token"
        ),
        "Gradient norm before clipping (crosses: spikes of the loss)": _steps_figure(
            go, comparison, "grad_norm", "norm"
        ),
        "Lowest SQNR of any operand (point at a mark: which)": _sqnr_figure(go, comparison),
    }
    config = {"displaylogo": False, "responsive": True}
    first = True
    for title, figure in figures.items():
        if figure is not None:
            # The first brings plotly.js along, the file itself: nothing is fetched
            yield f"<h2>{html.escape(title)}</h2>"
            yield figure.to_html(full_html=False, include_plotlyjs=first, config=config)
            first = False


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    rest = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{first}</tr>\n{rest}</table></div>'


def _verdicts(comparison: Comparison) -> str:
    rows = []
    for label, health in verdict_lines(comparison):
        more = "".join(f"<li>{html.escape(text)}</li>" for text in [*health.evidence[1:], *health.notes])
        rows.append(
            f'<tr><td>{html.escape(label)}</td><td class="{health.verdict}">{html.escape(health.sentence)}'
            f"{f'<ul>{more}</ul>' if more else ''}</td></tr>"
        )
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _picture(png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return f'<noscript><img alt="loss curves and gaps" src="data:image/png;base64,{data}"></noscript>'


def page(comparison: Comparison, gate_failures: Sequence[str], command: str, png: bytes) -> str:
    """The HTML. png: the picture for readers without scripts. Raises ValueError where plotly is not installed."""
    gates = "".join(f"<li>{html.escape(f)}</li>" for f in gate_failures)
    listed = "".join(f"<li>{html.escape(n)}</li>" for n in notes(comparison))
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Comparison of runs</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>Comparison of runs</h1><p>{html.escape(headline(comparison))}</p>",
            f'<div class="gate">Gates that do not pass:<ul>{gates}</ul></div>' if gates else "",
            _table(COLUMNS, table_rows(comparison)),
            _picture(png),
            *_figures(comparison),
            "<h2>Verdicts</h2>",
            _verdicts(comparison),
            f"<h2>Notes</h2><ul>{listed}</ul>",
            "<p>Gaps over seeds: Student's interval of differences of runs that share a seed. Gaps over windows: paired "
            "bootstrap of one seed's two models over held-out windows. Extra tokens: until the run's validation loss is the "
            "baseline's final one. Lowest SQNR: logged, or by the census before the first step.</p>",
            f"<p>Made by <code>{html.escape(command)}</code>; every number is in comparison.json.</p></body></html>",
        ]
    )


def save(comparison: Comparison, gate_failures: Sequence[str], command: str, png: bytes, path: Path) -> None:
    """Writes the page, whole or not at all. Raises ValueError where it would exceed LIMIT_BYTES."""
    text = page(comparison, gate_failures, command, png).encode()
    if len(text) > LIMIT_BYTES:
        raise ValueError(
            f"the page would have {len(text):,} bytes of at most {LIMIT_BYTES:,}: compare fewer runs at a time, or pass "
            "html=false"
        )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(text)
    partial.replace(path)
