"""How ``qtrain status`` looks: one line that sums up, a table with a row a run, and what failed and why."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtrain.analysis.run_states import COMPLETED, STATES, TROUBLE, UNDER_WAY
from qtrain.analysis.survey import Row, Survey

_BAR = 10  # characters
_DETAILS = 12  # runs in trouble whose logs are told; the others stand in json=
# Columns of a terminal from which on more of the table is shown
_WIDE, _WIDER = 118, 150
_COLOURS = {
    "queued": "yellow", "starting": "cyan", "running": "bold cyan", "requeued": "yellow", "completed": "green",
    **dict.fromkeys(TROUBLE, "bold red"), "interrupted": "bold yellow", "cancelled": "bold yellow", "silent": "bold yellow",
    "healthy": "green", "noisy": "yellow", "unstable": "bold yellow",
}  # fmt: skip


def duration(seconds: float | None) -> str:
    """``45s``, ``12m``, ``3h20m``, ``2d04h``."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f}s"
    if minutes < 100:
        return f"{minutes}m"
    return f"{minutes // 60}h{minutes % 60:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


def _bar(row: Row, plain: bool) -> Text:
    """``━━━━━━──── 1,200/2,000``."""
    tail = row.tail
    if tail is None or not tail.steps:
        return Text(f"{tail.step:,}" if tail is not None and tail.step else "")
    full, empty = ("#", ".") if plain else ("━", "─")
    done = min(_BAR, int(_BAR * tail.step / tail.steps))
    bar = Text(full * done, style=_COLOURS[row.state].removeprefix("bold "))
    bar.append(empty * (_BAR - done), style="bright_black")
    return bar.append(f" {tail.step:,}/{tail.steps:,}", style="")


def _number(value: float | None) -> Text:
    if value is None:
        return Text("")
    return Text(f"{value:.3f}", style="" if math.isfinite(value) else "bold red")


def _state(row: Row) -> Text:
    text = Text(row.state, style=_COLOURS[row.state])
    if row.standing.why and row.state in (*UNDER_WAY,):
        text.append(f" {row.standing.why}", style="dim")
    return text


def _verdict(row: Row) -> Text:
    verdict = row.verdict
    text = Text(verdict or "", style=_COLOURS.get(verdict or "", ""))
    if verdict is not None and row.tail is not None and not row.tail.whole:
        text.append("~", style="dim")
    return text


def _alarms(row: Row) -> Text:
    return Text(f"{len(row.alerts)}" if row.alerts else "", style="yellow")


def _tries(row: Row) -> Text:
    return Text(f"{row.attempts}" if row.attempts > 1 else "")


def _rate(row: Row) -> Text:
    rate = row.tail.tokens_per_s if row.tail is not None else None
    return Text("" if rate is None else f"{rate:,.0f}")


def _columns(width: int, plain: bool) -> list[tuple[str, dict[str, Any], Callable[[Row], Text]]]:
    """(heading, options, cell), from left to right, of a table in ``width`` columns."""
    right = {"justify": "right", "no_wrap": True}
    label: dict[str, Any] = {"overflow": "ellipsis", "no_wrap": True, "ratio": 3, "min_width": 12}
    columns = [
        ("run", label, lambda row: Text(row.label)),
        ("state", {"overflow": "ellipsis", "no_wrap": True, "ratio": 2, "min_width": 11}, _state),
        ("step", {"no_wrap": True}, lambda row: _bar(row, plain)),
        ("train", right, lambda row: _number(row.tail.loss if row.tail else None)),
        ("val", right, lambda row: _number(row.tail.val_loss if row.tail else None)),
        ("so far", {"no_wrap": True}, _verdict),
        ("alarms", right, _alarms),
        ("left", right, lambda row: Text(duration(row.left))),
    ]
    if width >= _WIDE:
        columns[6:7] = [columns[6], ("tokens/s", right, _rate)]
        columns += [
            ("tries", right, _tries),
            ("node", {"overflow": "ellipsis", "no_wrap": True}, lambda row: Text(row.node or "")),
        ]
    if width >= _WIDER:
        columns.append(
            (
                "folder",
                {"overflow": "ellipsis", "no_wrap": True, "ratio": 2},
                lambda row: Text(_name(row.folder)),
            )
        )
    return columns


def _name(folder: Path | None) -> str:
    return "" if folder is None else folder.name


def shown_rows(rows: Sequence[Row], limit: int | None) -> tuple[list[Row], dict[str, int]]:
    """At most ``limit`` rows in their order, and how many of each state are left out: completed ones first, then what waits."""
    if limit is None or len(rows) <= limit:
        return list(rows), {}
    order = {
        state: i for i, state in enumerate((*TROUBLE, "running", "starting", "requeued", "queued", COMPLETED))
    }
    chosen = sorted(range(len(rows)), key=lambda i: (order[rows[i].state], i))[:limit]
    kept = set(chosen)
    left_out: dict[str, int] = {}
    for i, row in enumerate(rows):
        if i not in kept:
            left_out[row.state] = left_out.get(row.state, 0) + 1
    return [rows[i] for i in sorted(kept)], left_out


def headline(found: Survey) -> Text:
    counts = found.counts
    text = Text(f"{len(found.rows)} run{'s' * (len(found.rows) != 1)}: ", style="bold")
    parts = [(f"{counts[state]} {state}", _COLOURS[state]) for state in STATES if state in counts]
    for i, (part, style) in enumerate(parts):
        text.append(", " * (i > 0)).append(part, style=style)
    if found.under_way:
        text.append("; ")
        left = f"about {duration(found.left)} left" if found.left is not None else "no pace is known yet"
        text.append(left, style="bold")
    return text


def _table(rows: Sequence[Row], console: Console) -> Table:
    plain = not (console.encoding or "").lower().startswith("utf")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", expand=False)
    columns = [
        c for c in _columns(console.width, plain) if c[0] in _ALWAYS or any(c[2](row).plain for row in rows)
    ]
    for heading, options, _ in columns:
        table.add_column(heading, **options)
    for row in rows:
        table.add_row(*(cell(row) for _, _, cell in columns))
    return table


_ALWAYS = ("run", "state", "step")


def _details(rows: Sequence[Row]) -> list[Text]:
    """Of what went wrong: the sentence, the log's telling line, and the next command."""
    lines: list[Text] = []
    for row in rows[:_DETAILS]:
        what = Text(f"{row.label}", style="bold").append(f"  {row.state}", style=_COLOURS[row.state])
        step = row.tail.step if row.tail is not None else 0
        what.append(f" after step {step:,}" if step else "", style="")
        why = row.standing.why or ""
        lines.append(what.append(f": {why}" if why else ""))
        if row.health is not None and row.state in ("diverged", "completed") and row.health.blame is not None:
            lines.append(Text(f"  {row.health.sentence}"))
        if row.cause is not None:
            lines.append(Text(f"  {row.cause.line}", style="red"))
        if row.log is not None:
            lines.append(
                Text(f"  log: {row.cause.log if row.cause and row.cause.log else row.log}", style="dim")
            )
        elif row.folder is not None:
            lines.append(Text(f"  folder: {row.folder}", style="dim"))
        if row.cause is not None and row.cause.kind != "unknown":
            lines.append(Text(f"  {row.cause.kind}: {row.cause.remedy}"))
        if row.command is not None:
            lines.append(Text("  next: ").append(row.command, style="cyan"))
    if len(rows) > _DETAILS:
        lines.append(
            Text(f"and {len(rows) - _DETAILS} more in trouble: json=FILE has all of them", style="dim")
        )
    return lines


def _logs(rows: Sequence[Row]) -> list[Text]:
    logs = [str(row.log.parent) for row in rows if row.log is not None]
    return [Text(f"logs: {os.path.commonpath(logs)}", style="dim")] if logs else []


def drawing(found: Survey, console: Console, limit: int | None) -> RenderableType:
    rows, left_out = shown_rows(found.rows, limit)
    parts: list[RenderableType] = [headline(found), Text("")]
    parts.append(_table(rows, console))
    if left_out:
        parts.append(
            Text(
                f"and {', '.join(f'{n} {state}' for state, n in left_out.items())} (limit=null shows all)",
                style="dim",
            )
        )
    if any(row.tail is not None and row.verdict is not None and not row.tail.whole for row in rows):
        parts.append(
            Text(
                "~ judged on its start, its last steps and places in between; qtrain compare reads all",
                style="dim",
            )
        )
    details = _details(found.troubled)
    if details:
        parts += [Text(""), *details]
    parts += [*_logs(rows), *(Text(f"note: {note}") for note in found.notes)]
    return Group(*parts)
