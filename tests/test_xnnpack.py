"""XNNPACK's forms of layers against the layers themselves, in PyTorch; in ExecuTorch: test_export_executorch.py."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers.quantization import convert
from models.frontends.mel_xnnpack import XnnMel
from models.layers.add import IntAdd, XnnAdd
from models.layers.avg_pool import AvgPool, IntAvgPool
from models.layers.axis_mean import IntAxisMean
from models.layers.channel_shuffle import IntChannelShuffle
from models.layers.concat import IntConcat
from models.layers.conv_unit import IntConv, XnnConv
from models.layers.core import QTensor, QuantConfig
from models.layers.fold import fold
from models.layers.residual_norm import IntResidualNorm, ResidualNorm
from models.layers.response_norm import IntResponseNorm, ResponseNorm, XnnIntResponseNorm
from models.layers.silu import IntSilu
from models.layers.split import IntSplit
from models.layers.sub_spectral_norm import IntSubSpectralNorm
from models.layers.xnnpack import for_xnnpack, operators
from tests.golden_inputs import wave
from tests.test_integer import random_activation
from tests.test_mel_export import CONFIGS, build, noise
from tests.test_quantization import OTHERS, network, prepared, spectrograms


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def assert_close_in_levels(found: QTensor, expected: QTensor) -> None:
    """Forms round in float: a value near the middle of two levels may go the other way, and no further."""
    assert (found.scale, found.zero_point) == (expected.scale, expected.zero_point)
    difference = (found.values.int() - expected.values.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 2e-3
    assert len(expected.values.unique()) > 20  # or there would be nothing to see


# ---- float ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, *OTHERS], ids=str)
def test_a_float_network_stays_the_same_function(options):
    model = network(**options)  # response norms with gains of both signs, and of 0
    log_mel = spectrograms(3, model.config.in_channels)
    form = for_xnnpack(fold(model), log_mel[:1])
    torch.testing.assert_close(form(log_mel), model(log_mel), rtol=1e-4, atol=1e-5)
    assert not any(hasattr(module, "for_xnnpack") for module in form.modules())


def test_silence_gives_no_nan():
    norm = ResponseNorm()
    nn.init.constant_(norm.gamma, 0.5)
    nn.init.constant_(norm.beta, 0.25)
    silence = torch.zeros(1, 4, 6, 5)
    assert torch.equal(for_xnnpack(norm, silence)(silence), torch.full_like(silence, 0.25))


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (3, 2)])
def test_the_padding_counts_in_an_average_pool(stride):
    pool, x = AvgPool(5, 3, stride, padding=1), wave((2, 5, 12, 9), "pool")
    torch.testing.assert_close(for_xnnpack(pool, x)(x), pool(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_front_end_gives_the_same_spectrogram(name):
    _, export, n_samples = build(name)
    waveform = noise(1, n_samples)
    form = for_xnnpack(export, waveform)
    assert isinstance(form[0], XnnMel)
    torch.testing.assert_close(form(waveform), export(waveform), rtol=0, atol=2e-5)  # float32 sums in another order


def test_the_model_itself_is_not_touched():
    _, export, n_samples = build("prime n_fft")
    model = nn.Sequential(export)
    for_xnnpack(model, noise(1, n_samples))
    assert model[0] is export
    model(noise(1, n_samples))  # still has all its tables


# ---- integer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "stride", "kernel"), [(1, (1, 1), 1), (1, (2, 2), 3), (8, (2, 1), 3)])
def test_convolution(rng, groups, stride, kernel):
    shape = (8, 8 // groups, kernel, kernel)
    layer = IntConv(
        torch.from_numpy(rng.integers(-127, 128, shape)).to(torch.int8), torch.full((8,), 0.01),
        torch.linspace(-1, 1, 8).half(), stride, (kernel // 2,) * 2, groups, (0.1, -20),
    )  # fmt: skip
    x = random_activation(rng, (2, 8, 16, 20), scale=0.02)
    assert_close_in_levels(XnnConv(layer, x)(x), layer(x))


@pytest.mark.parametrize("input", [None, (0.02, 3)])
def test_a_convolution_of_float_values(rng, input):
    weight = torch.from_numpy(rng.integers(-127, 128, (8, 1, 3, 3))).to(torch.int8)
    layer = IntConv(weight, torch.full((8,), 0.01), torch.zeros(8).half(), (2, 2), (1, 1), 1, (0.05, -10), input)
    x = wave((2, 1, 32, 30), "float", 0.9)
    form = XnnConv(layer, x)
    assert_close_in_levels(form(x), layer(x))
    assert form.weight.dtype == (torch.float32 if input is None else torch.int8)


def test_an_average_pool_is_a_convolution(rng):
    layer = IntAvgPool(AvgPool(6, 3, (2, 1), padding=1), (0.01, -5))
    x = random_activation(rng, (2, 6, 16, 20), scale=0.02)
    assert_close_in_levels(XnnConv(layer, x)(x), layer(x))


def test_biases_are_whole_numbers_of_steps(rng):
    # ExecuTorch multiplies by one over the step where `IntSums` divides: biases between two steps could go either way.
    n = 20000
    step = torch.from_numpy(rng.uniform(1e-5, 1e-3, n)).float() * 0.03
    bias = (torch.from_numpy(rng.integers(-5000, 5000, n)).float() + 0.5) * step
    layer = IntConv(torch.ones(n, 1, 1, 1, dtype=torch.int8), step / 0.03, bias, (1, 1), (0, 0), n, (1.0, 0))
    form = XnnConv(layer, random_activation(rng, (1, n, 1, 1), scale=0.03))
    step = form.scale * 0.03
    expected = torch.round(bias / step)
    assert (torch.round(bias * (1 / step)) != expected).any()
    assert torch.equal(torch.round(form.bias * (1 / step)), expected)


def test_sum(rng):
    x, y = (random_activation(rng, (2, 6, 16, 20), scale) for scale in (0.013, 0.021))
    layer = IntAdd((0.027, 11))
    assert_close_in_levels(XnnAdd(layer)(x, y), layer(x, y))


@pytest.mark.parametrize("shift", [-40, 0, 25])
@pytest.mark.parametrize("gamma", [-0.4, 0.0, 0.8])
def test_response_norm(rng, gamma, shift):
    layer = IntResponseNorm(gamma, (0.05, -128), (0.01, -128), (1 / 60, -128), (0.021, shift))
    x = random_activation(rng, (2, 12, 10, 14), scale=0.02, zero_point=-30)
    assert_close_in_levels(XnnIntResponseNorm(layer, x)(x), layer(x))


def residual_norm(rng) -> nn.Module:
    return IntResidualNorm(ResidualNorm(), (0.03, -5))


def sub_spectral_norm(rng) -> nn.Module:
    weight, bias = (torch.from_numpy(rng.uniform(0.2, 1, 6 * 4)).float() for _ in range(2))
    return IntSubSpectralNorm(4, weight, bias, (0.02, -10))


# Scales of which no whole number is half of another: means would lie between two levels.
BETWEEN = {
    "residual norm": residual_norm,
    "sub-spectral norm": sub_spectral_norm,
    "mean over freq": lambda _rng: IntAxisMean(2, (0.00413, 3)),
    "mean over time": lambda _rng: IntAxisMean(3, (0.00413, 3)),
    "silu": lambda _rng: IntSilu((0.01, -100)),
    "concat": lambda _rng: IntConcat((0.03, 5)),
}


@pytest.mark.parametrize("make", BETWEEN.values(), ids=BETWEEN)
def test_layers_that_are_float_between_8_bit_values(rng, make):
    layer, x = make(rng), random_activation(rng, (2, 6, 16, 20), scale=0.02, zero_point=0)
    assert_close_in_levels(layer.for_xnnpack(x)(x), layer(x))


def test_layers_that_move_channels(rng):
    x = random_activation(rng, (2, 6, 16, 20), scale=0.02)
    shuffle, split = IntChannelShuffle(2), IntSplit(3)
    assert torch.equal(shuffle.for_xnnpack(x)(x).values, shuffle(x).values)
    for found, part in zip(split.for_xnnpack(x)(x), split(x), strict=True):
        assert torch.equal(found.values, part.values)


@pytest.mark.parametrize("quantize_input", [False, True])
def test_int8_values_are_read_as_they_were_written(quantize_input):
    # XNNPACK keeps one scale and zero point for each value and goes by the writer's.
    model = prepared(config=QuantConfig(quantize_input=quantize_input))
    log_mel = spectrograms(1)
    graph = torch.export.export(for_xnnpack(convert(model), log_mel), (log_mel,), strict=False).graph
    pairs = [
        (node.args[1:], node.args[0].args[1:])
        for node in graph.nodes
        if node.target is operators().dequantize_per_tensor.default and node.args[0].op == "call_function"
    ]
    assert len(pairs) > 30
    assert all(read == written for read, written in pairs)
