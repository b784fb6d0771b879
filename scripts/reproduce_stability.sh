#!/usr/bin/env bash
# The study of docs/stability_study.md: some 40 minutes of one core; interrupted, the same command goes on.
# Arguments: those of reproduce_stability.py (--help lists them).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/setup_venv.sh
. "$here/setup_venv.sh"
setup_venv "report"
exec "$VENV_PYTHON" -u "$here/reproduce_stability.py" "$@"
