#!/usr/bin/env python3
"""Compares the ids and labels of `bellora prepare --dump` with Python's SentencePiece, row by row.

    compare_tokens.py BELLORA FOLDER [--tokenizer FILE]... [--base DIR]

Every *.jsonl of FOLDER (rows of instruction, input, output) under both built-in templates with every tokenizer: by
default all *.model files of FOLDER/tokenizers. --base is a model folder for the config (FOLDER/stories260K); its
weights are not used. A line for each comparison; exit 1 if any row differs. Needs `pip install sentencepiece`.

This side shares nothing with Bellora but the rules: texts are split at special tokens, each stretch is encoded by
SentencePiece itself, the prompt begins with BOS, the answer is encoded by itself and ends with EOS.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import sentencepiece

SENTENCE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TEMPLATES = {
    "alpaca": (SENTENCE + "\n\n### Instruction:\n\n", "\n\n### Response:\n\n"),
    "chinese-alpaca": (SENTENCE + "\n\n### Instruction:\n", "\n\n### Response: "),
}
MAX_LENGTH = 100_000  # nothing is cut


class Encoder:
    """SentencePiece with a text split at special tokens first."""

    def __init__(self, path):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        pieces = [(self.model.id_to_piece(i), i) for i in range(self.model.get_piece_size())]
        self.special = {p: i for p, i in pieces if self.model.is_control(i) or self.model.is_unknown(i) or p == "[PAD]"}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split

    def __call__(self, text):
        ids = []
        for stretch in self.split(text):
            if stretch in self.special:
                ids.append(self.special[stretch])
            elif stretch:
                ids += self.model.encode(stretch)
        return ids

    def sample(self, row, before, after):
        """Ids and labels of a row."""
        content = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        prompt = [self.model.bos_id()] + self(before + content + after)
        answer = self(row["output"]) + [self.model.eos_id()]
        return prompt + answer, [-100] * len(prompt) + answer


def read_rows(path):
    with open(path, encoding="utf-8-sig") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def dump(bellora, base, tokenizer, rows, template, folder):
    """What Bellora makes of a file, in the words of its contract."""
    config, out = folder / "config.toml", folder / "dump.jsonl"
    text = lambda value: json.dumps(str(value), ensure_ascii=False)
    config.write_text(
        f"[model]\nbase = {text(base)}\ntokenizer = {text(tokenizer)}\ndevice = \"cpu\"\nresize_vocab = true\n"
        f"[lora]\nmodules_to_save = [\"embed_tokens\", \"lm_head\"]\n"
        f"[data]\ntrain = [{text(rows)}]\ntemplate = {text(template)}\nmax_length = {MAX_LENGTH}\n"
        f"truncation = \"error\"\ncache_dir = {text(folder / 'cache')}\n"
        f"[train]\noutput = {text(folder / 'run')}\nmicro_batch_tokens = {MAX_LENGTH}\n",
        encoding="utf-8",
    )
    run = subprocess.run([bellora, "prepare", config, "--dump", out], capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"bellora prepare: exit {run.returncode}\n{run.stderr}")
    with open(out, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bellora", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tokenizer", type=pathlib.Path, action="append")
    parser.add_argument("--base", type=pathlib.Path)
    args = parser.parse_args()
    bellora = args.bellora.resolve()
    folder = args.folder.resolve()
    tokenizers = [path.resolve() for path in args.tokenizer or sorted(folder.glob("tokenizers/*.model"))]
    files = sorted(folder.glob("*.jsonl"))
    if not files or not tokenizers:
        sys.exit(f"{folder}: no *.jsonl files, or no tokenizers")
    base = (args.base or folder / "stories260K").resolve()

    n_rows = n_differing = 0
    for tokenizer in tokenizers:
        encoder = Encoder(tokenizer)
        for path in files:
            rows = read_rows(path)
            for template, (before, after) in TEMPLATES.items():
                with tempfile.TemporaryDirectory() as scratch:
                    got = dump(bellora, base, tokenizer, path, template, pathlib.Path(scratch))
                wanted = [encoder.sample(row, before, after) for row in rows]
                differing = [
                    line for line, (ours, theirs) in enumerate(zip(got, wanted), 1)
                    if (ours["input_ids"], ours["labels"]) != theirs
                ]
                off = len(differing) + abs(len(got) - len(wanted))
                first = f", the first in row {differing[0]}" if differing else ""
                size = f"{len(rows)} rows, {sum(len(ids) for ids, _ in wanted)} tokens"
                print(f"{tokenizer.name} {path.name} {template}: {size}, {off} differ{first}", flush=True)
                n_rows += len(rows)
                n_differing += off
    print(f"{n_rows - n_differing} of {n_rows} rows are identical to SentencePiece {sentencepiece.__version__}")
    sys.exit(n_differing > 0)


if __name__ == "__main__":
    main()
