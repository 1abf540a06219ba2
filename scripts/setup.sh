#!/usr/bin/env bash
# Makes this checkout ready for `cargo build`: fetches libtorch, once, into the ignored folder .libtorch/.
#
#   scripts/setup.sh
#
# libtorch comes out of PyTorch's Python package, through whatever pip the system's python3 has; Python plays no part
# at run time. About 550 MB to fetch, 1.2 GB on disk. .cargo/config.toml points the build there, so that no environment
# variable is needed. A second call finds everything in place and returns at once; a call that was interrupted leaves
# no half-filled .libtorch/ behind, and the next one starts over.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

TORCH=2.11.0
# torch's CPU library itself is linked against these two of CUDA's (2 MB and 18 MB); no other part of CUDA is needed.
REQUIREMENTS=("torch==$TORCH" nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85)
# The package's Python version does not matter here, so one is fixed: any python3 can run the pip that fetches it.
PLATFORM=(--python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none)
for tag in manylinux_2_{28,27,25,18,17,12}_x86_64 manylinux2014_x86_64 manylinux2010_x86_64; do
    PLATFORM+=(--platform "$tag")
done

# What the build reads; one of them missing means that somebody has tidied too much.
NEEDED=(
    torch/lib/libtorch_cpu.so torch/lib/libc10.so torch/include/torch/csrc/api/include/torch/torch.h
    link/lib/libtorch.so link/lib/libtorch_cpu.so link/lib/libc10.so
    nvidia/cu13/lib/libcudart.so.13 nvidia/cu13/lib/libcupti.so.13
)

is_complete() {
    [ "$(cat "$1/.stamp" 2>/dev/null)" = "${REQUIREMENTS[*]}" ] || return 1
    local file
    for file in "${NEEDED[@]}"; do
        [ -s "$1/$file" ] || return 1
    done
}

check_tools() {
    local faults=0
    missing() {
        say "error: $1"
        say "hint: $2"
        faults=1
    }
    [ "$(uname -s) $(uname -m)" = "Linux x86_64" ] ||
        missing "this is $(uname -s) on $(uname -m)" "libtorch is fetched for Linux on x86_64 alone"
    command -v cargo >/dev/null ||
        missing "cargo was not found" "install Rust, and see that cargo's folder (often ~/.cargo/bin) is on PATH"
    command -v c++ >/dev/null || command -v "${CXX:-c++}" >/dev/null ||
        missing "no C++ compiler was found" "install one (Debian, Ubuntu: apt install g++)"
    return "$faults"
}

fetch() {
    require_python_with_pip
    say "fetching libtorch $TORCH into .libtorch/ (about 550 MB, once) ..."
    local partial=.libtorch.partial
    rm -rf "$partial"
    mkdir "$partial"
    echo '*' >"$partial/.gitignore" # should this call be interrupted, git will not list the remains
    pip_target "$partial" "${PLATFORM[@]}" "${REQUIREMENTS[@]}" ||
        die "pip could not fetch ${REQUIREMENTS[*]}" \
            "see pip's message above; it needs a reachable package index, pip 20.3 or newer, and 3 GB free here and in the temporary folder"
    # What the program is linked against: the CPU half alone, so that it starts on machines without CUDA. The package's
    # own libtorch.so would pull in libtorch_cuda.so; torch-sys always says -ltorch, which this linker script answers.
    mkdir -p "$partial/link/lib"
    ln -s ../../torch/lib/libtorch_cpu.so ../../torch/lib/libc10.so "$partial/link/lib/"
    echo 'INPUT(-ltorch_cpu)' >"$partial/link/lib/libtorch.so"
    printf '%s\n' "${REQUIREMENTS[*]}" >"$partial/.stamp"
    is_complete "$partial" || die "the fetched package lacks files that the build needs" "remove $partial and run scripts/setup.sh again"
    rm -rf .libtorch
    mv "$partial" .libtorch
}

check_tools || exit 1
only_one
if is_complete .libtorch; then
    say "libtorch $TORCH is in place (.libtorch/)"
else
    fetch
    say "libtorch $TORCH is ready (.libtorch/)"
fi
