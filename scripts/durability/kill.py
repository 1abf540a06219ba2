#!/usr/bin/env python3
"""Kills one run again and again, and holds what comes out against a run that was left in peace; needs Python alone.

    kill.py FOLDER [BELLORA] [--kills 100] [--seed 0] [--steps 1500] [--nproc 1]

FOLDER/base becomes a tiny model (make_random_base.py). A run of it ends undisturbed. The same run is then started, killed by
SIGKILL at a random moment and started again with --resume until it was killed as often as asked: a third of the kills come
while it starts, a third while a checkpoint is being written, a third at any other moment. After every kill all checkpoints must
be whole, none may have been lost, and the next start must go on from the newest. In the end adapter, last checkpoint, metrics
(times aside) and TensorBoard's points must be those of the undisturbed run, bit for bit. FOLDER/kill.json says what happened.

With --nproc the run has so many ranks, whose optimizer is sharded, and a kill hits any of them or their supervisor; none of these
processes may be left ten seconds later.
"""

import argparse
import filecmp
import json
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
EVERY = 5
POLL_SECS = 0.0005
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
GONE_SECS = 10
CLOCK = ("step_secs", "tokens_per_s", "eval_secs")


def fail(what):
    sys.exit(f"error: {what}")


def identity(run):
    """Which file metrics.jsonl is at present."""
    try:
        return (run / "metrics.jsonl").stat().st_ino
    except FileNotFoundError:
        return None


def last_step(run):
    """The step of the last whole line of metrics.jsonl; 0 where there is none."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0
    except FileNotFoundError:
        return 0


def checkpoints(run):
    """Steps of the checkpoints under their final names."""
    folder = run / "checkpoints"
    return sorted(int(path.name[5:]) for path in folder.glob("step-*")) if folder.is_dir() else []


def is_saving(run):
    """Whether a checkpoint is being written or an old one deleted."""
    try:
        return any(name.startswith(".incomplete-") for name in os.listdir(run / "checkpoints"))
    except FileNotFoundError:
        return False


class Trainer:
    """The run, one process after another."""

    def __init__(self, bellora, folder, steps, nproc):
        self.bellora, self.run, self.steps = bellora, folder / "run", steps
        self.stderr = folder / "stderr.txt"
        settings = {
            "train.output": self.run, "train.max_steps": steps, "train.global_batch": 2, "train.checkpoint_every": EVERY,
            "train.keep_checkpoints": 2, "train.eval_every": 50, "train.micro_batch_tokens": 256, "train.log_every": 3,
            "data.validation_fraction": 0.2, "data.cache_dir": folder / "cache", "model.dtype": "fp32", "model.device": "cpu",
        }  # fmt: skip
        self.command = [bellora, "train", folder / "random.toml", "--resume"]
        if nproc > 1:
            self.command += ["--nproc", str(nproc)]
            settings["train.shard"] = "true"
        for key, value in settings.items():
            self.command += ["--set", f"{key}={value}"]

    def start(self):
        with open(self.stderr, "wb") as stderr:
            return subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stderr=stderr, env=ENVIRONMENT)

    def end(self):
        """Runs to the end; gives the seconds that took."""
        started = time.perf_counter()
        if self.start().wait():
            fail(f"the run failed:\n{self.stderr.read_text()}")
        return time.perf_counter() - started

    def wait_until(self, process, is_time):
        """Waits for a moment of the run; False if it has ended before."""
        while not is_time():
            if process.poll() is not None:
                return False
            time.sleep(POLL_SECS)
        return True

    def judge(self, before):
        """Holds the folder against what a killed run may leave; `before` is the newest checkpoint that was seen."""
        steps = checkpoints(self.run)
        newest = steps[-1] if steps else 0
        if newest < before:
            fail(f"the checkpoint of step {before} was lost; there are {steps}")
        for step in steps:
            folder = self.run / f"checkpoints/step-{step:08}"
            manifest = json.loads((folder / "MANIFEST.json").read_text())
            for name, file in manifest["files"].items():
                if (folder / name).stat().st_size != file["size_bytes"]:
                    fail(f"{folder / name} is not whole")
        if steps:
            verified = subprocess.run([self.bellora, "verify", self.run], capture_output=True, text=True, check=False)
            if verified.returncode:
                fail(f"verify says:\n{verified.stdout}{verified.stderr}")
        return newest

    def judge_start(self, newest):
        """Holds what the killed process said against the checkpoint that it should have gone on from."""
        said = self.stderr.read_text(errors="replace")
        if "damaged" in said or "metrics.jsonl has" in said:
            fail(f"the start found damage:\n{said}")
        went_on = re.search(r"goes on from step (\d+) of", said)
        if went_on and int(went_on[1]) != newest:
            fail(f"went on from step {went_on[1]}, though the checkpoint of step {newest} is whole")
        return went_on is not None


def ranks_of(supervisor):
    """The processes of a job's ranks."""
    mark, found = f"BELLORA_SUPERVISOR={supervisor}".encode(), []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:
            pass
    return found


def kill_any(process, draws):
    """Kills the run's process, or any one of its ranks; gives whether it was a rank and the seconds until nothing was left."""
    victim = draws.choice([process.pid, *ranks_of(process.pid)])
    started = time.perf_counter()
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        fail("a rank ended by itself")
    while process.poll() is None or ranks_of(process.pid):
        if time.perf_counter() - started > GONE_SECS:
            fail(f"{GONE_SECS} s after the kill of process {victim} there is left: {process.pid}, {ranks_of(process.pid)}")
        time.sleep(POLL_SECS)
    return victim != process.pid, time.perf_counter() - started


def points(run):
    """TensorBoard's points by tag: step to value; what a later session voids is gone."""
    found = {}
    for path in sorted((run / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = fields(data[at + 12 : at + 12 + length])
            if len(data) < at + 16 + length:
                break
            at += 16 + length
            step = event.get(2, [0])[0]
            if 7 in event:
                found = {tag: {s: v for s, v in of_tag.items() if s < step} for tag, of_tag in found.items()}
            for value in map(fields, fields(event[5][0])[1]) if 5 in event else ():
                tag = value[1][0].decode()
                if tag != "train/tokens_per_s":
                    found.setdefault(tag, {})[step] = value[2][0]
    return found


def fields(message):
    """The fields of a message in protocol buffers by number."""
    at, found = 0, {}

    def varint():
        nonlocal at
        number, shift = 0, 0
        while True:
            byte = message[at]
            at += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            value = message[at : at + size]
            at += size
        found.setdefault(key >> 3, []).append(value)
    return found


def timeless(run):
    """The lines of metrics.jsonl without what a clock says."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def compare(run, straight):
    """Holds the killed run against the one that was left in peace."""
    last = f"checkpoints/step-{checkpoints(straight)[-1]:08}"
    for folder in ("adapter", last):
        names = sorted(path.name for path in (straight / folder).iterdir())
        if names != sorted(path.name for path in (run / folder).iterdir()):
            fail(f"{folder} holds other files")
        _, differ, broken = filecmp.cmpfiles(run / folder, straight / folder, names, shallow=False)
        if differ or broken:
            fail(f"{folder}: {differ + broken} differ")
    ours, judge = timeless(run), timeless(straight)
    if ours != judge:
        at = next((i for i, (a, b) in enumerate(zip(ours, judge)) if a != b), min(len(ours), len(judge)))
        fail(f"metrics.jsonl differs from line {at + 1} on; {len(ours)} lines and {len(judge)}")
    if points(run) != points(straight):
        fail("TensorBoard's points differ")
    return {"metrics lines": len(judge), "TensorBoard points": sum(map(len, points(straight).values()))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("bellora", nargs="?", type=pathlib.Path, default=ROOT / "target/release/bellora")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--nproc", type=int, default=1)
    arguments = parser.parse_args()
    folder, draws = arguments.folder.resolve(), random.Random(arguments.seed)
    bellora = arguments.bellora.resolve()
    if folder.exists() and any(folder.iterdir()):
        fail(f"{folder} is not empty")
    maker = ROOT / "scripts/make_random_base.py"
    subprocess.run([sys.executable, maker, folder, "--hidden", "64"], check=True)

    trainer = Trainer(bellora, folder, arguments.steps, arguments.nproc)
    straight_secs = trainer.end()
    straight = folder / "straight"
    trainer.run.rename(straight)
    # How long a start takes: until the first line of an update.
    process, started = trainer.start(), time.perf_counter()
    trainer.wait_until(process, lambda: last_step(trainer.run) > 0)
    start_secs = time.perf_counter() - started
    kill_any(process, draws)
    shutil.rmtree(trainer.run)
    print(f"undisturbed: {straight_secs:.1f} s, of which {start_secs:.2f} s to start", flush=True)

    newest, log, killed_at = 0, [], time.perf_counter()
    for kill in range(arguments.kills):
        kind = ("start", "save", "any")[draws.randrange(3)]
        before = identity(trainer.run)
        process = trainer.start()
        # No further than leaves steps for the kills that are still to come.
        room = max(1, (arguments.steps - newest) // (arguments.kills - kill) - 2 * EVERY)
        goal = newest + draws.randrange(1, room + 1)
        if kind == "start":
            time.sleep(draws.uniform(0, start_secs))
        else:
            # A start that goes on replaces metrics.jsonl; until then its lines are those of the process before.
            is_alive = trainer.wait_until(
                process, lambda: (newest == 0 or identity(trainer.run) != before) and last_step(trainer.run) >= goal
            )
            if kind == "save":
                is_alive = is_alive and trainer.wait_until(process, lambda: is_saving(trainer.run))
            if not is_alive:
                fail(f"the run ended before kill {kill + 1}: give it more --steps\n{trainer.stderr.read_text()}")
            # A checkpoint of this model takes some milliseconds, as a step does.
            time.sleep(draws.uniform(0, 0.005 if kind == "save" else 0.03))
        was_saving = is_saving(trainer.run)
        of_a_rank, gone_secs = kill_any(process, draws)
        had_begun = trainer.judge_start(newest) or (newest == 0 and last_step(trainer.run) > 0)
        newest = trainer.judge(newest)
        n_lost = max(0, last_step(trainer.run) - newest) if had_begun else 0
        log.append({
            "kind": kind, "rank": of_a_rank, "starting": not had_begun, "saving": was_saving, "newest": newest,
            "steps lost": n_lost, "gone seconds": round(gone_secs, 3),
        })  # fmt: skip
    kill_secs = time.perf_counter() - killed_at
    trainer.end()
    trainer.judge_start(newest)
    same = compare(trainer.run, straight)
    summary = {
        "kills": len(log), "ranks": arguments.nproc, "of a rank": sum(entry["rank"] for entry in log),
        "seconds until nothing was left, at most": max(entry["gone seconds"] for entry in log),
        "while starting": sum(entry["starting"] for entry in log),
        "while a checkpoint was written": sum(entry["saving"] for entry in log),
        "steps done again": sum(entry["steps lost"] for entry in log),
        "steps": arguments.steps, "checkpoint every": EVERY, "seed": arguments.seed,
        "undisturbed seconds": round(straight_secs, 1), "seconds with kills": round(kill_secs, 1), "bit for bit the same": True, **same,
    }  # fmt: skip
    (folder / "kill.json").write_text(json.dumps({**summary, "log": log}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
