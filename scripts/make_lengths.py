#!/usr/bin/env python3
"""Counts the lengths in a dump of samples (bellora prepare CONFIG --dump TOKENS.jsonl) and prints them as a file of
lengths, the form that data/README.md describes: numbers of tokens alone, sorted, nothing of the texts.

    scripts/make_lengths.py TOKENS.jsonl "what they are the lengths of" > lengths.json
"""

import collections
import json
import sys


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    path, about = sys.argv[1:]
    counts = collections.Counter()
    with open(path, encoding="utf-8") as file:
        for line in file:
            labels = json.loads(line)["labels"]
            # No token comes before the first, so that it is never learned.
            counts[len(labels), sum(label != -100 for label in labels[1:])] += 1
    entries = [f"  [{tokens}, {learned}, {samples}]" for (tokens, learned), samples in sorted(counts.items())]
    head = json.dumps({"format": "bellora lengths 1", "about": about}, ensure_ascii=False)
    print(head[:-1] + ',\n "lengths": [\n' + ",\n".join(entries) + "\n ]}")


if __name__ == "__main__":
    main()
