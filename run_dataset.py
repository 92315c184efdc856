"""Fetches, examines and prepares the data set.

python run_dataset.py download --dataset_dir data      TAU22 from Zenodo (30 GB), resumable; others with --set
python run_dataset.py check --dataset_dir data/TAU...  counts, missing and broken clips; exit status 1 if any
python run_dataset.py cache --dataset_dir data/TAU...  builds the waveform store that training reads
python run_dataset.py cut --dataset_dir data/TAU... --out DIR    clips of ten seconds as TAU22 has them
python run_dataset.py convert --dataset_dir CochlScene --out DIR  CochlScene in TAU22's layout
python run_dataset.py preview --config recipes/cpjku_student.yaml --out preview   draws what its augmentations do
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

from datasets.audio import RESAMPLERS, SOXR, Sampling
from datasets.cache import open_store
from datasets.cochlscene import convert_cochlscene
from datasets.doctor import check
from datasets.known import DATASETS
from datasets.segments import cut_data_set
from datasets.tau import read_clips
from helpers import cli, parts
from helpers.data import DataConfig, dataset_root, load_data, load_teacher, sampling_of
from helpers.fetch.zenodo import ZENODO_API, download_record
from helpers.options import add_training_data_options, add_training_options
from helpers.parts import STUDENT, Parts
from helpers.recipes import parse
from helpers.report.preview import pick_clips, write_previews

DOWNLOAD = "Fetches a data set from Zenodo and extracts it; goes on after an interruption.\n\n" + "\n".join(
    f"  {name:8} {row.title}{'' if row.n_clips is None else f', {row.n_clips:,} clips'} ({row.page})"
    for name, row in DATASETS.items()
)
CUT = """Cuts the clips of TAU 2020 (ten seconds, five parts in the name) into ten segments each, and the lists with
them: names, order and sample format are those of TAU22. Goes on after an interruption."""
COCHLSCENE = """Lays the extracted CochlScene (https://zenodo.org/records/7080122, CC BY-SA 3.0) out like TAU22, in
segments of one second: Train is the training part, Test the test part, Val in neither (fold1_validate.csv); 13 scenes
of its own; recordings that --val_fraction holds out are those of whole users. Goes on after an interruption."""
USAGE = "run_dataset.py preview --out DIR [--config FILE] [--option value ...]"
PREVIEW = """Draws what each augmentation of a recipe does to a clip, and what all do together: waveform and log-mel
before and after, and the difference, as PNG files.

  python run_dataset.py preview --config recipes/cpjku_student.yaml --out preview
  python run_dataset.py preview --dataset synthetic --augment mixup --mixup_alpha 0.3 --out preview

Takes all options of run_training.py; those of data, front end, augmentations and loss, and --seed, count. An
augmentation is drawn until it has changed the clip a few times, however small its probability; the middle one is shown.
"""


def make_parser(chosen: Parts = STUDENT) -> cli.Parser:
    parser = cli.Parser(__doc__, prog="run_dataset.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="download|check|cache|cut|convert|preview")

    download = commands.add_parser("download", help="fetch and extract a data set", description=DOWNLOAD)
    download.add_argument("--set", choices=[*DATASETS], default="tau22", help="which one, see above")
    download.add_argument("--dataset_dir", default=".", help="folder that will hold the data set's own folder")
    download.add_argument("--keep_archives", action=cli.OnOff, help="do not delete archives once extracted")
    download.add_argument("--record", type=cli.number(int, 1, 10**12), help="number of another Zenodo record")
    download.add_argument("--zenodo_api", default=ZENODO_API, help="address of Zenodo's API")

    doctor = commands.add_parser("check", help="examine a data set; exit status 1 when something is wrong")
    doctor.add_argument("--quick", action=cli.OnOff, help="read headers only: minutes less, finds no broken samples")
    cache = commands.add_parser("cache", help="build the waveform store ahead of training")
    cache.add_argument("--cache_path", default=DataConfig.cache_path, help="folder of the waveform stores")
    cache.add_argument("--resample_rate", type=cli.number(int, 1), default=32000, help="sampling rate in Hz")
    cache.add_argument("--resampler", choices=[*RESAMPLERS], default=SOXR,
                       help="librosa's filter, or torchaudio's; a front end wants that of its authors")  # fmt: skip
    for command in (doctor, cache):
        command.add_argument("--dataset", choices=["tau22", "synthetic"], default="tau22", help="as in run_training.py")
        command.add_argument("--dataset_dir", help="folder of meta.csv; without it the variable TAU22_DIR")

    cut = commands.add_parser("cut", help="cut ten-second clips into segments of one second", description=CUT)
    convert = commands.add_parser("convert", help="lay CochlScene out like TAU22", description=COCHLSCENE)
    cut.add_argument("--dataset_dir", required=True, help="folder of meta.csv")
    convert.add_argument("--dataset_dir", required=True, help="folder of Train, Val and Test")
    for command in (cut, convert):
        command.add_argument("--out", required=True, metavar="DIR", help="folder of the new data set")

    shown = commands.add_parser(
        "preview", help="draw what each augmentation of a recipe does", description=PREVIEW, usage=f"python {USAGE}"
    )
    group = shown.add_argument_group("preview")
    group.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures, made when missing")
    group.add_argument("--clip", metavar="NAME", help="a clip of the training part; without it, the first clip of the "
                                                      "recording device with the most")  # fmt: skip
    add_training_options(shown, chosen)
    # Of a recipe it takes what decides the pictures; so it takes recipes of other scripts, too.
    looked_at = cli.Parser()
    parts.add_network_options(looked_at, chosen)
    parts.add_augmentation_options(looked_at, chosen)
    parts.add_loss_options(looked_at, chosen)
    add_training_data_options(looked_at)
    shown.reads = {"seed", *(action.dest for action in looked_at._actions)}
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser, args = parse(make_parser, sys.argv[1:] if argv is None else argv)
    if args.command == "preview":
        return preview(parser, args)
    if args.command == "download":
        return download(parser, args)
    if args.command in ("cut", "convert"):
        write = cut_data_set if args.command == "cut" else convert_cochlscene
        n_segments = write(Path(args.dataset_dir), Path(args.out))
        print(f"{n_segments:,} segments are in {args.out}; next: {check_command(args.out)}")
        return 0
    root = dataset_root(DataConfig(dataset=args.dataset, dataset_dir=args.dataset_dir))
    if args.command == "cache":
        store = open_store(read_clips(root), Sampling(args.resample_rate, args.resampler), args.cache_path)
        print(f"{len(store.waveforms):,} clips at {store.sample_rate} Hz are in {store.folder}")
        return 0
    counts, findings = check(root, quick=args.quick)
    print(counts)
    for finding in findings:
        print(f"\n{finding}")
    print(f"\n{len(findings)} problem{'s' * (len(findings) != 1)}" if findings else "\nall is well")
    return 1 if findings else 0


def download(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    known = DATASETS[args.set]
    record = args.record or known.record
    if record is None:
        parser.error(f"the Zenodo record of {known.title} is not known here: look for it at {known.page} and give "
                     "its number with --record")  # fmt: skip
    folder = download_record(
        record, Path(args.dataset_dir), api=args.zenodo_api, keep_archives=args.keep_archives, report=print
    )
    print(f"the data set is in {folder}; next: {check_command(folder)}")
    return 0


def check_command(folder: Path | str) -> str:
    return shlex.join(["python", "run_dataset.py", "check", "--dataset_dir", str(folder)])


def preview(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Draws what the augmentations do that the options choose."""
    if not args.augment and not args.cropped:
        parser.error("--augment names no augmentation, so there is nothing to draw")
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    with cli.option_errors(parser):
        frontend, loss_fn = parts.build_frontend(args), parts.build_loss(args)
        data_config = cli.config_from(args, DataConfig)
        parts.check_configs(args)
    if args.teacher_logits is None:  # which may be those of a subset; else its list need not be fetched
        data_config = replace(data_config, subset=100)
    data = load_data(data_config, sampling_of(frontend), args.seed, args.cropped, args.crop_shift)
    index = pick_clips(data.train, args.clip, args.seed)
    load_teacher(data, args.teacher_logits, loss_fn, args.given)
    with cli.option_errors(parser):
        chain = parts.build_augment(args, data, frontend, loss_fn)
        configs = parts.augment_configs(args)
        pictures, idle = write_previews(folder, data.train, index, chain, configs, frontend, args.seed)
    for picture in pictures:
        print(picture)
    for name in idle:
        options = asdict(configs[name]) if name in configs else {}
        words = " ".join(f"--{option} {value}" for option, value in options.items() if value is not None)
        print(f"{name} changes nothing of {data.train.files[index[0]]} with {words}: no picture")
    return 0


if __name__ == "__main__":
    cli.run(main)
