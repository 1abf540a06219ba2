#!/usr/bin/env python3
"""Compares the ids and labels of `bellora prepare --dump` under a model's own chat template with Transformers', row by row.

    compare_chat.py BELLORA BASE ROWS TOKENIZER...

ROWS is a folder; every *.jsonl of it (messages, ShareGPT's conversations, or instruction, input, output) is tokenised with every
TOKENIZER, a folder with tokenizer.json and a chat template. BASE is a model folder for the config, with as many rows as the largest
vocabulary (scripts/make_random_base.py FOLDER --hidden 64 --layers 1 --vocabulary 270000); its weights are not used. A line for each
comparison; exit 1 if any row differs. Needs `pip install transformers jinja2`.

This side shares nothing with Bellora but the rules: the text is apply_chat_template's, encoded at once, and of the last answer what it
adds to its generation prompt is learned, up to and with the last token that ends a turn.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from transformers import AutoTokenizer

ROLES = {"human": "user", "gpt": "assistant"}
ENDS = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "</s>"]
MAX_LENGTH = 100_000  # nothing is cut


def messages_of(row):
    if "instruction" in row:
        turns = [pair for pair in row.get("history") or []]
        turns.append([row["instruction"] + ("\n" + row["input"] if row.get("input") else ""), row["output"]])
        return [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
    turns = row.get("messages") or row.get("conversations")
    found = []
    for turn in turns:
        role, text = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
        found.append({"role": ROLES.get(role, role), "content": text})
    return found


def sample(tokenizer, messages):
    """Ids, and labels where the last answer is learned; None where the template refuses the row."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    except Exception:  # jinja2's, of the template's own choice
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    end = next(found + len(mark) for mark in ENDS if (found := text.rfind(mark)) >= len(prompt))
    labels = []
    for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        overlaps = first < end and (last > len(prompt) or first >= len(prompt))
        labels.append(token if overlaps else -100)
    assert text.startswith(prompt), "the template rewrites what came before"
    return encoded["input_ids"], labels


def dump(bellora, base, tokenizer, rows, folder):
    config, out = folder / "c.toml", folder / "dump.jsonl"
    config.write_text(
        f'[model]\nbase = "{base}"\ntokenizer = "{tokenizer}"\n[data]\ntrain = ["{rows}"]\ntemplate = "chat"\nlearn = "last"\n'
        f'max_length = {MAX_LENGTH}\ncache_dir = "{folder}/cache"\n[train]\noutput = "{folder}/run"\n',
        encoding="utf-8",
    )
    subprocess.run([bellora, "prepare", str(config), "--dump", str(out)], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def main():
    bellora, base, folder, *tokenizers = sys.argv[1:]
    differing = 0
    for path in tokenizers:
        tokenizer = AutoTokenizer.from_pretrained(path)
        for rows in sorted(pathlib.Path(folder).glob("*.jsonl")):
            parsed = [json.loads(line) for line in rows.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            if not any(key in parsed[0] for key in ("instruction", "messages", "conversations")):
                continue
            wanted = [(row, sample(tokenizer, messages_of(row))) for row in parsed]
            taken = [(row, found) for row, found in wanted if found]
            with tempfile.TemporaryDirectory() as temporary:
                temporary = pathlib.Path(temporary)
                good = temporary / "rows.jsonl"
                good.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row, _ in taken), encoding="utf-8")
                ours = dump(bellora, pathlib.Path(base).resolve(), pathlib.Path(path).resolve(), good, temporary)
            same = sum((one["input_ids"], one["labels"]) == (ids, labels) for one, (_, (ids, labels)) in zip(ours, taken))
            refused = len(wanted) - len(taken)
            print(f"{path}: {rows.name}: {same} of {len(taken)} rows are equal, {refused} refused by the template", flush=True)
            differing += max(len(ours), len(taken)) - same
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
