"""The command line that studies share: options, the runs, and the exit codes of runs that did not end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from study_runs import Run, RunFailed, run_all


def parser(description: str | None, out: str, workers: int) -> argparse.ArgumentParser:
    """out and workers: the defaults."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1 (default 3)")
    made.add_argument(
        "--workers", type=int, default=workers, help=f"runs at a time, a core each (default {workers})"
    )
    made.add_argument("--out", type=Path, default=Path(out), help=f"folder of the runs (default {out})")
    made.add_argument(
        "--page", type=Path, help="a page with the markers of the results; the picture goes beside it"
    )
    made.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="overrides of all runs, such as steps=2"
    )
    return made


def parsed(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    options = made.parse_args(argv)
    if options.seeds < 1 or options.workers < 1:
        made.error("--seeds and --workers must be 1 or more")
    return options


def ended(runs: Sequence[Run], options: argparse.Namespace) -> int | None:
    """Runs them all. None where all have a result; else the exit code: 2 where one failed, 130 where it was interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs are ended, and save first
    try:
        run_all(runs, options.workers, options.settings)
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return None
