#!/usr/bin/env python3
"""Has PEFT and Transformers load what bellora wrote, and compares logits with those of the golden adapter.

    check_peft.py BELLORA CASE...

For every case bellora trains and exports a merged model; then PEFT opens the run's final adapter as it is, and
AutoModelForCausalLM the merged folder. The golden side is the case's own final adapter, opened and merged by PEFT. Printed
is the largest difference between logits over the first rows of the case; in fp32 it must not exceed 1e-4, else the exit
code is 1. Where a half-precision type takes part (a base stored or trained in bf16) the figure is printed, not judged.

A case is a folder of tests/golden/, or one of the same kind with a case.json (golden/final_adapter, golden/tokenised.json).
Needs torch, transformers and peft.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers

TOLERANCE = 1e-4
N_ROWS = 4


@dataclasses.dataclass
class Case:
    name: str
    base: pathlib.Path
    golden_adapter: pathlib.Path
    rows: list  # token ids of a few samples
    config: str  # of the job, in TOML; {out} stands for the run folder
    trained_in_fp32: bool


def read_case(folder):
    folder = folder.resolve()
    return read_foreign_case(folder) if (folder / "case.json").exists() else read_own_case(folder)


def read_own_case(folder):
    lines = (folder / "expected" / "tokens.jsonl").read_text().splitlines()[:N_ROWS]
    config = (folder / "config.toml").read_text(encoding="utf-8")
    return Case(
        name=folder.name,
        base=folder / "base",
        golden_adapter=folder / "expected" / "adapter",
        rows=[json.loads(line)["input_ids"] for line in lines],
        config=config.replace("{case}", str(folder)),
        trained_in_fp32='dtype = "fp32"' in config,
    )


def read_foreign_case(folder):
    """A case.json with the Hugging Face Trainer's names."""
    case = json.loads((folder / "case.json").read_text())
    lora, by_samples = case["lora"], case["loss_norm"] != "tokens"
    length = "max_steps" if (case["max_steps"] or 0) > 0 else "num_train_epochs"
    template = {"card": "alpaca", "framework": "chinese-alpaca", "chat": "chat"}[case["template"]]
    if case.get("template_file"):
        template = str(folder / case["template_file"])
    sections = {
        "model": {
            "base": str(folder / "base"),
            "tokenizer": str(folder / "tokenizer"),
            "dtype": {"float32": "fp32", "bfloat16": "bf16"}[case["dtype"]],
            "device": "cpu",
            "init_adapter": str(folder / "init_adapter"),
            "resize_vocab": case["resize"],
        },
        "lora": {
            "r": lora["r"],
            "alpha": lora["lora_alpha"],
            "dropout": lora["lora_dropout"],
            "target_modules": lora["target_modules"],
            "modules_to_save": lora.get("modules_to_save") or [],
            "use_rslora": bool(lora.get("use_rslora")),
        },
        "data": {
            "train": [str(folder / "data" / "train.jsonl")],
            "template": template,
            "learn": case.get("learn") or "auto",
            "max_length": case["max_seq_length"],
            "truncation": "cut",
            "shuffle": case["shuffle"],
        },
        "train": {
            "output": "{out}",
            length.removeprefix("num_train_"): case[length],
            "global_batch": case["per_device_train_batch_size"] * case["gradient_accumulation_steps"],
            "learning_rate": case["learning_rate"],
            "schedule": case["lr_scheduler_type"],
            "warmup_ratio": case["warmup_ratio"],
            "weight_decay": case["weight_decay"],
            "betas": [case["adam_beta1"], case["adam_beta2"]],
            "eps": case["adam_epsilon"],
            "max_grad_norm": case["max_grad_norm"],
            "loss_average": "samples" if by_samples else "tokens",
            "loss_group_samples": case["per_device_train_batch_size"] if by_samples else 1,
        },
    }
    lines = []
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())]
    tokenised = json.loads((folder / "golden" / "tokenised.json").read_text())
    rows = tokenised.get(case["template"], tokenised.get(f"chat_{case.get('learn')}"))[:N_ROWS]
    return Case(
        name=folder.name,
        base=folder / "base",
        golden_adapter=folder / "golden" / "final_adapter",
        rows=[ids for ids, _ in rows],
        config="\n".join(lines) + "\n",
        trained_in_fp32=case["dtype"] == "float32",
    )


def call(bellora, *arguments):
    command = [bellora, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {result.returncode}\n{result.stderr.strip()}")


def logits(model, rows):
    model.eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0].float() for ids in rows]


def open_adapter(case, folder):
    """The base with an adapter, by PEFT alone; the base grows to the adapter's tables, if it has any."""
    base = transformers.AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    tensors = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
    n_rows = {tensor.shape[0] for name, tensor in tensors.items() if "embed_tokens" in name or "lm_head" in name}
    if n_rows and max(n_rows) > base.config.vocab_size:
        base.resize_token_embeddings(max(n_rows), mean_resizing=False)
    return peft.PeftModel.from_pretrained(base, str(folder))


def largest_difference(ours, golden):
    return max(float((a - b).abs().max()) for a, b in zip(ours, golden, strict=True))


def check(bellora, case):
    """Prints a line and returns whether the case is within the tolerance."""
    with tempfile.TemporaryDirectory(prefix="bellora-check-") as temporary:
        work = pathlib.Path(temporary)
        (work / "config.toml").write_text(case.config.replace("{out}", str(work / "run")), encoding="utf-8")
        call(bellora, "train", work / "config.toml")
        call(bellora, "export", work / "run", "--format", "merged", "--out", work / "merged")
        golden = open_adapter(case, case.golden_adapter)
        golden_logits = logits(golden, case.rows)
        adapter = largest_difference(logits(open_adapter(case, work / "run" / "adapter"), case.rows), golden_logits)
        merged_model, info = transformers.AutoModelForCausalLM.from_pretrained(
            work / "merged", dtype=torch.float32, output_loading_info=True
        )
        lacking = {kind: names for kind, names in info.items() if names}
        merged = largest_difference(logits(merged_model, case.rows), logits(golden.merge_and_unload(), case.rows))
    stored_in_fp32 = getattr(transformers.AutoConfig.from_pretrained(case.base), "dtype", None) in (None, torch.float32)
    judged = [case.trained_in_fp32, case.trained_in_fp32 and stored_in_fp32]
    fine = not lacking and all(
        difference <= TOLERANCE for difference, is_judged in zip((adapter, merged), judged) if is_judged
    )
    parts = [
        f"{kind} {difference:.1e}{'' if is_judged else ' (half precision, not judged)'}"
        for kind, difference, is_judged in zip(("adapter", "merged"), (adapter, merged), judged)
    ]
    scale = max(float(row.abs().max()) for row in golden_logits)
    print(
        f"{case.name}: {', '.join(parts)}, of logits up to {scale:.1f}: {'ok' if fine else 'short'}"
        + (f"; loading the merged model: {lacking}" if lacking else ""),
        flush=True,
    )
    return fine


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bellora = str(pathlib.Path(sys.argv[1]).resolve())
    n_fine = 0
    for folder in sys.argv[2:]:
        try:
            n_fine += check(bellora, read_case(pathlib.Path(folder)))
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            print(f"{pathlib.Path(folder).name}: short: {error}", flush=True)
    n_cases = len(sys.argv) - 2
    print(f"{n_fine} of {n_cases} cases: PEFT and Transformers read what bellora wrote, and agree")
    sys.exit(n_fine < n_cases)


if __name__ == "__main__":
    main()
