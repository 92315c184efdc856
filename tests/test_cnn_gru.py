"""Tan's CNN-GRU against what the published code returned, a published checkpoint, and one written by hand."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.checkpoints.checkpoint import load_model
from helpers.complexity import measure
from helpers.quantization import QuantizationError, prepare
from models import get_model
from models.layers.core import QuantConfig
from tests.golden_inputs import fill_state, wave
from tests.students import SMALL_MEL, check_scripts, has_the_manifest

CASES = ["v1_b24", "v2_b24", "v1_b16", "v1_b24_T65"]


def build(**options) -> nn.Module:
    return get_model("cnn_gru", **options)


@pytest.fixture(params=CASES)
def case(request, shared) -> dict:
    return torch.load(shared("golden/dcase2025/cnn_gru_fill.pt"), weights_only=True)[request.param]


def filled(case: dict) -> tuple[nn.Module, Tensor]:
    """The network and its input; with the statistics of the formula alone signals would die out."""
    model = fill_state(build(**case["config"]))
    model.load_state_dict(model.state_dict() | case["override"])
    x = wave(tuple(case["input"]["shape"]), case["input"]["key"], case["input"]["scale"])
    return model, x * torch.arange(1, 1 + len(x))[:, None, None, None] - 3


def test_matches_the_published_network(case):
    model, x = filled(case)
    has_the_manifest(model, case["manifest"])
    assert [name for name, _ in model.named_parameters()] == case["parameters"]
    seen = {}
    for name in case["activations_fp32"]:
        if not name.startswith("cs_"):  # channel shuffles, a function here
            module = model.get_submodule(name)
            module.register_forward_hook(lambda _m, _x, y, name=name: seen.update({name: y}))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), case["logits_fp32"], rtol=0, atol=1e-5)
        for name, y in seen.items():
            wanted = case["activations_fp32"][name]
            y = y[0] if isinstance(y, tuple) else y
            if name == "conv1d_5_2":
                y = y.view(wanted["shape"])
            assert list(y.shape) == wanted["shape"]
            found = [y.mean().item(), y.std().item(), y.abs().max().item()]
            assert found == pytest.approx([wanted["mean"], wanted["std"], wanted["absmax"]], rel=1e-4, abs=1e-5)
            torch.testing.assert_close(y.flatten()[:8], wanted["first8"].flatten(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.double()(x.double()), case["logits_fp64"], rtol=0, atol=1e-9)


def test_parameters_and_cost_are_the_published_ones(case):
    cost = measure(build(**case["config"]), tuple(case["input"]["shape"][1:])).trained
    assert (cost.n_parameters, cost.macs) == (case["n_params"], case["macs"])


def test_training_matches_the_published_network_in_float64(case):
    model, x = filled(case)
    model.double().train()
    for module in (model.drop_channels, model.drop_steps):
        module.eval()  # as recorded
    wanted = case["train_fp64"]
    logits = model(x.double())
    loss = F.cross_entropy(logits, wanted["labels"])
    loss.backward()
    torch.testing.assert_close(logits, wanted["logits"], rtol=1e-9, atol=1e-9)
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-9)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == wanted["no_grad"]
    norms = {name: gradient.norm().item() for name, gradient in gradients.items() if gradient is not None}
    assert norms == pytest.approx(wanted["grad_norms"], rel=1e-6, abs=1e-12)
    assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(wanted["grad_norm"], rel=1e-6)
    for name, value in wanted["running_after"].items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-9)


def test_the_published_checkpoint_loads_and_gives_the_published_logits(shared, golden):
    data = golden("dcase2025_tan_sub1")
    loaded = load_model(shared("golden/dcase2025/tan_sub1_checkpoint.pt"))
    assert loaded.model.config == build().config == build(**data["config"]).config
    has_the_manifest(loaded.model, data["manifest"])
    cost = measure(loaded.model, (1, 256, 33)).trained
    assert (cost.n_parameters, cost.macs) == (data["n_params"], data["macs"])
    i = data["clips"].index(data["logmel_clip"])
    with torch.no_grad():
        logits = loaded.model(data["logmel"][None])[0]
        torch.testing.assert_close(logits, data["logits_fp32"]["general"][i], rtol=0, atol=1e-4)
        half = loaded.model.half()(data["logmel"][None].half())[0].float()
    torch.testing.assert_close(half, data["logits_half_cpu"]["general"][i].float(), rtol=0, atol=5e-2)


def by_hand(state: dict[str, Tensor], x: Tensor, shuffles: bool) -> Tensor:
    """The network from its specification: functions on a state dict, the GRU's equations step by step."""

    def unit(x: Tensor, name: str, **options) -> Tensor:
        weight = state[f"{name}.0.weight"]
        y = F.conv2d(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2), **options)
        entries = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(y, *(state[f"{name}.1.{entry}"] for entry in entries), eps=1e-5)

    def excite(x: Tensor, name: str) -> Tensor:
        hidden = (x.mean(dim=(2, 3)) @ state[f"{name}.fc1.weight"].T + state[f"{name}.fc1.bias"]).clamp_min(0)
        gate = hidden @ state[f"{name}.fc2.weight"].T + state[f"{name}.fc2.bias"]
        return x * (1 / (1 + (-gate).exp()))[..., None, None]

    def swap(x: Tensor, n_groups: int) -> Tensor:
        if not shuffles:
            return x
        per_group = x.shape[1] // n_groups
        return x[:, [group * per_group + i for i in range(per_group) for group in range(n_groups)]]

    def branch(x: Tensor, number: int) -> Tensor:
        x = unit(x, f"conv2d_2_{number}")
        x = unit(x, f"codw2d_2_{number}L", groups=x.shape[1])
        x = F.silu(unit(x, f"codw2d_2_{number}R", groups=x.shape[1], stride=2))
        return excite(x, f"se_2_{number}")

    def mix(name: str, a: Tensor, b: Tensor) -> Tensor:
        return state[name] * a + (1 - state[name]) * b

    x = unit(unit(x, "conv2d_1_0"), "conv2d_1_1")
    n_first = x.shape[1]
    x = unit(swap(x, n_first // 2), "codw2d_1L1", groups=n_first)
    x = excite(F.silu(unit(x, "codw2d_1R1", groups=n_first)), "se_1_1")
    xm, xa = branch(F.max_pool2d(x, 2), 1), branch(F.avg_pool2d(x, 2), 2)
    a = mix("param1", F.avg_pool2d(xa, 2), F.avg_pool2d(xm, 2))
    m = mix("param2", F.max_pool2d(xm, 2), F.max_pool2d(xa, 2))
    x = mix("param4", a, m)
    x = x + unit(x, "conv2d_3_1")
    x = swap(x, x.shape[1] // 2)
    x = F.silu(unit(x, "codw2d_3_1", groups=x.shape[1], stride=(2, 1)))
    u = F.silu(unit(x, "conv2d_4_1")).mean(dim=3)
    w_in, w_hid, b_in, b_hid = (state[f"bgru2d_4_1.{n}_l0"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h, outputs = u.new_zeros(len(u), 64), []
    for step in range(u.shape[1]):
        (r_x, z_x, n_x), (r_h, z_h, n_h) = (u[:, step] @ w_in.T + b_in).chunk(3, 1), (h @ w_hid.T + b_hid).chunk(3, 1)
        update = torch.sigmoid(z_x + z_h)
        h = (1 - update) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + update * h
        outputs.append(h.mean(dim=1))
    z = mix("param3", u.mean(dim=2), torch.stack(outputs, dim=1))
    z = F.silu(z) if shuffles else z
    return z @ state["conv1d_5_2.weight"][:, 0].T + state["conv1d_5_2.bias"]


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 1, 256, 33)),
        ({"variant": 2, "n_classes": 3}, (2, 1, 256, 6)),
        ({"base_channels": 12, "input_fdim": 48, "divisor": 7}, (3, 1, 48, 17)),
        ({"variant": 2, "base_channels": 4, "channels_multiplier": 2.5, "expansion_rate": 3}, (1, 1, 256, 44)),
    ],
)
def test_agrees_with_one_written_by_hand(options, shape):
    model = fill_state(build(**options)).double().eval()
    x = wave(shape, "cnn_gru/by hand", 2).double()
    with torch.no_grad():
        wanted = by_hand(model.state_dict(), x, model.config.variant == 1)
        torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(x), torch.cat([model(clip) for clip in x.split(1)]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"variant": 2, "n_classes": 4}, {"base_channels": 16, "divisor": 3}, {"base_channels": 20, "divisor": 7},
        {"base_channels": 12, "channels_multiplier": 2.5, "expansion_rate": 3, "input_fdim": 64, "divisor": 100},
    ],
)  # fmt: skip
def test_it_is_read_off_its_shapes(tmp_path, options):
    model = fill_state(build(**options)).eval()
    torch.save({name: value.half() for name, value in model.state_dict().items()}, tmp_path / "w.pt")
    loaded = load_model(tmp_path / "w.pt")
    n_mels = model.config.input_fdim
    assert loaded.model.config.widths == model.config.widths and loaded.frontend.config.n_mels == n_mels
    x = wave((2, 1, n_mels, 20), "x")
    torch.testing.assert_close(loaded.model(x), model(x), rtol=0, atol=1e-2)


def test_8_bits_are_refused_with_the_gru_by_name():
    with pytest.raises(QuantizationError, match=r"layer bgru2d_4_1 \(GRU\) .* export the network as fp32 or fp16"):
        prepare(build(), QuantConfig(), torch.zeros(1, 1, 256, 33))


@pytest.mark.slow
def test_trains_resumes_and_exports(tau, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_scripts("cnn_gru", [*SMALL_MEL, "--base_channels", "8", "--input_fdim", "64"], monkeypatch, int8=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": 3}, "variant"),
        ({"base_channels": 6}, "base_channels must be a multiple of 4, got 6"),
        ({"expansion_rate": 1.5}, "expansion_rate must be a whole number"),
        ({"input_fdim": 100}, "input_fdim must be a multiple of 16"),
        ({"divisor": 145}, "and a step, got 36, 72 and 0"),
        ({"base_channels": 4, "channels_multiplier": 0.3}, "must give a branch"),
        ({"base_channels": 1 << 14}, "the widest layer has"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("shape", [(1, 1, 128, 33), (1, 1, 256, 5)])
def test_refuses_spectrograms_of_another_size(shape):
    with pytest.raises(ValueError, match=re.escape(f"got {shape[2]} and {shape[3]}")):
        build()(torch.zeros(shape))
