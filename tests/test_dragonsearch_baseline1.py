"""dragonsearch's first baseline against what the published code returned, and one written by hand."""

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
    return get_model("dragonsearch_baseline1", **options)


def test_matches_the_published_network(golden):
    manifest = golden("dragonsearch_manifest")["baseline1"]
    (case,) = (case for case in golden("dragonsearch_models")["baselines"] if case["model"] == "baseline1")
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

    def layer(x: Tensor, i: int, padding: int) -> Tensor:
        weight, (n_batch, _, n_rows, n_columns) = state[f"conv2d_{i}.weight"], x.shape
        patches = F.unfold(x, 3, padding=padding)  # (batch, channel * 9, position)
        y = weight.flatten(1) @ patches + state[f"conv2d_{i}.bias"][:, None]
        mean, var, gain, bias = (
            state[f"batch_norm_{i}.{entry}"][:, None] for entry in ("running_mean", "running_var", "weight", "bias")
        )
        y = ((y - mean) / (var + 1e-5).sqrt() * gain + bias).clamp_min(0)
        return y.view(n_batch, -1, n_rows - 2 + 2 * padding, n_columns - 2 + 2 * padding)

    x = F.max_pool2d(layer(layer(x, 1, 1), 2, 1), 5)
    x = F.max_pool2d(layer(x, 3, 0), 2).flatten(1)
    for i in (1, 2):
        x = x @ state[f"dense_{i}.weight"].T + state[f"dense_{i}.bias"]
    return x


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 1, 60, 129)),
        ({"input_fdim": 20, "input_tdim": 33, "n_classes": 3}, (3, 1, 22, 30)),
        ({"input_fdim": 41, "input_tdim": 20}, (1, 1, 41, 20)),
    ],
)
def test_agrees_with_one_written_by_hand(options, shape):
    model = fill_state(build(**options)).double().eval()
    x = wave(shape, "baseline1/by hand").double()
    torch.testing.assert_close(model(x), by_hand(model.state_dict(), x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x), torch.cat([model(clip) for clip in x.split(1)]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"n_classes": 4, "input_tdim": 50}])
def test_it_is_read_off_its_shapes(tmp_path, options):
    model = fill_state(build(**options)).eval()
    torch.save({"model_state_dict": model.state_dict(), "scheduler_state_dict": None}, tmp_path / "w.pth")
    loaded = load_model(tmp_path / "w.pth")
    assert loaded.model.config.positions == model.config.positions and loaded.frontend.config.n_mels == 64
    x = wave((2, 1, 64, model.config.input_tdim), "x")
    assert torch.equal(loaded.model(x), model(x))
    with pytest.raises(ForeignError, match="no multiple of 160"):
        recognise("x.pt", build(input_fdim=30).state_dict() | {"dense_1.weight": torch.zeros(100, 96)})


@pytest.mark.parametrize("options", [{}, {"input_fdim": 41, "input_tdim": 33}], ids=["default", "odd"])
def test_runs_in_8_bits_and_onnx_runtime_agrees(tmp_path, options):
    model = fill_state(build(**options)).eval()
    x = wave((4, 1, model.config.input_fdim, model.config.input_tdim), "baseline1/8 bits", 2)
    x = x * torch.linspace(0.5, 1.5, 4)[:, None, None, None]
    check_8_bits(model, x, tmp_path)


@pytest.mark.slow
def test_trains_resumes_and_exports(tau, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_scripts("dragonsearch_baseline1", [*SMALL_MEL, "--input_tdim", "33"], monkeypatch, int8=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"input_fdim": 19}, "input_fdim"), ({"input_tdim": 0}, "input_tdim"), ({"dropout": 1.0}, "dropout")],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_refuses_spectrograms_of_another_size():
    with pytest.raises(ValueError, match="about 64 mel bands and 128 frames, got 128 and 44: set input_fdim"):
        build()(torch.zeros(1, 1, 128, 44))
