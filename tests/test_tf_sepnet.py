import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.complexity import measure
from models import get_frontend, get_model
from models.tf_sepnet import TfSepnet, TfSepnetConfig, TimeFreqSepBlock
from tests.golden_inputs import clip, fill_state, wave
from tests.students import (
    batch_of,
    check_8_bits,
    check_float_file,
    check_published,
    check_recognised,
    check_scripts,
    check_stages,
    check_training,
    clips_of,
)

SMALL = {"base_channels": 8, "n_classes": 5}


def build(**options) -> TfSepnet:
    return TfSepnet(TfSepnetConfig(**options))


@pytest.mark.parametrize("case", [0, 1])
def test_matches_the_published_network_stage_by_stage(golden, case):
    case = golden("easy_tfsepnet")["cases"][case]
    check_stages(check_published("tf_sepnet", case), case)


@pytest.mark.slow
def test_training_matches_the_published_network_in_float64(golden):
    (case,) = (case for case in golden("easy_train_grad")["cases"] if case["class"] == "TFSepNet")
    check_training("tf_sepnet", case)


def test_blocks_match_the_published_ones(shared):
    data = torch.load(shared("golden/easy_dcase_task1/blocks.pt"), weights_only=True)
    x = batch_of(data["input_shape"], data["input_key"])
    for c_out, name in ((8, "tfsep_same"), (12, "tfsep_change")):
        block = fill_state(TimeFreqSepBlock(8, c_out, 3, 0.1)).eval()
        torch.testing.assert_close(block(x), data[name], rtol=0, atol=1e-5)
    assert [[name, list(value.shape)] for name, value in block.state_dict().items()] == data["tfsep_change_manifest"]


def test_the_default_front_end_is_the_published_one(shared):
    data = torch.load(shared("golden/easy_dcase_task1/spec.pt"), weights_only=True)["cpmel512"]
    name, options = TfSepnet.default_frontend
    for frontend in (get_frontend(name, **options).train(), get_frontend(name, **options).eval()):
        log_mel = frontend(clip(*data["clip"]))
        torch.testing.assert_close(log_mel[:, 0], data["out"], rtol=0, atol=1e-3)  # of float32, see its README


@pytest.mark.parametrize(
    ("options", "shape", "n_parameters", "macs"),
    [
        ({}, (256, 64), 126_858, 14_782_944), ({"depth": 16}, (512, 64), 126_858, 32_024_128),
        ({"depth": 16}, (256, 64), 126_858, 16_104_384), ({}, (512, 640), 126_858, 284_009_920),
        ({"base_channels": 32}, (512, 64), 34_634, 8_855_000), ({"base_channels": 40}, (512, 64), 52_290, 12_899_000),
        ({"base_channels": 48}, (512, 64), 73_546, 17_674_000), ({"base_channels": 80}, (512, 64), 194_570, 44_093_000),
        ({"base_channels": 128}, (512, 64), 484_106, 105_676_000),
    ],
)  # fmt: skip
def test_sizes_are_the_published_ones(options, shape, n_parameters, macs):
    cost = measure(build(**options), (1, *shape)).trained
    # Those given in millions have three decimals.
    assert cost.n_parameters == n_parameters and abs(cost.macs - macs) <= (500 if macs % 1000 == 0 else 0)


def test_the_network_is_what_its_paper_says():
    """Written with functions and slices, from the state dict."""

    def norm(x: Tensor, name: str, **options) -> Tensor:
        x = F.conv2d(x, state[f"{name}._conv.weight"], **options)
        mean, variance = state[f"{name}._bn.running_mean"], state[f"{name}._bn.running_var"]
        gain = state[f"{name}._bn.weight"] / (variance + 1e-5).sqrt()
        bias = state[f"{name}._bn.bias"] - mean * gain
        return (x * gain[:, None, None] + bias[:, None, None]).clamp_min(0)

    def residual_norm(x: Tensor) -> Tensor:
        bands = x.permute(0, 2, 1, 3).flatten(2)  # (batch, mel, channel * time)
        deviation = (bands.var(dim=2) + 1e-5).sqrt()[:, None, :, None]
        return 0.1 * x + (x - bands.mean(dim=2)[:, None, :, None]) / deviation

    def block(x: Tensor, name: str) -> Tensor:
        if f"{name}.trans_conv._conv.weight" in state:
            x = norm(x, f"{name}.trans_conv")
        half = x.shape[1] // 2
        order = [i * half + k for k in range(half) for i in (0, 1)]
        x = x[:, order]
        a, b = x[:, :half], x[:, half:]
        y = norm(a, f"{name}.freq_dw_conv", padding=(1, 0), groups=half).mean(dim=2, keepdim=True)
        a = a + norm(y, f"{name}.freq_pw_conv")
        y = norm(b, f"{name}.temp_dw_conv", padding=(0, 1), groups=half).mean(dim=3, keepdim=True)
        return torch.cat([a, b + norm(y, f"{name}.temp_pw_conv")], dim=1)

    model = fill_state(build(**SMALL, depth=16)).double().eval()
    state, x = model.state_dict(), wave((2, 1, 45, 27), "log-mel").double()
    y = norm(x, "conv_layers.0", stride=2, padding=1)
    y = norm(y, "conv_layers.1", stride=2, padding=1, groups=4)
    y = residual_norm(y)
    for first, last in ((1, 2), (5, 6), (9, 10)):
        for i in range(first, last + 1):
            y = block(y, f"middle_layers.{i}")
        y = residual_norm(y)
        y = F.max_pool2d(y, 2) if last < 10 else y
    for i in (12, 13, 14):
        y = block(y, f"middle_layers.{i}")
    y = F.conv2d(residual_norm(y), state["classifier.conv.weight"], state["classifier.conv.bias"]).mean(dim=(2, 3))
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{}, {"depth": 16, "base_channels": 12, "in_channels": 2, "kernel_size": 5}], ids=str
)
@pytest.mark.parametrize("shape", [(29, 29), (61, 43), (40, 101)])
def test_takes_any_size_and_a_batch_gives_what_its_clips_give(options, shape):
    model = fill_state(build(**(SMALL | options))).eval()
    x = wave((3, model.config.in_channels, *shape), "batch")
    torch.testing.assert_close(model(x), torch.cat([model(one) for one in x.split(1)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("depth", "least"), [(16, 13), (17, 29)])
def test_the_smallest_input_is_what_it_says(depth, least):
    model = build(**SMALL, depth=depth).eval()
    assert model(torch.zeros(2, 1, least, least)).isfinite().all()
    for shape in ((least - 1, least), (least, least - 1)):
        with pytest.raises(ValueError, match=f"at least {least} mel bands .* got {shape[0]} and {shape[1]}"):
            model(torch.zeros(2, 1, *shape))
    with pytest.raises(ValueError, match=r"log_mel must be \(batch, 1, mel, time\)"):
        model(torch.zeros(1, 3, 64, 64))


def test_dropout_is_that_of_the_pointwise_convolutions_and_of_training():
    x = wave((2, 1, 40, 40), "x")
    model = fill_state(build(**SMALL, dropout=0.5))
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_channels": 63}, "base_channels must be a multiple of 4, got 63"),
        ({"base_channels": 66}, "halves of 1, 1.5, 2 and 2.5 times"), ({"base_channels": 0}, "base_channels"),
        ({"depth": 18}, "depth must be in .16, 17., got 18"), ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"dropout": 1.0}, "dropout"), ({"n_classes": 0}, "n_classes"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("depth", [16, 17])
def test_is_read_off_its_shapes(tmp_path, depth):
    options = SMALL | {"depth": depth, "base_channels": 12, "kernel_size": 5, "in_channels": 2}
    check_recognised("tf_sepnet", tmp_path / "w.pt", **options)


@pytest.mark.slow
def test_runs_as_float_files(tmp_path):
    check_float_file(fill_state(build(**SMALL)).eval(), clips_of(37, 41), tmp_path)


@pytest.mark.slow
def test_runs_in_8_bits(tmp_path):
    # Some 200,000 values to round in each clip: statistics that a runtime computes in its own way would show.
    _, kinds = check_8_bits(fill_state(build(n_classes=5, base_channels=12)).eval(), clips_of(256, 41), tmp_path)
    assert {"QLinearConv", "QLinearAdd", "QLinearConcat", "Split", "Transpose"} <= set(kinds)


@pytest.mark.slow
def test_trains_resumes_and_exports(tau, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--base_channels", "4", "--depth", "16", "--n_mels", "24"]
    check_scripts("tf_sepnet", options, monkeypatch, int8=True)


def test_is_in_the_table():
    assert type(get_model("tf_sepnet")) is TfSepnet
