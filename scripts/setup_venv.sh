# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with qtrain in it.
#
#   setup_venv [EXTRA]    EXTRA: an optional-dependencies group of pyproject.toml, such as test
#
# sets VENV_PYTHON. A stamp in .venv names the pyproject.toml, the Python and the extra that were installed, so that a
# second run installs nothing. The environment may set
#   QTRAIN_VENV         the folder (default: .venv in the checkout)
#   QTRAIN_PYTHON       the interpreter that makes it (default: the first of python3.13 .. python3.10, python3)
#   QTRAIN_TORCH        what pip installs as torch (default: torch==2.13.0 without an NVIDIA GPU, torch>=2.11 with one)
#   QTRAIN_TORCH_INDEX  an index for torch alone, such as PyTorch's CPU index: without a GPU it avoids the CUDA build
# shellcheck shell=bash

_suitable_python() {
    "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

_find_python() {
    local candidate
    if [ -n "${QTRAIN_PYTHON:-}" ]; then
        _suitable_python "$QTRAIN_PYTHON" && { echo "$QTRAIN_PYTHON"; return 0; }
        echo "QTRAIN_PYTHON=$QTRAIN_PYTHON is no Python 3.10 or newer with the venv module" >&2
        return 1
    fi
    for candidate in python3.13 python3.12 python3.11 python3.10 python3 python; do
        _suitable_python "$candidate" && { echo "$candidate"; return 0; }
    done
    echo "No Python 3.10 or newer with the venv module on PATH." >&2
    echo "Install one (Debian and Ubuntu: apt-get install python3 python3-venv) or set QTRAIN_PYTHON to it." >&2
    return 1
}

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1
}

has_cxx_compiler() {
    { [ -n "${CXX:-}" ] && command -v "$CXX" >/dev/null 2>&1; } || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1
}

_install_torch() {
    local wanted="${QTRAIN_TORCH:-}"
    if [ -z "$wanted" ]; then
        # Plain torch brings gigabytes of CUDA libraries on Linux; where a CPU build of this version is at hand, the
        # pin selects it.
        if has_nvidia_gpu; then wanted="torch>=2.11"; else wanted="torch==2.13.0"; fi
    fi
    echo "installing $wanted"
    if [ -n "${QTRAIN_TORCH_INDEX:-}" ]; then
        "$VENV_PYTHON" -m pip install --index-url "$QTRAIN_TORCH_INDEX" "$wanted" && return 0
    else
        "$VENV_PYTHON" -m pip install "$wanted" && return 0
    fi
    echo "pip could not install $wanted. QTRAIN_TORCH names another build, as in QTRAIN_TORCH='torch>=2.11';" >&2
    echo "QTRAIN_TORCH_INDEX names the index to take it from (PyTorch's installation page lists one for CPU builds)." >&2
    return 1
}

setup_venv() {
    local extra="${1:-}" root venv python stamp wanted target
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    venv="${QTRAIN_VENV:-$root/.venv}"
    VENV_PYTHON="$venv/bin/python"
    if [ ! -x "$VENV_PYTHON" ]; then
        python="$(_find_python)" || return 1
        echo "making $venv with $("$python" --version)"
        "$python" -m venv "$venv" || return 1
    fi
    # A stamp an extra: installing one leaves the others as they are
    stamp="$venv/.qtrain-installed-${extra:-base}"
    wanted="$("$VENV_PYTHON" -c '
import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), sys.version.split()[0], sys.argv[2:])
' "$root/pyproject.toml" "$root" "${QTRAIN_TORCH:-}" "$extra")" || return 1
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    _install_torch || return 1
    target="$root"
    [ -z "$extra" ] || target="${root}[$extra]"
    echo "installing qtrain${extra:+ with its $extra extra}"
    "$VENV_PYTHON" -m pip install -e "$target" || return 1
    printf '%s\n' "$wanted" >"$stamp"
}
