"""Latency and size of the files that run_export.py writes, 8 bits beside float, in ONNX Runtime.

  python benchmarks/artifact_latency.py                           the default CP-Mobile, random weights
  python benchmarks/artifact_latency.py --checkpoint PATH         the weights of a checkpoint (fp32)
  python benchmarks/artifact_latency.py --n_threads 2

The baseline of the 8-bit files are the float files of the same network, folded and exported the same way; the files
take turns, one clip at a time. Front end included: from waveform to logits.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.checkpoints.checkpoint import load_model
from helpers.export import parity
from helpers.export.files import write_onnx
from helpers.quantization import calibrate, convert, prepare
from models import get_frontend, get_model
from models.layers.core import QuantConfig


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="PATH", help="network and front end (default: fresh ones)")
    parser.add_argument("--n_threads", type=int, default=1, help="of ONNX Runtime (default 1)")
    parser.add_argument("--n_rounds", type=int, default=500, help="runs of every file (default 500)")
    parser.add_argument("--quantize_input", action="store_true", help="the first convolution in integers too")
    parser.add_argument("--inputs", nargs="+", choices=["network", "waveform"], default=["network", "waveform"],
                        help="network: log-mel in; waveform: the front end is inside (default: both)")  # fmt: skip
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.checkpoint:
        loaded = load_model(args.checkpoint)
        model, frontend, scenes = loaded.model, loaded.frontend, loaded.scenes
    else:
        model, frontend, scenes = get_model("cp_mobile").eval(), get_frontend("cp_mel").eval(), ()
    rate = frontend.config.sample_rate
    waveform, _ = parity.generated_clips(rate, rate)
    log_mel = frontend(waveform)
    prepared = prepare(model, QuantConfig(quantize_input=args.quantize_input), log_mel[:1])
    calibrate(prepared, lambda: [log_mel[:8]])  # ranges change no time
    networks = {"fp32": model, "int8": convert(prepared)}

    with tempfile.TemporaryDirectory() as folder:
        files, inputs = [], []
        for precision, network in networks.items():
            for kind in args.inputs:
                path = Path(folder) / f"{kind}_{precision}.onnx"
                files.append(write_onnx(network, frontend, scenes, rate, precision, kind == "waveform", path))
                inputs.append(waveform if kind == "waveform" else log_mel)
        medians = parity.latencies(files, inputs, args.n_rounds, args.n_threads)
        print(f"{'file':22}{'bytes':>10}{'median ms':>12}{'of fp32':>10}")
        for i, (path, milliseconds) in enumerate(zip(files, medians, strict=True)):
            ratio = milliseconds / medians[i % len(args.inputs)]
            print(f"{path.name:22}{path.stat().st_size:>10,}{milliseconds:>12.2f}{ratio:>10.2f}")


if __name__ == "__main__":
    main()
