import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.checkpoints.checkpoint import load_model
from helpers.quantization import calibrate
from models.layers.add import Add, FakeAdd
from models.layers.avg_pool import AvgPool, FakeAvgPool
from models.layers.conv_unit import ConvUnit, FakeConvUnit
from models.layers.core import ActivationQuantizer, Place, QuantConfig
from models.layers.fold import fold
from models.layers.global_mean import FakeGlobalMean, GlobalMean
from models.layers.response_norm import FakeResponseNorm, ResponseNorm, ResponseQuantizer
from models.layers.weights import weight_scale
from tests.golden_inputs import wave
from tests.test_cp_mobile import inputs_of, model_of
from tests.test_quantization import CHECKPOINT

CONFIG = QuantConfig()
FIRST, LATER = Place(reads_float=True), Place()


@dataclass(frozen=True)
class FineConfig(QuantConfig):
    """Weights in steps so small that straight-through gradients must be those of the float layer."""

    @property
    def weight_max(self) -> int:
        return 1 << 14


def unit_of(c_in=6, c_out=8, kernel=3, relu=True, **kwargs) -> ConvUnit:
    """A unit whose norm has moved away from where norms begin."""
    torch.manual_seed(1)
    unit = ConvUnit(c_in, c_out, kernel, relu=relu, **kwargs)
    with torch.no_grad():
        unit[1].weight.copy_(torch.rand(c_out) + 0.5)
        unit[1].weight[0] *= -1
        unit[1].bias.copy_(torch.randn(c_out) * 0.3)
        unit[1].running_mean.copy_(torch.randn(c_out) * 0.2)
        unit[1].running_var.copy_(torch.rand(c_out) + 0.5)
    return unit


def gradients(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    module.zero_grad()
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    y = module(*inputs)
    (y * wave(tuple(y.shape), "slope")).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return found | {f"input {i}": x.grad for i, x in enumerate(inputs)}


def ranged(module: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    """The module with ranges that are the extremes of its activations for these inputs."""

    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = module

        def forward(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return self.layer(*inputs)

    calibrate(Once(), lambda: [inputs], "minmax")
    return module


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


# ---- folding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpmobile_default", "cpmobile_small", "cpmobile_large"])
def test_folding_matches_the_published_fused_network(golden, name):
    data = golden(name)
    model = model_of(data).eval()
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert list(folded.state_dict()) == data["fused_names"]
    assert [list(value.shape) for value in folded.state_dict().values()] == data["fused_shapes"]
    assert sum(parameter.numel() for parameter in folded.parameters()) == data["n_params_fused"]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    # Float32 sums of other products: the published system says 6e-6 for its own two versions on real clips.
    torch.testing.assert_close(folded(inputs_of(data)), data["fused_logits"], rtol=0, atol=1e-4)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


# ---- activations ----------------------------------------------------------------------------------------------------


def test_ranges_include_zero_and_zero_is_a_level():
    for x in (torch.linspace(2, 3, 9), torch.linspace(-3, -2, 9), torch.linspace(-0.3, 5, 9), torch.zeros(9)):
        quantizer = ranged(ActivationQuantizer(), x)
        y = quantizer(x)
        assert quantizer.low <= 0 <= quantizer.high
        assert quantizer(torch.zeros(1)).item() == 0
        # Half a step, and what the rounding of the zero point takes from one end.
        assert (y - x).abs().max() <= quantizer.params()[0] * 1.001


@pytest.mark.parametrize("make", [ActivationQuantizer, ResponseQuantizer])
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_pass_changes_no_range(make, training):
    quantizer = ranged(make(), torch.linspace(-1, 3, 20)).train(training)
    before = buffers(quantizer)
    y = quantizer(torch.linspace(-100, 100, 20))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.named_buffers())
    assert y.abs().max() < 4  # the range it was given


def test_the_gradient_passes_inside_the_range_only():
    quantizer = ranged(ActivationQuantizer(), torch.tensor([-1.0, 3.0]))
    x = torch.tensor([-9.0, -1.5, -0.9, 0.0, 0.013, 2.9, 3.5, 9.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.7, 1.3), (0.0, 5.2), (-3.1, 1.0), (-40.0, 80.0)])
def test_one_is_a_level_of_responses(low, high):
    quantizer = ResponseQuantizer().eval()
    quantizer.low.fill_(low)
    quantizer.high.fill_(high)
    scale, zero_point = quantizer.constants()
    assert 1 / scale == pytest.approx(round(1 / scale), rel=1e-6)
    assert -128 <= zero_point <= 127
    assert zero_point + round(1 / scale) <= 127  # 1 can be held
    assert quantizer(torch.ones(1)).item() == 1
    ends = torch.tensor([low, max(high, 1)])
    assert (quantizer(ends) - ends).abs().max() <= scale


def test_responses_far_below_zero_still_have_a_zero_point_of_8_bits():
    quantizer = ResponseQuantizer().eval()
    quantizer.low.fill_(-300.0)
    quantizer.high.fill_(1.0)
    assert -128 <= quantizer.constants()[1] <= 127
    assert quantizer(torch.ones(1)).item() == 1


# ---- convolution ----------------------------------------------------------------------------------------------------


def test_weight_scales_are_half_floats_per_channel():
    weight = wave((5, 4, 3, 3), "weight") * torch.tensor([1e-9, 0.01, 1, 30, 0])[:, None, None, None]
    scale = weight_scale(weight, 127)
    assert torch.equal(scale, scale.half().float())
    largest = weight.abs().amax(dim=(1, 2, 3))
    assert torch.allclose(scale[1:4], largest[1:4] / 127, rtol=2**-10)  # the precision of 16 bits
    assert (largest / scale <= 127.5).all()  # the largest weight stays within the range
    assert torch.isfinite(1 / scale).all()


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("layout", [{}, {"stride": (2, 1)}, {"c_in": 8, "groups": 8}, {"kernel": 1}])
def test_without_rounding_a_unit_is_the_float_unit(relu, layout):
    unit = unit_of(relu=relu, **layout)
    fake = FakeConvUnit(copy.deepcopy(unit), CONFIG, FIRST)
    fake.rounding = fake.output.rounding = False
    x = wave((4, unit[0].in_channels, 9, 7), "x")
    for mode in (True, False):
        unit.train(mode), fake.train(mode)
        ours, theirs = gradients(fake, (x,)), gradients(unit, (x,))
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4, msg=name)
        torch.testing.assert_close(fake(x), unit(x), rtol=1e-5, atol=1e-5)
        for name, value in unit.named_buffers():
            torch.testing.assert_close(fake.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduced_range", [False, True])
def test_in_eval_mode_a_unit_is_a_convolution_with_rounded_folded_weights(reduced_range):
    unit, config = unit_of().eval(), QuantConfig(reduced_range=reduced_range, limit_pairs=False)
    fake = FakeConvUnit(copy.deepcopy(unit), config, LATER).eval()
    x = wave((4, 6, 9, 7), "x")
    fake.output.rounding = False
    conv, _relu = fold(nn.Sequential(unit))[0][0]
    q_max = 63 if reduced_range else 127
    scale = (conv.weight.abs().amax(dim=(1, 2, 3), keepdim=True) / q_max).half().float()
    # Near enough for a product that lies between two levels to be rounded the other way.
    values = torch.round(conv.weight / scale)
    assert values.abs().max() == q_max
    expected = F.relu(F.conv2d(x, values * scale, conv.bias.half().float(), padding=1))
    torch.testing.assert_close(fake(x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["learning", "frozen", "eval"])
def test_straight_through_gradients_are_those_of_the_float_unit(mode):
    unit = unit_of()
    fake = FakeConvUnit(copy.deepcopy(unit), FineConfig(limit_pairs=False), LATER)
    fake.output.rounding = False
    unit.train(mode == "learning"), fake.train(mode != "eval")
    fake.norm_frozen = mode == "frozen"
    x = wave((4, 6, 9, 7), "x")
    ours, theirs = gradients(fake, (x,)), gradients(unit, (x,))
    for name in theirs:
        largest = theirs[name].abs().max()
        # Weights are off by up to half of 2^-13 of the largest, sums of 54 products by a little more.
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-3 * largest.item(), msg=name)


def test_limited_pairs_round_alike_in_training_and_on_the_target_and_their_gradient_passes():
    unit = unit_of(kernel=1)
    with torch.no_grad():
        unit[0].weight[:, :2] = unit[0].weight[:, :2].abs().amax(dim=1, keepdim=True) + 1  # pairs that overflow
    fake = ranged(FakeConvUnit(unit, CONFIG, LATER), wave((4, 6, 9, 7), "x")).eval()
    fake.output.rounding = False
    target = fake.convert()
    x = wave((4, 6, 9, 7), "other")
    weight = target.weight.float() * target.weight_scale[:, None, None, None]
    expected = F.relu(F.conv2d(x, weight, target.bias.float()))
    torch.testing.assert_close(fake(x), expected, rtol=0, atol=1e-4)
    assert gradients(fake, (x,))["0.weight"][:, :2].abs().sum() > 0
    wanted = unit[0].weight * (unit[1].weight / (unit[1].running_var + unit[1].eps).sqrt())[:, None, None, None]
    # Halving the pair would be off by half of it; wider steps keep it.
    assert (weight - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_the_norm_learns_until_it_is_frozen():
    x = wave((4, 6, 9, 7), "x", 3.0)
    fake = ranged(FakeConvUnit(unit_of(), CONFIG, LATER), x).train()
    before = buffers(fake)
    fake(x)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert not torch.equal(buffers(fake)[name], before[name]), name
    fake.norm_frozen = True
    before = buffers(fake)
    y = fake(x * 2)
    assert all(torch.equal(value, before[name]) for name, value in fake.named_buffers())
    assert torch.equal(y, fake.eval()(x * 2))  # statistics of the batch no longer count


def test_ranges_behind_a_relu_spend_no_level_on_negative_values():
    x = wave((4, 6, 9, 7), "x")
    fake = ranged(FakeConvUnit(unit_of(), CONFIG, LATER), x)
    assert fake.output.low == 0
    assert fake.output.constants()[1] == -128
    assert fake(x).min() == 0
    without = ranged(FakeConvUnit(unit_of(relu=False), CONFIG, LATER), x)
    assert without.output.low < 0


@pytest.mark.parametrize("gain", [0.0, 1e-43, 1e-12])
def test_switched_off_channels_are_their_bias_and_train(gain):
    unit = unit_of()
    with torch.no_grad():
        unit[1].weight[2] = gain
        unit[1].bias[2] = 0.25
    x = wave((4, 6, 9, 7), "x")
    fake = ranged(FakeConvUnit(unit, CONFIG, LATER), x).train()
    for _ in range(3):
        assert all(torch.isfinite(value).all() for value in gradients(fake, (x,)).values())
    y = fake.eval()(x)
    assert torch.isfinite(y).all()
    assert (y[:, 2] - 0.25).abs().max() <= fake.output.params()[0]
    converted = fake.convert()
    assert not converted.weight[2].any()


def test_rounding_does_not_blow_up_the_gradient_of_a_nearly_switched_off_channel():
    unit = unit_of()
    with torch.no_grad():
        unit[1].weight[2] = 1e-6  # its folded weights all round to 0
        unit[1].bias[2] = 0.25
    fake = FakeConvUnit(copy.deepcopy(unit), CONFIG, LATER).train()
    fake.output.rounding = False
    x = wave((4, 6, 9, 7), "x")
    ours, theirs = gradients(fake, (x,))["1.weight"][2], gradients(unit.train(), (x,))["1.weight"][2]
    assert abs(ours) <= 10 * abs(theirs)


def test_the_first_layer_is_that_of_the_published_int8_network(shared):
    model = load_model(shared(CHECKPOINT)).model
    guide = torch.load(shared("golden/cpjku_dcase23/checkpoint_int8_guide.pt"), weights_only=True)
    unit = FakeConvUnit(model.in_c[0], QuantConfig(), FIRST).eval()
    unit.output.high.fill_(1)
    layer = unit.convert()
    theirs = torch.tensor(guide["first_conv_weight_int"], dtype=torch.float64).view(8, 1, 3, 3)
    their_scale = guide["first_conv_weight_scales"].double().flatten()
    # They spread the largest weight over 127.5 steps, we over 127; each rounds to its nearest step.
    torch.testing.assert_close(layer.weight_scale.double() / their_scale, torch.full_like(their_scale, 127.5 / 127),
                               rtol=1e-3, atol=0)  # fmt: skip
    ours = layer.weight * layer.weight_scale.double()[:, None, None, None]
    room = 0.501 * (layer.weight_scale.double() + their_scale)[:, None, None, None]
    assert ((ours - theirs * their_scale[:, None, None, None]).abs() <= room).all()
    assert (layer.weight - theirs).abs().max() <= 1
    torch.testing.assert_close(layer.bias.float(), guide["first_conv_bias"].float(), rtol=2**-11, atol=1e-6)


# ---- the other layers -----------------------------------------------------------------------------------------------


def response_norm(gamma: float, beta: float) -> ResponseNorm:
    layer = ResponseNorm()
    with torch.no_grad():
        layer.gamma.fill_(gamma)
        layer.beta.fill_(beta)
    return layer


@pytest.mark.parametrize(("gamma", "beta"), [(0.0, 0.0), (0.8, 0.2), (-0.3, 0.3), (2.1, -0.4), (-0.5, -1.1)])
def test_response_norm_with_rounding_stays_near_the_float_layer(gamma, beta):
    layer = response_norm(gamma, beta)
    fake = FakeResponseNorm(copy.deepcopy(layer), CONFIG, LATER)
    x = wave((3, 12, 8, 6), "x") * torch.linspace(0.2, 2, 12)[:, None, None]
    ranged(fake, x)
    y, expected = fake.eval()(x), layer.eval()(x)
    step = fake._output()[0].item()
    n_steps = y / step
    torch.testing.assert_close(n_steps, n_steps.round(), rtol=0, atol=1e-3)
    assert y.min() >= 0 and n_steps.max() <= 255.01
    # Roots of rounded means: where all but the strongest channel are weak, a twentieth of the range.
    assert (y - expected).abs().max() <= 0.05 * expected.max()
    assert (y - expected).abs().mean() <= 0.01 * expected.max()
    for name, value in gradients(fake.train(), (x,)).items():
        assert torch.isfinite(value).all(), name
    for quantizer in (fake.square, fake.power, fake.response, fake.output):
        quantizer.rounding = False
    torch.testing.assert_close(fake.eval()(x), expected, rtol=1e-4, atol=1e-5)
    ours, theirs = gradients(fake, (x,)), gradients(layer, (x,))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("beta", [-0.2, 0.0, 0.2])
def test_response_norm_trains_on_silence(beta):
    x = torch.zeros(2, 4, 3, 3)
    fake = ranged(FakeResponseNorm(response_norm(0.5, beta), CONFIG, LATER), x).train()
    for _ in range(2):
        assert all(torch.isfinite(value).all() for value in gradients(fake, (x,)).values())
    assert (fake.eval()(x) - max(beta, 0)).abs().max() <= 1e-3


def test_sums_and_pools_round_what_the_float_layers_give():
    x, y = wave((2, 4, 9, 7), "x"), wave((2, 4, 9, 7), "y")
    pool = AvgPool(4, 3, (2, 1), padding=1)
    for fake, layer, inputs in (
        (FakeAdd(Add(), CONFIG, LATER), Add(), (x, y)),
        (FakeAvgPool(pool, CONFIG, LATER), pool, (x,)),
    ):
        expected = layer(*inputs)
        out = ranged(fake, *inputs)(*inputs)
        scale, _ = fake.output.params()
        assert (out - expected).abs().max() <= 1.001 * scale
        assert len(out.unique()) > 50
        fake.output.rounding = False
        assert torch.equal(fake(*inputs), expected)


def test_the_mean_over_the_logits_is_not_rounded():
    x = wave((3, 10, 4, 2), "x")
    assert torch.equal(FakeGlobalMean(GlobalMean(), CONFIG, LATER)(x), x.mean(dim=(2, 3)))
