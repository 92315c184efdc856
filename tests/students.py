"""What the tests of the student networks ask of each: golden outputs, 8 bits, and every script in small."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import run_export
import run_qat
import run_training
from helpers.checkpoints.checkpoint import load_checkpoint, load_model
from helpers.complexity import measure
from helpers.export.files import write_onnx
from helpers.export.onnx_file import export_onnx
from helpers.quantization import (
    calibrate,
    convert,
    prepare,
    rounding_off,
    step_of_logits,
)
from models import MODELS, get_frontend, get_model
from models.layers.core import QuantConfig
from tests.conftest import write_nothing
from tests.golden_inputs import fill_state, wave


def batch_of(shape: list[int], key: str) -> Tensor:
    """The inputs behind easy_dcase_task1's golden files: clips with closed formulas of their own, one louder than the
    other."""
    return torch.stack([wave(tuple(shape[1:]), f"{key}/{i}", 1 + 0.5 * i) for i in range(shape[0])])


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    return {{"num_classes": "n_classes"}.get(name, name): value for name, value in case["config"].items()}


def check_published(name: str, case: dict[str, Any]) -> nn.Module:
    """Logits, names, shapes and counts of a golden case; the network filled."""
    model = fill_state(get_model(name, **options_of(case))).eval()
    assert [[entry, list(value.shape)] for entry, value in model.state_dict().items()] == case["manifest"]
    x = batch_of(case["input_shape"], case["input_key"])
    with torch.no_grad():
        # 100 times what float32 differs from float64 there.
        torch.testing.assert_close(model(x), case["logits"], rtol=0, atol=1e-4)
        layout = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(layout(x), case["logits"], rtol=0, atol=1e-4)
    report = measure(model, tuple(x.shape[1:]))
    assert report.trained.n_parameters == case["params"] and report.trained.macs == case["macs_torchinfo"]
    return model


def check_stages(model: nn.Module, case: dict[str, Any]) -> None:
    """Shape, mean and root mean square of what every stage gives."""
    taps: dict[str, list[Any]] = {}

    def note(name: str, y: Tensor) -> None:
        taps[name] = [name, list(y.shape), y.double().mean().item(), y.double().square().mean().sqrt().item()]

    for name, *_ in case["stages"]:
        model.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: note(name, y))
    with torch.no_grad():
        model(batch_of(case["input_shape"], case["input_key"]))
    assert list(taps) == [name for name, *_ in case["stages"]]
    for found, wanted in zip(taps.values(), case["stages"], strict=True):
        assert found[:2] == wanted[:2]
        assert found[2:] == pytest.approx(wanted[2:], abs=1e-5), found[0]


def check_training(name: str, case: dict[str, Any]) -> None:
    """Loss, gradients and statistics of norms of one step, in float64."""
    model = fill_state(get_model(name, **options_of(case))).double().train()
    logits = model(batch_of(case["input_shape"], case["input_key"]).double())
    torch.testing.assert_close(logits.float(), case["logits_train"], rtol=0, atol=1e-4)  # stored from float32
    loss = F.cross_entropy(logits, torch.tensor(case["labels"]))
    loss.backward()
    # The published residual norm keeps its constants in float32 even there: 0.1 is off by 1.5e-8 of itself.
    assert loss.item() == pytest.approx(case["loss"], rel=1e-7)
    norms = {entry: parameter.grad.norm().item() for entry, parameter in model.named_parameters()}
    assert norms == pytest.approx(dict(case["param_grad_norms"]), rel=1e-6, abs=1e-9)
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(case["grad_norm"], rel=1e-6)
    buffers = {entry: value.norm().item() for entry, value in model.named_buffers() if value.is_floating_point()}
    assert buffers == pytest.approx(dict(case["buffer_norms_after"]), rel=1e-6)


def check_recognised(name: str, path: Path, **options: Any) -> nn.Module:
    """A bare state dict and one of a Lightning checkpoint load as this network, which no other claims; it is given."""
    model = fill_state(get_model(name, **options)).eval()
    state = model.state_dict()
    entries = {other: cls.entry for other, (_, cls) in MODELS.items() if hasattr(cls, "entry")}
    claims = [other for other, entry in entries.items() for key in state if f".{key}".endswith(f".{entry}")]
    assert claims == [name]
    for content in (state, {"state_dict": {f"backbone.{key}": value for key, value in state.items()}, "epoch": 3}):
        torch.save(content, path)
        loaded = load_model(path).model
        assert type(loaded) is type(model)
        for option, value in options.items():
            assert getattr(loaded.config, option) == value
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    return loaded


# ---- on the target --------------------------------------------------------------------------------------------------


def clips_of(n_mels: int, n_frames: int, n: int = 4) -> Tensor:
    return wave((n, 1, n_mels, n_frames), "log-mel", 0.9) * torch.linspace(0.4, 1.4, n)[:, None, None, None]


def onnx_logits(path: Path, x: Tensor, exact: bool = True) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
    options.log_severity_level, options.optimized_model_filepath = 3, f"{path}.optimised"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"log_mel": x.numpy()})[0])


@torch.no_grad()
def check_float_file(model: nn.Module, x: Tensor, folder: Path) -> None:
    """An ONNX file in float32 gives what PyTorch does; those of 16 bits are checked as scripts write them."""
    frontend = get_frontend("cp_mel", n_mels=x.shape[2]).eval()
    scenes = [f"scene {i}" for i in range(model.config.n_classes)]
    n_samples = 1 + (x.shape[3] - 1) * frontend.config.hop_length + 1
    path = write_onnx(model, frontend, scenes, n_samples, "fp32", False, folder / "fp32.onnx")
    torch.testing.assert_close(onnx_logits(path, x), model(x), rtol=0, atol=1e-4)


def check_8_bits(
    model: nn.Module, x: Tensor, folder: Path, config: QuantConfig | None = None
) -> tuple[nn.Module, list[str]]:
    """The fake-quantized network is near the float one, the integer one near that, and ONNX Runtime gives its logits.

    Args:
        x: log-mel (batch, 1, mel, time) with several clips.

    Returns:
        The integer network, and the kinds of nodes that ONNX Runtime makes of its file.
    """
    ready = prepare(model, config or QuantConfig(), x[:1])
    assert all(torch.equal(ready.state_dict()[name], value) for name, value in model.state_dict().items())
    calibrate(ready, lambda: [x], "minmax")
    ready.eval()
    with torch.no_grad():
        with rounding_off(ready):
            torch.testing.assert_close(ready(x), model(x), rtol=1e-4, atol=1e-4)
        logits, floats = ready(x), model(x)
        spread = floats.abs().max()
        assert 1e-4 < (logits - floats).abs().max() < 0.2 * spread
        integers = convert(ready)
        # A value that rounds the other way moves what follows; residual norms hand that on to whole bands.
        assert (integers(x) - logits).abs().max() <= max(4 * step_of_logits(integers), 0.05 * spread)
        path = export_onnx(integers, x, folder / "int8.onnx", "log_mel", {})
        for n_clips in (1, len(x)):
            for exact in (False, True):
                found = onnx_logits(path, x[:n_clips], exact)
                torch.testing.assert_close(found, integers(x[:n_clips]), rtol=0, atol=1e-4)
    kinds = [node.op_type for node in onnx.load(f"{path}.optimised").graph.node]
    assert "QLinearConv" in kinds and "BatchNormalization" not in kinds and "Gemm" not in kinds
    return integers, kinds


def has_the_manifest(model: nn.Module, manifest: dict[str, list[int]]) -> None:
    """Names, order and shapes of the state dict are those of a manifest."""
    assert list(model.state_dict()) == list(manifest)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == manifest


# ---- scripts --------------------------------------------------------------------------------------------------------

DATA = [
    "--dataset_dir", "tau", "--cache_path", "cache", "--logger", "none", "--batch_size", "8", "--lr", "0.01",
]  # fmt: skip
# One second gives (1, 64, 32).
SMALL_MEL = [
    "--frontend", "cp_mel", "--resample_rate", "8000", "--window_size", "512", "--n_fft", "512", "--hop_size", "250",
    "--n_mels", "64", "--fmax_aug_range", "1",
]  # fmt: skip


def weights(run: str) -> dict[str, Tensor]:
    return load_checkpoint(Path("DCASE23_Task1") / run / "checkpoints/last.pt")["model"]["state"]


def check_scripts(name: str, options: list[str], monkeypatch: pytest.MonkeyPatch, int8: bool) -> None:
    """Trains, resumes to the same weights, and exports in 16 bits or, trained on for them, 8; from the current folder.

    On 27 clips; fewer epochs than two cannot be parted. In 8 bits for few networks, as it takes seconds and
    `check_8_bits` looks at the network of each.
    """
    options = ["--model", name, *options, "--augment", "--kd_lambda", "1", *DATA, "--warm_up_len", "0"]
    assert run_training.main([*options, "--dry_run"])["n_parameters"]
    run_training.main([*options, "--n_epochs", "2", "--run_id", "whole"])
    run_training.main([*options, "--n_epochs", "1", "--run_id", "parted"])
    run_training.main(["--resume", "parted", "--n_epochs", "2"])
    whole, parted = weights("whole"), weights("parted")
    assert all(torch.equal(whole[entry], parted[entry]) for entry in whole)
    run, precision = "whole", "fp16"
    if int8:
        run, precision = "target", "int8"
        monkeypatch.setattr(run_qat, "write_onnx", write_nothing)
        qat = [*DATA, "--kd_lambda", "1", "--augment", "--n_epochs", "1", "--freeze_params_epochs", "1"]
        run_qat.main([*qat, "--wandb_id", "whole", "--run_id", run])
    last, export = f"DCASE23_Task1/{run}/checkpoints/last.pt", ["--latency_rounds", "0", "--n_clips", "8"]
    assert run_export.main(["--checkpoint", last, *export, "--inputs", "network", "--precision", precision]) == 0
