"""Runs declared workloads, keeps what was measured, and makes the tables of docs/speed.md from it.

  python benchmarks/run.py                                       all of benchmarks/workloads/: about 15 minutes
  python benchmarks/run.py --workloads step_batch64_threads1
  python benchmarks/run.py --tables                              only writes the tables anew

A workload is a YAML file: a benchmark of this folder that times our side and a plain one in turn, and its options. What
comes out goes into benchmarks/results/<workload>.csv: medians in milliseconds per clip, with hardware and versions.
"""

import argparse
import csv
import os
import platform
import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs/speed.md"
COLUMNS = ("case", "plain_ms", "ours_ms", "processor", "cores", "threads", "system", "python", "torch")
MARKED = re.compile(r"(<!-- workload: (\w+) -->\n).*?(<!-- end of workload -->)", re.DOTALL)


def processor() -> str:
    """The name of the processor, as the system tells it."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""


def measure(workload: Path) -> None:
    """Runs a workload and writes its results."""
    options = yaml.safe_load(workload.read_text(encoding="utf-8"))
    name = options.pop("benchmark")
    command = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    n_threads = torch.get_num_threads()
    times: Mapping[str, tuple[float, float]] = runpy.run_path(str(HERE / f"{name}.py"))["main"](command)
    torch.set_num_threads(n_threads)
    machine = (processor(), os.cpu_count(), options.get("threads", n_threads), platform.system())
    machine += (platform.python_version(), torch.__version__)
    path = HERE / "results" / f"{workload.stem}.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([case, f"{plain:.4f}", f"{ours:.4f}", *machine] for case, (plain, ours) in times.items())


def table(name: str) -> str:
    """The results of a workload as a table, and what they were measured on."""
    with open(HERE / "results" / f"{name}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| | plain | ours | times as fast |", "|---|---|---|---|"]
    for row in rows:
        plain, ours = float(row["plain_ms"]), float(row["ours_ms"])
        lines.append(f"| {row['case']} | {plain:.3f} | {ours:.3f} | {plain / ours:.2f} |")
    first = rows[0]
    lines += ["", f"{first['processor']}, {first['threads']} of {first['cores']} cores, torch {first['torch']}."]
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """A document with the tables between its marks made anew, of what has been measured."""

    def anew(mark: re.Match) -> str:
        is_there = (HERE / "results" / f"{mark[2]}.csv").is_file()
        return f"{mark[1]}{table(mark[2])}{mark[3]}" if is_there else mark[0]

    return MARKED.sub(anew, text)


def main(argv: list[str] | None = None) -> None:
    known = sorted(path.stem for path in (HERE / "workloads").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--tables", action="store_true", help="write the tables of docs/speed.md and end")
    args = parser.parse_args(argv)
    for name in [] if args.tables else args.workloads:
        print(f"{name}:")
        measure(HERE / "workloads" / f"{name}.yaml")
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main()
