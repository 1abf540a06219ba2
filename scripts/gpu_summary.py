#!/usr/bin/env python3
"""Puts what gpu_check.sh measured side by side: prints a table, and writes it to FOLDER/summary.md and FOLDER/summary.json.

    gpu_summary.py FOLDER

Needs Python alone. A part whose file is missing is named; nothing is compared that was not measured in this folder.
"""

import json
import pathlib
import sys


def read(folder, name):
    try:
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# Kernels of a trace that are shown.
SHOWN = 20


def gib(n_bytes):
    return "-" if n_bytes is None else f"{n_bytes / 2**30:.1f}"


def way_of(result):
    """A peer's combination in words."""
    words = [result["layout"], "checkpointing" if result["checkpointing"] else "no checkpointing", result["attention"]]
    return ", ".join(words + ["fp32 adapters under autocast"] * result["autocast"])


def row_of_bench(bench):
    recompute = "recompute" if bench["recompute"] else "no recompute"
    way = f"bellora {bench['version']}, {bench['dtype']}, {recompute}, dropout {bench['lora']['dropout']:g}"
    memory = bench["memory"]
    allocator = memory["allocator"]
    held = f"{gib(allocator['reserved_peak_bytes'])} GiB reserved, {allocator['retries']} retries" if allocator else ""
    return [way, bench["tokens_per_s"], bench["mfu"], memory["peak_bytes"], bench["micro_batch_tokens"], held]


def row_of_peer(result, dtype):
    way = f"PEFT, {dtype}, {way_of(result)}"
    speed, remark = result.get("tokens_per_s"), result.get("error", "")
    return [way, speed, None, result.get("peak_bytes"), result.get("micro_batch_tokens"), remark]


def table(rows):
    lines = ["| | tokens/s | MFU | peak GiB | micro-batch tokens | |", "|---|---:|---:|---:|---:|---|"]
    for way, speed, mfu, peak, tokens, remark in rows:
        speed = "-" if speed is None else f"{speed:,.0f}"
        mfu = "-" if mfu is None else f"{100 * mfu:.1f} %"
        tokens = "-" if tokens is None else f"{tokens:,}"
        lines.append(f"| {way} | {speed} | {mfu} | {gib(peak)} | {tokens} | {remark} |")
    return lines


def selftest_lines(selftest):
    if selftest is None:
        return ["selftest: no result"]
    rows = selftest["rows"]
    wrong = [row for row in rows if not row["ok"]]
    lines = [f"selftest: {len(rows) - len(wrong)} of {len(rows)} results in order"]
    for row in wrong:
        error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
        found = row["fault"] or f"error {error}, tolerance {row['tolerance']:.1e}"
        lines.append(f"- {row['op']} in {row['dtype']}: {found}")
    return lines


# The bits of NVML's reasons for lower clocks that mean trouble; 1 is an idle GPU, 2 a clock that was asked for.
REASONS = {4: "power cap", 8: "hardware slowdown", 32: "software thermal", 64: "hardware thermal", 128: "power brake"}


def clock_lines(folder):
    """What nvidia-smi sampled once a second: of the SM clock the range while at work, and why it was lower."""
    try:
        rows = [line.split(", ") for line in (folder / "clocks.csv").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ["clocks: not sampled, there is no nvidia-smi"]
    clocks, masks = [], []
    for row in rows:
        try:
            clock, mask = float(row[1]), int(row[6], 16)
        except (IndexError, ValueError):  # a field that this GPU does not have, or half a line
            continue
        masks.append(mask)
        if not mask & 1:
            clocks.append(clock)
    if not clocks:
        return [f"clocks: none of {len(rows)} samples is of a GPU at work"]
    reasons = [f"{name} in {n} s" for bit, name in REASONS.items() if (n := sum(1 for mask in masks if mask & bit))]
    said = ", ".join(reasons) or "nothing held them down"
    return [f"clocks: {min(clocks):.0f} to {max(clocks):.0f} MHz in {len(clocks)} samples at work; {said}"]


def piece_lines(by, report):
    """The pieces of a step as a table."""
    if report is None:
        return [f"pieces by {by}: no result"]
    if report.get("skipped"):
        return [f"pieces by {by}: skipped, {report['skipped']}"]
    lines = [f"| piece, by {by} {report.get('torch', report.get('version'))} | library | ms | TFLOP/s | GB/s |"]
    lines.append("|---|---|---:|---:|---:|")
    for piece in report["pieces"]:
        if "median_s" not in piece:
            lines.append(f"| {piece['name']} | {piece['library']} | - | - | {piece['not_available']} |")
            continue
        rate = lambda key, unit: f"{piece[key] / unit:,.2f}" if key in piece else "-"
        columns = [piece["name"], piece["library"], f"{1e3 * piece['median_s']:.3f}"]
        lines.append(f"| {' | '.join([*columns, rate('flops_per_s', 1e12), rate('bytes_per_s', 1e9)])} |")
    return lines


def trace_lines(report):
    """The kernels of two updates that take longest, and what the rest of them take together."""
    trace = report and report["trace"]
    if not trace:
        return ["trace: no result"]
    updates, kernels = trace["updates"], trace["kernels"]
    lines = [f"trace: {trace['n_events']:,} events of {updates} updates, {1e3 * trace['secs'] / updates:.1f} ms each", ""]
    lines += ["| kernel | calls an update | ms an update | share |", "|---|---:|---:|---:|"]
    row = lambda name, calls, secs, share: (
        f"| {name} | {calls / updates:g} | {1e3 * secs / updates:.3f} | {100 * share:.1f} % |"
    )
    lines += [row(k["name"].replace("|", "\\|")[:120], k["calls"], k["secs"], k["share"]) for k in kernels[:SHOWN]]
    if rest := kernels[SHOWN:]:
        lines.append(row(f"{len(rest)} others", *(sum(k[key] for k in rest) for key in ("calls", "secs", "share"))))
    return lines


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__.strip())
    folder = pathlib.Path(sys.argv[1])
    benches = ["bench-bf16", "bench-again", "bench-dropout0", "bench-fp16"]
    names = ["machine", "parts", "selftest", "pieces", "pieces-python", "trace", *benches, "peers", "peers-again", "repeat", "read-ahead"]
    found = {name: read(folder, name) for name in names}
    machine, peers, repeat = found["machine"] or {}, found["peers"], found["repeat"]

    rows = [row_of_bench(found[name]) for name in benches if found[name]]
    ratio, best = None, None
    if peers and peers["results"]:
        rows += [row_of_peer(result, peers["settings"]["dtype"]) for result in peers["results"]]
        measured = [result for result in peers["results"] if "tokens_per_s" in result]
        best = max(measured, key=lambda result: result["tokens_per_s"], default=None)
        if best and found["bench-bf16"] and found["bench-bf16"]["dtype"] == peers["settings"]["dtype"]:
            ratio = found["bench-bf16"]["tokens_per_s"] / best["tokens_per_s"]

    lines = ["# A rehearsal on the CPU: no claim" if machine.get("rehearsal") else "# One call of scripts/gpu_check.sh", ""]
    for key in ("date", "gpu", "system", "bellora", "commit", "libtorch"):
        lines.append(f"- {key}: {machine.get(key, '-')}")
    if peers and "versions" in peers:
        lines.append("- peers: " + ", ".join(f"{name} {version}" for name, version in peers["versions"].items()))
    lines += ["", *selftest_lines(found["selftest"]), ""]
    if rows:
        lines += table(rows) + ["", "Real tokens, padding not counted; medians; the same lengths in the same order."]
    if ratio:
        lines.append(f"bellora in {found['bench-bf16']['dtype']} is {ratio:.2f} times the fastest of PEFT ({way_of(best)}).")
    if peers and peers["skipped"]:
        lines.append(f"peers: skipped, {peers['skipped']}")
    again = found["peers-again"]
    if again and again["results"]:
        at = 1 + max(i for i, row in enumerate(lines) if row.startswith("| PEFT") or row.startswith("| bellora"))
        lines[at:at] = table([row_of_peer(result, again["settings"]["dtype"]) for result in again["results"]])[2:]
    if repeat:
        same = lambda key: "bit for bit the same" if repeat[key] else "NOT THE SAME"
        lines += ["", f"repeated run: {same('repeated_is_identical')}; resumed run: {same('resumed_is_identical')}"]
    lines += ["", *clock_lines(folder)]
    if found["read-ahead"]:
        lines.append(f"read ahead: {gib(found['read-ahead']['bytes'])} GiB in {found['read-ahead']['seconds']} s")
    lines += ["", *piece_lines("bellora", found["pieces"]), "", *piece_lines("PYTHON's torch", found["pieces-python"])]
    lines += ["", *trace_lines(found["trace"])]
    bad = [part for part in found["parts"] or [] if part["outcome"] != "done"]
    lines += [""] * bool(bad) + [f"{part['part']}: {part['outcome']} ({part['seconds']} s)" for part in bad]

    text = "\n".join(lines) + "\n"
    (folder / "summary.md").write_text(text, encoding="utf-8")
    summary = {"machine": machine, "ratio_to_best_peer": ratio, "best_peer": best and way_of(best), "parts": found["parts"]}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
