import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.complexity import measure
from models import get_frontend
from models.bc_resnet import BcResnet, BcResnetConfig, BroadcastBlock
from models.layers.fold import fold
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

SMALL = {"base_channels": 6, "n_classes": 5}


def build(**options) -> BcResnet:
    return BcResnet(BcResnetConfig(**options))


@pytest.mark.parametrize("case", [0, 1])
def test_matches_the_published_network_stage_by_stage(golden, case):
    case = golden("easy_bcresnet")["cases"][case]
    check_stages(check_published("bc_resnet", case), case)


@pytest.mark.slow
def test_training_matches_the_published_network_in_float64(golden):
    (case,) = (case for case in golden("easy_train_grad")["cases"] if case["class"] == "BCResNet")
    check_training("bc_resnet", case)


def test_blocks_match_the_published_ones(shared):
    data = torch.load(shared("golden/easy_dcase_task1/blocks.pt"), weights_only=True)
    x = batch_of(data["input_shape"], data["input_key"])
    for c_out, sub_bands, name in ((8, 4, "bc_same"), (12, 1, "bc_change")):
        block = fill_state(BroadcastBlock(8, c_out, 3, 0.1, sub_bands)).eval()
        torch.testing.assert_close(block(x), data[name], rtol=0, atol=1e-5)
    assert [[name, list(value.shape)] for name, value in block.state_dict().items()] == data["bc_change_manifest"]


def test_the_default_front_end_is_the_published_one(shared):
    data = torch.load(shared("golden/easy_dcase_task1/spec.pt"), weights_only=True)["cpmel256"]
    name, options = BcResnet.default_frontend
    for frontend in (get_frontend(name, **options).train(), get_frontend(name, **options).eval()):
        torch.testing.assert_close(frontend(clip(*data["clip"]))[:, 0], data["out"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "shape", "n_parameters", "macs"),
    [
        ({"sub_bands": 4}, (256, 64), 85_730, 29_588_760), ({}, (512, 64), 81_770, 58_581_920),
        ({}, (256, 640), 81_770, 295_819_200), ({"base_channels": 24}, (256, 64), 31_882, 13_096_000),
        ({"base_channels": 32}, (256, 64), 53_962, 20_564_000), ({"base_channels": 48}, (256, 64), 115_306, 40_158_000),
        ({"base_channels": 64}, (256, 64), 199_562, 65_960_000),
        ({"base_channels": 80}, (256, 64), 306_730, 97_970_000),
    ],
)  # fmt: skip
def test_sizes_are_the_published_ones(options, shape, n_parameters, macs):
    cost = measure(build(**options), (1, *shape)).trained
    # Those given in millions have three decimals.
    assert cost.n_parameters == n_parameters and abs(cost.macs - macs) <= (500 if macs % 1000 == 0 else 0)


@pytest.mark.parametrize("sub_bands", [1, 4])
def test_a_block_is_what_its_paper_says(sub_bands):
    """Written row by row and frame by frame."""
    for c_in in (6, 4):
        block = fill_state(BroadcastBlock(c_in, 6, 5, 0.1, sub_bands)).double().eval()
        x, state = wave((2, c_in, 8, 7), "x").double(), block.state_dict()

        def norm(x: Tensor, name: str, channel: slice, state: dict = state) -> Tensor:  # (batch, channel, ...)
            gain, bias, mean, variance = (
                state[f"{name}._bn.{entry}"][channel].view(-1, *[1] * (x.ndim - 2))
                for entry in ("weight", "bias", "running_mean", "running_var")
            )
            return (x - mean) / (variance + 1e-5).sqrt() * gain + bias

        y = x
        if c_in != 6:
            y = torch.einsum("oi,bift->boft", state["trans_conv._conv.weight"][:, :, 0, 0], x)
            y = norm(y, "trans_conv", slice(None)).relu()
        kernel, padded, start = state["freq_dw_conv.weight"][:, 0, :, 0], F.pad(y, (0, 0, 2, 2)), y
        rows = [(padded[:, :, f : f + 5] * kernel[None, :, :, None]).sum(dim=2) for f in range(8)]
        rows = [norm(row, "ssn", slice(f * sub_bands // 8, None, sub_bands)) for f, row in enumerate(rows)]
        mean = torch.stack(rows).mean(dim=0)  # (batch, channel, time)
        kernel, padded = state["temp_dw_conv._conv.weight"][:, 0, 0], F.pad(mean, (2, 2))
        frames = torch.stack([(padded[:, :, t : t + 5] * kernel).sum(dim=2) for t in range(7)], dim=2)
        frames = norm(frames, "temp_dw_conv", slice(None))
        frames = torch.einsum("oi,bit->bot", state["pw_conv.weight"][:, :, 0, 0], frames / (1 + (-frames).exp()))
        out = torch.stack([row + frames for row in rows], dim=2) + (start if c_in == 6 else 0)
        torch.testing.assert_close(block(x), out.relu(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"sub_bands": 2, "in_channels": 2, "kernel_size": 5}], ids=str)
@pytest.mark.parametrize("shape", [(16, 7), (47, 33), (64, 51)])
def test_takes_any_size_and_a_batch_gives_what_its_clips_give(options, shape):
    model = fill_state(build(**(SMALL | options))).eval()
    x = wave((3, model.config.in_channels, *shape), "batch")
    if (shape[0] + 1) // 2 % 8 and model.config.sub_bands > 1:
        pytest.skip("the bands do not fit")
    torch.testing.assert_close(model(x), torch.cat([model(one) for one in x.split(1)]), rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_fit_are_named():
    model = build(**SMALL)
    assert model(torch.zeros(2, 1, 7, 7)).shape == (2, 5)
    for shape in ((6, 7), (7, 6)):
        with pytest.raises(ValueError, match=f"at least 7 mel bands and 7 frames, got {shape[0]} and {shape[1]}"):
            model(torch.zeros(2, 1, *shape))
    model = build(**SMALL, sub_bands=5).eval()
    with pytest.raises(ValueError, match=r"sub_bands must divide the rows .* 256 mel bands .* 128, 64, 32, got 5"):
        model(torch.zeros(1, 1, 256, 16))
    assert model(torch.zeros(1, 1, 40, 16)).shape == (1, 5)
    for sub_bands in (2, 4, 8, 16):
        assert build(**SMALL, sub_bands=sub_bands).eval()(torch.zeros(1, 1, 256, 16)).shape == (1, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 16}, "depth"), ({"kernel_size": 2}, "kernel_size must be odd, got 2"), ({"dropout": -1}, "dropout"),
        ({"base_channels": 0}, "base_channels"), ({"sub_bands": 0}, "sub_bands"), ({"n_classes": 0}, "n_classes"),
        ({"sub_bands": 4096}, "sub_bands times"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("sub_bands", [1, 4])
def test_is_read_off_its_shapes(tmp_path, sub_bands):
    check_recognised("bc_resnet", tmp_path / "w.pt", **SMALL, sub_bands=sub_bands, kernel_size=5, in_channels=2)


@pytest.mark.slow
def test_runs_as_float_files(tmp_path):
    check_float_file(fill_state(build(**SMALL, sub_bands=2)).eval(), clips_of(32, 37), tmp_path)


@pytest.mark.slow
def test_runs_in_8_bits(tmp_path):
    _, kinds = check_8_bits(fill_state(build(**SMALL, sub_bands=2)).eval(), clips_of(256, 37), tmp_path)
    assert {"QLinearConv", "QLinearAdd", "GatherND"} <= set(kinds) and kinds.count("Conv") == 1  # the first


@pytest.mark.slow
def test_trains_resumes_and_exports(tau, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--base_channels", "4", "--sub_bands", "2", "--n_mels", "32"]
    check_scripts("bc_resnet", options, monkeypatch, int8=False)


def test_one_band_is_a_norm_that_goes_into_its_convolution():
    model = fill_state(build(**SMALL)).eval()
    folded, x = fold(model, clips_of(16, 16, 1)), clips_of(32, 37)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    model = fill_state(build(**SMALL, sub_bands=2)).eval()
    torch.testing.assert_close(fold(model, clips_of(16, 16, 1))(x), model(x), rtol=1e-4, atol=1e-5)
