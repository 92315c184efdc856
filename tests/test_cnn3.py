import pytest
import torch
import torch.nn.functional as F

from models.cnn3 import Cnn3, Cnn3Config
from tests.golden_inputs import fill_state, wave
from tests.students import (
    check_8_bits,
    check_float_file,
    check_published,
    check_recognised,
    check_scripts,
    check_stages,
    clips_of,
)

SMALL = {"base_channels": 6, "n_classes": 5, "kernel_size": 3}


def build(**options) -> Cnn3:
    return Cnn3(Cnn3Config(**options))


@pytest.mark.parametrize("case", [0, 1])
def test_matches_the_published_network_stage_by_stage(golden, case):
    case = golden("easy_cnn3")["cases"][case]
    check_stages(check_published("cnn3", case), case)


def test_the_network_is_what_its_papers_say():
    """Written with unfolded patches and matrix products, from the state dict."""
    model = fill_state(build(**SMALL, in_channels=2)).double().eval()
    state, x = model.state_dict(), wave((2, 2, 43, 57), "log-mel").double()

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = state[f"{name}._conv.weight"]
        patches = F.unfold(x, 3, padding=1)  # (batch, channel * 9, position)
        y = (weight.flatten(1) @ patches).view(len(x), len(weight), *x.shape[2:])
        gain, bias, mean, variance, shift = (
            state[f"{name}.{entry}"][:, None, None]
            for entry in ("_bn.weight", "_bn.bias", "_bn.running_mean", "_bn.running_var", "_conv.bias")
        )
        return ((y + shift - mean) / (variance + 1e-5).sqrt() * gain + bias).relu()

    y = conv(conv(x, "conv1"), "conv2")[:, :, :40, :55].unflatten(3, (11, 5)).unflatten(2, (8, 5)).amax(dim=(3, 5))
    y = conv(y, "conv3")[:, :, :, :10].unflatten(2, (2, 4)).amax(dim=(3, 4))  # (batch, channel, 2)
    y = (y.reshape(2, -1) @ state["linear1.weight"].T + state["linear1.bias"]).relu()
    y = y @ state["linear2.weight"].T + state["linear2.bias"]
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(40, 50), (41, 51), (59, 99)])
def test_a_batch_gives_what_its_clips_give(shape):
    model, x = fill_state(build(**SMALL)).eval(), wave((3, 1, *shape), "batch")
    torch.testing.assert_close(model(x), torch.cat([model(one) for one in x.split(1)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(39, 51), (60, 51), (40, 49), (40, 100), (40, 501)])
def test_sizes_that_the_pools_do_not_fit_are_named(shape):
    with pytest.raises(ValueError, match=f"40 to 59 mel bands and 50 to 99 frames, got {shape[0]} and {shape[1]}"):
        build(**SMALL)(torch.zeros(1, 1, *shape))


def test_dropout_is_that_of_training():
    model, x = fill_state(build(**SMALL, dropout=0.5)), wave((2, 1, 40, 51), "x")
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_channels": 0}, "base_channels"), ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"dropout": 1}, "dropout"), ({"n_classes": 0}, "n_classes"), ({"in_channels": 1.5}, "in_channels"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_is_read_off_its_shapes(tmp_path):
    check_recognised("cnn3", tmp_path / "w.pt", **SMALL, in_channels=2)


@pytest.mark.slow
def test_runs_as_float_files(tmp_path):
    check_float_file(fill_state(build(**SMALL)).eval(), clips_of(40, 51), tmp_path)


@pytest.mark.slow
def test_runs_in_8_bits(tmp_path):
    _, kinds = check_8_bits(fill_state(build(**SMALL)).eval(), clips_of(40, 51), tmp_path)
    assert {"QLinearConv", "QGemm"} <= set(kinds)


@pytest.mark.slow
def test_trains_resumes_and_exports(tau, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_scripts("cnn3", ["--base_channels", "4", "--kernel_size", "3", "--n_mels", "40"], monkeypatch, int8=False)
