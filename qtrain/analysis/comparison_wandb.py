"""A comparison in W&B: a run with the table, charts and the page, and, with a server, a report that shows them to others.

The charts are W&B's own presets over tables that are logged with them, so that they can be edited there. A report is made by the
library wandb-workspaces and holds text of the comparison, and panels of the project's runs, grouped by arm; it asks a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .comparison import Comparison
from .comparison_figures import band
from .comparison_table import COLUMNS, headline, notes, table_rows, verdict_lines

# W&B refuses longer titles of reports
_TITLE = 128


def check_report(*, logs: bool, mode: str) -> None:
    """Raises ValueError where there can be no report: without a run, a server, or the library. mode: online or offline."""
    if not logs:
        raise ValueError("wandb_report=true: a report shows what was logged; pass wandb=true too")
    if mode != "online":
        raise ValueError(
            f"wandb_report=true: a report needs W&B's server, and the mode is {mode}; log in with 'wandb login', or leave it out"
        )
    if find_spec("wandb_workspaces") is None:
        raise ValueError("wandb_report=true needs wandb-workspaces: pip install 'qtrain[wandb-report]'")


def charts(comparison: Comparison) -> dict[str, Any]:
    """name -> chart: validation losses over tokens, and where they are known the gaps and the lowest SQNR of each arm."""
    import wandb

    found: dict[str, Any] = {}
    curves = {r.label: band(r) for r in comparison.arms}
    curves = {label: c for label, c in curves.items() if len(c[0])}
    if curves:
        found["charts/val_loss"] = wandb.plot.line_series(
            xs=[c[0].tolist() for c in curves.values()],
            ys=[c[1].tolist() for c in curves.values()],
            keys=list(curves),
            title="Validation loss, mean over seeds, nats a token",
            xname="tokens",
        )
    gaps = [
        [r.label, 100 * r.gap_fraction.mean]
        for r in comparison.arms
        if r.gap_fraction is not None and r.gap_fraction.mean is not None
    ]
    title = f"Gap to {comparison.baseline.label}, % of its loss"
    lowest = [[r.label, r.sqnr[0]] for r in comparison.arms if r.sqnr is not None]
    for name, value, rows, shown in (
        ("charts/gap", "gap_percent", gaps, title),
        ("charts/lowest_sqnr", "sqnr_db", lowest, "Lowest SQNR of any operand, dB"),
    ):
        if rows:
            table = wandb.Table(columns=["arm", value], data=rows)
            found[name] = wandb.plot.bar(table, "arm", value, title=shown)
    return found


def log(
    comparison: Comparison,
    command: str,
    page: Path | None,
    *,
    mode: str,
    report: bool = False,
    **where: Any,
) -> list[str]:
    """A run of the job type "compare" with table, charts, and the page where there is one; and a report of it. Where they
    lie. where: project, entity, dir."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", save_code=False, disable_git=True, x_disable_meta=True
    )
    run = wandb.init(
        name="comparison",
        job_type="compare",
        mode=mode,  # type: ignore[arg-type]
        settings=settings,
        config={"command": command},
        **where,
    )
    run.log(
        {"comparison": wandb.Table(columns=list(COLUMNS), data=[list(r) for r in table_rows(comparison)])}
    )
    run.log(charts(comparison))
    if page is not None:
        run.log({"page": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
    lies, project, entity = run.url if mode == "online" else run.dir, run.project, run.entity
    run.finish()
    return [str(lies), *([_save_report(comparison, command, project, entity)] if report else [])]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "; ")


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _save_report(comparison: Comparison, command: str, project: str, entity: str) -> str:
    """Its address."""
    import wandb_workspaces.reports.v2 as wr

    runs = wr.Runset(project=project, entity=entity, name="runs by arm", groupby=["group"])
    # The library types its arguments as invariant lists of unions
    panels: list[Any] = [
        wr.LinePlot(title=title, x="tokens", y=[metric])
        for title, metric in (
            ("Validation loss", "val/loss"),
            ("Gradient norm", "train/grad_norm"),
            ("Share of loss spikes", "stability/loss_spike_share"),
            ("Share of clipped steps", "stability/clip_share"),
        )
    ]
    remarks: list[Any] = [*notes(comparison)]
    report = wr.Report(
        project=project,
        entity=entity,
        title=f"Comparison against {comparison.baseline.label}"[:_TITLE],
        description=command,
        blocks=[
            wr.P(headline(comparison)),
            wr.MarkdownBlock(_markdown_table(COLUMNS, table_rows(comparison))),
            wr.H2("Verdicts"),
            wr.UnorderedList([f"{label}: {health.sentence}" for label, health in verdict_lines(comparison)]),
            wr.H2("Notes"),
            wr.UnorderedList(remarks),
            wr.H2("Runs"),
            wr.PanelGrid(runsets=[runs], panels=panels),
        ],
    )
    report.save()
    return str(report.url)
