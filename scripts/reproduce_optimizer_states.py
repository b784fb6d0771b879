"""Which of Adam's moments survive which format: the study of docs/optimizer_states.md, run, judged and written down."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from optimizer_states_runs import ARMS, RunFailed, run_all, runs_of

ROOT = Path(__file__).parents[1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1 (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each (default 2)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/optimizer_states"), help="folder of the runs"
    )
    parser.add_argument("settings", nargs="*", help="overrides of all runs, such as steps=2")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs are ended and save first
    runs = runs_of(ARMS, range(options.seeds), options.out)
    try:
        run_all(runs, options.workers, options.settings)
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
