#!/usr/bin/env python3
"""The peer: LoRA on a Llama by Transformers + PEFT on CPU, as one would write it by hand. Called by bench_cpu.py.

    peft_cpu.py make-base FOLDER --vocab N --dtype fp32|bf16       a randomly initialised model to measure on
    peft_cpu.py train BASE ROWS --dtype fp32|bf16 --update N --batch N [--steps N] [--threads N] [--r N]

ROWS are lines of {"input_ids": [], "labels": []}, as `bellora prepare --dump` writes them, taken in file order. The rows
of an update are sorted by length and go through the model in padded micro-batches of --batch rows; the loss is averaged
over the update's label tokens. Prints one line of JSON. tokens_per_s is the median over all updates but the first of
real tokens (padding does not count) by seconds; peak_rss_mib is that of this process.
"""

import argparse
import json
import os
import resource
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
commands = parser.add_subparsers(dest="command", required=True)
make = commands.add_parser("make-base")
make.add_argument("folder")
make.add_argument("--vocab", type=int, required=True)
make.add_argument("--dtype", choices=["fp32", "bf16"], required=True)
train = commands.add_parser("train")
train.add_argument("base")
train.add_argument("rows")
train.add_argument("--dtype", choices=["fp32", "bf16"], required=True)
train.add_argument("--update", type=int, required=True, help="rows an update")
train.add_argument("--batch", type=int, required=True, help="rows a micro-batch")
train.add_argument("--steps", type=int, default=4, help="updates, the first of which is not counted")
train.add_argument("--threads", type=int, default=2)
train.add_argument("--r", type=int, default=64)
arguments = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(getattr(arguments, "threads", 2))  # read when torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import torch.nn.functional as F
import transformers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(folder, vocab_size, dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=vocab_size, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def padded(rows, key, filler):
    width = max(len(row["input_ids"]) for row in rows)
    return torch.tensor([row[key] + [filler] * (width - len(row[key])) for row in rows])


def micro_batches(rows, size):
    """Ids, labels and mask of an update's micro-batches; the longest rows first, so that padding is least."""
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        mask = None  # none is needed where no row is padded
        if len({len(row["input_ids"]) for row in part}) > 1:
            mask = (padded([{**row, "mask": [1] * len(row["input_ids"])} for row in part], "mask", 0)).long()
        yield padded(part, "input_ids", 0), padded(part, "labels", -100), mask


def run():
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM.from_pretrained(arguments.base, dtype=DTYPES[arguments.dtype])
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=arguments.r, lora_alpha=2 * arguments.r, lora_dropout=0.0, target_modules=ALL_SEVEN
    )
    model = peft.get_peft_model(model, lora).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    with open(arguments.rows, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    rates, losses = [], []
    for step in range(arguments.steps):
        update = [rows[(step * arguments.update + i) % len(rows)] for i in range(arguments.update)]
        start, loss_sum = time.perf_counter(), 0.0
        n_labels = sum(label != -100 for row in update for label in row["labels"][1:])
        for ids, labels, mask in micro_batches(update, arguments.batch):
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
            loss = loss / n_labels
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        n_tokens = sum(len(row["input_ids"]) for row in update)
        rates.append(n_tokens / (time.perf_counter() - start))
        losses.append(loss_sum)
    print(
        json.dumps(
            {
                "tokens_per_s": statistics.median(rates[1:]),
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "losses": losses,
                "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
            }
        )
    )


if arguments.command == "make-base":
    make_base(arguments.folder, arguments.vocab, DTYPES[arguments.dtype])
else:
    run()
