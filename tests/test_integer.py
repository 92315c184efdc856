"""The target's layers against 64-bit integers in NumPy, written out as loops over kernel positions."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers.quantization import convert
from models.layers.add import IntAdd
from models.layers.avg_pool import AvgPool, IntAvgPool
from models.layers.conv_unit import IntConv
from models.layers.core import QTensor, QuantConfig, Rounding, quantize
from models.layers.global_mean import IntGlobalMean
from models.layers.integer_sums import EXACT_FLOAT32
from models.layers.response_norm import IntResponseNorm
from models.layers.weights import limit_pairs
from tests.test_quantization import prepared, spectrograms

EPS = np.float32(1e-6)


def random_activation(rng, shape, scale=None, zero_point=None) -> QTensor:
    zero_point = int(rng.integers(-128, 128)) if zero_point is None else zero_point
    scale = float(np.float32(rng.uniform(0.001, 0.1))) if scale is None else scale
    return QTensor(torch.from_numpy(rng.integers(-128, 128, shape).astype(np.int8)), scale, zero_point)


def signed(q: QTensor) -> np.ndarray:
    return q.values.numpy().astype(np.int64) - q.zero_point


def to_levels(integers: np.ndarray, factor, zero_point: int) -> np.ndarray:
    """One float32 product, rounded half to even, shifted, clamped."""
    product = integers.astype(np.float32) * np.asarray(factor, dtype=np.float32)
    return np.clip(np.rint(product).astype(np.int64) + zero_point, -128, 127)


def convolve(x: np.ndarray, weight: np.ndarray, stride, padding, groups: int) -> np.ndarray:
    """Convolution of int64 (batch, channel, freq, time); what lies outside is 0."""
    n_out, n_in, n_rows, n_columns = weight.shape
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    n_freq, n_time = (x.shape[2] - n_rows) // stride[0] + 1, (x.shape[3] - n_columns) // stride[1] + 1
    y = np.zeros((len(x), n_out, n_freq, n_time), dtype=np.int64)
    for out in range(n_out):
        first = out // (n_out // groups) * n_in
        for c in range(n_in):
            for i in range(n_rows):
                for j in range(n_columns):
                    window = x[
                        :, first + c, i : i + n_freq * stride[0] : stride[0], j : j + n_time * stride[1] : stride[1]
                    ]
                    y[:, out] += weight[out, c, i, j] * window
    return y


def bias_in_steps(bias: torch.Tensor, step: np.ndarray) -> np.ndarray:
    return np.rint(bias.float().numpy() / step).astype(np.int64)


@pytest.mark.parametrize("output_zero_point", [-128, -37, 127])
@pytest.mark.parametrize(
    ("c_in", "c_out", "kernel", "stride", "groups"),
    [
        (1, 8, 3, (2, 2), 1),
        (8, 12, 1, (1, 1), 1),
        (24, 24, 3, (1, 1), 24),
        (16, 16, 3, (2, 1), 16),
        (12, 8, 3, (1, 2), 4),
        (6, 5, 5, (1, 1), 1),
        (300, 6, 1, (1, 1), 1),
        (130, 4, 3, (1, 1), 1),
    ],
)
def test_convolutions_are_those_of_64_bit_integers(c_in, c_out, kernel, stride, groups, output_zero_point):
    rng = np.random.default_rng([c_in, c_out, kernel, output_zero_point + 128])
    x = random_activation(rng, (3, c_in, 9, 7))
    weight = rng.integers(-127, 128, (c_out, c_in // groups, kernel, kernel)).astype(np.int8)
    weight_scale = rng.uniform(0.0005, 0.01, c_out).astype(np.float16).astype(np.float32)
    bias = torch.from_numpy(rng.normal(0, 1, c_out).astype(np.float16))
    spread = weight_scale.mean() * x.scale * 60 * 70 * np.sqrt(weight[0].size)
    out = (float(np.float32(spread / 60)), output_zero_point)
    padding = (kernel // 2, kernel // 2)
    layer = IntConv(torch.from_numpy(weight), torch.from_numpy(weight_scale), bias, stride, padding, groups, out, None)

    step = weight_scale * np.float32(x.scale)
    sums = convolve(signed(x), weight.astype(np.int64), stride, padding, groups)
    sums += bias_in_steps(bias, step)[:, None, None]
    expected = to_levels(sums, (step / np.float32(out[0]))[:, None, None], output_zero_point)
    y = layer(x)
    assert (y.scale, y.zero_point, y.values.dtype) == (*out, torch.int8)
    assert np.array_equal(y.values.numpy(), expected)
    assert len(np.unique(expected)) > 50 or output_zero_point == 127  # neither all clamped nor all one level


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # said when oneDNN is switched
@pytest.mark.parametrize("n_clips", [1, 16, 33])
def test_convolutions_are_exact_without_onednn(n_clips):
    # As on builds without oneDNN, where batches from 16 go to NNPACK: its Winograd transforms round.
    rng = np.random.default_rng(9)
    x = random_activation(rng, (n_clips, 8, 20, 18))
    weight = rng.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)
    weight_scale, bias = torch.full((8,), 0.001), torch.zeros(8, dtype=torch.float16)
    out = (float(np.float32(x.scale * 1.3)), 0)
    layer = IntConv(torch.from_numpy(weight), weight_scale, bias, (1, 1), (1, 1), 1, out, None)
    step = weight_scale.numpy() * np.float32(x.scale)
    sums = convolve(signed(x), weight.astype(np.int64), (1, 1), (1, 1), 1)
    with torch.backends.mkldnn.flags(enabled=False):
        y = layer(x)
    assert np.array_equal(y.values.numpy(), to_levels(sums, (step / np.float32(out[0]))[:, None, None], 0))


def test_padding_stands_for_zero_whatever_the_zero_point():
    weight = torch.ones(1, 1, 3, 3, dtype=torch.int8)
    arguments = (torch.ones(1), torch.zeros(1, dtype=torch.float16), (1, 1), (1, 1), 1, (1.0, 0), None)
    for zero_point in (-128, -5, 0, 101, 127):
        x = QTensor(torch.full((1, 1, 3, 3), zero_point, dtype=torch.int8), 1.0, zero_point)
        assert not IntConv(weight, *arguments)(x).values.any()


def test_ties_go_to_even_and_the_ends_saturate():
    weight = torch.tensor([[[[1]]], [[[-1]]]], dtype=torch.int8)
    values = torch.tensor([-128, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 127], dtype=torch.int8)
    x = QTensor(values[None, None, None], 1.0, 0)
    zeros = torch.zeros(2, dtype=torch.float16)
    halves = IntConv(weight, torch.ones(2), zeros, (1, 1), (0, 0), 1, (2.0, 0), None)(x).values[0, :, 0]
    assert halves[0].tolist() == [-64, -2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2, 64]
    assert halves[1].tolist() == [64, 2, 2, 2, 1, 0, 0, 0, -1, -2, -2, -2, -64]
    doubled = IntConv(weight, torch.ones(2), zeros, (1, 1), (0, 0), 1, (0.5, 0), None)(x).values[0, :, 0]
    assert doubled[0].tolist() == [-128, -10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 10, 127]
    assert doubled[1, 0] == 127 and doubled[1, -1] == -128


def test_sums_beyond_24_bits_are_exact():
    # 255 * 127 * 600 is beyond 2**24: on the way to a small sum float32 would lose odd units.
    n = 600
    weight = torch.full((1, 2 * n, 1, 1), 127, dtype=torch.int8)
    weight[:, n:] = -127
    weight[0, -1] = -126
    x = QTensor(torch.full((1, 2 * n, 1, 2), 127, dtype=torch.int8), 1.0, -128)
    x.values[..., 1] -= 1
    layer = IntConv(weight, torch.ones(1), torch.zeros(1, dtype=torch.float16), (1, 1), (0, 0), 1, (4.0, 0), None)
    assert 255 * int(weight.abs().int().sum()) > EXACT_FLOAT32
    assert layer(x).values.flatten().tolist() == [64, 64]  # 255 and 254 quarters, 63.75 and 63.5


def test_the_first_layer_rounds_its_float_input_only_when_asked():
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.normal(0, 1, (2, 1, 8, 8)).astype(np.float32))
    weight = rng.integers(-127, 128, (4, 1, 3, 3)).astype(np.int8)
    scale = rng.uniform(0.001, 0.01, 4).astype(np.float16).astype(np.float32)
    bias = torch.from_numpy(rng.normal(0, 1, 4).astype(np.float16))
    common = (torch.from_numpy(weight), torch.from_numpy(scale), bias, (2, 2), (1, 1), 1, (0.05, -10))
    y = IntConv(*common, None)(x)
    real = nn.functional.conv2d(
        x.double(), torch.from_numpy(weight * scale[:, None, None, None]).double(), bias.double(), 2, 1
    )
    exact = (real / np.float32(0.05)).numpy() - 10
    sure = np.abs(exact - np.floor(exact) - 0.5) > 1e-4  # float32 may round what is nearer to a tie either way
    assert sure.mean() > 0.99
    assert np.array_equal(y.values.numpy()[sure], np.clip(np.rint(exact), -128, 127)[sure])

    constants = (float(np.float32(0.03)), 5)
    rounded = QTensor(quantize(x, *constants), *constants)
    assert torch.equal(IntConv(*common, constants)(x).values, IntConv(*common, None)(rounded).values)
    expected = np.clip(np.rint(x.numpy() / np.float32(0.03)) + 5, -128, 127)
    assert np.array_equal(rounded.values.numpy(), expected)


def test_quantize_rounds_half_to_even_and_clamps():
    x = torch.tensor([-1e9, -200.0, -1.5, -0.5, 0.5, 1.5, 2.5, 200.0, 1e9])
    assert quantize(x, 1.0, 0).tolist() == [-128, -128, -2, 0, 0, 2, 2, 127, 127]
    assert quantize(x, 1.0, 100).tolist() == [-128, -100, 98, 100, 100, 102, 102, 127, 127]
    assert quantize(x, 1.0, 0).dtype == torch.int8


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("zero_point", [-128, -3, 127])
def test_pools_are_sums_over_nine(stride, zero_point):
    rng = np.random.default_rng(5)
    x = random_activation(rng, (2, 6, 9, 7), zero_point=zero_point)
    layer = AvgPool(6, 3, stride, padding=1)
    out = (float(np.float32(x.scale * 0.9)), 4)
    y = IntAvgPool(layer, out)(x)
    sums = convolve(signed(x), np.ones((6, 1, 3, 3), dtype=np.int64), stride, (1, 1), 6)
    factor = np.float32(1 / 9) * np.float32(x.scale) / np.float32(out[0])
    assert np.array_equal(y.values.numpy(), to_levels(sums, factor, 4))
    # And they are what the float layer says, zeros of the padding included.
    real = layer(x.dequantize()).clamp(-132 * out[0], 123 * out[0])
    assert (y.dequantize() - real).abs().max() <= 0.501 * out[0]


def test_sums_of_all_pairs_are_the_nearest_level():
    rng = np.random.default_rng(6)
    every = torch.arange(-128, 128, dtype=torch.int8)
    for _ in range(20):
        a, b = (random_activation(rng, (1,)) for _ in range(2))
        a = a._replace(values=every[None, None, :, None].expand(1, 1, 256, 256))
        b = b._replace(values=every[None, None, None, :].expand(1, 1, 256, 256))
        out = (float(np.float32(rng.uniform(0.3, 1.2) * (a.scale + b.scale))), int(rng.integers(-128, 128)))
        y = IntAdd(out)(a, b)
        exact = (signed(a) * a.scale + signed(b) * b.scale) / out[0] + out[1]
        sure = np.abs(exact - np.floor(exact) - 0.5) > 1e-4
        assert sure.mean() > 0.99
        assert np.array_equal(y.values.numpy()[sure], np.clip(np.rint(exact), -128, 127)[sure])
        assert np.abs(y.values.numpy() - np.clip(exact, -128, 127)).max() < 0.5002
        assert (y.scale, y.zero_point) == out


def response_reference(x: QTensor, gamma, square, power, response, output) -> tuple[np.ndarray, np.ndarray]:
    """Levels, and which channels are far enough from ties of the float part, (batch, channel)."""
    (scale, shift), d = output, signed(x)
    n_positions = x.values.shape[2] * x.values.shape[3]
    step = np.float32(x.scale)
    squares = to_levels(d * d, step * step / np.float32(square[0]), square[1]) - square[1]
    total = squares.sum(axis=(2, 3), keepdims=True)
    factor = np.float32(square[0]) / np.float32(power[0] * n_positions)
    powers = to_levels(total, factor, power[1]) - power[1]
    norm = np.sqrt(powers * power[0])
    relative = norm / (norm.mean(axis=1, keepdims=True) + EPS)
    per_one = round(1 / response[0])
    exact = gamma * relative * per_one  # 1 + gamma * n in steps, without the 1
    sure = np.abs(exact - np.floor(exact) - 0.5) > 1e-3
    responses = np.clip(np.rint(exact) + per_one + response[1], -128, 127).astype(np.int64) - response[1]
    values = to_levels(d * responses, step * np.float32(response[0]) / np.float32(scale), -128 + max(shift, 0))
    return np.maximum(values + min(shift, 0), -128), sure[:, :, 0, 0]


@pytest.mark.parametrize("beta", [-1.1, -0.05, 0.0, 0.4])
@pytest.mark.parametrize("gamma", [-0.9, -0.3, 0.0, 0.7, 2.1])
def test_response_norm_is_that_of_64_bit_integers(gamma, beta):
    rng = np.random.default_rng([int(10 * gamma) + 50, int(100 * beta) + 200])
    x = random_activation(rng, (3, 24, 8, 6), scale=float(np.float32(0.02)), zero_point=int(rng.integers(-100, 0)))
    quiet = torch.linspace(0.05, 1, 24)[:, None, None]  # channels of all levels
    x = x._replace(
        values=((x.values - float(x.zero_point)) * quiet + x.zero_point).round().clamp(-128, 127).to(torch.int8)
    )
    real = x.dequantize().double()
    squares = real * real
    norm = squares.mean(dim=(2, 3), keepdim=True).sqrt()
    responses = 1 + gamma * norm / (norm.mean(dim=1, keepdim=True) + 1e-6)
    expected = torch.relu(real * responses + beta)

    def of_range(values) -> tuple[float, int]:
        return float(np.float32(values.max() / 255)), -128

    low, high = min(responses.min().item(), 0), max(responses.max().item(), 1)
    per_one = int(255 / (high - low))
    response = (float(np.float32(1 / per_one)), -128 - round(low * per_one))
    scale = float(np.float32((expected.max().item() + max(-beta, 0)) / 255))
    arguments = (gamma, of_range(squares), of_range(norm * norm), response, (scale, round(beta / scale)))
    y = IntResponseNorm(*arguments)(x)
    reference, sure = response_reference(x, *arguments)
    assert sure.mean() > 0.9
    assert np.array_equal(y.values.numpy()[sure], reference[sure])
    assert (y.scale, y.zero_point) == (scale, -128)
    # What it stands for: steps of the response at the largest values, and rounded powers in quiet channels.
    worst = real.abs().max().item() * (0.5 / per_one + abs(gamma) * 0.1) + 2 * scale
    assert (y.dequantize() - expected).abs().max() <= worst
    assert (y.values == -128).any() and len(y.values.unique()) >= 10


def test_response_norm_of_silence_is_the_bias():
    x = QTensor(torch.full((2, 4, 3, 3), 7, dtype=torch.int8), 0.1, 7)
    for beta, expected in ((13, 13), (0, 0), (-13, 0)):
        y = IntResponseNorm(0.5, (0.01, -128), (0.01, -128), (1 / 100, -128), (0.02, beta))(x)
        assert (y.values == -128 + expected).all()


def test_the_global_mean_is_no_multiple_of_a_step():
    rng = np.random.default_rng(8)
    x = random_activation(rng, (5, 10, 16, 8))
    y = IntGlobalMean()(x)
    exact = signed(x).mean(axis=(2, 3)) * x.scale
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), exact, rtol=1e-6, atol=1e-7)
    n_steps = y.numpy() / x.scale
    assert np.abs(n_steps - np.rint(n_steps)).max() > 0.1


# ---- overflow on CPUs that add pairs of products in 16 bits ---------------------------------------------------------


def largest_pair_sum(weight: torch.Tensor) -> int:
    """Largest magnitude of a sum of two products that a kernel may form: any two weights of one output channel."""
    magnitudes = []
    for sign in (1, -1):
        flat = (sign * weight.flatten(1).int()).clamp_min(0)
        top = flat.topk(min(2, flat.shape[1]), dim=1).values
        magnitudes.append(255 * int(top.sum(dim=1).max()))
    return max(magnitudes)


def test_pairs_of_products_fit_16_bits_with_the_reduced_range_and_not_with_the_full_one():
    assert largest_pair_sum(torch.full((1, 2, 1, 1), 63, dtype=torch.int8)) <= 32767
    assert largest_pair_sum(torch.full((1, 2, 1, 1), -63, dtype=torch.int8)) <= 32768
    assert largest_pair_sum(torch.full((1, 2, 1, 1), 127, dtype=torch.int8)) > 32767
    # What such a CPU makes of it: the pair saturates, and the sum is another.
    x, weight = np.array([255, 255], dtype=np.int64), np.array([127, 127], dtype=np.int64)
    assert np.clip((x * weight).sum(), -32768, 32767) != (x * weight).sum()


@pytest.mark.parametrize(
    ("config", "largest"),
    [(QuantConfig(reduced_range=True), 63), (QuantConfig(limit_pairs=False), 127)],
    ids=["reduced range", "no limit"],
)
def test_weights_are_int8_within_their_range(config, largest):
    layers = [module for module in convert(prepared(config=config)).modules() if isinstance(module, IntConv)]
    assert len(layers) == 12
    overflows = 0
    for layer in layers:
        assert layer.weight.dtype == torch.int8
        per_channel = layer.weight.int().abs().amax(dim=(1, 2, 3))
        assert (per_channel == largest).all()  # every channel uses its range: scales are per channel
        overflows += largest_pair_sum(layer.weight) > 32767
    assert (overflows == 0) == config.reduced_range


def saturating_sums(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """What vpmaddubsw and vpmaddwd make of uint8 activations (n,) and each channel of int8 weights (channel, n)."""
    products = np.pad(x.astype(np.int64) * weight, ((0, 0), (0, weight.shape[1] % 2)))
    pairs = products.reshape(len(weight), -1, 2).sum(axis=2)
    return np.clip(pairs, -32768, 32767).sum(axis=1)


@pytest.mark.parametrize("limit", [True, False])
def test_by_default_no_pair_that_kernels_add_in_16_bits_can_overflow(limit):
    config = QuantConfig(quantize_input=True, limit_pairs=limit)
    layers = [module for module in convert(prepared(config=config)).modules() if isinstance(module, IntConv)]
    rng, differing = np.random.default_rng(0), 0
    for layer in layers:
        if layer.groups == len(layer.weight):  # depthwise kernels add in 32 bits
            continue
        weight = layer.weight.permute(0, 2, 3, 1).flatten(1).numpy()  # the order that kernels read channels last in
        n = weight.shape[1]
        for x in (np.full(n, 255), rng.integers(0, 256, n)):
            differing += not np.array_equal(saturating_sums(x, weight), (x * weight.astype(np.int64)).sum(axis=1))
    assert (differing == 0) == limit


def test_limiting_weakens_the_pairs_that_overflow_and_nothing_else():
    weight = torch.tensor([[127, 127, 100, 28], [100, 29, -127, -127], [-127, 127, 64, 64], [-2, -127, 5, 127]])
    expected = torch.tensor([[64, 64, 100, 28], [99, 29, -64, -64], [-127, 127, 64, 64], [-1, -127, 3, 125]])
    assert torch.equal(limit_pairs(weight[:, :, None, None])[:, :, 0, 0], expected)
    odd = torch.full((1, 3, 1, 3), 127)  # nine weights, channels first: the last has no partner
    limited = limit_pairs(odd)[0, :, 0].T.flatten().tolist()
    assert limited == [64, 64, 64, 64, 64, 64, 64, 64, 127]
    assert torch.equal(limit_pairs(odd.float()).int(), limit_pairs(odd))


# ---- whole networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(True, True)], ids=["default", "reduced, input too"])
def test_every_converted_layer_gives_the_levels_of_the_fake_quantized_one(config):
    ready, x = prepared(config=config), spectrograms()
    converted = convert(ready)
    calls = []
    for name, module in ready.named_modules():
        if isinstance(module, Rounding) and hasattr(module, "convert"):
            module.register_forward_hook(lambda _module, inputs, y, name=name: calls.append((name, inputs, y)))
    with torch.no_grad():
        logits = ready(x)
    integers = {id(x): x}  # of the fake-quantized tensors
    assert len(calls) == 19
    for name, inputs, y in calls:
        out = converted.get_submodule(name)(*[integers[id(value)] for value in inputs])
        if not isinstance(out, QTensor):
            torch.testing.assert_close(out, y, rtol=1e-5, atol=1e-5)
            assert y is logits
            continue
        levels = torch.round(y / out.scale) + out.zero_point
        off = (levels - out.values).abs()
        # A bias is rounded to steps of the sums, which float products do not know: values near a tie may differ.
        assert off.max() <= 1, name
        assert off.mean() <= 5e-3, name
        integers[id(y)] = out._replace(values=levels.to(torch.int8))
