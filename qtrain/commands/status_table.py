"""How ``qtrain status`` looks: one line that sums up, a table with a row a run, and what failed and why."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtrain.analysis.run_states import COMPLETED, STATES, TROUBLE, UNDER_WAY
from qtrain.analysis.survey import Row, Survey

_BAR = 10  # characters
_DETAILS = 12  # runs in trouble whose logs are told; the others stand in json=
# Columns of a terminal from which on more of the table is shown
_WIDE, _WIDER = 118, 150
_GAP = 2  # characters between columns
_COLOURS = {
    "queued": "yellow", "starting": "cyan", "running": "bold cyan", "requeued": "yellow", "completed": "green",
    **dict.fromkeys(TROUBLE, "bold red"), "interrupted": "bold yellow", "cancelled": "bold yellow", "silent": "bold yellow",
    "diverged": "bold red", "failed": "bold red", "healthy": "green", "noisy": "yellow", "unstable": "bold yellow",
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
    """How many, and of what: ``3 loss_spike, clip_share``."""
    names = ", ".join(dict.fromkeys(alert.name.rsplit("/", 1)[-1] for alert in row.alerts))
    return Text(f"{len(row.alerts)} {names}" if row.alerts else "", style="yellow")


def _tries(row: Row) -> Text:
    return Text(f"{row.attempts}" if row.attempts > 1 else "")


def _rate(row: Row) -> Text:
    rate = row.tail.tokens_per_s if row.tail is not None else None
    return Text("" if rate is None else f"{rate:,.0f}")


@dataclass(frozen=True)
class _Column:
    """least: characters that it is cut to where the terminal is narrow; None: never cut. from_width: of the terminal from
    which on it is shown. always: even where no row has anything in it."""

    heading: str
    cell: Callable[[Row], Text]
    right: bool = True
    least: int | None = None
    from_width: int = 0
    always: bool = False


def _columns(plain: bool) -> list[_Column]:
    """From left to right."""
    return [
        _Column("run", lambda row: Text(row.label), right=False, least=16, always=True),
        _Column("state", _state, right=False, least=11, always=True),
        _Column("step", lambda row: _bar(row, plain), right=False, always=True),
        _Column("train", lambda row: _number(row.tail.loss if row.tail else None)),
        _Column("val", lambda row: _number(row.tail.val_loss if row.tail else None)),
        _Column("so far", _verdict, right=False),
        _Column("alarms", _alarms, right=False, least=6),
        _Column("tokens/s", _rate, from_width=_WIDE),
        _Column("left", lambda row: Text(duration(row.left))),
        _Column("tries", _tries),
        _Column("node", lambda row: Text(row.node or ""), right=False, least=6, from_width=_WIDE),
        _Column("folder", lambda row: Text(_name(row.folder)), right=False, least=8, from_width=_WIDER),
    ]


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
    found = [(c, [c.cell(row) for row in rows]) for c in _columns(plain) if console.width >= c.from_width]
    shown = [(c, cells) for c, cells in found if c.always or any(cell.plain for cell in cells)]
    widths = [max([len(c.heading), *(cell.cell_len for cell in cells)]) for c, cells in shown]
    # What does not fit is cut from the columns that can be: the widest first
    excess = sum(widths) + _GAP * (len(widths) - 1) - console.width
    while excess > 0:
        spare = [(widths[i] - c.least, i) for i, (c, _) in enumerate(shown) if c.least is not None]
        most, widest = max(spare)
        if most <= 0:
            break
        widths[widest] -= 1
        excess -= 1
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for (column, _), width in zip(shown, widths, strict=True):
        table.add_column(
            column.heading,
            justify="right" if column.right else "left",
            no_wrap=True,
            min_width=width,
            max_width=width,
        )
    for i in range(len(rows)):
        table.add_row(*(_cut(cells[i], width) for (_, cells), width in zip(shown, widths, strict=True)))
    return table


def _cut(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    return text


def _details(rows: Sequence[Row]) -> list[Text]:
    """Of what went wrong: the sentence, the log's telling line, and the next command."""
    lines: list[Text] = []
    for row in rows[:_DETAILS]:
        what = Text(f"{row.label}", style="bold").append(f"  {row.state}", style=_COLOURS[row.state])
        step = row.tail.step if row.tail is not None else 0
        what.append(f" after step {step:,}" if step else "", style="")
        why = row.standing.why or ""
        lines.append(what.append(f": {why}" if why else ""))
        if (
            row.health is not None
            and row.verdict in ("diverged", "failed")
            and row.health.sentence not in f"diverged: {why}"
        ):
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
