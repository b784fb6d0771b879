"""Measuring claims one after the other, in as many sittings as it takes, and saying what came of them.

A claim that was measured is one JSON file, ``claims/NAME.json``, which appears by a rename. It is measured again only where what
it claims has changed, or where it raised. An error is a result of its own, never "holds".
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .claims import CLAIMS, FAILS, HOLDS, THEMES, UNKNOWN, Bench, Claim, Measured, OutOfTime
from .claims.bench import replace_text

ERROR, OPEN = "error", "not yet"
BEGIN, END = "<!-- verification: written by qtrain verify -->", "<!-- end of the verification -->"
_NUMBERS = ("value", "low", "high")


@dataclass(frozen=True)
class Finding:
    """claim: its name. outcome: ``holds``, ``does not hold``, ``cannot tell``, ``error`` or ``not yet``. problem: of an error."""

    claim: Claim
    outcome: str
    measured: Measured | None = None
    seconds: float = 0.0
    problem: str = ""


def chosen(only: Sequence[str] | None) -> list[Claim]:
    """The claims of those names, or of themes; all for None. Raises ValueError, naming what there is, for others."""
    if only is None:
        return list(CLAIMS.values())
    found: list[Claim] = []
    for name in only:
        if name in CLAIMS:
            found.append(CLAIMS[name])
        elif name in THEMES:
            found += THEMES[name]
        else:
            raise ValueError(
                f"only: no claim or theme {name!r}; themes are {', '.join(THEMES)}; claims are {', '.join(CLAIMS)}"
            )
    return list({claim.name: claim for claim in found}.values())


def _statement(claim: Claim) -> dict[str, Any]:
    """What a kept measurement must have been made for."""
    return {"says": claim.says, "quantity": claim.quantity, "expected": claim.expected}


def kept(claim: Claim, folder: Path, key: str) -> Finding | None:
    """What was found before, judged anew; None where there is nothing, or something of another claim or size."""
    path = folder / "claims" / f"{claim.name}.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["statement"] != _statement(claim) or found["size"] != key or found["measured"] is None:
        return None
    numbers = {name: float(found["measured"][name]) for name in _NUMBERS}
    measured = Measured(**numbers, of=found["measured"]["of"])
    return Finding(claim, claim.judge(measured), measured, found["seconds"])


def _keep(finding: Finding, folder: Path, key: str) -> None:
    (folder / "claims").mkdir(parents=True, exist_ok=True)
    measured = None
    if finding.measured is not None:  # JSON has no infinity
        measured = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in asdict(finding.measured).items()
        }
    found = {
        "statement": _statement(finding.claim),
        "size": key,
        "outcome": finding.outcome,
        "measured": measured,
        "seconds": round(finding.seconds, 2),
        "problem": finding.problem,
    }
    replace_text(folder / "claims" / f"{finding.claim.name}.json", json.dumps(found, indent=1) + "\n")


def measured_now(claim: Claim, bench: Bench) -> Finding:
    """Raises OutOfTime where the budget ends within."""
    began = time.process_time()
    try:
        measured = claim.measure(bench)
    except OutOfTime:
        raise
    except Exception as error:  # a claim that cannot be measured must not hide the others
        last = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        return Finding(claim, ERROR, None, time.process_time() - began, problem)
    return Finding(claim, claim.judge(measured), measured, time.process_time() - began)


def verify(
    claims: Iterable[Claim], bench: Bench, say: Callable[[str], None] = lambda _: None
) -> list[Finding]:
    """A finding of each claim, ``not yet`` for those that the bench's deadline left no time for."""
    found: list[Finding] = []
    for claim in claims:
        finding = kept(claim, bench.folder, bench.size.key)
        if finding is None:
            try:
                bench.check_time()
                finding = measured_now(claim, bench)
                _keep(finding, bench.folder, bench.size.key)
                say(f"{finding.outcome:<14} {claim.name} ({finding.seconds:.1f} s)")
            except OutOfTime:
                finding = Finding(claim, OPEN)
        found.append(finding)
    return found


def _number(value: float) -> str:
    return f"{value:.4g}"


def cells(finding: Finding) -> list[str]:
    """claim, source, quantity, expected, measured, interval, outcome."""
    claim, m = finding.claim, finding.measured
    value = "" if m is None else _number(m.value)
    interval = ""
    if m is not None:
        interval = "exact" if m.low == m.value == m.high else f"{_number(m.low)} .. {_number(m.high)}"
    return [claim.says, claim.source, claim.quantity, claim.expected, value, interval, finding.outcome]


HEADER = ("claim", "source", "measured quantity", "expected", "measured", "interval", "")


def counted(findings: Sequence[Finding]) -> str:
    outcomes = [f.outcome for f in findings]
    names = (HOLDS, FAILS, UNKNOWN, ERROR, OPEN)
    return ", ".join(f"{outcomes.count(n)} {n}" for n in names if n in outcomes)


def themed(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """By theme, in the registry's order."""
    by_name = {f.claim.name: f for f in findings}
    grouped = {
        theme: [by_name[c.name] for c in claims if c.name in by_name] for theme, claims in THEMES.items()
    }
    return {theme: found for theme, found in grouped.items() if found}


def page(findings: Sequence[Finding], command: str, versions: Mapping[str, Any], size: str) -> str:
    """Markdown: the tables, how they were made, and on what."""
    about = ", ".join(f"{k} {versions[k]}" for k in ("qtrain", "torch", "python") if versions.get(k))
    lines = [f"`{command}`: {counted(findings)}. {about}; trainings {size}.", ""]
    for theme, found in themed(findings).items():
        lines += [
            f"### {theme[0].upper()}{theme[1:]}",
            "",
            f"| {' | '.join(HEADER)} |",
            "|---|---|---|---|---|---|---|",
        ]
        for finding in found:
            shown = [cell.replace("|", "\\|") for cell in cells(finding)]
            shown[-1] = f"**{shown[-1]}**" if finding.outcome != HOLDS else shown[-1]
            lines.append(f"| {' | '.join(shown)} |")
        notes = [f"- `{f.claim.name}`: {f.problem}" for f in found if f.problem]
        lines += ["", *notes, *([""] if notes else [])]
    return "\n".join(lines).rstrip() + "\n"


def between_markers(text: str, content: str) -> str:
    """``text`` with what stands between the markers replaced. Raises ValueError where they are not there."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}, once each, in this order")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{content.strip()}\n\n{END}{rest.split(END)[1]}"
