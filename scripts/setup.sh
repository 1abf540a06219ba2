#!/usr/bin/env bash
# Makes this checkout ready for `cargo build`: fetches libtorch, once, into the ignored folder .libtorch/.
#
#   scripts/setup.sh [--cpu]
#
# libtorch comes out of PyTorch's Python package, through whatever pip the system's python3 has; Python plays no part
# at run time. Without an NVIDIA GPU, or with --cpu, that is what a CPU needs: about 550 MB to fetch, 1.2 GB on disk. With
# one, all of CUDA's libraries come along: 2.7 GB to fetch, 4.6 GB on disk. The program is the same, and either set builds
# it. .cargo/config.toml points the build there, so that no environment variable is needed. A second call finds everything
# in place and returns at once; a call that was interrupted leaves no half-filled .libtorch/ behind, and the next one
# starts over.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

TORCH=2.11.0
# torch's CPU library itself is linked against these two of CUDA's (2 MB and 18 MB); a CPU needs no other part of CUDA.
LEAN=("torch==$TORCH" nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85)
# What the CUDA half asks for, in the versions that torch's package names.
WHOLE=(
    "${LEAN[@]}" nvidia-cublas==13.1.0.3 nvidia-cuda-nvrtc==13.0.88 nvidia-cudnn-cu13==9.19.0.56 nvidia-cufft==12.0.0.61
    nvidia-cufile==1.15.1.6 nvidia-curand==10.4.0.35 nvidia-cusolver==12.0.4.66 nvidia-cusparse==12.6.3.3
    nvidia-cusparselt-cu13==0.8.0 nvidia-nccl-cu13==2.28.9 nvidia-nvjitlink==13.0.88 nvidia-nvshmem-cu13==3.4.5
)
# The least compute capability that CUDA 13 has code for, times ten.
LEAST_CAPABILITY=75
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
# What a GPU's run reads besides.
NEEDED_BY_CUDA=(
    torch/lib/libtorch_cuda.so torch/lib/libc10_cuda.so nvidia/cu13/lib/libcublas.so.13 nvidia/cu13/lib/libcublasLt.so.13
    nvidia/cu13/lib/libnvrtc.so.13 nvidia/cudnn/lib/libcudnn.so.9 nvidia/nccl/lib/libnccl.so.2
)

# is_complete FOLDER SET...: whether a folder holds one of these sets (lean, whole).
is_complete() {
    local folder=$1 stamp set
    shift
    stamp=$(cat "$folder/.stamp" 2>/dev/null) || return 1
    has "$folder" "${NEEDED[@]}" || return 1
    for set in "$@"; do
        [ "$set:$stamp" != "lean:${LEAN[*]}" ] || return 0
        [ "$set:$stamp" != "whole:${WHOLE[*]}" ] || ! has "$folder" "${NEEDED_BY_CUDA[@]}" || return 0
    done
    return 1
}

has() {
    local folder=$1 file
    shift
    for file in "$@"; do
        [ -s "$folder/$file" ] || return 1
    done
}

# The least compute capability of this machine's GPUs times ten; nothing where there is no GPU.
gpu_capability() {
    command -v nvidia-smi >/dev/null || return 0
    local said least='' line
    said=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) || {
        # A driver that answers other questions but not this one is too old for CUDA 13 as well.
        ! nvidia-smi -L 2>/dev/null | grep -q '^GPU ' || echo 0
        return 0
    }
    while IFS= read -r line; do
        if [[ $line =~ ^[[:space:]]*([0-9]+)\.([0-9])[[:space:]]*$ ]]; then
            line=$((10 * BASH_REMATCH[1] + BASH_REMATCH[2]))
            [ -n "$least" ] && [ "$least" -le "$line" ] || least=$line
        fi
    done <<<"$said"
    echo "$least"
}

# Decides which set this machine needs: sets `wanted` and `sets`, those that will do.
choose() {
    wanted=lean sets=(lean whole)
    local capability
    [ "$only_cpu" = 0 ] || return 0
    capability=$(gpu_capability)
    [ -n "$capability" ] || return 0
    if [ "$capability" -ge "$LEAST_CAPABILITY" ]; then
        wanted=whole sets=(whole)
        return 0
    fi
    # What --cpu has fetched before will do.
    ! is_complete .libtorch "${sets[@]}" || return 0
    local whose="has compute capability $((capability / 10)).$((capability % 10))"
    [ "$capability" -gt 0 ] || whose="does not say its compute capability, so its driver is too old"
    die "this machine's GPU $whose; libtorch $TORCH is fetched with CUDA 13, which begins at 7.5" \
        "the cu126 build of libtorch $TORCH serves older GPUs. Build without CUDA first (scripts/setup.sh --cpu, then
  cargo build --release); install torch $TORCH from pip's cu126 index into a Python environment; run the program with
  LD_LIBRARY_PATH=<site-packages>/torch/lib, and it finds the GPU"
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
    local requirements size room
    if [ "$wanted" = whole ]; then
        requirements=("${WHOLE[@]}") size="with CUDA 13, about 2.7 GB" room="10 GB"
    else
        requirements=("${LEAN[@]}") size="for the CPU, about 550 MB" room="3 GB"
    fi
    say "fetching libtorch $TORCH into .libtorch/ ($size, once) ..."
    local partial=.libtorch.partial
    rm -rf "$partial"
    mkdir "$partial"
    echo '*' >"$partial/.gitignore" # should this call be interrupted, git will not list the remains
    pip_target "$partial" "${PLATFORM[@]}" "${requirements[@]}" ||
        die "pip could not fetch ${requirements[*]}" \
            "see pip's message above; it needs a reachable package index, pip 20.3 or newer, and $room free here and in the temporary folder"
    # What the program is linked against: the CPU half alone, so that it starts on machines without CUDA. The package's
    # own libtorch.so would pull in libtorch_cuda.so; torch-sys always says -ltorch, which this linker script answers.
    mkdir -p "$partial/link/lib"
    ln -s ../../torch/lib/libtorch_cpu.so ../../torch/lib/libc10.so "$partial/link/lib/"
    echo 'INPUT(-ltorch_cpu)' >"$partial/link/lib/libtorch.so"
    printf '%s\n' "${requirements[*]}" >"$partial/.stamp"
    is_complete "$partial" "$wanted" || die "the fetched package lacks files that the build needs" "remove $partial and run scripts/setup.sh again"
    rm -rf .libtorch
    mv "$partial" .libtorch
}

only_cpu=0
case $# in
0) ;;
1) [ "$1" = --cpu ] || die "$1 is not known" "scripts/setup.sh [--cpu]"
    only_cpu=1 ;;
*) die "there are $# arguments" "scripts/setup.sh [--cpu]" ;;
esac
check_tools || exit 1
only_one
choose
if is_complete .libtorch "${sets[@]}"; then
    say "libtorch $TORCH is in place (.libtorch/)"
else
    fetch
    say "libtorch $TORCH is ready (.libtorch/)"
fi
