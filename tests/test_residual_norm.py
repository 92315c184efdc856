"""Residual norms against the published ones, against plain loops, and in 8 bits."""

import pytest
import torch

from helpers.quantization import QuantizationError, prepare
from models.layers.adaptive_residual_norm import AdaptiveResidualNorm
from models.layers.core import Place, QTensor, QuantConfig
from models.layers.residual_norm import FakeResidualNorm, ResidualNorm
from tests.golden_inputs import fill_state, wave
from tests.students import batch_of


@pytest.fixture(scope="module")
def blocks(shared) -> dict:
    return torch.load(shared("golden/easy_dcase_task1/blocks.pt"), weights_only=True)


def test_match_the_published_ones(blocks):
    x = batch_of(blocks["input_shape"], blocks["input_key"])
    torch.testing.assert_close(ResidualNorm()(x), blocks["resnorm"], rtol=0, atol=1e-5)
    norm = AdaptiveResidualNorm(8)
    assert [[name, list(value.shape)] for name, value in norm.state_dict().items()] == blocks["adaresnorm_manifest"]
    torch.testing.assert_close(norm(x), blocks["adaresnorm_default"], rtol=0, atol=1e-5)
    torch.testing.assert_close(fill_state(norm)(x), blocks["adaresnorm"], rtol=0, atol=1e-5)


def test_every_band_of_every_clip_is_normalised_by_itself():
    x = wave((2, 3, 4, 7), "x").double() * torch.tensor([1.0, 30, 0.1, 4])[:, None]
    y, adaptive = ResidualNorm(0.25, 1e-3)(x), AdaptiveResidualNorm(3, learns=False).double()
    assert not any(parameter.requires_grad for parameter in adaptive.parameters())
    for clip in range(2):
        for band in range(4):
            values = x[clip, :, band].numpy()
            normed = (values - values.mean()) / (values.var(ddof=1) + 1e-3) ** 0.5
            torch.testing.assert_close(y[clip, :, band], torch.from_numpy(0.25 * values + normed))
            normed = (values - values.mean()) / (values.var(ddof=1) + 1e-5) ** 0.5
            torch.testing.assert_close(adaptive(x)[clip, :, band], torch.from_numpy((values + normed) / 2))


def test_silence_stays_finite():
    assert ResidualNorm()(torch.zeros(1, 2, 3, 4)).eq(0).all()


def test_integers_differ_from_float_by_one_rounding():
    fake = FakeResidualNorm(ResidualNorm(), QuantConfig(), Place())
    x = QTensor(wave((2, 5, 6, 9), "q", 40).round().clamp(-128, 127).to(torch.int8), 0.03, -7)
    real = x.dequantize()
    fake.output.set_range(*(value.item() for value in ResidualNorm()(real).aminmax()))
    y = fake.convert()(x)
    torch.testing.assert_close(y.dequantize(), ResidualNorm()(real), rtol=0, atol=0.5001 * y.scale)
    assert (y.dequantize() - fake(real)).abs().max() <= 1.001 * y.scale
    assert len(y.values.unique()) > 50


def test_an_adaptive_one_is_refused_by_name_in_8_bits():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), AdaptiveResidualNorm(4), torch.nn.AdaptiveAvgPool2d(1))
    with pytest.raises(QuantizationError, match=r"layer 1 \(AdaptiveResidualNorm\) has no 8-bit form"):
        prepare(model, QuantConfig(), wave((1, 1, 8, 8), "x"))
