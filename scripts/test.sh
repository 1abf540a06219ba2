#!/usr/bin/env bash
# Sets up what the tests need, builds, and runs them all.
#
#   scripts/test.sh [ARGUMENT OF CARGO TEST ...]
#
# In release mode, so that the program and all its dependencies are compiled once, for use and for the tests. With
# arguments (say, a test's name) only `cargo test --release ARGUMENT ...` runs.
#
# Where a folder with reference cases is found (the environment variable BELLORA_SHARED, or ../shared beside the
# checkout), they are judged as well by the script that comes with them, with one process and with several ranks; without
# it the project's own cases suffice.
# The last line is "N passed, M failed".
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

shared=${BELLORA_SHARED:-$root/../shared}
binary=${CARGO_TARGET_DIR:-$root/target}/release/bellora

scripts/setup.sh
if [ $# -gt 0 ]; then
    exec cargo test --release "$@"
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0 failed=0 broken=0

# Adds up what a regular expression with two groups (passed, failed) finds in the log.
count() {
    local line
    while IFS= read -r line; do
        if [[ $line =~ $1 ]]; then
            passed=$((passed + BASH_REMATCH[1])) failed=$((failed + BASH_REMATCH[2]))
        fi
    done <"$log"
}

# Many tests wait for processes of their own: one more than there are cores keeps these busy.
cpu=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1)
vectors=$(grep -m 1 '^flags' /proc/cpuinfo | grep -oE '\b(avx2|avx512f|avx512_bf16|amx_bf16)\b' | tr '\n' ' ' || true)
say "on ${cpu:-an unknown CPU}, $(nproc) cores (${vectors:-no AVX2 })ONEDNN_MAX_CPU_ISA=${ONEDNN_MAX_CPU_ISA-} OMP_NUM_THREADS=${OMP_NUM_THREADS-}"
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-$(($(nproc) + 1))}
cargo test --release --no-fail-fast 2>&1 | tee "$log" || broken=1
count '^test result: .* ([0-9]+) passed; ([0-9]+) failed;'
say "the project's own tests: $passed passed, $failed failed"

if [ -f "$shared/oracle/oracle_case.py" ] && [ -x "$binary" ]; then
    shared=$(cd "$shared" && pwd)
    cases=("$shared"/oracle/cases/*/)
    say "reference cases found in $shared/oracle: ${#cases[@]}; each runs in default and in small micro-batches"
    packages=$(private_packages numpy 'numpy>=1.24')
    for ranks in "" "--nproc 2 --set train.shard=true" "--nproc 3 --set train.shard=false"; do
        say "reference cases with ${ranks:-one process}:"
        ORACLE_EXTRA=$ranks PYTHONPATH="$packages" python3 "$shared/oracle/oracle_case.py" "$binary" "${cases[@]}" 2>&1 |
            tee "$log" || broken=1
        agreeing=$(sed -nE 's|^([0-9]+)/[0-9]+ runs agree.*|\1|p' "$log")
        passed=$((passed + ${agreeing:-0})) failed=$((failed + 2 * ${#cases[@]} - ${agreeing:-0}))
        say "reference cases: ${#cases[@]} ran, ${agreeing:-0} of $((2 * ${#cases[@]})) runs agree"
    done
else
    say "no reference cases: $shared/oracle is not there (the environment variable BELLORA_SHARED says where to look)"
fi

[ "$broken" = 0 ] || [ "$failed" -gt 0 ] || failed=1 # for example, a test that does not compile
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
