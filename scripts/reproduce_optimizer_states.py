"""Which of Adam's moments survive which format: the study of docs/optimizer_states.md, run, judged and written down.

    bash scripts/reproduce_optimizer_states.sh                                   the whole study
    bash scripts/reproduce_optimizer_states.sh --page docs/optimizer_states.md   and its results into that page

About 30 minutes of processor time. The same command goes on where it was interrupted. Exit code: 0 where every claim holds,
1 where one does not or cannot be told, 2 where a run failed, 130 where it was interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from optimizer_states_claims import CLAIMS, HOLDS, judge
from optimizer_states_page import check_alike, draw, read_results, section, write_page
from optimizer_states_runs import ARMS, RunFailed, run_all, runs_of

from qtrain.training.run_folder import write_text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1 (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each (default 2)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/optimizer_states"), help="folder of the runs"
    )
    parser.add_argument(
        "--page", type=Path, help="a page with the markers of the results; the picture goes beside it"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="overrides of all runs, such as steps=2"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.workers < 1:
        parser.error("--seeds and --workers must be 1 or more")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs are ended, and save first
    runs = runs_of(ARMS, range(options.seeds), options.out)
    try:
        run_all(runs, options.workers, options.settings)
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    check_alike(runs)
    results = read_results(runs)
    verdicts = [judge(claim, results) for claim in CLAIMS]
    text = section(results, verdicts, runs, options.settings)
    print(text)
    write_text(options.out / "results.md", text + "\n")
    picture = options.out / "results.png"
    if options.page is not None:
        write_page(options.page, text)
        picture = options.page.with_suffix(".png")
    draw(results, runs, picture)
    failed = [v for v in verdicts if v.outcome != HOLDS]
    print(f"\n{len(verdicts) - len(failed)} of {len(verdicts)} claims hold; picture: {picture}")
    for v in failed:
        print(f"{v.outcome}: {v.claim.text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
