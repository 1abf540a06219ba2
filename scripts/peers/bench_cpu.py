#!/usr/bin/env python3
"""Measures `bellora train` against Transformers + PEFT on the CPU, and writes docs/measurements/cpu.json and cpu.md.

    bench_cpu.py [BELLORA] [--pairs 5] [--jobs equal,belle] [--dtypes fp32,bf16] [--belle-rows 64] [--python PYTHON]

Two jobs on a Llama of hidden size 512, 8 layers, rank 64 on all seven projections, 2 threads, real tokens counted:
  equal   8 rows of 256 tokens an update, all of them learned, vocabulary 8,192
  belle   64 rows (or --belle-rows) of BELLE an update with their own lengths and labels, vocabulary 49,954; the peer sorts them by length
          and runs at its best micro-batch of 1, 2, 4 and 8 rows. Needs data/belle_dev1k.jsonl and
          data/tokenizers/chinese_alpaca.model in the folder that the environment variable BELLORA_SHARED names, or
          in ../shared beside the checkout; skipped where they are not.
The two run in turn, ours and the peer's, --pairs times, since such machines drift; what counts is the median of the
pairs' ratios. Both sides get the same rows in the same order from the same weights, and must agree in their first loss.
PYTHON is an interpreter with torch, transformers and peft (by default the one that runs this).
"""

import argparse
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "measurements"
SHARED = pathlib.Path(os.environ.get("BELLORA_SHARED", ROOT.parent / "shared")) / "data"
PEER = pathlib.Path(__file__).with_name("peft_cpu.py")
THREADS = 2
R = 64
EQUAL_LENGTH, EQUAL_UPDATE, EQUAL_VOCAB, EQUAL_STEPS = 256, 8, 8192, 6
BELLE_UPDATE, BELLE_VOCAB, BELLE_STEPS = 64, 49954, 3
# Both start from the same weights with a zero lora_B, so the first loss differs by rounding alone.
FIRST_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def run_process(command, **options):
    """Runs a command and returns its standard output, wall time and peak resident memory in MiB."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, env=environment, **options)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            sys.exit(f"error: {' '.join(map(str, command))} ended with {process.returncode}:\n{err.read()[-2000:]}")
        return out.read(), time.perf_counter() - start, usage.ru_maxrss / 1024


class Job:
    """A job in a folder of its own: data, tokenizer, config; the base comes for each dtype."""

    def __init__(self, name, folder, vocab_size, update, steps, batches):
        self.name, self.folder, self.vocab_size = name, folder, vocab_size
        self.update, self.steps, self.batches = update, steps, batches
        folder.mkdir()

    def base(self, python, dtype):
        folder = self.folder / f"base-{dtype}"
        if not folder.exists():
            run_process([python, PEER, "make-base", folder, "--vocab", self.vocab_size, "--dtype", dtype])
        return folder

    def config(self, base, dtype, output):
        data, tokenizer, template = self.data_files()
        text = f"""
            [model]
            base = "{base}"
            tokenizer = "{tokenizer}"
            dtype = "{dtype}"
            device = "cpu"
            [lora]
            r = {R}
            alpha = {2 * R}
            dropout = 0
            [data]
            train = ["{data}"]
            template = "{template}"
            max_length = 512
            truncation = "cut"
            shuffle = false
            cache_dir = "{self.folder / "cache"}"
            [train]
            output = "{output}"
            max_steps = {self.steps}
            global_batch = {self.update}
            learning_rate = 1e-4
            schedule = "constant"
            warmup_steps = 0
            checkpoint_every = 0
            eval_every = 0
            """
        path = self.folder / f"{dtype}.toml"
        path.write_text("\n".join(line.strip() for line in text.splitlines()), encoding="utf-8")
        return path

    def data_files(self):
        if self.name == "belle":
            return SHARED / "belle_dev1k.jsonl", SHARED / "tokenizers" / "chinese_alpaca.model", "alpaca"
        data, tokenizer, template = (self.folder / name for name in ("rows.jsonl", "tokenizer", "bare.toml"))
        if not data.exists():
            write_equal_rows(data, self.update * self.steps)
            write_word_tokenizer(tokenizer)
            template.write_text('user = ["", ""]\nreply = ["", ""]\n', encoding="utf-8")
        return data, tokenizer, template


def write_equal_rows(path, n_rows):
    """A question of one word and an answer that with its end-of-text token fills the row: all that can be learned is."""
    rnd = random.Random(0)
    word = lambda: f"w{rnd.randrange(3, EQUAL_VOCAB)}"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(n_rows):
            answer = " ".join(word() for _ in range(EQUAL_LENGTH - 2))
            file.write(json.dumps({"instruction": word(), "input": "", "output": answer}) + "\n")


def write_word_tokenizer(folder):
    """One token a word: the length of a row is then what the row says."""
    special = ["<unk>", "<s>", "</s>"]
    words = special + [f"w{i}" for i in range(len(special), EQUAL_VOCAB)]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **plain} for i, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def run_ours(bellora, job, base, dtype):
    output = job.folder / f"run-{time.time_ns()}"
    _, wall, peak = run_process([bellora, "train", job.config(base, dtype, output)], cwd=job.folder)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    rate = statistics.median(line["tokens_per_s"] for line in updates[1:])
    return {"tokens_per_s": rate, "peak_rss_mib": peak, "wall_s": wall, "first_loss": updates[0]["loss"]}


def run_peer(python, job, base, dtype, rows, batch, steps):
    command = [python, PEER, "train", base, rows, "--dtype", dtype, "--update", job.update, "--batch", batch]
    text, wall, peak = run_process([*command, "--steps", steps, "--threads", THREADS, "--r", R])
    result = json.loads(text.strip().splitlines()[-1])
    return {**result, "peak_rss_mib": peak, "wall_s": wall, "first_loss": result["losses"][0]}


def measure(bellora, python, job, dtype, n_pairs):
    base = job.base(python, dtype)
    rows = job.folder / "rows-dump.jsonl"
    run_process([bellora, "prepare", job.config(base, dtype, job.folder / "unused"), "--dump", rows])
    lengths = [len(json.loads(line)["input_ids"]) for line in rows.read_text().splitlines()[: job.update * job.steps]]
    if job.name == "equal" and set(lengths) != {EQUAL_LENGTH}:
        sys.exit(f"error: rows of {sorted(set(lengths))} tokens, not {EQUAL_LENGTH}")

    tried = {}
    if len(job.batches) > 1:
        for batch in job.batches:
            tried[batch] = run_peer(python, job, base, dtype, rows, batch, 2)["tokens_per_s"]
            print(f"  {job.name} {dtype}: peer with micro-batches of {batch}: {tried[batch]:.0f} tokens/s", flush=True)
    batch = max(tried, key=tried.get) if tried else job.batches[0]

    pairs = []
    for i in range(n_pairs):
        ours = run_ours(bellora, job, base, dtype)
        peer = run_peer(python, job, base, dtype, rows, batch, job.steps)
        if abs(ours["first_loss"] - peer["first_loss"]) > FIRST_LOSS_TOLERANCE[dtype]:
            sys.exit(f"error: not the same job: first losses {ours['first_loss']} and {peer['first_loss']}")
        pairs.append({"ours": ours, "peer": peer, "ratio": ours["tokens_per_s"] / peer["tokens_per_s"]})
        print(
            f"  {job.name} {dtype} pair {i + 1}: ours {ours['tokens_per_s']:.0f}, peer {peer['tokens_per_s']:.0f} "
            f"tokens/s, ratio {pairs[-1]['ratio']:.2f}",
            flush=True,
        )
    middle = lambda side, key: statistics.median(pair[side][key] for pair in pairs)
    return {
        "job": job.name,
        "dtype": dtype,
        "tokens_an_update": sum(lengths) / job.steps,
        "peer_batch": batch,
        "peer_batches_tried": tried,
        "ratio": statistics.median(pair["ratio"] for pair in pairs),
        "ours": {key: middle("ours", key) for key in ("tokens_per_s", "peak_rss_mib")},
        "peer": {key: middle("peer", key) for key in ("tokens_per_s", "peak_rss_mib")},
        "pairs": pairs,
    }


def describe_machine():
    model = "unknown"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {"cpu": model, "cores": os.cpu_count(), "threads_used": THREADS, "system": platform.platform()}


def write_report(results, machine):
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "cpu.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    versions = results[0]["pairs"][0]["peer"]["versions"]
    lines = [
        "# Speed on the CPU against Transformers + PEFT",
        "",
        f"By `scripts/peers/bench_cpu.py`, which says what the jobs are, on {machine['cpu']}, {machine['threads_used']} threads;",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        f"Ours and the peer ran in turn; medians of {len(results[0]['pairs'])} pairs, the ratio being the median of the pairs' ratios.",
        "Real tokens, padding not counted.",
        "",
        "| job | dtype | tokens an update | ours, tokens/s | peer, tokens/s | ratio | ours, peak MiB | peer, peak MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        name = r["job"] + (f", peer in micro-batches of {r['peer_batch']}" if r["peer_batches_tried"] else "")
        lines.append(
            f"| {name} | {r['dtype']} | {r['tokens_an_update']:,.0f} | {r['ours']['tokens_per_s']:,.0f} | "
            f"{r['peer']['tokens_per_s']:,.0f} | {r['ratio']:.2f} | {r['ours']['peak_rss_mib']:,.0f} | "
            f"{r['peer']['peak_rss_mib']:,.0f} |"
        )
    (OUT / "cpu.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[-len(results) - 2 :]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bellora", nargs="?", default=ROOT / "target" / "release" / "bellora", type=pathlib.Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--jobs", default="equal,belle")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--belle-rows", type=int, default=BELLE_UPDATE, help="rows of BELLE an update")
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    bellora, results = arguments.bellora.resolve(), []
    with tempfile.TemporaryDirectory(prefix="bellora-bench-") as temporary:
        work = pathlib.Path(temporary)
        for name in arguments.jobs.split(","):
            if name == "equal":
                job = Job(name, work / name, EQUAL_VOCAB, EQUAL_UPDATE, EQUAL_STEPS, [EQUAL_UPDATE])
            elif name == "belle" and (SHARED / "belle_dev1k.jsonl").exists():
                job = Job(name, work / name, BELLE_VOCAB, arguments.belle_rows, BELLE_STEPS, [1, 2, 4, 8])
            elif name == "belle":
                print(f"belle is skipped: {SHARED}/belle_dev1k.jsonl is not there", flush=True)
                continue
            else:
                sys.exit(f"error: no such job: {name}\nhint: equal, belle, or both with a comma")
            for dtype in arguments.dtypes.split(","):
                results.append(measure(bellora, arguments.python, job, dtype, arguments.pairs))
    if results:
        write_report(results, describe_machine())


if __name__ == "__main__":
    main()
