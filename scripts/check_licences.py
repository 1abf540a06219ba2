#!/usr/bin/env python3
"""Holds every crate that bellora is built from against deny.toml, offline: where `cargo deny` is not installed.

    check_licences.py

Reads `cargo metadata`. Fails on a licence that deny.toml's `allow` does not cover, on a crate that comes from a git
repository or another registry, on a banned crate, and on a dependency of ours without a version. Two versions of one
crate are named, not refused.
"""

import collections
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = "x86_64-unknown-linux-gnu"


def rules():
    """The allowed licences and the banned crates of deny.toml (tomllib is not in every Python 3, so by pattern)."""
    text = re.sub(r"^\s*#.*$", "", (ROOT / "deny.toml").read_text(encoding="utf-8"), flags=re.M)
    licences = re.search(r"\[licenses\].*?\ballow = \[(.*?)\]", text, re.S)
    if not licences:
        sys.exit("error: deny.toml has no [licenses] allow = [...]")
    return set(re.findall(r'"([^"]+)"', licences[1])), set(re.findall(r'crate = "([^"]+)"', text))


def metadata():
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", TARGET]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{result.stderr.strip()}\nhint: run `cargo fetch --locked` first")
    return json.loads(result.stdout)


def satisfied(expression, allowed):
    """Whether an SPDX expression can be met by allowed licences. Old crates write "MIT/Apache-2.0" for OR."""
    tokens = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))

    def either():
        result = both()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            result = both() or result
        return result

    def both():
        result = one()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            result = one() and result
        return result

    def one():
        token = tokens.pop(0)
        if token == "(":
            result = either()
            tokens.pop(0)
            return result
        if tokens and tokens[0] == "WITH":
            tokens.pop(0)
            token = f"{token} WITH {tokens.pop(0)}"
        return token in allowed

    return either()


def main():
    allowed, banned = rules()
    data = metadata()
    used = {node["id"] for node in data["resolve"]["nodes"]}
    ours = set(data["workspace_members"])
    faults, versions, n_checked = [], collections.defaultdict(set), 0
    for package in sorted((p for p in data["packages"] if p["id"] in used), key=lambda p: p["name"]):
        label = f"{package['name']} {package['version']}"
        if package["id"] in ours:
            faults += [f"{d['name']}: give it a version" for d in package["dependencies"] if d["req"] == "*"]
            continue
        n_checked += 1
        versions[package["name"]].add(package["version"])
        if not re.match(r"registry\+.*/crates\.io-index$|sparse\+.*", package["source"] or ""):
            faults.append(f"{label} comes from {package['source'] or 'a local path'}, not from the crate registry")
        if package["name"] in banned:
            faults.append(f"{label} is banned by deny.toml")
        if not package["license"]:
            faults.append(f"{label} names no licence (file: {package['license_file']})")
        elif not satisfied(package["license"], allowed):
            faults.append(f"{label} is under {package['license']}, which deny.toml does not allow")
    for name, several in sorted(versions.items()):
        if len(several) > 1:
            print(f"note: {name} is built in versions {', '.join(sorted(several))}")
    for fault in faults:
        print(f"error: {fault}")
    print(f"{n_checked} crates checked against deny.toml, {len(faults)} faults")
    return 1 if faults or not n_checked else 0


if __name__ == "__main__":
    sys.exit(main())
