#!/usr/bin/env python3
"""The table of methods: what `lightmoe compress --list` says of each, beside what a comparison measured (its report.json).

    scripts/methods_table.py demo/results/compare/report.json > demo/results/compare/methods.md
    scripts/methods_table.py demo/results/compare/report.json --ratios 0.25 0.5        # README.md's
"""
import argparse
import json
import re
import subprocess
import tomllib


def listed(program):
    """name -> (slots, trains, reads, arXiv id), from the columns of --list."""
    lines = subprocess.run([program, "compress", "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [re.split(r" {2,}", line) for line in lines[1:]]
    return {cells[0]: tuple(cells[1:5]) for cells in rows}


def share(cell):
    """Mean and spread of a cell in %; nothing where no run is."""
    if cell is None or cell["mean"] is None:
        return "-"
    return f"{100 * cell['mean']:.1f}" + (f" ± {100 * cell['deviation']:.1f}" if cell["deviation"] is not None else "")


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("report")
    arguments.add_argument("--program", default="build/lightmoe")
    arguments.add_argument("--ratios", type=float, nargs="+")
    options = arguments.parse_args()
    report = json.load(open(options.report))
    with open(report["recipe"], "rb") as file:
        recipe = tomllib.load(file)
    known = [t["name"] for t in report["tasks"] if t["scenario"] == "preserving"]
    ratios = options.ratios or sorted({row["ratio"] for row in report["rows"] if row["ratio"] > 0})
    rows = {(row["method"], row["ratio"], row["recovered"]): row for row in report["rows"]}

    def as_compressed(name, ratio):
        """Mean of the known tasks, a number."""
        row = rows.get((name, ratio, False))
        values = [row["tasks"][t]["mean"] for t in known] if row else [None]
        return None if None in values else 100 * sum(values) / len(values)

    print(f"Exact match in %: as compressed, mean of {', '.join(known)}; recovered, mean of all five tasks ± standard deviation over seeds. "
          f"Made from `{options.report}` ({report['computed_by']}).\n")
    head = ["method", "source", "slots", "training", "reads", *[f"{100 * r:g} %" for r in ratios], *[f"{100 * r:g} %, recovered" for r in ratios]]
    print("| " + " | ".join(head) + " |\n|" + "---|" * 5 + "---:|" * (2 * len(ratios)))
    methods = listed(options.program)
    table = []
    for name in recipe["recipe"]["methods"]:
        base = recipe.get("method", {}).get(name, {}).get("method", name)
        if base not in methods or not any((name, r, recovered) in rows for r in ratios for recovered in (False, True)):
            continue
        slots, training, reads, paper = methods[base]
        compressed = [as_compressed(name, r) for r in ratios]
        recovered = [rows.get((name, r, True), {}).get("average") for r in ratios]
        line = [name, paper or "-", slots, training, reads, *["-" if v is None else f"{v:.1f}" for v in compressed], *map(share, recovered)]
        table.append((-(compressed[-1] or 0), "| " + " | ".join(line) + " |"))
    for _, line in sorted(table):
        print(line)


if __name__ == "__main__":
    main()
