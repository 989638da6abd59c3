#!/usr/bin/env python3
"""The table of methods: what `lightmoe compress --list` says of each, beside what a comparison measured (its report.json).

    scripts/methods_table.py demo/results/compare/report.json > demo/results/compare/methods.md
"""
import json
import re
import subprocess
import sys


def listed(program):
    """name -> (slots, reads, arXiv id, what it does), from the columns of --list."""
    lines = subprocess.run([program, "compress", "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    starts = [m.start() for m in re.finditer(r"(?<=  )\S|^\S", lines[0])]
    found = {}
    for line in lines[1:]:
        cells = [line[a:b].strip() for a, b in zip(starts, starts[1:] + [None])]
        if len(cells) == 6 and cells[0] and cells[2]:
            found[cells[0]] = (cells[1], cells[3], cells[4], cells[5])
    return found


def mean(row, tasks):
    values = [row["tasks"][t]["mean"] for t in tasks]
    return None if any(v is None for v in values) else 100 * sum(values) / len(values)


def main():
    report = json.load(open(sys.argv[1]))
    program = sys.argv[2] if len(sys.argv) > 2 else "build/lightmoe"
    known = [t["name"] for t in report["tasks"] if t["scenario"] == "preserving"]
    every = [t["name"] for t in report["tasks"]]
    ratios = sorted({row["ratio"] for row in report["rows"] if row["ratio"] > 0})
    rows = {(row["method"], row["ratio"], row["recovered"]): row for row in report["rows"]}
    text = lambda value: "-" if value is None else f"{value:.1f}"
    head = ["method", "source", "slots", "reads"] + [f"{100 * r:g} %" for r in ratios] + ["50 %, recovered", "seeds"]
    print(f"Exact match in %, mean of {', '.join(known)} without training; after recovery mean of all five tasks. Made from "
          f"`{sys.argv[1]}` ({report['computed_by']}).\n")
    print("| " + " | ".join(head) + " |\n|" + "---|" * 4 + "---:|" * (len(ratios) + 2))
    order = []
    for name, (slots, reads, paper, _) in listed(program).items():
        cells = [rows.get((name, r, False)) for r in ratios]
        recovered = rows.get((name, 0.5, True))
        if not any(cells) and recovered is None:
            continue
        free = [mean(row, known) if row else None for row in cells]
        trained = mean(recovered, every) if recovered else None
        seeds = min(recovered["tasks"][t]["seeds"] for t in every) if recovered else 0
        line = [name, paper or "-", slots, reads] + [text(v) for v in free] + [text(trained), str(seeds or "-")]
        order.append((-(free[-1] or 0), "| " + " | ".join(line) + " |"))
    for _, line in sorted(order):
        print(line)


if __name__ == "__main__":
    main()
