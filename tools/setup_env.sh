#!/usr/bin/env bash
# Makes or refreshes .venv with everything `make quickstart` and `make test` need.
#
#   tools/setup_env.sh [VENV_DIR]        default: .venv beside setup.py
#
# CPU machine (nvidia-smi finds no GPU): torch by constraints-cpu.txt, and only a build without CUDA.
# GPU machine: torch from the package index, which is the CUDA build; Transformer Engine is a step of its
# own (see CONTRIBUTING.md).
#
# PYTHON          interpreter to use (3.11 or 3.12); otherwise the first that fits is taken
# TORCH_CPU_INDEX where CPU builds of torch are, asked only if pip's own sources have none
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${1:-$ROOT/.venv}"
TORCH_CPU_INDEX="${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# Runs the candidate rather than looking for it: version managers leave commands that only print an error.
python_fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3 python; do
        if python_fits "$candidate"; then
            printf '%s\n' "$candidate"
            return
        elif [ "$candidate" = "${PYTHON:-}" ]; then
            fail "PYTHON=$PYTHON does not run or is not Python 3.11 or 3.12"
        fi
    done
    fail "Python 3.11 or 3.12 is needed and was not found; install it or name one: make setup PYTHON=/path/to/python3.11"
}

has_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU '
}

make_venv() {
    local python
    python="$(find_python)"
    # Debian splits ensurepip off; venv would then fail half way and leave a venv without pip.
    "$python" -c 'import venv, ensurepip' 2>/dev/null \
        || fail "$python cannot make virtual environments (modules venv, ensurepip missing); on Debian: apt-get install python3-venv"
    echo "setup: $("$python" --version) ($python) -> $VENV"
    # --clear: what is left of an interrupted first run would not be repaired by pip.
    "$python" -m venv --clear "$VENV"
}

# The torch file pip would install under the constraints, e.g. ".../torch-2.13.0+cpu-cp311-...whl"; empty if none.
torch_candidate() {
    "$VENV/bin/python" -m pip install --quiet --dry-run --ignore-installed --no-deps --report - \
        -c "$ROOT/constraints-cpu.txt" torch 2>/dev/null \
        | "$VENV/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["download_info"]["url"])' \
        2>/dev/null || true
}

has_cpu_torch() {
    "$VENV/bin/python" - "$ROOT/constraints-cpu.txt" 2>/dev/null <<'PY'
import sys
from importlib.metadata import version
pinned = next(line for line in open(sys.argv[1]) if line.startswith("torch==")).strip().removeprefix("torch==")
installed = version("torch")
local_ok = installed.endswith("+cpu") or sys.platform == "darwin"
sys.exit(not (installed.split("+")[0] == pinned and local_ok))
PY
}

install_cpu_torch() {
    has_cpu_torch && return
    local found
    found="$(torch_candidate)"
    case "$(uname -s) $found" in
        Darwin*torch-* | *+cpu* | *%2Bcpu*)
            "$VENV/bin/python" -m pip install --quiet -c "$ROOT/constraints-cpu.txt" torch ;;
        *)
            echo "setup: pip's own sources have no CPU build of torch; asking $TORCH_CPU_INDEX"
            "$VENV/bin/python" -m pip install --quiet --no-deps --index-url "$TORCH_CPU_INDEX" \
                -c "$ROOT/constraints-cpu.txt" torch \
                || fail "no CPU build of torch ($(cat "$ROOT/constraints-cpu.txt")) found; the CUDA build is not" \
                        "installed on a machine without a GPU. Point PIP_FIND_LINKS or TORCH_CPU_INDEX at one." ;;
    esac
    has_cpu_torch || fail "pip installed a torch that is not the CPU build of constraints-cpu.txt"
}

# What the tests of this machine need. DALI decodes on the CPU too, and there is none for macOS; the disassembler reads
# what nvcc makes of csrc/.
extras() {
    local found=test
    [ "$(uname -s)" = Darwin ] || found+=,dali
    if [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] || command -v nvcc >/dev/null; then found+=,csrc; fi
    printf '%s\n' "$found"
}

main() {
    [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
    cd "$ROOT"
    if has_gpu; then
        echo "setup: GPU found, installing the CUDA build of torch and the dependencies (some GB)"
        "$VENV/bin/python" -m pip install --quiet -e ".[$(extras)]"
    else
        echo "setup: no GPU found, installing the CPU build of torch and the dependencies (about 2.2 GB, some minutes)"
        install_cpu_torch
        "$VENV/bin/python" -m pip install --quiet -c constraints-cpu.txt -e ".[$(extras)]"
        has_cpu_torch || fail "the CPU build of torch was replaced while the dependencies were installed"
    fi
    "$VENV/bin/python" -m pip check
    "$VENV/bin/python" -c 'import torch; print(f"setup: done, torch {torch.__version__}")'
}

main
