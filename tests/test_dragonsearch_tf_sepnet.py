"""dragonsearch's TF-SepNet against what the published code returned, and one written by hand."""

import pytest
import torch
import torchaudio
from torch import Tensor, nn

from helpers.checkpoints.checkpoint import load_model
from helpers.complexity import measure
from helpers.quantization import QuantizationError, prepare
from models import get_model
from models.layers.affine_residual_norm import AffineResidualNorm
from models.layers.core import QuantConfig
from tests.golden_inputs import clip, fill_state, wave
from tests.students import SMALL_MEL, check_scripts, has_the_manifest

MANIFESTS = ["tfsepnet/width60", "tfsepnet/width80_teacher", "tfsepnet/width40"]


def build(**options) -> nn.Module:
    return get_model("dragonsearch_tf_sepnet", **options)


def filled(fill: str = "fill_state+norms", **options) -> nn.Module:
    """With the plain formula the norms' numbers are tiny, and little of the input gets through."""
    model = fill_state(build(**options)).eval()
    if fill == "fill_state+norms":
        offsets = {"rho": (0.5, 0.2), "gamma": (1, 0.2), "beta": (0, 0.1)}
        state = model.state_dict()
        for name, value in state.items():
            if (kind := name.rsplit(".", 1)[1]) in offsets:
                offset, scale = offsets[kind]
                state[name] = offset + wave(tuple(value.shape), name, scale)
        model.load_state_dict(state)
    return model


def input_of(case: dict) -> Tensor:
    source = case["input"]
    if source["kind"] == "wave":
        return wave(tuple(source["shape"]), source["key"], source["scale"])
    to_mel = torchaudio.transforms.MelSpectrogram(32000, 2048, hop_length=744, n_mels=128, power=2)
    mel = to_mel(clip(source["seconds"], source["rate"], source["key"], source["batch"]))[:, None]
    return (mel + 1e-6).log() if source["kind"] == "log_mel" else mel


@pytest.mark.parametrize("name", MANIFESTS)
def test_names_shapes_and_cost_are_the_published_ones(golden, name):
    data = golden("dragonsearch_manifest")[name]
    model = build(**data["arguments"])
    has_the_manifest(model, data["state_dict"])
    for case in data["complexity"]:
        cost = measure(model, tuple(case["input"][1:])).trained
        n_clips = case["input"][0]  # the published check takes a batch for one clip
        assert (cost.n_parameters, cost.macs * n_clips) == (case["torchinfo_params"], case["torchinfo_mult_adds"])
    assert cost.n_parameters == data["parameters"]


@pytest.mark.parametrize("i", range(5))
def test_every_layer_gives_what_the_published_one_does(golden, i):
    case = golden("dragonsearch_models")["tfsepnet"][i]
    model, x, seen = filled(case["fill"], **case["arguments"]), input_of(case), []
    assert list(x.shape) == case["input_shape"]
    for layer in model.feature:
        layer.register_forward_hook(lambda _m, _x, y: seen.append(y))
    tolerance = 1e-5 * case["logits"].abs().max().item()
    with torch.no_grad():
        torch.testing.assert_close(model(x), case["logits"], rtol=0, atol=tolerance)
        for y, stage in zip(seen, case["stages"], strict=True):
            assert list(y.shape) == stage["shape"]
            spread = stage["std"]
            assert y.mean().item() == pytest.approx(stage["mean"], rel=1e-4, abs=1e-4 * spread)
            assert y.std().item() == pytest.approx(spread, rel=1e-4)
        torch.testing.assert_close(model.double()(x.double()).float(), case["logits"], rtol=0, atol=tolerance)


def by_hand(state: dict[str, Tensor], x: Tensor, n_groups: int) -> Tensor:
    """From the specification; the layers by their numbers in it, clips one by one in the norms."""

    def norm(x: Tensor, i: int) -> Tensor:
        rho, gamma, beta = (state[f"feature.{i}.{name}"][0] for name in ("rho", "gamma", "beta"))
        clips = []
        for one in x:  # (channel, freq, time)
            bands = [(band - band.mean()) / (band.var() + 1e-5).sqrt() for band in one.unbind(1)]
            clips.append(gamma * (rho * one + (1 - rho) * torch.stack(bands, dim=1)) + beta)
        return torch.stack(clips)

    def line(x: Tensor, weight: Tensor, dim: int) -> Tensor:
        n, taps = x.shape[dim], weight.flatten(1)[:, :, None, None]
        zeros = torch.zeros_like(x.narrow(dim, 0, 1))
        padded = torch.cat([zeros, x, zeros], dim=dim)
        return sum(padded.narrow(dim, i, n) * taps[:, i] for i in range(3))

    def pointwise(x: Tensor, name: str) -> Tensor:
        y = torch.einsum("oi,bift->boft", state[f"{name}.conv.weight"].flatten(1), x)
        entries = ("running_mean", "running_var", "weight", "bias")
        mean, var, gain, bias = (state[f"{name}.bn.{entry}"][:, None, None] for entry in entries)
        return ((y - mean) / (var + 1e-5).sqrt() * gain + bias).clamp_min(0)

    def block(x: Tensor, i: int) -> Tensor:
        name = f"feature.{i}"
        if f"{name}.trans_conv.conv.weight" in state:
            x = torch.einsum("oi,bift->boft", state[f"{name}.trans_conv.conv.weight"].flatten(1), x)
        per_group = x.shape[1] // n_groups
        order = [b * n_groups + a for a in range(n_groups) for b in range(per_group)]  # output a * (C / g) + b
        x = x[:, order]
        half = x.shape[1] // 2
        f, t = x[:, :half], x[:, half:]
        f_mean = line(f, state[f"{name}.freq_dw_conv.conv.weight"], 2).mean(dim=2, keepdim=True)
        t_mean = line(t, state[f"{name}.temp_dw_conv.conv.weight"], 3).mean(dim=3, keepdim=True)
        f, t = f + pointwise(f_mean, f"{name}.freq_pw_conv"), t + pointwise(t_mean, f"{name}.temp_pw_conv")
        return torch.cat([f, t], dim=1)

    x = torch.conv2d(x, state["feature.0.weight"], stride=2, padding=2)
    kinds = "nbbnmbbnmbbnbbbn"  # of layers 1 to 16: norm, block, max pool
    for i, kind in enumerate(kinds, start=1):
        x = {"n": norm, "b": block}[kind](x, i) if kind != "m" else torch.max_pool2d(x, 2)
    weight, bias = state["classifier.weight"].flatten(1), state["classifier.bias"]
    return x.flatten(2).mean(dim=2) @ weight.T + bias


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 1, 128, 44)),
        ({"width": 12, "shuffle_groups": 6, "n_classes": 3}, (3, 1, 65, 29)),
        ({"width": 4, "shuffle_groups": 1}, (2, 1, 7, 7)),
        ({"width": 20, "shuffle_groups": 2}, (1, 1, 31, 101)),
    ],
)
def test_agrees_with_one_written_by_hand(options, shape):
    model = filled(**options).double()
    x = wave(shape, "tf_sepnet/by hand").double()
    with torch.no_grad():
        wanted = by_hand(model.state_dict(), x, model.config.shuffle_groups)
        torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(x), torch.cat([model(one) for one in x.split(1)]), rtol=1e-9, atol=1e-9)


def test_without_a_shuffle_channels_stay_where_they_are():
    plain, x = filled(width=12, shuffle=False), wave((2, 1, 32, 20), "x")
    one_group = filled(width=12, shuffle_groups=1)
    assert torch.equal(plain(x), one_group(x)) and not torch.equal(plain(x), filled(width=12, shuffle_groups=2)(x))


def test_the_norm_learns_all_its_numbers_and_half_precision_does_not_overflow():
    norm, x = AffineResidualNorm(3).double(), wave((2, 3, 5, 4), "norm").double()
    assert torch.autograd.gradcheck(norm, x.requires_grad_())
    norm(x).square().sum().backward()
    assert all(value.grad.any() for value in norm.parameters())
    large = 1000 * wave((1, 3, 5, 4), "norm")
    torch.testing.assert_close(
        AffineResidualNorm(3).half()(large.half()).float(), AffineResidualNorm(3)(large), rtol=1e-2, atol=1
    )


@pytest.mark.parametrize("options", [{}, {"width": 80}, {"width": 40, "n_classes": 4}])
def test_it_is_read_off_its_shapes(tmp_path, options):
    model = filled(**options)
    torch.save({"model_state_dict": model.state_dict(), "scheduler_state_dict": None}, tmp_path / "model_x_199.pth")
    loaded = load_model(tmp_path / "model_x_199.pth").model
    assert loaded.config == model.config
    x = wave((2, 1, 64, 20), "x")
    assert torch.equal(loaded(x), model(x))


def test_8_bits_are_refused_with_the_norm_by_name():
    with pytest.raises(QuantizationError, match=r"layer feature\.1 \(AffineResidualNorm\) .* as fp32 or fp16"):
        prepare(build(), QuantConfig(), torch.zeros(1, 1, 128, 44))


def test_initial_weights_are_spread_as_specified():
    torch.manual_seed(0)
    model = build(width=200)
    stem, pointwise = model.feature[0], model.feature[3].freq_pw_conv.conv
    assert stem.weight.std().item() == pytest.approx((2 / (400 * 25)) ** 0.5, rel=0.05)
    assert pointwise.weight.std().item() == pytest.approx((2 / 100) ** 0.5, rel=0.05)


@pytest.mark.slow
def test_trains_resumes_and_exports(tau, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_scripts("dragonsearch_tf_sepnet", [*SMALL_MEL, "--width", "20"], monkeypatch, int8=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 50}, "2 and shuffle_groups = 10 divide, got 50: 50, 75, 100, 125"),
        ({"width": 16}, "got 16: 16, 24, 32, 40"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
        ({"shuffle_groups": 0}, "shuffle_groups"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_refuses_spectrograms_that_are_too_small():
    with pytest.raises(ValueError, match="at least 7 mel bands and frames, got 128 and 6"):
        build()(torch.zeros(1, 1, 128, 6))
