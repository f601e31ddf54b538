#!/usr/bin/env bash
# Runs the kernels, and steps made of them, under AddressSanitizer and UndefinedBehaviorSanitizer:
# the tests are the usual ones, what they compile is not. Takes some minutes.
set -uo pipefail
cd "$(dirname "$0")/.."

TESTS=(
    tests/codegen/kernels
    tests/codegen/test_cpp_quantized.py
    tests/codegen/test_cpp_tables.py
    "tests/e2e/test_parity.py::test_logits_hidden_states_and_greedy_tokens_are_those_of_transformers[llama-cpp]"
)

library() {
    local path
    path=$("$CXX" -print-file-name="$1")
    [ -e "$path" ] || { echo "sanitize: $CXX has no $1: it takes gcc, with its sanitizers" >&2; exit 1; }
    echo "$path"
}

export CXX=${CXX:-g++}
preload="$(library libasan.so) $(library libubsan.so)" || exit

# Python itself leaks on purpose. Nothing is captured (-s): what a process says as it dies must be seen.
LD_PRELOAD=$preload INFC_SANITIZE=1 \
    ASAN_OPTIONS=detect_leaks=0:malloc_context_size=8 UBSAN_OPTIONS=print_stacktrace=1 \
    .venv/bin/pytest --all -n 2 -q -s "${TESTS[@]}" "$@"
