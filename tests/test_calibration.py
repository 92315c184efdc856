"""Ranges of activations chosen without training."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers.quantization import (
    QuantizationError,
    calibrate,
    convert,
    prepare,
    quantizers,
)
from models.layers.conv_unit import ConvUnit
from models.layers.core import ActivationQuantizer, QuantConfig
from tests.test_quantization import assert_same_state, network, spectrograms, state_of


def alone(*batches: torch.Tensor, method: str, **options) -> ActivationQuantizer:
    """One quantizer that was calibrated on its own."""
    model = nn.Sequential(ActivationQuantizer()).eval()
    calibrate(model, lambda: list(batches), method, **options)
    return model[0]


def heavy_tailed(low_end: bool) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(4).standard_t(3, 200_000).astype(np.float32))
    return x if low_end else x.relu()


def rounding_error(quantizer: ActivationQuantizer, x: torch.Tensor) -> float:
    return (quantizer.eval()(x) - x).double().square().mean().item()


def test_minmax_takes_the_extremes_of_every_layer():
    model, x = network(), spectrograms()
    extremes = {}

    def note(name):
        return lambda _module, _inputs, y: extremes.update({name: (min(y.min().item(), 0), y.max().item())})

    for name, module in model.named_modules():
        if isinstance(module, ConvUnit) or name.endswith((".add", ".shortcut", "after_block_norm")):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        model(x)
    ready = prepare(model, QuantConfig(), x[:1])
    calibrate(ready, lambda: x.split(3), "minmax")
    outputs = {name.removesuffix(".output"): q for name, q in quantizers(ready) if name.endswith(".output")}
    assert outputs.keys() <= extremes.keys() and len(outputs) == 18
    for name, quantizer in outputs.items():
        assert (quantizer.low.item(), quantizer.high.item()) == pytest.approx(extremes[name], rel=1e-4, abs=1e-5), name
    assert all(quantizer.has_range for _, quantizer in quantizers(ready))


@pytest.mark.parametrize("low_end", [True, False])
@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0])
def test_percentile_leaves_out_what_it_says(low_end, percentile):
    x = heavy_tailed(low_end)
    quantizer = alone(*x.split(30_000), method="percentile", percentile=percentile)
    bin_width = (x.max() - x.min()).item() / 2048
    # Ends of bins of a histogram; in the tail neighbouring values may be farther apart than a bin is wide.
    assert quantizer.high.item() == pytest.approx(np.percentile(x, percentile), abs=3 * bin_width)
    low = np.percentile(x, 100 - percentile) if low_end else 0
    assert quantizer.low.item() == pytest.approx(low, abs=3 * bin_width)
    for outside in (x > quantizer.high, x < quantizer.low):
        assert outside.float().mean() <= 1 - percentile / 100 + 1e-6


def test_percentiles_count_batches_of_more_than_24_bits():
    # Float32 counts stop at 2**24: a training batch of 256 clips has more values, most of them 0, in one layer.
    x = torch.zeros(18_000_000)
    x[:1750] = 1  # 0.0097 %
    assert alone(x, method="percentile", percentile=99.99).high < 0.5
    x[:1850] = 1
    assert alone(x, method="percentile", percentile=99.99).high == 1


@pytest.mark.parametrize("low_end", [True, False])
def test_least_squares_beat_the_extremes_on_a_heavy_tail(low_end):
    x = heavy_tailed(low_end)
    minmax, mse = alone(x, method="minmax"), alone(x, method="mse")
    assert (minmax.low, minmax.high) == (min(x.min(), 0), x.max())
    assert rounding_error(mse, x) < 0.95 * rounding_error(minmax, x)
    assert mse.high < minmax.high


@pytest.mark.parametrize("kind", ["even", "normal", "few levels", "negative"])
def test_least_squares_are_never_worse_than_the_extremes(kind):
    rng = np.random.default_rng(7)
    x = {
        "even": rng.uniform(-1, 3, 50_000),
        "normal": rng.normal(0, 1, 50_000),
        "few levels": rng.choice([0.0, 0.5, 7.0], 50_000),
        "negative": -rng.exponential(1, 50_000),
    }[kind]
    x = torch.from_numpy(x.astype(np.float32))
    # The search sees a histogram, not the values: it may miss by a little.
    assert rounding_error(alone(x, method="mse"), x) <= 1.02 * rounding_error(alone(x, method="minmax"), x) + 1e-9


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_calibration_touches_ranges_only_and_keeps_the_mode(method):
    for training in (True, False):
        ready = prepare(network(), QuantConfig(), spectrograms(1)).train(training)
        before = state_of(ready)
        calibrate(ready, lambda: [spectrograms()], method)
        assert_same_state(ready, before, but=(".low", ".high"))
        assert {module.training for module in ready.modules()} == {training}
        assert not any(module._forward_pre_hooks for module in ready.modules())
        assert all(quantizer.rounding for _, quantizer in quantizers(ready))


def test_constant_activations_have_a_range():
    for method in ("minmax", "percentile", "mse"):
        quantizer = alone(torch.zeros(100), method=method)
        assert quantizer.eval()(torch.zeros(3)).tolist() == [0, 0, 0]
        quantizer = alone(torch.full((100,), 0.5), method=method)
        assert (quantizer.eval()(torch.full((3,), 0.5)) - 0.5).abs().max() < 0.01


def test_calibration_without_clips_says_so():
    with pytest.raises(QuantizationError):
        calibrate(prepare(network(), QuantConfig(), spectrograms(1)), lambda: [], "minmax")


def test_networks_without_ranges_are_not_converted():
    with pytest.raises(QuantizationError):
        convert(prepare(network(), QuantConfig(), spectrograms(1)))
