#!/usr/bin/env bash
# Proves the program on a machine with an NVIDIA GPU and measures it beside its peers: one call of less than nine minutes,
# with nothing to install.
#
#   [OUT=FOLDER] [BELLORA=PROGRAM] [PYTHON=python3] scripts/gpu_check.sh [--rehearse] [--no-peers] [FOLDER]
#
# What it does, each part within a time of its own; one that fails or takes too long is recorded, and the next goes on:
#   selftest       every op and a tiny training run against the same in higher precision; its rows are printed as they come
#   pieces         the parts of one layer's step, each timed by itself by bellora bench --pieces, and
#   pieces-python  by PYTHON's torch (peers/pieces.py)
#   bench-bf16     bellora bench: Llama-2-7B with random weights, rank 64 on all seven projections, embedding and head trained,
#                  vocabulary 49,954, 64 samples an update with the lengths of BELLE's, dropout 0.05
#   peers          Transformers + PEFT on the same lengths, by peers/peft_gpu.py, with whatever PYTHON has
#   bench-again    bench-bf16 once more, and
#   peers-again    the peers' fastest once more, so that ours and theirs are measured in turn
#   bench-dropout0 bench-bf16 without dropout
#   trace          bellora bench --trace: the name and time of every kernel of two updates, in trace-events.json
#   bench-fp16     one update in fp16
#   repeat         a real training, done twice and resumed once from its middle, with train.deterministic = true: all three must
#                  give the same adapter, bit for bit; on the quickstart's base where it is in place, else on random weights
#   sanitizer      selftest --kernels under compute-sanitizer, where that is installed
#   table          what was measured, side by side
#
# While selftest runs, the libraries and the base are read in the background, so that later parts find them in memory. Clocks and
# the reasons for lower ones are sampled once a second by nvidia-smi, where there is one.
#
# Everything lies as JSON in FOLDER (OUT; else runs/gpu-check), logs beside it, and once more in FOLDER/gpu-check.tar.gz, which is
# below 16 MB: the one file to carry away. The script wants scripts/, data/ and tests/golden/ of the checkout, the program and
# PYTHON. The program is BELLORA, or the one in target/release; built elsewhere, it runs by the libtorch of PYTHON's torch, which
# is taken where its own lacks CUDA. COMMIT names what it was built from where git cannot. Exit code 1 if a part failed.
#
# --rehearse does all that on the CPU with a tiny model, from end to end. --no-peers leaves them out.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

rehearse=false with_peers=true out=${OUT:-}
for argument in "$@"; do
    case "$argument" in
    --rehearse) rehearse=true ;;
    --no-peers) with_peers=false ;;
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/gpu_check.sh
        exit 0
        ;;
    -*) die "unknown argument: $argument" "scripts/gpu_check.sh [--rehearse] [--no-peers] [FOLDER]" ;;
    *) out=$argument ;;
    esac
done
out=${out:-runs/gpu-check}
bellora=${BELLORA:-${CARGO_TARGET_DIR:-$root/target}/release/bellora}
python=${PYTHON:-python3}
command -v "$bellora" >/dev/null || die "$bellora is no program" "build it (cargo build --release), or name one: BELLORA=PROGRAM"
mkdir -p "$out" || die "the folder $out cannot be made" "name another"
out=$(cd "$out" && pwd)
NAMES=(machine selftest pieces pieces-python bench-bf16 peers bench-again peers-again bench-dropout0 trace trace-events bench-fp16 repeat sanitizer parts read-ahead summary)
for name in "${NAMES[@]}"; do rm -f "$out/$name.json" "$out/$name.log"; done
rm -f "$out"/{clocks.csv,summary.md,gpu-check.tar.gz}
work=$(mktemp -d) || die "there is no room for temporary files" "set TMPDIR"
background=()
# What runs in the background, and nothing else, is ended.
end_background() {
    local pid
    for pid in "${background[@]}"; do kill -- "-$pid" 2>/dev/null; done
    background=()
}
trap 'end_background; rm -rf "$work"' EXIT

# What differs between a GPU and the rehearsal: the model, how much of it, and the dtypes.
WARMUP=1 # updates before those that count, here and in the peers: both time the same ones
if [ "$rehearse" = true ]; then
    device=cpu shape=tiny vocabulary=997 rank=8 samples=8 updates=2 again_updates=1 tokens=1024 random_hidden=64
    pieces=(--rows 96 --hidden 64 --intermediate 176 --heads 4 --r 8 --repeats 3)
else
    device=cuda shape=llama-2-7b vocabulary=49954 rank=64 samples=64 updates=6 again_updates=3 tokens=16384 random_hidden=1024
    pieces=(--rows 11200 --hidden 4096 --intermediate 11008 --heads 32 --r 64 --repeats 10)
fi
JOB=(
    --shape "$shape" --vocab-size "$vocabulary" --json
    --set "model.device=$device" --set "lora.r=$rank" --set "lora.alpha=$((2 * rank))"
    --set 'lora.modules_to_save=["embed_tokens", "lm_head"]' --set "train.global_batch=$samples" --set train.seed=42
)

# Seconds from the start after which no part begins; what it may take at most ends before nine minutes.
LAST=505
failed=0 said=()

# part NAME SECONDS COMMAND...: runs a part within its time and what is left of the whole.
part() {
    local name=$1 limit=$2 begun=$SECONDS code=0 verdict
    shift 2
    [ "$limit" -le $((LAST - SECONDS)) ] || limit=$((LAST - SECONDS))
    if [ "$limit" -lt 5 ]; then
        verdict="not run: no time left" failed=1
    else
        say "[$SECONDS s] $name: at most $limit s"
        if [ "$name" = selftest ]; then
            # A device that hangs shows by its last row where.
            timeout -k 5 "$limit" "$@" 2>&1 >"$out/$name.out" | tee "$out/$name.log" >&2
            code=${PIPESTATUS[0]}
        else
            timeout -k 5 "$limit" "$@" >"$out/$name.out" 2>"$out/$name.log" || code=$?
        fi
        # A part that was cut off leaves what it had measured; half a line of JSON is of no use to anybody.
        if [ -s "$out/$name.out" ] && [ "$code" -lt 2 ]; then mv "$out/$name.out" "$out/$name.json"; else rm -f "$out/$name.out"; fi
        case $code in
        0) verdict="done" ;;
        124 | 137) verdict="cut off after $limit s" failed=1 ;;
        *) verdict="exit code $code; $(grep -m1 '^error' "$out/$name.log" || tail -n 1 "$out/$name.log")" failed=1 ;;
        esac
    fi
    verdict=${verdict//\\/ } verdict=${verdict//\"/\'}
    say "[$SECONDS s] $name: $verdict"
    said+=("{\"part\": \"$name\", \"seconds\": $((SECONDS - begun)), \"outcome\": \"$verdict\"}")
    local IFS=,
    printf '[%s]\n' "${said[*]}" >"$out/parts.json"
    return "$code"
}

describe_machine() {
    local gpu
    gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -n 1)
    printf '{"date": "%s", "bellora": "%s", "commit": "%s", "system": "%s", "gpu": "%s", "libtorch": "%s", "rehearsal": %s}\n' \
        "$(date -u +%Y-%m-%d)" "$("$bellora" --version)" "${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null)}" "$(uname -sr)" \
        "${gpu:-none}" "${torch_lib:-its own}" "$rehearse" >"$out/machine.json"
}

# Where PYTHON's torch has its libraries. It is looked up, not imported.
find_torch() {
    "$python" -c 'import importlib.util as u, os; s = u.find_spec("torch"); print(os.path.join(os.path.dirname(s.origin), "lib") if s else "")' 2>/dev/null
}

# Reads what later parts load, so that it lies in memory by then: libtorch and CUDA's libraries, PYTHON's, the quickstart's base.
read_ahead() {
    local begun=$SECONDS own folder
    own=$(ldd "$bellora" 2>/dev/null | sed -nE 's/.*libtorch_cpu\.so => (.*) \(.*/\1/p')
    for folder in "${own:+$(dirname "$own")}" "${own:+$(dirname "$own")/../../nvidia}" "$(find_torch)" "$(find_torch)/../../nvidia"; do
        [ ! -d "$folder" ] || find -L "$folder" -name '*.so*' -type f -print0
    done >"$work/ahead"
    [ ! -d .models/smollm2-135m ] || find .models/smollm2-135m -type f -print0 >>"$work/ahead"
    local bytes
    bytes=$(sort -zu "$work/ahead" | xargs -0 -r cat 2>/dev/null | wc -c)
    printf '{"bytes": %s, "seconds": %s}\n' "$bytes" "$((SECONDS - begun))" >"$out/read-ahead.json"
}

# Samples clocks once a second, with the reasons for which they are low, as a mask of bits.
sample_clocks() {
    exec nvidia-smi -l 1 --format=csv,noheader,nounits \
        --query-gpu=timestamp,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used,clocks_throttle_reasons.active
}

# in_background FUNCTION FILE: runs a function in a process group of its own, which ends with the script.
in_background() {
    set -m
    "$1" >"$2" 2>/dev/null </dev/null &
    background+=("$!")
    set +m
}

# Everything in one file below 16 MB: of a long log its end. The trace of a large model has megabytes, which pack well.
pack() {
    local folder=$work/gpu-check file size
    mkdir -p "$folder"
    for file in "$out"/*.{json,log,csv,md}; do
        [ -f "$file" ] || continue
        case $file in
        */trace-events.json) cp "$file" "$folder/" ;;
        *) tail -c 1000000 "$file" >"$folder/${file##*/}" ;;
        esac
    done
    tar -C "$work" -czf "$out/gpu-check.tar.gz" gpu-check || return
    size=$(wc -c <"$out/gpu-check.tar.gz")
    if [ "$size" -ge 16000000 ] && [ -f "$folder/trace-events.json" ]; then
        say "gpu-check.tar.gz would have $size bytes: it goes without trace-events.json, which stays in $out"
        rm "$folder/trace-events.json"
        tar -C "$work" -czf "$out/gpu-check.tar.gz" gpu-check || return
        size=$(wc -c <"$out/gpu-check.tar.gz")
    fi
    [ "$size" -lt 16000000 ] || { say "error: gpu-check.tar.gz has $size bytes" && return 1; }
    say "all of it in one file: $out/gpu-check.tar.gz, $size bytes"
}

selftest() { part selftest 120 "$bellora" selftest --device "$device" --json; }

# A training of 8 updates on the device; its run folder is $1.
train() {
    local config sets=(
        --set "train.output=$1" --set "model.device=$device" --set model.dtype=auto --set train.max_steps=8 --set train.checkpoint_every=4
        --set train.keep_checkpoints=9 --set train.eval_every=0 --set train.deterministic=true --set "data.cache_dir=$work/cache"
    )
    if [ "$rehearse" = false ] && [ -f .models/smollm2-135m/model.safetensors ]; then
        config=configs/quickstart.toml
    else
        config=$work/random.toml
        [ -f "$config" ] || "$python" scripts/make_random_base.py "$work" --hidden "$random_hidden" || return
    fi
    "$bellora" train "$config" "${sets[@]}" >&2
}

# Trains twice, resumes a copy of the first from the middle, compares the adapters, and prints what it found as JSON.
repeat() {
    local runs=$work same=false resumed=false
    train "$runs/first" && train "$runs/second" || return
    cp -R "$runs/first" "$runs/resumed"
    rm -rf "$runs/resumed/adapter" "$runs/resumed/checkpoints/"*8
    "$bellora" resume "$runs/resumed" >&2 || return
    cmp "$runs"/{first,second}/adapter/adapter_model.safetensors >&2 && same=true
    cmp "$runs"/{first,resumed}/adapter/adapter_model.safetensors >&2 && resumed=true
    printf '{"repeated_is_identical": %s, "resumed_is_identical": %s, "losses": [%s]}\n' "$same" "$resumed" \
        "$(sed -nE 's/.*"loss": ?([^,]*),.*/\1/p' "$runs/first/metrics.jsonl" | paste -sd, -)"
    [ "$same$resumed" = truetrue ] || { say "error: the adapters differ" && return 1; }
}
export -f repeat train say
export work bellora python device rehearse random_hidden

in_background read_ahead /dev/null
if command -v nvidia-smi >/dev/null; then in_background sample_clocks "$out/clocks.csv"; fi
torch_lib="" library_path=${LD_LIBRARY_PATH:-}
selftest
if [ $? -ge 2 ] && [ "$rehearse" = false ]; then
    torch_lib=$(find_torch)
    if [ -d "$torch_lib" ]; then
        say "the program's own libtorch does not serve here; trying that of $python, in $torch_lib"
        export LD_LIBRARY_PATH="$torch_lib${library_path:+:$library_path}"
        failed=0 said=()
        selftest
    fi
fi
describe_machine
# What was set for the program is none of PYTHON's.
by_python() { part "$1" "$2" env "LD_LIBRARY_PATH=$library_path" "$python" "${@:3}"; }
bench() { part "$1" "$2" "$bellora" bench "${JOB[@]}" --warmup "$WARMUP" --updates "$3" --set "model.dtype=$4" --set "lora.dropout=$5"; }
peers() {
    by_python "$1" "$2" scripts/peers/peft_gpu.py "$out/$1.json" --device "$device" --shape "$shape" --vocab "$vocabulary" \
        --r "$rank" --update "$samples" --warmup "$WARMUP" --tokens "$tokens" "${@:3}"
}
part pieces 60 "$bellora" bench "${JOB[@]}" --pieces --set model.dtype=bf16
by_python pieces-python 50 scripts/peers/pieces.py "$out/pieces-python.json" --device "$device" --seconds 40 "${pieces[@]}"
bench bench-bf16 70 "$updates" bf16 0.05
if [ "$with_peers" = true ]; then peers peers 110 --updates "$updates" --seconds 90; fi
bench bench-again 45 "$again_updates" bf16 0.05
if [ "$with_peers" = true ]; then peers peers-again 45 --updates "$again_updates" --seconds 40 --again "$out/peers.json"; fi
bench bench-dropout0 35 "$again_updates" bf16 0
part trace 45 "$bellora" bench "${JOB[@]}" --warmup "$WARMUP" --updates 1 --set model.dtype=bf16 --set lora.dropout=0.05 --trace "$out/trace-events.json"
bench bench-fp16 35 1 fp16 0.05
part repeat 60 bash -c repeat
if command -v compute-sanitizer >/dev/null && [ "$rehearse" = false ]; then
    part sanitizer 60 compute-sanitizer --error-exitcode 9 "$bellora" selftest --kernels --device "$device" --json
fi
say "[$SECONDS s] the table, also in $out/summary.md"
end_background
"$python" scripts/gpu_summary.py "$out" || failed=1
pack || failed=1
exit "$failed"
