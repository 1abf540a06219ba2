#!/usr/bin/env python3
"""Prints what the quickstart's training changed; exit code 1 if the loss did not fall.

    quickstart_summary.py RUN RESULTS QUESTION

RUN is the run folder; RESULTS holds eval-base.json and eval-tuned.json (from `bellora eval`), answer-base.txt and
answer-tuned.txt (from `bellora generate`). Called by quickstart.sh.
"""

import json
import pathlib
import sys


def read_updates(path):
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [line for line in lines if isinstance(line.get("loss"), (int, float))]


def one_line(path):
    # A base model may stop in the middle of a character.
    text = path.read_text(encoding="utf-8", errors="replace")
    return " ⏎ ".join(text.strip("\n").split("\n"))


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    run, results, question = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
    updates = read_updates(run / "metrics.jsonl")
    if not updates:
        sys.exit(f"error: {run}/metrics.jsonl has no update\nhint: scripts/quickstart.sh --fresh trains again")
    first, last = updates[0], updates[-1]
    before, after = (json.loads((results / f"eval-{which}.json").read_text()) for which in ("base", "tuned"))
    n_tokens = sum(update["tokens"] for update in updates)
    seconds = sum(update["step_secs"] for update in updates)
    fell = last["loss"] < first["loss"]
    for name, value in {
        "training": f"{len(updates)} updates, {n_tokens:,} tokens, {seconds:.0f} s",
        "loss": f"{first['loss']:.4f} at the first update, {last['loss']:.4f} at the last",
        "held-out loss": f"{before['eval_loss']:.4f} of the base, {after['eval_loss']:.4f} of the tuned model "
        f"({after['samples']} rows that were not learned)",
        "question": question,
        "base": one_line(results / "answer-base.txt"),
        "tuned": one_line(results / "answer-tuned.txt"),
        "adapter": f"{run}/adapter/",
        "log": f"{run}/train.log, {run}/metrics.jsonl",
        "TensorBoard": f"{run}/tensorboard/",
    }.items():
        print(f"{name:<14} {value}")
    if not fell:
        sys.exit("error: the loss did not fall")


if __name__ == "__main__":
    main()
