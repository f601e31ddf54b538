#!/usr/bin/env bash
# Makes .venv with everything that development needs. Safe to run again: what is there is kept.
set -euo pipefail
cd "$(dirname "$0")/.."

CPU_INDEX=https://download.pytorch.org/whl/cpu

die() {
    echo "setup: $*" >&2
    exit 1
}

# Prints the first Python that can make a virtual environment (a name on PATH may be an empty shim);
# 3.11 is tried first because constraints.txt was resolved with it.
find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    return 1
}

find_compiler() {
    local name
    for name in ${CXX:-c++ g++ clang++}; do
        command -v "$name" >/dev/null && return
    done
    return 1
}

# The `+cpu` in the version matches CPU wheels alone, so a first try with pip's own settings is safe:
# it finds a wheel that the machine already has. The second try asks PyTorch's index of CPU wheels.
install_torch() {
    local torch
    torch=$(grep '^torch==' constraints.txt)
    "${pip[@]}" --no-deps --only-binary :all: "$torch" 2>/dev/null ||
        "${pip[@]}" --no-deps --only-binary :all: --index-url "$CPU_INDEX" "$torch" ||
        die "no CPU wheel of $torch for this Python, neither here nor at $CPU_INDEX"
}

find_compiler || die "no C++ compiler (${CXX:-c++, g++ or clang++}): install one, or name it in CXX"
if [ ! -x .venv/bin/python ]; then
    python=$(find_python) || die "no Python 3.11 to 3.13 with venv: install one, or name it in PYTHON"
    echo "setup: making .venv with $("$python" --version) and filling it:"
    echo "setup:   torch for the CPU, without CUDA    190 MB to download"
    echo "setup:   triton, which needs no GPU         190 MB to download"
    echo "setup:   about 142 smaller packages         310 MB to download, 2.8 GB on disk in all"
    "$python" -m venv .venv
else
    echo "setup: bringing .venv up to date"
fi

pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check install)
"${pip[@]}" --constraint constraints.txt setuptools
install_torch
"${pip[@]}" --constraint constraints.txt --no-build-isolation --editable ".[compile,dev]"
