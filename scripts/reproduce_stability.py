"""Which recipes stay healthy, which fail, and does the verdict say why: the study of docs/stability_study.md.

    bash scripts/reproduce_stability.sh                                  the whole study
    bash scripts/reproduce_stability.sh --page docs/stability_study.md   and its results into that page

About 40 minutes of processor time on one core. The same command goes on where it was interrupted. Exit code: 0 where the
placebo cannot be told from the baseline and every verdict is one that was foreseen, 1 where not, 2 where a run failed or
the runs cannot be compared, 130 where it was interrupted.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

import study_command
from stability_arms import ARMS, EXPERIMENT
from stability_page import SCRIPT, section, surprises
from study_page import check_alike, write_page
from study_runs import BASELINE, runs_of

from qtrain.training.run_folder import write_text


def main(argv: Sequence[str] | None = None) -> int:
    from qtrain import cli
    from qtrain.analysis.comparison import compare
    from qtrain.analysis.run_sources import places, read_all

    parser = study_command.parser(__doc__, "outputs/stability", workers=1)
    options = study_command.parsed(parser, argv)
    runs = runs_of(ARMS, range(options.seeds), options.out, EXPERIMENT)
    if (code := study_command.ended(runs, options)) is not None:
        return code
    check_alike(runs)
    folders, compared = [str(run.folder) for run in runs], options.out / "comparison"
    words = [f"runs=[{','.join(folders)}]", f"baseline={BASELINE}", "allow=[optimizer.lr]"]
    if code := cli.main(["compare", *words, f"out={compared}"]):
        return code
    comparison = compare(read_all(places(folders)), baseline=BASELINE, allow=["optimizer.lr"])
    text = section(comparison, runs, options.settings)
    print(text)
    write_text(options.out / "results.md", text + "\n")
    if options.page is not None:
        write_page(options.page, SCRIPT, text)
        shutil.copyfile(compared / "comparison.png", options.page.with_suffix(".png"))
    found = surprises(comparison)
    print(f"surprises: {len(found)}; {options.out / 'results.md'}")
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
