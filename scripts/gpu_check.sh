#!/usr/bin/env bash
# Proves the program on a machine with an NVIDIA GPU and measures it beside its peers: one call of less than nine minutes,
# with nothing to install.
#
#   [OUT=FOLDER] [BELLORA=PROGRAM] [PYTHON=python3] scripts/gpu_check.sh [--rehearse] [--no-peers] [FOLDER]
#
# What it does, each part within a time of its own; one that fails or takes too long is recorded, and the next goes on:
#   selftest     every op and a tiny training run against the same in higher precision
#   bench-bf16   bellora bench: Llama-2-7B with random weights, rank 64 on all seven projections, embedding and head trained,
#                vocabulary 49,954, 64 samples an update with the lengths of BELLE's
#   peers        Transformers + PEFT on the same lengths, by peers/peft_gpu.py, with whatever PYTHON has
#   bench-fp16   the same as bench-bf16, shorter
#   repeat       a real training, done twice and resumed once from its middle, with train.deterministic = true: all three must
#                give the same adapter, bit for bit; on the quickstart's base where it is in place, else on random weights
#   table        what was measured, side by side
#
# Everything lies as JSON in FOLDER (OUT; else runs/gpu-check), logs beside it. The program is BELLORA, or the one in
# target/release; built elsewhere, it runs by the libtorch of PYTHON's torch, which is taken where its own lacks CUDA. COMMIT names
# what it was built from where git cannot. Exit code 1 if a part failed.
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
rm -f "$out"/{machine,selftest,bench-bf16,bench-fp16,peers,repeat,parts,summary}.json "$out"/*.log "$out/summary.md"
work=$(mktemp -d) || die "there is no room for temporary files" "set TMPDIR"
trap 'rm -rf "$work"' EXIT

# What differs between a GPU and the rehearsal: the model, how much of it, and the dtypes.
WARMUP=1 # updates before those that count, here and in the peers: both time the same ones
if [ "$rehearse" = true ]; then
    device=cpu shape=tiny vocabulary=997 rank=8 samples=8 updates=2 fp16_updates=1 tokens=1024 random_hidden=64
else
    device=cuda shape=llama-2-7b vocabulary=49954 rank=64 samples=64 updates=6 fp16_updates=3 tokens=16384 random_hidden=1024
fi
JOB=(
    --shape "$shape" --vocab-size "$vocabulary" --warmup "$WARMUP" --json
    --set "model.device=$device" --set "lora.r=$rank" --set "lora.alpha=$((2 * rank))" --set lora.dropout=0.05
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
        timeout -k 5 "$limit" "$@" >"$out/$name.out" 2>"$out/$name.log" || code=$?
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

selftest() { part selftest 60 "$bellora" selftest --device "$device" --json; }

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
part bench-bf16 110 "$bellora" bench "${JOB[@]}" --updates "$updates" --set model.dtype=bf16
if [ "$with_peers" = true ]; then
    # What was set for the program is none of theirs.
    part peers 200 env "LD_LIBRARY_PATH=$library_path" "$python" scripts/peers/peft_gpu.py "$out/peers.json" --device "$device" \
        --shape "$shape" --vocab "$vocabulary" --r "$rank" --update "$samples" --warmup "$WARMUP" --updates "$updates" \
        --tokens "$tokens" --seconds 180
fi
part bench-fp16 60 "$bellora" bench "${JOB[@]}" --updates "$fp16_updates" --set model.dtype=fp16
part repeat 75 bash -c repeat
say "[$SECONDS s] the table, also in $out/summary.md"
"$python" scripts/gpu_summary.py "$out" || failed=1
exit "$failed"
