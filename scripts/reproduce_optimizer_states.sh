#!/usr/bin/env bash
# The study of docs/optimizer_states.md: some 30 minutes of processor time; interrupted, the same command goes on.
# Arguments: those of reproduce_optimizer_states.py (--help lists them).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/setup_venv.sh
. "$here/setup_venv.sh"
setup_venv ""
exec "$VENV_PYTHON" -u "$here/reproduce_optimizer_states.py" "$@"
