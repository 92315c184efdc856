"""Writes a checkpoint as files that run outside PyTorch, proves that they give its answers, and counts what they cost.

  python run_export.py --wandb_id <id>                          of a run of run_training.py: fp32 and fp16
  python run_export.py --checkpoint <run>/checkpoints/last.pt   of a run of run_qat.py: int8, and its weights in fp32
  python run_export.py --wandb_id <id> --formats onnx pte       ExecuTorch programs too (optional package)
  python run_export.py --wandb_id <id> --clips recordings/      parity on your own recordings

Each precision is written twice: network_<precision>.onnx takes log-mel spectrograms, waveform_<precision>.onnx takes
waveforms at the model's rate. Labels, rate, clip length and normalisation are in the file's metadata. Clips for the
parity report: --clips, else the test part of the data set named, else generated ones. Exit status 1 when a file differs
by more than the report allows.
"""

import helpers.start  # noqa: F401, I001 (before torch)

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets.audio import read_audio
from datasets.files import replacing
from datasets.tau import RECORDING_DEVICES, DataError
from helpers import cli
from helpers.export import parity
from helpers.checkpoints.checkpoint import CheckpointError, LoadedModel, load_model
from helpers.complexity import Report, enforce_limits, measure
from helpers.complexity import table as complexity_table
from helpers.data import DataConfig, load_data, sampling_of
from helpers.export.files import activation_bytes, example_input, write_executorch, write_onnx
from helpers.export.executorch_program import run_program
from helpers.parts import STUDENT, Parts
from helpers.quantization import convert, float_layers, float_network, for_target, overflowing_layers, step_of_logits
from helpers.recipes import parse
from helpers.runs.folder import source_checkpoint
from helpers.checkpoints.stated import add_stated_options, believe

log = logging.getLogger(__name__)

EXACT, HERE = ", exact integers", ", as this CPU computes"  # two ways to run an int8 file
PRECISIONS = {"fp32": ("fp32", "fp16"), "fp16": ("fp16",), "int8": ("fp32", "int8")}  # of a checkpoint: of its files


@dataclass(frozen=True)
class File:
    path: Path
    precision: str
    takes_waveform: bool

    def run(self, waveform: Tensor, log_mel: Tensor, exact: bool = False) -> Tensor:
        inputs = waveform if self.takes_waveform else log_mel
        if self.path.suffix == ".pte":
            return run_program(self.path, inputs)
        return parity.run_onnx(self.path, inputs, exact=exact)


def make_parser(chosen: Parts = STUDENT) -> argparse.ArgumentParser:
    parser = cli.Parser(
        __doc__,
        prog="run_export.py",
        usage="python %(prog)s --wandb_id ID | --checkpoint PATH [--option value ...]",
    )
    source = parser.add_argument_group("what to export")
    source.add_argument("--wandb_id", metavar="ID", help="run of this project; its checkpoint is found by itself")
    source.add_argument("--checkpoint", metavar="PATH", help="instead of a run: a checkpoint, ours or published")
    source.add_argument("--project_name", default="DCASE23_Task1", help="folder of all runs of the project")
    files = parser.add_argument_group("files")
    files.add_argument("--out_dir", help="where they go (default: export/ beside the run's checkpoints)")
    files.add_argument("--formats", nargs="+", choices=["onnx", "pte"], default=["onnx"],
                       help="onnx; pte: ExecuTorch for XNNPACK")  # fmt: skip
    files.add_argument("--precision", nargs="+", choices=["fp32", "fp16", "int8"],
                       help="default: all that the checkpoint has")  # fmt: skip
    files.add_argument("--inputs", nargs="+", choices=["network", "waveform"], default=["network", "waveform"],
                       help="network: log-mel in; waveform: the front end is inside")  # fmt: skip
    files.add_argument("--clip_seconds", type=cli.number(float, 0, above=True),
                       help="length of a clip (default: as trained)")  # fmt: skip
    files.add_argument("--sample_rate", type=cli.number(int, 1),
                       help="rate of the target's waveforms in Hz; must be the front end's")  # fmt: skip
    checks = parser.add_argument_group("checks")
    checks.add_argument("--enforce_limits", action=cli.OnOff,
                        help="refuse a network over the challenge's limits (status 2)")  # fmt: skip
    checks.add_argument("--clips", metavar="FOLDER", help="wav files for the parity report; resampled, cut to length")
    checks.add_argument("--n_clips", type=cli.number(int, 1), default=200, help="most clips of the parity report")
    checks.add_argument("--latency_rounds", type=cli.number(int, 0), default=200,
                        help="one-thread runs whose median is an ONNX file's latency; 0 is off")  # fmt: skip
    cli.add_config_arguments(parser, "data for the parity report", DataConfig)
    parser.set_defaults(dataset=None)
    add_stated_options(parser, chosen)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser, args = parse(make_parser, sys.argv[1:] if argv is None else argv)
    path, published = source_checkpoint(args.project_name, args.wandb_id, args.checkpoint)
    loaded = believe(parser, args, load_model(path, published), path)
    n_samples = clip_length(args, loaded, path)
    precisions = chosen_precisions(args, loaded, path)
    out_dir = Path(args.out_dir) if args.out_dir else default_folder(path, published)

    source = float_network(loaded.model) if loaded.precision == "int8" else loaded.model
    networks = {"fp32": source, "fp16": for_target(source, "fp16")}
    if loaded.precision == "int8":
        networks["int8"] = convert(loaded.model)
    shape = tuple(example_input(loaded.frontend, loaded.frontend.sample_rate, False).shape[1:])
    # As the rules count it: before folding, which is what is left of a network that was trained in 8 bits.
    plain = type(source)(source.config) if loaded.precision == "int8" else source.float()
    report = measure(plain, shape)
    lines = [f"{type(source).__name__} on {shape} (channel, mel, time), one second:", complexity_table(report)]
    if "int8" in precisions:
        stored = measure(networks["int8"], shape).trained.stored_bytes
        lines.append(
            f"\nstored in 8 bits (biases in 16, files write them in 32): {stored:,} bytes; what computes in float:"
        )
        lines += [f"  {name or 'network'}: {what}" for name, what in float_layers(networks["int8"])]
    print("\n".join(lines))
    if args.enforce_limits:
        enforce_limits(report, "fp16" if loaded.precision == "fp16" else "int8")

    waveform, devices = parity_clips(args, loaded, n_samples)  # what is wrong with them is told before any file
    files = write_files(args, loaded, networks, precisions, n_samples, out_dir)
    comparisons = compare_forms(loaded, networks, files, waveform, devices)
    text = parity.table(comparisons)
    if "int8" in precisions:
        text += f"\n\n{overflow_line(networks['int8'])}"
    with replacing(out_dir / "parity.md") as report_file:
        report_file.write(f"# Parity of {path}\n\n{len(waveform)} clips; logits.\n\n{text}\n")
    print(f"\n{text}\n\n{sizes(args, files, waveform, loaded, report)}")
    print(f"\nfiles and parity.md are in {out_dir}")
    wrong = [comparison.name for comparison in comparisons if not comparison.passes]
    here = [name for name in wrong if name.endswith(HERE) and name.replace(HERE, EXACT) not in wrong]
    wrong = [name for name in wrong if name not in here]
    if wrong:
        print(f"error: parity fails for {', '.join(wrong)}: do not use these files", file=sys.stderr)
    if here:
        remedy = (
            "this CPU adds 8-bit products in 16 bits, in which they overflow; quantize again with --limit_pairs (the "
            "default of run_qat.py) or --reduced_range, or"
        )
        if not overflowing_layers(networks["int8"]):
            remedy = "though no pair of their weights can overflow, this CPU does not compute their integers; there,"
        exact = "run them in ONNX Runtime with session.x64quantprecision=1"
        print(f"error: parity fails for {', '.join(here)}: {remedy} {exact}", file=sys.stderr)
    return 1 if wrong or here else 0


def overflow_line(network: nn.Module) -> str:
    """Whether CPUs that add 8-bit products in 16 bits give the logits of the integer network, in words."""
    layers = overflowing_layers(network)
    if not layers:
        return "No pair of int8 weights can overflow 16 bits: x86 CPUs without VNNI give the same logits as others."
    where = ", ".join(f"{name} ({n})" for name, n in layers[:3]) + (", ..." if len(layers) > 3 else "")
    return (
        f"{sum(n for _, n in layers)} pairs of int8 weights can overflow 16 bits, in {where}: x86 CPUs without VNNI "
        "may give other logits; quantize with --limit_pairs or --reduced_range for them."
    )


def clip_length(args: argparse.Namespace, loaded: LoadedModel, path: Path) -> int:
    """Samples of a clip; refuses a rate that is not the front end's."""
    rate = loaded.frontend.sample_rate
    if args.sample_rate not in (None, rate):
        raise CheckpointError(
            f"--sample_rate {args.sample_rate}, but the front end of {path} works at {rate} Hz: resample the waveform "
            "before it, or train a network at that rate"
        )
    if args.clip_seconds is not None:
        return round(args.clip_seconds * rate)
    return loaded.content.get("clip_samples", rate)


def chosen_precisions(args: argparse.Namespace, loaded: LoadedModel, path: Path) -> list[str]:
    available = PRECISIONS[loaded.precision]
    missing = [name for name in args.precision or () if name not in available]
    if missing:
        remedy = f"; quantize it first: {shlex.join(['python', 'run_qat.py', '--checkpoint', str(path)])}"
        raise CheckpointError(
            f"{path} is {loaded.precision}, which gives {' and '.join(available)} files, not {', '.join(missing)}"
            + (remedy if "int8" in missing else "")
        )
    return [name for name in available if name in (args.precision or available)]


def default_folder(path: Path, published: str | None) -> Path:
    if published:
        return path.parent / "export" / published
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return run / "export"


def write_files(
    args: argparse.Namespace, loaded: LoadedModel, networks: dict[str, nn.Module], precisions: Sequence[str],
    n_samples: int, out_dir: Path,
) -> list[File]:  # fmt: skip
    files, temperature = [], loaded.content.get("temperature", 1.0)
    for precision in precisions:
        for kind in args.inputs:
            for suffix in args.formats:
                if suffix == "pte" and precision == "fp16":
                    continue  # XNNPACK computes in float32; a half-precision program would only be cast
                path = out_dir / f"{kind}_{precision}.{suffix}"
                write = write_onnx if suffix == "onnx" else write_executorch
                log.info("writing %s", path)
                network = networks[precision].cpu().eval()
                what = network, loaded.frontend, loaded.scenes, n_samples, precision, kind == "waveform", path
                write(*what, temperature=temperature)
                files.append(File(path, precision, kind == "waveform"))
    return files


def parity_clips(args: argparse.Namespace, loaded: LoadedModel, n_samples: int) -> tuple[Tensor, list[str]]:
    """Clips (clip, sample) and their recording devices."""
    sampling = sampling_of(loaded.frontend)
    if args.clips:
        if not Path(args.clips).is_dir():
            raise DataError(f"--clips {args.clips} is no folder: name the folder of the wav files")
        paths = [path for path in Path(args.clips).rglob("*") if path.suffix.lower() == ".wav"]
        paths = sorted(path for path in paths if not path.name.startswith("."))[: args.n_clips]  # Macs leave ._x.wav
        if not paths:
            raise DataError(f"--clips {args.clips}: no wav files there")
        remedy = "remove it from the folder of --clips, or put a good one in its place"
        clips = [torch.from_numpy(read_audio(path, sampling, remedy=remedy)).float() for path in paths]
        for path, clip in zip(paths, clips, strict=True):
            if len(clip) == 0:
                raise DataError(f"{path} holds no samples: {remedy}")
        clips = [clip.repeat(-(-n_samples // len(clip)))[:n_samples] for clip in clips]
        names = [path.stem.rsplit("-", 1)[-1] for path in paths]
        return torch.stack(clips), [name if name in RECORDING_DEVICES else "unknown" for name in names]
    if args.dataset or args.dataset_dir:
        data = load_data(cli.config_from(args, DataConfig), sampling, seed=0)
        if data.store.n_samples != n_samples:
            raise DataError(f"clips of {data.meta.root} have {data.store.n_samples} samples, the files {n_samples}")
        index = torch.linspace(0, len(data.test) - 1, min(args.n_clips, len(data.test))).long()
        batch = data.test.batch(index).to(torch.device("cpu"))
        return batch.waveform, [data.meta.recording_devices[i] for i in batch.recording_device.tolist()]
    return parity.generated_clips(sampling.rate, n_samples, args.n_clips)


@torch.no_grad()
def compare_forms(
    loaded: LoadedModel, networks: dict[str, nn.Module], files: Sequence[File], waveform: Tensor,
    recording_devices: Sequence[str],
) -> list[parity.Comparison]:  # fmt: skip
    log_mel = loaded.frontend.eval()(waveform)
    logits = {precision: network(log_mel) for precision, network in networks.items()}
    comparisons = []

    def add(name: str, values: Tensor, reference: str, reference_values: Tensor, tolerance: parity.Tolerance | None):
        comparisons.append(parity.compare(name, values, reference, reference_values, recording_devices, tolerance))

    integer = parity.integer_tolerance(len(waveform), step_of_logits(networks["int8"])) if "int8" in networks else None
    if "int8" in networks:
        add("PyTorch, fake quantization", loaded.model(log_mel), "PyTorch fp32", logits["fp32"], None)
        add("PyTorch, integers", logits["int8"], "PyTorch, fake quantization", loaded.model(log_mel), parity.ROUNDING)
    for file in files:
        tolerance = {
            ("fp32", False): parity.FLOAT, ("fp32", True): parity.FLOAT_FRONTEND,
            ("fp16", False): parity.HALF, ("fp16", True): parity.HALF,
            ("int8", False): integer if file.path.suffix == ".onnx" else parity.INTEGER_PROGRAM,
            ("int8", True): parity.ROUNDING,
        }[file.precision, file.takes_waveform]  # fmt: skip
        reference = {"int8": "PyTorch, integers"}.get(file.precision, f"PyTorch {file.precision}")
        if file.precision == "int8" and file.path.suffix == ".onnx":
            exact = file.run(waveform, log_mel, exact=True)
            add(f"{file.path.name}{EXACT}", exact, reference, logits[file.precision], tolerance)
            # The same file twice: whatever its front end rounds, both must give the same.
            add(f"{file.path.name}{HERE}", file.run(waveform, log_mel), f"the same{EXACT}", exact, integer)
        else:
            add(file.path.name, file.run(waveform, log_mel), reference, logits[file.precision], tolerance)
    return comparisons


def sizes(
    args: argparse.Namespace, files: Sequence[File], waveform: Tensor, loaded: LoadedModel, report: Report
) -> str:
    """Size of each file, its memory for activations, and its latency where it runs in ONNX Runtime."""
    onnx = [file for file in files if file.path.suffix == ".onnx"] if args.latency_rounds else []
    log_mel = loaded.frontend(waveform[:1])
    inputs = [waveform if file.takes_waveform else log_mel for file in onnx]
    medians = parity.latencies([file.path for file in onnx], inputs, args.latency_rounds) if onnx else []
    milliseconds = {file.path: ms for file, ms in zip(onnx, medians, strict=True)}
    lines = ["| file | bytes | activations, bytes | one clip, one thread |", "|---|---|---|---|"]
    for file in files:
        network = report.folded.peak_bytes(file.precision)
        memory = activation_bytes(network, loaded.frontend, waveform.shape[1], file.takes_waveform)
        lines.append(
            f"| {file.path.name} | {file.path.stat().st_size:,} | {memory:,} | {latency(file.path, milliseconds)} |"
        )
    return "\n".join(lines)


def latency(path: Path, milliseconds: dict[Path, float]) -> str:
    """Of a file in words; of one that takes waveforms also how much of it the front end is, where that was measured."""
    if path not in milliseconds:
        return "not measured"
    text = f"{milliseconds[path]:.2f} ms"
    network = path.with_name(path.name.replace("waveform_", "network_"))
    if network != path and network in milliseconds:
        text += f", front end {max(0.0, 1 - milliseconds[network] / milliseconds[path]):.0%}"
    return text


if __name__ == "__main__":
    cli.run(main)
