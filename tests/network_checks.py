"""What every small network must do, whatever it computes: train, resume, be exported and counted, and run in 8 bits."""

from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import run_export
import run_training
from helpers.checkpoints.checkpoint import load_checkpoint, load_model
from helpers.export.onnx_file import export_onnx
from helpers.quantization import calibrate, convert, prepare, rounding_off, step_of_logits
from models.layers.core import QuantConfig

# A small front end: 1 second gives (1, 64, 32).
OPTIONS = [
    "--frontend", "cp_mel",
    "--resample_rate", "8000", "--window_size", "512", "--n_fft", "512", "--hop_size", "250", "--n_mels", "64",
    "--fmax_aug_range", "1", "--dataset_dir", "tau", "--cache_path", "cache", "--logger", "none", "--batch_size", "9",
    "--warm_up_len", "0", "--augment", "time_roll",
]  # fmt: skip
EXPORT = ["--latency_rounds", "0", "--n_clips", "6", "--inputs", "network"]


def trains_resumes_and_exports(name: str, *options: str) -> None:
    """Through the scripts, in the folder that the process is in, with the data set `tau` there."""
    chosen = ["--model", name, *OPTIONS, *options]
    run_training.main([*chosen, "--n_epochs", "2", "--run_id", "whole"])
    run_training.main([*chosen, "--n_epochs", "1", "--run_id", "parted"])
    run_training.main(["--resume", "parted", "--n_epochs", "2"])
    runs = Path("DCASE23_Task1")
    whole, parted = (
        load_checkpoint(runs / run / "checkpoints/last.pt")["model"]["state"] for run in ("whole", "parted")
    )
    assert all(torch.equal(whole[entry], parted[entry]) for entry in whole)
    last = str(runs / "whole/checkpoints/last.pt")
    assert run_export.main(["--checkpoint", last, "--precision", "fp16", *EXPORT]) == 0  # as its parity report
    loaded, waveform = load_model(last), 0.1 * torch.randn(2, 8000)
    with torch.no_grad():
        log_mel = loaded.frontend(waveform)
        wanted = loaded.model(log_mel)
    session = onnxruntime.InferenceSession(str(runs / "whole/export/network_fp16.onnx"))
    (found,) = session.run(None, {"log_mel": log_mel.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=5e-2, atol=5e-2)


def runs_in_8_bits(model: nn.Module, x: Tensor, path: Path, config: QuantConfig | None = None) -> nn.Module:
    """Prepared, converted and in ONNX Runtime's integer kernels; gives the integer network.

    Args:
        x: log-mel (batch, 1, mel, time) with several clips.
    """
    ready = prepare(model, config or QuantConfig(), x[:1])
    before = model.state_dict()
    assert all(torch.equal(ready.state_dict()[name], value) for name, value in before.items())
    calibrate(ready, lambda: [x], "minmax")
    ready.eval()
    with torch.no_grad(), rounding_off(ready):
        torch.testing.assert_close(ready(x), model(x), rtol=1e-4, atol=1e-4)
    integers = convert(ready)
    with torch.no_grad():
        wanted, rounded, floats = integers(x), ready(x), model(x)
    assert (wanted - rounded).abs().max() <= max(step_of_logits(integers), 0.02 * rounded.abs().max())
    assert (wanted - floats).abs().max() <= 0.2 * floats.abs().max()
    export_onnx(integers, x, path, "log_mel", {})
    session_options = onnxruntime.SessionOptions()
    session_options.add_session_config_entry("session.x64quantprecision", "1")
    session_options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    session_options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"log_mel": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)
    kinds = {node.op_type for node in onnx.load(session_options.optimized_model_filepath).graph.node}
    assert "QLinearConv" in kinds and "BatchNormalization" not in kinds and "Gemm" not in kinds
    return integers


def has_the_manifest(model: nn.Module, manifest: dict[str, list[int]]) -> None:
    """Names, order and shapes of the state dict are those of a manifest."""
    assert list(model.state_dict()) == list(manifest)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == manifest
