#!/usr/bin/env bash
# Everything that must hold before a commit: lint, format, types, tests. Arguments go to pytest, as in
#
#   bash scripts/test.sh tests/quant -k groups
#
# The last line is pytest's summary. QTRAIN_TEST_WORKERS: processes of pytest (default 2; each computes on one thread).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/setup_venv.sh
. "$here/setup_venv.sh"
setup_venv test
cd "$here/.."

"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .
"$VENV_PYTHON" -m mypy
OMP_NUM_THREADS=1 exec "$VENV_PYTHON" -m pytest -n "${QTRAIN_TEST_WORKERS:-2}" --dist worksteal "$@"
