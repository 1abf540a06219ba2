#!/usr/bin/env python3
"""Measures how long training waits for a checkpoint of 600 MB, and what a save in flight costs the steps; needs Python alone.

    stall.py FOLDER [BELLORA] [--saves 6] [--every 8] [--threads N]

FOLDER/base becomes a model whose embedding and head, both trained, make a state of 614 MB (hidden size 512, vocabulary 49,954).
The clock is TensorBoard's: it has a time for every step. What lies between two of them beside the step itself is what training
waited. FOLDER/stall.json gets every number; the tables go to standard output.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import struct
import subprocess
import sys

from kill import ROOT, fail, fields

HIDDEN, VOCABULARY = 512, 49_954


def train(bellora, folder, saves, every, threads):
    """Trains, leaving FOLDER/run."""
    settings = {
        "train.max_steps": saves * every + every // 2, "train.checkpoint_every": every, "train.keep_checkpoints": 1,
        "train.eval_every": 0, "train.global_batch": 8, "model.dtype": "fp32", "model.device": "cpu",
        "data.cache_dir": folder / "cache",
    }  # fmt: skip
    command = [bellora, "train", folder / "random.toml"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    if ended.returncode:
        fail(f"the run failed:\n{ended.stderr}")


def times_of_steps(run):
    """When each step's point was written, by the only event file of a run that was not stopped."""
    (path,) = (run / "tensorboard").iterdir()
    data, at, times = path.read_bytes(), 0, {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = fields(data[at + 12 : at + 12 + length])
        at += 16 + length
        if 5 in event:
            times[event[2][0]] = struct.unpack("<d", event[1][0])[0]
    return times


def read(run):
    """Puts together what train.log, metrics.jsonl and the event file say: the saves, and the steps by what goes on beside."""
    text = (run / "train.log").read_text()
    copied = {int(s): float(t) for s, t in re.findall(r"checkpoint of step (\d+): copied in ([\d.]+) s", text)}
    written = re.findall(r"checkpoint of step (\d+): ([\d.]+) MB written in ([\d.]+) s", text)
    secs = {line["step"]: line["step_secs"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    times = times_of_steps(run)
    waited = {step: times[step] - times[step - 1] - secs[step] for step in times if step - 1 in times}
    saves, in_flight = [], set()
    for step, megabytes, write_secs in ((int(s), float(mb), float(t)) for s, mb, t in written):
        until = times[step] + copied[step] + float(write_secs)
        in_flight |= {s for s in times if s > step and times[s] - secs[s] < until}
        if step + 1 in waited:
            saves.append({"step": step, "MB": megabytes, "write secs": write_secs, "copy secs": copied[step],
                          "waited secs": waited[step + 1]})  # fmt: skip
    saved = {save["step"] + 1 for save in saves}
    # The first two steps warm caches up.
    others = [step for step in waited if step > 2 and step not in saved]
    return {
        "saves": saves,
        "waited otherwise secs": [waited[step] for step in others],
        "step secs with a save in flight": [secs[step] for step in sorted(in_flight)],
        "step secs without": [secs[step] for step in secs if step > 2 and step not in in_flight],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("bellora", nargs="?", type=pathlib.Path, default=ROOT / "target/release/bellora")
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        fail(f"{folder} is not empty")
    maker = ROOT / "scripts/make_random_base.py"
    sizes = ["--hidden", str(HIDDEN), "--vocabulary", str(VOCABULARY)]
    subprocess.run([sys.executable, maker, folder, *sizes], check=True)
    train(arguments.bellora.resolve(), folder, arguments.saves, arguments.every, arguments.threads)
    found = read(folder / "run")
    machine = {"system": platform.platform(), "threads": arguments.threads}
    (folder / "stall.json").write_text(json.dumps({**machine, **found}, indent=1) + "\n", encoding="utf-8")

    print("| checkpoint of step | MB | save, whole (s) | copy and hand-over (s) | training waited (s) | beyond the copy, of the save |")
    print("|---:|---:|---:|---:|---:|---:|")
    for save in found["saves"]:
        whole = save["copy secs"] + save["write secs"]
        beyond = max(0.0, save["waited secs"] - save["copy secs"]) / whole
        print(f"| {save['step']} | {save['MB']:.1f} | {whole:.2f} | {save['copy secs']:.3f} | {save['waited secs']:.3f} | {beyond:.1%} |")
    print("\n| steps | number | median (s) | slowest (s) |\n|---|---:|---:|---:|")
    for name in ("step secs with a save in flight", "step secs without"):
        secs = found[name]
        if secs:
            print(f"| {name[10:]} | {len(secs)} | {statistics.median(secs):.3f} | {max(secs):.3f} |")
    print(f"\nBetween two steps without a save: {1000 * statistics.median(found['waited otherwise secs']):.1f} ms (median).")


if __name__ == "__main__":
    main()
