"""Layers that reorder, part and join channels, and means over one axis: in float and in integers."""

import pytest
import torch
from torch import Tensor

from models.layers.axis_mean import AxisMean, FakeAxisMean
from models.layers.channel_shuffle import ChannelShuffle, FakeChannelShuffle
from models.layers.concat import Concat, FakeConcat
from models.layers.core import Place, QTensor, QuantConfig
from models.layers.split import FakeSplit, Split
from tests.golden_inputs import wave


def levels(shape: tuple[int, ...], key: str, scale: float, zero_point: int) -> QTensor:
    return QTensor(wave(shape, key, 60).round().clamp(-128, 127).to(torch.int8), scale, zero_point)


def prepared(fake: type, layer: torch.nn.Module, result: Tensor | None = None) -> torch.nn.Module:
    fake = fake(layer, QuantConfig(), Place())
    if result is not None:
        fake.output.set_range(*(value.item() for value in result.aminmax()))
    return fake


def test_a_shuffle_of_halves_interleaves_them(shared):
    data = torch.load(shared("golden/easy_dcase_task1/blocks.pt"), weights_only=True)
    x = torch.arange(8.0).view(1, 8, 1, 1).expand(2, 8, 3, 5)
    assert ChannelShuffle(2)(x)[0, :, 0, 0].tolist() == data["shuffle_order"] == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_shuffle_is_pytorchs_and_moves_integers():
    x = levels((2, 12, 3, 5), "x", 0.1, 3)
    for n in (2, 3, 4):
        y = prepared(FakeChannelShuffle, ChannelShuffle(n)).convert()(x)
        assert torch.equal(y.dequantize(), torch.nn.functional.channel_shuffle(x.dequantize(), n))
        assert (y.scale, y.zero_point) == (0.1, 3)
    with pytest.raises(ValueError, match="5 groups do not divide 12 channels"):
        ChannelShuffle(5)(x.values)


def test_parts_of_a_split_are_its_channels():
    x = levels((2, 12, 3, 5), "x", 0.1, 3)
    parts = prepared(FakeSplit, Split(3)).convert()(x)
    assert torch.equal(torch.cat([part.dequantize() for part in parts], dim=1), x.dequantize())
    assert [torch.equal(a, b.dequantize()) for a, b in zip(Split(3)(x.dequantize()), parts, strict=True)] == [True] * 3
    with pytest.raises(ValueError, match="12 channels cannot be split into 5"):
        Split(5)(x.values)


def test_what_is_joined_takes_one_scale():
    parts = [levels((2, 4, 3, 5), "a", 0.1, 3), levels((2, 6, 3, 5), "b", 0.02, -50)]
    real = [part.dequantize() for part in parts]
    fake = prepared(FakeConcat, Concat(), torch.cat(real, dim=1))
    y = fake.convert()(*parts)
    assert torch.equal(y.dequantize(), fake(*real)) and y.values.dtype == torch.int8
    torch.testing.assert_close(y.dequantize(), torch.cat(real, dim=1), rtol=0, atol=0.501 * y.scale)


@pytest.mark.parametrize("dim", [2, 3])
def test_means_are_rounded_once(dim):
    x = levels((2, 4, 7, 5), "x", 0.1, 3)
    mean = x.dequantize().double().mean(dim=dim, keepdim=True)
    torch.testing.assert_close(AxisMean(dim)(x.dequantize().double()), mean)
    y = prepared(FakeAxisMean, AxisMean(dim), mean).convert()(x)
    torch.testing.assert_close(y.dequantize().double(), mean, rtol=0, atol=0.501 * y.scale)
