"""Fetches, examines and prepares the data set.

python run_dataset.py download --dataset_dir data      TAU22 from Zenodo (30 GB), resumable
python run_dataset.py check --dataset_dir data/TAU...  counts, missing and broken clips; exit status 1 if any
python run_dataset.py cache --dataset_dir data/TAU...  builds the waveform store that training reads
"""

import helpers.start  # noqa: F401, I001 (before torch)

import shlex
import sys
from pathlib import Path

from datasets.cache import open_store
from datasets.doctor import check
from datasets.tau import TAU22_PAGE, read_meta
from helpers import cli
from helpers.data import DataConfig, dataset_root
from helpers.parts import STUDENT, Parts
from helpers.recipes import parse
from helpers.fetch.zenodo import ZENODO_API, download_record

TAU22_RECORD = 6337421


def make_parser(_chosen: Parts = STUDENT) -> cli.Parser:
    parser = cli.Parser(__doc__, prog="run_dataset.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="download|check|cache")

    download = commands.add_parser("download", help="fetch and extract TAU22's development set", description=TAU22_PAGE)
    download.add_argument("--dataset_dir", default=".", help="folder that will hold the data set's own folder")
    download.add_argument("--keep_archives", action=cli.OnOff, help="do not delete archives once extracted")
    download.add_argument(
        "--record", type=cli.number(int, 1, 10**12), default=TAU22_RECORD, help="number of the Zenodo record"
    )
    download.add_argument("--zenodo_api", default=ZENODO_API, help="address of Zenodo's API")

    doctor = commands.add_parser("check", help="examine a data set; exit status 1 when something is wrong")
    doctor.add_argument("--quick", action=cli.OnOff, help="read headers only: minutes less, finds no broken samples")
    cache = commands.add_parser("cache", help="build the waveform store ahead of training")
    cache.add_argument("--cache_path", default=DataConfig.cache_path, help="folder of the waveform stores")
    cache.add_argument("--resample_rate", type=cli.number(int, 1), default=32000, help="sampling rate in Hz")
    for command in (doctor, cache):
        command.add_argument("--dataset", choices=["tau22", "synthetic"], default="tau22", help="as in run_training.py")
        command.add_argument("--dataset_dir", help="folder of meta.csv; without it the variable TAU22_DIR")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    _, args = parse(make_parser, sys.argv[1:] if argv is None else argv)
    if args.command == "download":
        folder = download_record(
            args.record, Path(args.dataset_dir), api=args.zenodo_api, keep_archives=args.keep_archives, report=print
        )
        command = shlex.join(["python", "run_dataset.py", "check", "--dataset_dir", str(folder)])
        print(f"the data set is in {folder}; next: {command}")
        return 0
    root = dataset_root(DataConfig(dataset=args.dataset, dataset_dir=args.dataset_dir))
    if args.command == "cache":
        store = open_store(read_meta(root), args.resample_rate, args.cache_path)
        print(f"{len(store.waveforms):,} clips at {store.sample_rate} Hz are in {store.folder}")
        return 0
    counts, findings = check(root, quick=args.quick)
    print(counts)
    for finding in findings:
        print(f"\n{finding}")
    print(f"\n{len(findings)} problem{'s' * (len(findings) != 1)}" if findings else "\nall is well")
    return 1 if findings else 0


if __name__ == "__main__":
    cli.run(main)
