import pytest
import torch
from torch import nn

from helpers.export.parity import compare, integer_tolerance
from helpers.quantization import calibrate, convert, overflowing_layers, prepare
from models.layers.conv_unit import IntConv
from models.layers.core import QuantConfig
from models.layers.weights import count_overflows, limit_pairs
from tests.golden_inputs import wave
from tests.test_quantization import network


@pytest.mark.parametrize("n_clips", [1, 2, 6, 17, 200])
def test_one_clip_on_a_tie_passes_and_a_wrong_file_does_not(n_clips):
    step = 0.08
    reference = wave((n_clips, 10), "logits", 3.0)
    one, tolerance = reference.clone(), integer_tolerance(n_clips, step)
    one[0] += step / 5
    assert compare("file", one, "integers", reference, ["a"] * n_clips, tolerance).passes
    wrong = reference + 0.028 * torch.where(wave((n_clips, 10), "sign") > 0, 1, -1)  # what saturation did, in the mean
    assert not compare("file", wrong, "integers", reference, ["a"] * n_clips, tolerance).passes


def test_pairs_that_can_overflow_are_counted_as_the_cpu_adds_them():
    weight = torch.zeros(2, 3, 1, 3, dtype=torch.int8)  # in the order of (freq, time, input channel): 9 and a zero
    weight[0, 0, 0, 0], weight[0, 1, 0, 0] = 100, 28  # positions 0 and 1: 128 * 255 > 32767
    weight[0, 2, 0, 0], weight[0, 0, 0, 1] = -100, -29  # 2 and 3
    weight[1, 0, 0, 0], weight[1, 1, 0, 0] = 127, -127  # opposite signs cancel
    weight[1, 1, 0, 1], weight[1, 2, 0, 1] = 100, 100  # 4 and 5
    weight[1, 2, 0, 2] = 127  # 8: alone
    assert count_overflows(weight) == 2
    assert count_overflows(limit_pairs(weight)) == 0


def saturating(layer: IntConv, x: torch.Tensor) -> torch.Tensor:
    """Largest difference that adding pairs of products in saturating 16 bits makes to the sums of uint8 columns."""
    flat = layer.weight.int().permute(0, 2, 3, 1).flatten(1)
    flat = nn.functional.pad(flat, (0, flat.shape[1] % 2))
    products = flat[None] * x[:, None, : flat.shape[1]]  # (column, channel, weight)
    pairs = products.unflatten(2, (-1, 2)).sum(dim=3)
    return (pairs - pairs.clamp(-32768, 32767)).abs().max()


@pytest.mark.parametrize("quantize_input", [False, True])
@pytest.mark.parametrize("limit", [False, True])
def test_limited_networks_have_no_sum_that_saturates(limit, quantize_input):
    model = network(base_channels=24, n_blocks=(2,))
    for i, parameter in enumerate(model.parameters()):  # pairs of large weights, as training makes them
        if parameter.ndim == 4:
            parameter.data = parameter.data.abs() + wave(tuple(parameter.shape), str(i), 0.02)
    ready = prepare(model, QuantConfig(limit_pairs=limit, quantize_input=quantize_input), wave((1, 1, 32, 16), "x"))
    calibrate(ready, lambda: [wave((2, 1, 32, 16), "x")], "minmax")
    integers = convert(ready)
    layers = [name for name, _ in overflowing_layers(integers)]
    assert bool(layers) == (not limit)
    assert ("in_c.0" in layers) == (quantize_input and not limit)
    columns = torch.full((1, 1 << 12), 255, dtype=torch.int32)
    for name, layer in integers.named_modules():
        if isinstance(layer, IntConv) and layer.groups == 1 and not layer.float_part:
            assert bool(saturating(layer, columns) > 0) == (name in layers)
