"""SP4ASC's network against what the published code returned, its published checkpoints, and one written by hand."""

import pytest
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from helpers.checkpoints.checkpoint import load_model
from helpers.complexity import measure
from helpers.quantization import calibrate, convert, float_layers, freeze, prepare, rounding_off, step_of_logits
from models import get_model
from models.layers.core import QuantConfig
from models.layers.fold import fold
from models.layers.xnnpack import for_xnnpack
from tests.golden_inputs import clip, fill_state, wave
from tests.students import SMALL_MEL, check_8_bits, check_scripts, has_the_manifest

PUBLISHED = ["configs.cnn6_small_dropout_2_specAugment_128_2_16_2_mixup_2",
             "configs.cnn6_small_dropout_2_specAugment_128_2_32_2_focal_loss"]  # fmt: skip


def build(**options) -> nn.Module:
    return get_model("cnn6_60k", **options)


def decibels(waveform: Tensor) -> Tensor:
    """SP4ASC's spectrogram (batch, 1, mel, time) of 44.1 kHz, from its specification."""
    window = torch.hann_window(2048, dtype=torch.float64)
    spectrum = torch.stft(waveform.double(), 2048, 1024, window=window, pad_mode="reflect", return_complex=True)
    bank = torchaudio.functional.melscale_fbanks(1025, 0.0, 22050.0, 256, 44100, norm="slaney", mel_scale="slaney")
    mel = bank.t().double() @ spectrum.abs().square()
    return (10 * mel.clamp_min(1e-10).log10()).float()[:, None]


def input_of(case: dict) -> Tensor:
    source = case["input"]
    if source["kind"] == "wave":
        return wave(tuple(source["shape"]), source["key"], source["scale"]).transpose(2, 3)
    return decibels(clip(source["seconds"], source["rate"], source["key"], source["batch"]))


def test_the_spectrogram_of_these_tests_is_the_published_one(shared):
    for case in torch.load(shared("golden/sp4asc/frontend.pt"), weights_only=True)["cases"]:
        ours = decibels(clip(case["seconds"], case["rate"], case["key"], case["batch"])).transpose(2, 3)
        difference = (ours - case["logmel"]).abs()
        assert difference.max() < 0.1 and difference.mean() < 1e-3


def test_names_shapes_and_counts_are_the_published_ones(golden):
    data, model = golden("sp4asc_manifest"), build()
    has_the_manifest(model, data["state_dict"])
    assert sum(value.numel() for value in model.state_dict().values()) == data["state_dict_elements_training"]
    report = measure(model, (1, 256, 44))
    assert report.trained.n_parameters == data["trainable_parameters"] == 62_922
    assert report.folded.n_parameters == data["state_dict_elements_fused"] == 62_474
    assert report.folded.parameter_bytes("fp16") / 1024 == data["fused_model_size_kb_fp16"]
    assert round(report.trained.arithmetic_macs / 1e6, 1) == 45.1
    assert round(measure(model, (1, 256, 431)).trained.arithmetic_macs / 1e6, 1) == 442.6
    folded = fold(model, torch.zeros(1, 1, 256, 44)).state_dict()
    blocks = {name: shape for name, shape in data["state_dict_fused"].items() if not name.startswith("bn0")}
    assert {name: list(value.shape) for name, value in folded.items() if not name.startswith("bn0")} == blocks


@pytest.mark.parametrize("i", range(4))
def test_matches_the_published_network(golden, i):
    case = golden("sp4asc_model_fill")["cases"][i]
    model, x = fill_state(build()).eval(), input_of(case)
    assert list(x.transpose(2, 3).shape) == case["input_shape"]
    seen = {}
    for name in (*(f"pool{j}" for j in (1, 2, 3, 4)), "dropout1"):
        model.get_submodule(name).register_forward_hook(lambda _m, _x, y, name=name: seen.update({name: y.clone()}))
    with torch.no_grad():
        torch.testing.assert_close(model(x), case["fp32"], rtol=0, atol=2e-3)
        torch.testing.assert_close(model.double()(x.double()).float(), case["fp32"], rtol=0, atol=2e-3)
        torch.testing.assert_close(fold(model, x).float()(x), case["fused_exact"], rtol=0, atol=2e-3)
    for j, stage in enumerate(case["stages"], start=1):
        y = seen[f"pool{j}"]
        assert list(y.shape) == stage["shape"]
        assert [y.mean().item(), y.std().item()] == pytest.approx([stage["mean"], stage["std"]], rel=1e-4, abs=1e-4)
    torch.testing.assert_close(seen["dropout1"].float(), case["pooled"], rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("name", PUBLISHED, ids=["mixup", "focal"])
def test_published_checkpoints_load_and_give_the_published_logits(shared, golden, name):
    loaded = load_model(shared(f"golden/sp4asc/trained_models/{name}/ckpt.pth"))
    assert type(loaded.model) is type(build()) and loaded.model.config == build().config
    assert loaded.frontend.config.n_mels == 256
    for file, wanted in golden("sp4asc_checkpoint_logits")["checkpoints"][name]["logits"].items():
        folder = "tau20_samples" if wanted["frames"] == 431 else "tau22_samples"
        waveform, rate = soundfile.read(shared(f"audio/{folder}/{file}"), dtype="float32")
        assert rate == 44_100
        x = decibels(torch.from_numpy(waveform)[None])
        assert x.mean().item() == pytest.approx(wanted["logmel_mean"], abs=1e-2)
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(x)[0], wanted["fp32"], rtol=0, atol=2e-3)
            torch.testing.assert_close(fold(loaded.model, x)(x)[0], wanted["fused_exact"], rtol=0, atol=2e-3)


def by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network as published, (time, mel), from the specification; lines as shifted sums, pools as means of views."""

    def norm(x: Tensor, name: str, dim: int) -> Tensor:
        shape = [-1 if i == dim else 1 for i in range(4)]
        mean, var, gain, bias = (
            state[f"{name}.{entry}"].view(shape) for entry in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    def line(x: Tensor, weight: Tensor, dim: int) -> Tensor:
        padded = F.pad(x, (0, 0, 2, 2) if dim == 2 else (2, 2))
        taps = weight.flatten(1)  # (channel, 3)
        parts = [padded.narrow(dim, 2 * i, x.shape[dim]) * taps[:, i, None, None] for i in range(3)]
        return sum(parts)

    x = norm(x.transpose(2, 3), "bn0", 3)
    for i in range(1, 1 + sum("ch_conv1" in name for name in state)):
        block = f"conv{i}"
        x = torch.einsum("oi,bitf->botf", state[f"{block}.ch_conv1.weight"].flatten(1), x)
        x = line(x, state[f"{block}.sp_conv1.weight"], 2) + line(x, state[f"{block}.sp_conv2.weight"], 3)
        x = norm(x, f"{block}.bn", 1).clamp_min(0)
        n_batch, n_channels, n_frames, n_mels = x.shape
        x = x[:, :, : n_frames // 2 * 2, : n_mels // 2 * 2]
        x = x.reshape(n_batch, n_channels, n_frames // 2, 2, n_mels // 2, 2).mean(dim=(3, 5))
    x = x.mean(dim=3)
    x = x.max(dim=2).values + x.mean(dim=2)
    x = (x @ state["fc1.weight"].T + state["fc1.bias"]).clamp_min(0)
    return x @ state["fc2.weight"].T + state["fc2.bias"]


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 1, 256, 44)),
        ({"input_fdim": 67, "channels": (5, 9, 3)}, (3, 1, 67, 29)),
        ({"input_fdim": 16, "n_classes": 3}, (2, 1, 16, 16)),
        ({"input_fdim": 2, "channels": (7,)}, (1, 1, 2, 3)),
    ],
)
def test_agrees_with_one_written_by_hand(options, shape):
    model = fill_state(build(**options)).double().eval()
    x = wave(shape, "cnn6/by hand", 20).double()
    torch.testing.assert_close(model(x), by_hand(model.state_dict(), x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x), torch.cat([model(clip) for clip in x.split(1)]), rtol=1e-9, atol=1e-9)


def test_training_has_the_gradients_of_differences():
    """In float64 with statistics of the batch: the loss along one direction in all parameters."""
    model = fill_state(build(input_fdim=20, channels=(6, 10), dropout=0.0)).double().train()
    x, target = wave((4, 1, 20, 13), "cnn6/train", 20).double(), torch.tensor([1, 5, 0, 9])
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    parameters = dict(model.named_parameters())
    directions = {name: wave(tuple(value.shape), name).double() for name, value in parameters.items()}
    slope = sum((value.grad * directions[name]).sum() for name, value in parameters.items()).item()
    losses = []
    for step in (1e-6, -1e-6):
        moved = {name: value.detach() + step * directions[name] for name, value in parameters.items()}
        losses.append(F.cross_entropy(torch.func.functional_call(model, moved, x), target).item())
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)
    assert all(value.grad.abs().sum() > 0 for value in parameters.values())


@pytest.mark.parametrize("options", [{}, {"channels": (20, 12), "n_classes": 4, "input_fdim": 30}])
def test_it_is_read_off_its_shapes(tmp_path, options):
    model = fill_state(build(**options)).eval()
    torch.save({"net": model.state_dict(), "epoch": 3, "config": {"lr": 1e-3}}, tmp_path / "ckpt.pth")
    loaded = load_model(tmp_path / "ckpt.pth").model
    assert loaded.config == model.config
    x = wave((2, 1, model.config.input_fdim, 20), "x")
    assert torch.equal(loaded(x), model(x))


def test_weights_with_folded_norms_are_read(golden, tmp_path):
    """Folded as the published test script does it, with the eps that it leaves out."""
    model = fill_state(build()).eval()
    fused = dict(model.state_dict())

    def scale_and_shift(norm: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias, mean, var = (fused.pop(f"{norm}.{n}") for n in ("weight", "bias", "running_mean", "running_var"))
        del fused[f"{norm}.num_batches_tracked"]
        scale = weight / torch.sqrt(var + 1e-5)
        return scale, bias - scale * mean

    scale, shift = scale_and_shift("bn0")
    fused |= {"bn0.weight": scale.view(1, -1, 1, 1), "bn0.bias": shift.view(1, -1, 1, 1)}
    for i in (1, 2, 3, 4):
        scale, fused[f"conv{i}.sp_conv2.bias"] = scale_and_shift(f"conv{i}.bn")
        for name in (f"conv{i}.sp_conv1.weight", f"conv{i}.sp_conv2.weight"):
            fused[name] = fused[name] * scale.view(-1, 1, 1, 1)
    manifest = golden("sp4asc_manifest")["state_dict_fused"]
    assert {name: list(value.shape) for name, value in fused.items()} == manifest
    torch.save(fused, tmp_path / "fused.pth")
    x = wave((3, 1, 256, 44), "cnn6/fused", 4)
    torch.testing.assert_close(load_model(tmp_path / "fused.pth").model(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(quantize_input=True)], ids=["default", "input too"])
@pytest.mark.parametrize("options", [{}, {"channels": (20, 12), "input_fdim": 30}], ids=["default", "odd"])
def test_runs_in_8_bits_and_onnx_runtime_agrees(tmp_path, options, config):
    model = fill_state(build(**options)).eval()
    x = wave((4, 1, model.config.input_fdim, 33), "cnn6/8 bits", 4) * torch.linspace(0.5, 1.5, 4)[:, None, None, None]
    integers, _ = check_8_bits(model, x, tmp_path, config)
    parts = dict(float_layers(integers))
    assert parts.pop("bn0") == "factor and offset of the spectrogram's mel bands"
    assert set(parts) == (set() if config.quantize_input else {"conv1.0"})
    corners = 3 * sum(model.config.channels)
    shape = tuple(x.shape[1:])
    assert measure(integers, shape).folded.n_parameters == measure(model, shape).folded.n_parameters + corners


def test_the_layers_learn_alike_with_fake_quantization_around_them():
    model = fill_state(build(channels=(20, 12), input_fdim=30, dropout=0.0))
    x = wave((4, 1, 30, 33), "cnn6/8 bits", 4)
    ready = prepare(model, QuantConfig(), x[:1])
    with rounding_off(ready):
        torch.testing.assert_close(ready.train()(x), model.train()(x), rtol=1e-4, atol=1e-4)
        for name, value in model.named_buffers():
            torch.testing.assert_close(ready.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
        freeze(ready)
        torch.testing.assert_close(ready(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(ready.state_dict()["bn0.num_batches_tracked"], torch.tensor(1))
    calibrate(ready, lambda: [x], "minmax")
    ready(x).sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in ready.parameters())
    integers = convert(ready.eval())
    form = for_xnnpack(integers, x[:1])
    assert (form(x) - integers(x)).abs().mean() <= step_of_logits(integers) / 4


@pytest.mark.slow
def test_trains_resumes_and_exports(tau, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_scripts("cnn6_60k", [*SMALL_MEL, "--input_fdim", "64"], monkeypatch, int8=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": ()}, "channels"),
        ({"channels": (4, 0)}, "channels"),
        ({"dropout": 1.0}, "dropout"),
        ({"input_fdim": 15}, "input_fdim must be >= 16 for 4 blocks"),
        ({"n_classes": 0}, "n_classes"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_refuses_spectrograms_of_another_size():
    with pytest.raises(ValueError, match="must have 256 mel bands, got 128"):
        build()(torch.zeros(1, 1, 128, 44))
    with pytest.raises(ValueError, match="at least 16 frames, got 15"):
        build()(torch.zeros(1, 1, 256, 15))
