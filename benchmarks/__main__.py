"""Make the table of record: every work, alternating with the reference, in one run.

Each program runs in its own process on the same inputs. The whole of it takes about half an hour on
two CPU cores; name a few works for a part of it.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from deen_zoo import create_model
from deen_zoo.device import keep_freed_memory
from deen_zoo.errors import UserError, check_least

from . import official, workloads
from .contest import Spec
from .works import WORKS, Plan, Row

EXAMPLES = """\
  python -m benchmarks --official LLCM/DEEN --csv docs/speed.csv
  python -m benchmarks ranking losses --official LLCM/DEEN --rounds 9
  python -m benchmarks reading start"""


def environment(threads: int) -> dict[str, str]:
    """Hardware and versions, as every row of the CSV file has them."""
    units = "AMX" if workloads.has_amx() else "AVX-512" if workloads.has_avx512() else "AVX2"
    found = {
        "cpu": f"{_cpu_name()} ({units})",
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": date.today().isoformat(),
    }
    for package in ("deen-zoo", "torch", "timm", "numpy", "openvino", "nncf"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True
        ).stdout.strip()
    return platform.processor() or platform.machine()


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| work | engine | figure | reference | ratio (rounds) | to timm | target | |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}x"
        if row.low is not None and row.high is not None and row.low < row.high:
            ratio += f" ({row.low:.3g} to {row.high:.3g})"
        target = "" if row.target is None else f"{row.target:.3g}x"
        target += " (missed)" if row.met is False else ""
        timm = "" if row.timm_ratio is None else f"{row.timm_ratio:.3g}x"
        figures = (_figure(row.figure, row.unit), _figure(row.reference, row.unit))
        engine = f"{row.engine} {row.precision}".strip()
        cells = (row.work, engine, *figures, ratio, timm, target, row.note)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def write_csv(rows: Sequence[Row], machine: dict[str, str], file: Path) -> None:
    """One line per row, with the machine and the versions on each."""
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [*asdict(Row("")), *machine])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if v is None else v for k, v in asdict(row).items()} | machine)


def run(args: argparse.Namespace) -> list[Row]:
    """Measure the works that were asked for.

    Raises:
        UserError: An unknown work, a bad number, or a folder that is not the reference's.
    """
    unknown = [work for work in args.works if work not in WORKS]
    if unknown:
        raise UserError(f"{unknown[0]!r}: choose from {', '.join(WORKS)}")
    for option, number in (("--rounds", args.rounds), ("--threads", args.threads)):
        if number is not None:
            check_least(option, number, 1)
    checkout = official.check_checkout(args.official) if args.official else None
    if checkout and args.model not in workloads.DATASETS:
        known = ", ".join(workloads.DATASETS)
        raise UserError(f"the reference has no {args.model}: choose from {known}")
    size = create_model(args.model).pretrained_cfg["input_size"][1:]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        spec = Spec(Path(folder), checkout, args.model, 32, tuple(size), "cpu", args.threads)
        if checkout:
            workloads.share_weights(spec)
        for work in args.works or WORKS:
            say(f"{work} ...")
            rows += WORKS[work](Plan(spec, args.rounds, say))
    return rows


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("works", nargs="*", metavar="WORK", help=f"{', '.join(WORKS)} (default: all)")
    add("--official", metavar="FOLDER", help="the DEEN folder of a checkout of the reference")
    add("--model", default="deen_resnet50_llcm", help="default: deen_resnet50_llcm")
    add("--rounds", type=int, help="rounds of each work (default: 1 to 15, fewer of slow ones)")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads (default: torch's)")
    add("--csv", metavar="FILE", help="also write the table with the machine on every row")
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        rows, machine = run(args), environment(args.threads)
        print(table(rows))
        print("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
        if args.csv:
            write_csv(rows, machine, Path(args.csv))
    except (UserError, OSError) as error:
        print(f"benchmarks: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
