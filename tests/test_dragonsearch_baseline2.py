"""dragonsearch's second baseline against what the published code returned, and one written by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.checkpoints.checkpoint import load_model
from helpers.checkpoints.foreign import ForeignError, recognise
from helpers.complexity import measure
from models import get_model
from tests.golden_inputs import fill_state, wave
from tests.students import SMALL_MEL, check_8_bits, check_scripts, has_the_manifest


def build(**options) -> nn.Module:
    return get_model("dragonsearch_baseline2", **options)


def test_matches_the_published_network(golden):
    manifest = golden("dragonsearch_manifest")["baseline2"]
    (case,) = (case for case in golden("dragonsearch_models")["baselines"] if case["model"] == "baseline2")
    model = fill_state(build()).eval()
    has_the_manifest(model, manifest["state_dict"])
    x = wave(tuple(case["shape"]), case["key"], case["scale"])
    tolerance = 1e-5 * case["logits"].abs().max().item()
    torch.testing.assert_close(model(x), case["logits"], rtol=0, atol=tolerance)
    torch.testing.assert_close(model.double()(x.double()).float(), case["logits"], rtol=0, atol=tolerance)
    for counted in manifest["complexity"]:
        cost = measure(build(), tuple(counted["input"][1:])).trained
        assert (cost.n_parameters, cost.macs) == (counted["torchinfo_params"], counted["torchinfo_mult_adds"])
    assert cost.n_parameters == manifest["parameters"]


def by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """From the specification; convolutions as matrix products over patches."""

    def layer(x: Tensor, i: int) -> Tensor:
        weight, (n_batch, _, n_rows, n_columns) = state[f"conv{i}.weight"], x.shape
        patches = F.unfold(x, 7, padding=3)  # (batch, channel * 49, position)
        y = weight.flatten(1) @ patches + state[f"conv{i}.bias"][:, None]
        mean, var, gain, bias = (
            state[f"batch_norm{i}.{entry}"][:, None] for entry in ("running_mean", "running_var", "weight", "bias")
        )
        y = ((y - mean) / (var + 1e-5).sqrt() * gain + bias).clamp_min(0)
        return y.view(n_batch, -1, n_rows, n_columns)

    x = F.max_pool2d(layer(layer(x, 1), 2), 5)
    x = F.max_pool2d(layer(x, 3), (4, 10)).flatten(1)
    x = (x @ state["fc1.weight"].T + state["fc1.bias"]).clamp_min(0)
    return x @ state["fc2.weight"].T + state["fc2.bias"]


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 1, 59, 99)),
        ({"input_fdim": 20, "input_tdim": 131, "n_classes": 3}, (3, 1, 22, 103)),
        ({"input_fdim": 64, "input_tdim": 50}, (1, 1, 64, 51)),
    ],
)
def test_agrees_with_one_written_by_hand(options, shape):
    model = fill_state(build(**options)).double().eval()
    x = wave(shape, "baseline2/by hand").double()
    torch.testing.assert_close(model(x), by_hand(model.state_dict(), x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x), torch.cat([model(clip) for clip in x.split(1)]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"n_classes": 4, "input_tdim": 101}])
def test_it_is_read_off_its_shapes(tmp_path, options):
    model = fill_state(build(**options)).eval()
    torch.save({"model_state_dict": model.state_dict(), "scheduler_state_dict": None}, tmp_path / "w.pth")
    loaded = load_model(tmp_path / "w.pth")
    assert loaded.model.config.positions == model.config.positions and loaded.frontend.config.n_mels == 40
    x = wave((2, 1, 40, model.config.input_tdim), "x")
    assert torch.equal(loaded.model(x), model(x))
    with pytest.raises(ForeignError, match="no multiple of 64"):
        recognise("x.pt", build().state_dict() | {"fc1.weight": torch.zeros(100, 96)})


@pytest.mark.parametrize("options", [{}, {"input_fdim": 41, "input_tdim": 101}], ids=["default", "odd"])
def test_runs_in_8_bits_and_onnx_runtime_agrees(tmp_path, options):
    model = fill_state(build(**options)).eval()
    x = wave((4, 1, model.config.input_fdim, model.config.input_tdim), "baseline2/8 bits", 2)
    x = x * torch.linspace(0.5, 1.5, 4)[:, None, None, None]
    check_8_bits(model, x, tmp_path)


@pytest.mark.slow
def test_trains_resumes_and_exports(tau, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*SMALL_MEL, "--input_fdim", "64", "--input_tdim", "50", "--hop_size", "150"]
    check_scripts("dragonsearch_baseline2", options, monkeypatch, int8=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"input_fdim": 19}, "input_fdim"), ({"input_tdim": 0}, "input_tdim"), ({"dropout": 1.0}, "dropout")],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_refuses_spectrograms_of_another_size():
    with pytest.raises(ValueError, match="about 40 mel bands and 51 frames, got 128 and 44: set input_fdim"):
        build()(torch.zeros(1, 1, 128, 44))
