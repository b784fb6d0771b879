#!/usr/bin/env bash
# From a checkout and Python >= 3.10 to a trained model: makes .venv, installs, and runs the main job.
#
#   bash scripts/quickstart.sh                          qtrain train experiment=quickstart
#   bash scripts/quickstart.sh steps=100                with other values
#   QTRAIN_EXPERIMENT=NAME bash scripts/quickstart.sh   another experiment
#
# scripts/setup_venv.sh says which variables change the installation.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/setup_venv.sh
. "$here/setup_venv.sh"
setup_venv ""

overrides=("experiment=${QTRAIN_EXPERIMENT:-quickstart}")
if ! has_nvidia_gpu && ! has_cxx_compiler; then
    echo "No C++ compiler found: training without torch.compile (slower; the numbers are the same up to rounding)."
    overrides+=("compile=false")
fi
exec "$VENV_PYTHON" -m qtrain.cli train "${overrides[@]}" "$@"
