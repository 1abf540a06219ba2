#!/usr/bin/env bash
# From a fresh checkout to a trained, tried adapter.
#
#   scripts/quickstart.sh            whatever is in place is reused: libtorch, the build, the base, a finished run
#   scripts/quickstart.sh --fresh    trains again
#
# Fetches libtorch, builds bellora, makes a small real base model (SmolLM2-135M), fine-tunes it by configs/quickstart.toml
# on data/quickstart.jsonl (a few minutes on two CPU cores) in the dtype that this machine multiplies fastest in, and shows on
# standard output what that changed: the loss, the loss on held-out rows, and the answer to a question that is not in the data.
# An interrupted training is continued from its last checkpoint. Ends with exit code 1 if the loss did not fall.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

CONFIG=configs/quickstart.toml
BASE=.models/smollm2-135m # these two as the config has them
RUN=runs/quickstart
QUESTION=请问你到底是谁呀？
# The config's template, "alpaca", spelled out: the base is asked in the very words that the tuned model gets.
PROMPT="Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:

$QUESTION

### Response:

"
bellora=${CARGO_TARGET_DIR:-$root/target}/release/bellora

fresh=false
case "$*" in
"") ;;
--fresh) fresh=true ;;
-h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/quickstart.sh
    exit 0
    ;;
*) die "unknown arguments: $*" "scripts/quickstart.sh [--fresh]" ;;
esac

only_one
say "[1/5] libtorch"
scripts/setup.sh
say "[2/5] build"
cargo build --release
say "[3/5] base model"
scripts/quickstart_base.sh
say "[4/5] training by $CONFIG"
if [ "$fresh" = true ]; then rm -rf "$RUN"; fi
if dtype=$(sed -nE 's/^dtype = "([a-z0-9]+)".*/\1/p' "$RUN/config.toml" 2>/dev/null) && [ -n "$dtype" ]; then
    say "the run in $RUN computes in $dtype"
else
    speeds=$("$bellora" bench --dtypes)
    dtype=${speeds%% *}
    say "products here: ${speeds//$'\n'/, }"
    say "the fastest are those in $dtype, so the run computes in it"
fi
"$bellora" train "$CONFIG" --resume --set "model.dtype=$dtype" >&2
say "[5/5] what it changed"
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
ask() { "$bellora" generate "$@" --max-new-tokens 48 --temperature 0; }
"$bellora" eval "$CONFIG" --set "model.dtype=$dtype" >"$results/eval-base.json" # a run not yet begun: the base
"$bellora" eval "$RUN" >"$results/eval-tuned.json"
ask "$BASE" --dtype "$dtype" --raw --prompt "$PROMPT" >"$results/answer-base.txt"
ask "$RUN" --prompt "$QUESTION" >"$results/answer-tuned.txt"
python3 scripts/quickstart_summary.py "$RUN" "$results" "$QUESTION"
