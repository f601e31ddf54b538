#!/usr/bin/env bash
# Sets up a clone in a folder with a space in its path and runs a fast part of the tests there, once
# under its own path and once through a link to it.
set -euo pipefail
cd "$(dirname "$0")/.."

# Layout and wheel look at the tree itself, the others start the command and the compiler in it.
TESTS=(
    tests/test_layout.py
    tests/test_wheel.py
    tests/driver/test_compile.py
    tests/driver/test_compiled_model.py
    tests/driver/test_cli.py
)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git clone --quiet . "$scratch/a folder/infc"
ln -s "a folder/infc" "$scratch/linked"

for place in "$scratch/a folder/infc" "$scratch/linked"; do
    echo "places: $place"
    (cd "$place" && make --no-print-directory test ARGS="-q ${TESTS[*]}")
done
