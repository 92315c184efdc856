import pytest
import torch
from torch import nn

from models.layers.core import Place, QTensor, QuantConfig
from models.layers.silu import FakeSilu
from models.layers.sub_spectral_norm import FakeSubSpectralNorm, SubSpectralNorm, sub_spectral_norm
from tests.golden_inputs import fill_state, wave
from tests.students import batch_of


def test_matches_the_published_one(shared):
    data = torch.load(shared("golden/easy_dcase_task1/blocks.pt"), weights_only=True)
    x, norm = batch_of(data["input_shape"], data["input_key"]), fill_state(sub_spectral_norm(8, 4))
    assert [[name, list(value.shape)] for name, value in norm.state_dict().items()] == data["ssn4_manifest"]
    torch.testing.assert_close(norm.eval()(x), data["ssn4_eval"], rtol=0, atol=1e-5)
    torch.testing.assert_close(norm.train()(x), data["ssn4_train"], rtol=0, atol=1e-5)
    torch.testing.assert_close(norm.norm.running_mean, data["ssn4_running_mean_after"], rtol=0, atol=1e-5)
    torch.testing.assert_close(norm.norm.running_var, data["ssn4_running_var_after"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_is_a_batch_norm_for_each_band(training):
    norm, x = fill_state(SubSpectralNorm(3, 4)).train(training), wave((2, 3, 8, 5), "x", 2)
    alone = [nn.BatchNorm2d(3).train(training) for _ in range(4)]
    for band, one in enumerate(alone):
        one.load_state_dict({
            name.removeprefix("_bn."): value[band::4] if value.ndim else value
            for name, value in norm.state_dict().items()
        })  # fmt: skip
    y = torch.cat([one(part) for one, part in zip(alone, x.split(2, dim=2), strict=True)], dim=2)
    torch.testing.assert_close(norm(x), y, rtol=1e-5, atol=1e-6)
    for band, one in enumerate(alone):
        torch.testing.assert_close(norm.norm.running_var[band::4], one.running_var)


def test_one_band_is_a_batch_norm_and_bands_must_fit():
    norm = fill_state(sub_spectral_norm(3, 1)).eval()
    x = wave((2, 3, 8, 5), "x")
    assert torch.equal(norm(x), norm._bn(x))
    assert list(norm.state_dict()) == list(sub_spectral_norm(3, 2).state_dict())
    with pytest.raises(ValueError, match="3 bands do not divide 8 rows"):
        SubSpectralNorm(3, 3)(x)


def levels(shape: tuple[int, ...]) -> QTensor:
    return QTensor(wave(shape, "q", 60).round().clamp(-128, 127).to(torch.int8), 0.05, 9)


def test_8_bits_follow_the_running_statistics():
    layer, x = fill_state(SubSpectralNorm(3, 4)).eval(), levels((2, 3, 8, 5))
    real = layer(x.dequantize())
    fake = FakeSubSpectralNorm(layer, QuantConfig(), Place()).train()
    assert fake.state_dict().keys() - layer.state_dict().keys() == {"output.low", "output.high"}
    fake.output.set_range(real.min().item(), real.max().item())
    fake.norm_frozen = True
    before = fake.norm.running_mean.clone()
    y = fake.convert()(x)
    torch.testing.assert_close(y.dequantize(), real, rtol=0, atol=0.501 * y.scale)
    torch.testing.assert_close(fake(x.dequantize()), y.dequantize(), rtol=0, atol=1.001 * y.scale)
    assert torch.equal(fake.norm.running_mean, before)
    fake.norm_frozen = False
    fake(x.dequantize())
    assert not torch.equal(fake.norm.running_mean, before)


def test_silu_is_a_table_of_its_levels():
    fake, x = FakeSilu(nn.SiLU(), QuantConfig(), Place()), levels((2, 3, 8, 5))
    real = nn.functional.silu(x.dequantize())
    fake.output.set_range(real.min().item(), real.max().item())
    y = fake.convert()(x)
    assert torch.equal(y.dequantize(), fake(x.dequantize())) and y.values.dtype == torch.int8
