"""Which of Adam's moments survive which format: the study of docs/optimizer_states.md, run, judged and written down.

    bash scripts/reproduce_optimizer_states.sh                                   the whole study
    bash scripts/reproduce_optimizer_states.sh --page docs/optimizer_states.md   and its results into that page

About 30 minutes of processor time. The same command goes on where it was interrupted. Exit code: 0 where every claim holds,
1 where one does not or cannot be told, 2 where a run failed, 130 where it was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import study_command
from optimizer_states_arms import ARMS, EXPERIMENT
from optimizer_states_claims import CLAIMS, HOLDS, judge
from optimizer_states_page import SCRIPT, draw, read_results, section
from study_page import check_alike, write_page
from study_runs import runs_of

from qtrain.training.run_folder import write_text


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_command.parser(__doc__, "outputs/optimizer_states", workers=2)
    options = study_command.parsed(parser, argv)
    runs = runs_of(ARMS, range(options.seeds), options.out, EXPERIMENT)
    if (code := study_command.ended(runs, options)) is not None:
        return code
    check_alike(runs)
    results = read_results(runs)
    verdicts = [judge(claim, results) for claim in CLAIMS]
    text = section(results, verdicts, runs, options.settings)
    print(text)
    write_text(options.out / "results.md", text + "\n")
    picture = options.out / "results.png"
    if options.page is not None:
        write_page(options.page, SCRIPT, text)
        picture = options.page.with_suffix(".png")
    draw(results, runs, picture)
    failed = [v for v in verdicts if v.outcome != HOLDS]
    print(f"\n{len(verdicts) - len(failed)} of {len(verdicts)} claims hold; picture: {picture}")
    for v in failed:
        print(f"{v.outcome}: {v.claim.text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
