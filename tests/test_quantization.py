from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.checkpoints.checkpoint import describe, load_model, save_checkpoint
from helpers.quantization import (
    QuantizationError,
    calibrate,
    convert,
    float_layers,
    float_network,
    for_target,
    freeze,
    prepare,
    quantizers,
    rounding_off,
    switch,
)
from models import FRONTENDS, MODELS, get_frontend, get_model
from models.layers.conv_unit import ConvUnit
from models.layers.core import QuantConfig, Rounding
from models.layers.global_mean import GlobalMean
from models.layers.response_norm import ResponseQuantizer
from tests.golden_inputs import fill_state, wave

SMALL = {"base_channels": 8, "channels_multiplier": 1.6, "expansion_rate": 2.0, "n_blocks": (2, 1)}
OTHERS = [
    {"base_channels": 4, "expansion_rate": 1.5, "n_blocks": (1,), "strides": {}},
    {"base_channels": 13, "n_blocks": (1, 2), "strides": {"b1": (1, 2), "b3": (2, 1)}, "n_classes": 3},
    {"base_channels": 16, "channels_multiplier": 1.0, "n_blocks": (2, 2), "strides": {"b2": (2, 2), "b4": (3, 1)}},
    {"base_channels": 8, "n_blocks": (1, 1, 1), "strides": {}, "in_channels": 2},
]
CONFIG = QuantConfig()
CHECKPOINT = "golden/cpjku_dcase23/c0a7nzin/checkpoints/epoch=149-step=81900.ckpt"


def network(strides=None, **options) -> nn.Module:
    """Weights by formula, a response norm that does something, in eval mode."""
    options = {**SMALL, **options}
    strides = {"b2": (2, 1)} if strides is None else strides
    model = fill_state(get_model("cp_mobile", strides=strides, **options))
    gains = [(-0.3, 0.2), (0.7, -0.1), (1.5, 0.0), (0.0, 0.05)]
    norms = [module for name, module in model.named_modules() if name.endswith("after_block_norm")]
    with torch.no_grad():
        for norm, (gamma, beta) in zip(norms, gains, strict=False):
            norm.gamma.fill_(gamma)
            norm.beta.fill_(beta)
    return model.eval()


def spectrograms(n_clips=8, n_channels=1) -> torch.Tensor:
    return wave((n_clips, n_channels, 48, 24), "log-mel", 0.7) * torch.linspace(0.4, 1.4, n_clips)[:, None, None, None]


def prepared(model=None, config=CONFIG, method="minmax") -> nn.Module:
    model = network() if model is None else model
    x = spectrograms(n_channels=model.config.in_channels)
    model = prepare(model, config, x[:1])
    calibrate(model, lambda: [x], method)
    return model.eval()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> None:
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        if not name.endswith(but or "never"):
            assert torch.equal(value, state[name]), name


# ---- prepare --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, *OTHERS], ids=str)
def test_prepared_networks_keep_weights_and_names_and_compute_the_same_without_rounding(options):
    model = network(**options)
    before = state_of(model)
    ready = prepared(model)
    assert_same_state(model, before)
    assert not any(isinstance(module, Rounding) for module in model.modules())
    ours = ready.state_dict()
    assert {name for name in ours if name not in before} == {
        f"{name}.{entry}" for name, _ in quantizers(ready) for entry in ("low", "high")
    }
    assert all(torch.equal(ours[name], value) for name, value in before.items())
    again = network(**options)
    again.load_state_dict({name: ours[name] for name in before})  # strict
    x = spectrograms(n_channels=model.config.in_channels)
    with rounding_off(ready):
        # The norm folded into the weights or behind them: float32 rounding, as between fused and unfused networks.
        torch.testing.assert_close(ready(x), model(x), rtol=0, atol=1e-4)
    assert (ready(x) - model(x)).abs().max() > 1e-4  # rounding is on again
    assert convert(ready)(x).shape == (len(x), model.config.n_classes)


def test_rounding_comes_back_after_an_error():
    ready = prepared()
    with pytest.raises(RuntimeError, match="stop"), rounding_off(ready):
        raise RuntimeError("stop")
    assert all(module.rounding for module in ready.modules() if isinstance(module, Rounding))


@pytest.mark.parametrize("training", [True, False])
def test_preparing_keeps_the_mode(training):
    model = network().train(training)
    assert {module.training for module in prepare(model, CONFIG, spectrograms(1)).modules()} == {training}


def test_preparing_an_eval_network_lets_nothing_learn():
    ready = prepare(network().eval(), CONFIG, spectrograms(1))
    before = state_of(ready)
    ready(spectrograms())
    assert_same_state(ready, before)


def test_prepared_networks_stay_on_their_device():
    ready = prepare(network().to("meta"), CONFIG, spectrograms(1))
    assert {value.device.type for value in ready.state_dict().values()} == {"meta"}


@pytest.mark.requires_cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("quantize_input", [True, False])
def test_a_gpu_gives_the_integers_of_the_cpu(quantize_input):
    config = QuantConfig(quantize_input=quantize_input)
    model, x = prepared(config=config), spectrograms()
    on_gpu = prepare(network().cuda(), config, x[:1])
    calibrate(on_gpu, lambda: [x.cuda()], "minmax")
    on_gpu.train()(x.cuda()).sum().backward()
    on_gpu.load_state_dict(model.state_dict())
    ours, theirs = convert(model), convert(on_gpu)
    if quantize_input:
        assert torch.equal(theirs(x.cuda()).cpu(), ours(x))
    else:  # the order of float sums in the first layer; with factors rounded to TF32 many levels would differ
        off = (theirs.in_c[0](x.cuda()).values.cpu().int() - ours.in_c[0](x).values.int()).abs()
        assert off.max() <= 1 and off.float().mean() <= 1e-4


class WithLayer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.body = nn.Sequential(ConvUnit(1, 8, 3), layer, ConvUnit(8, 4, 1, relu=False))
        self.pool = GlobalMean()

    def forward(self, x):
        return self.pool(self.body(x))


def test_unknown_layers_are_named():
    with pytest.raises(QuantizationError, match=r"body\.1 \(GELU\)") as caught:
        prepare(WithLayer(nn.GELU()), CONFIG, spectrograms(1))
    assert "\n" not in str(caught.value)
    with pytest.raises(QuantizationError, match="Sequential has no layer"):
        prepare(nn.Sequential(nn.GELU()), CONFIG, spectrograms(1))


@pytest.mark.parametrize("layer", [nn.Identity(), nn.Dropout(0.5), nn.Sequential()], ids=str)
def test_layers_that_hand_on_what_they_get_do_so_in_integers(layer):
    ready = prepare(WithLayer(layer), CONFIG, spectrograms(1))
    calibrate(ready, lambda: [spectrograms()], "minmax")
    ready.eval()
    x = spectrograms()
    assert (convert(ready)(x) - ready(x)).abs().max() < 0.05


# ---- training -------------------------------------------------------------------------------------------------------


def test_eval_mode_changes_no_buffer():
    """The published observers went on learning from the validation clips."""
    ready = prepared()
    before = state_of(ready)
    ready(10 * spectrograms())
    with rounding_off(ready):
        ready(10 * spectrograms())
    convert(ready)(10 * spectrograms())
    assert_same_state(ready, before)


@pytest.mark.parametrize("variant", ["as filled", "dead channels", "zero response"])
def test_training_lowers_the_loss_with_finite_gradients(variant):
    model = network()
    with torch.no_grad():
        for module in model.modules():
            if variant == "dead channels" and isinstance(module, nn.BatchNorm2d):
                module.weight[1] = 0
        for name, parameter in model.named_parameters():
            if variant == "zero response" and "after_block_norm" in name:
                parameter.zero_()
    ready = prepared(model).train()
    target = torch.arange(8) % 10
    optimizer = torch.optim.Adam(ready.parameters(), lr=3e-3)
    losses = []
    for i in range(18):
        if i % 3 == 0:
            calibrate(ready, lambda: [spectrograms()])  # as run_qat.py does at the start of an epoch
        loss = F.cross_entropy(ready(spectrograms()), target)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in ready.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.isfinite(value).all() for value in ready.state_dict().values())
    x = spectrograms()
    y = ready.eval()(x)
    assert torch.isfinite(y).all()
    assert (convert(ready)(x) - y).abs().max() < 0.1 * y.abs().max()


def train_steps(model: nn.Module, n_steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for i in range(n_steps):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(spectrograms() * (1 + i)), torch.arange(8) % 10).backward()
        optimizer.step()


def test_freezing_stops_norms_but_not_weights():
    """In the published system norms were folded away beforehand: nothing was left to freeze."""
    ready = prepared()
    norms = [name for name, module in ready.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == len([module for module in network().modules() if isinstance(module, nn.BatchNorm2d)])
    before = state_of(ready)
    train_steps(ready, 2)
    learned = state_of(ready)
    for name in norms:
        assert not torch.equal(learned[f"{name}.running_mean"], before[f"{name}.running_mean"]), name
    freeze(ready)
    train_steps(ready, 2)
    frozen = state_of(ready)
    for name, _ in ready.named_buffers():
        assert torch.equal(frozen[name], learned[name]), name
    for name, parameter in ready.named_parameters():
        # Behind a batch's own mean a bias of the norm before it may have no gradient, weights always do.
        assert not torch.equal(parameter, learned[name]) or name.endswith("bias"), name
    # Training mode now computes what eval mode does.
    x = spectrograms()
    assert torch.equal(ready.train()(x), ready.eval()(x))
    switch(ready, norm_frozen=False)
    train_steps(ready, 1)
    assert not torch.equal(state_of(ready)[f"{norms[0]}.running_mean"], frozen[f"{norms[0]}.running_mean"])


def test_fp32_scores_are_those_of_a_float_network():
    """The published "fp32" metrics were fake-quantized."""
    ready = prepared()
    train_steps(ready, 2)
    ready.eval()
    model, x = network(), spectrograms()
    state = ready.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    with rounding_off(ready):
        torch.testing.assert_close(ready(x), model(x), rtol=0, atol=1e-4)


def test_logits_are_no_multiples_of_a_step():
    """The published logits were pooled in integers."""
    ready = prepared()
    logits, step = convert(ready)(spectrograms()), ready.feed_forward.output.params()[0]
    n_steps = (logits / step).double()
    assert (n_steps - n_steps.round()).abs().max() > 0.1


def test_no_range_behind_a_relu_includes_negative_values():
    """The published range behind the response norm included what its ReLU removes; its activations had 7 bits."""
    ready = prepared()
    train_steps(ready, 1)
    before_relu = {"block.2", "feed_forward", "add", "response"}
    for name, quantizer in quantizers(ready):
        if not any(part in name for part in before_relu):
            assert quantizer.low == 0 and quantizer.constants()[1] == -128, name
        n_levels = (quantizer.high - quantizer.low) / quantizer.params()[0]
        if not isinstance(quantizer, ResponseQuantizer):
            assert n_levels == pytest.approx(255, rel=1e-5), name


def test_quantized_checkpoints_reload(tmp_path):
    """The published ones could not be loaded again."""
    config = QuantConfig(reduced_range=True, quantize_input=True)
    ready = prepared(config=config)
    train_steps(ready, 1)
    content = {
        "model": describe(ready, MODELS), "frontend": describe(get_frontend("cp_mel"), FRONTENDS),
        "precision": "int8", "quantization": asdict(config), "scenes": [f"scene {i}" for i in range(10)],
    }  # fmt: skip
    save_checkpoint(tmp_path / "last.pt", content)
    loaded = load_model(tmp_path / "last.pt")
    assert loaded.precision == "int8"
    assert {module.training for module in loaded.model.modules()} == {False}
    assert_same_state(loaded.model, state_of(ready))
    x = spectrograms()
    assert torch.equal(loaded.model(x), ready.eval()(x))
    assert torch.equal(convert(loaded.model)(x), convert(ready)(x))
    assert convert(loaded.model).in_c[0].weight.abs().max() == 63


# ---- conversion -----------------------------------------------------------------------------------------------------


def test_converted_networks_give_the_same_bits_on_any_number_of_threads_and_clips():
    converted, x = convert(prepared()), spectrograms(33)
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = converted(x)
        assert torch.equal(converted(x), expected)
        torch.set_num_threads(2)
        assert torch.equal(converted(x), expected)
    finally:
        torch.set_num_threads(n_threads)
    for n in (1, 2, 7, 16, 32):
        assert torch.equal(torch.cat([converted(part) for part in x.split(n)]), expected), n
    assert torch.equal(converted.to(memory_format=torch.channels_last)(x), expected)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # said when oneDNN is switched
@pytest.mark.parametrize("quantize_input", [True, False])
def test_converted_networks_give_the_same_bits_without_onednn(quantize_input):
    # Batches from 16 then go to NNPACK, whose transforms round.
    model = network(base_channels=32)
    converted, x = convert(prepared(model, QuantConfig(quantize_input=quantize_input))), spectrograms(33)
    expected = converted(x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(converted(x), expected)


def test_conversion_leaves_the_prepared_network_alone():
    for training in (True, False):
        ready = prepared().train(training)
        before, classes = state_of(ready), [type(module) for module in ready.modules()]
        converted = convert(ready)
        assert_same_state(ready, before)
        assert [type(module) for module in ready.modules()] == classes
        assert {module.training for module in ready.modules()} == {training}
        assert not list(converted.parameters())
        assert not any(isinstance(module, Rounding) for module in converted.modules())
        assert not converted.training
        with rounding_off(ready):
            x = spectrograms()
            assert torch.equal(convert(ready)(x), converted(x))


def test_networks_for_the_target_by_precision():
    model, x = network(), spectrograms()
    assert torch.equal(for_target(model, "fp32")(x), model(x))
    half = for_target(model, "fp16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert half(x).dtype == torch.float32
    torch.testing.assert_close(half(x), model(x), rtol=0, atol=2e-2)  # some rounding steps of 11 bits, logits up to 4
    ready = prepared(model)
    assert torch.equal(for_target(ready, "int8")(x), convert(ready)(x))


def test_the_float_network_within_is_a_network_of_its_own():
    ready = prepared()
    train_steps(ready, 1)
    plain, x = float_network(ready), spectrograms()
    assert type(plain) is type(network()) and not plain.training
    assert not any(isinstance(module, Rounding) for module in plain.modules())
    with rounding_off(ready.eval()):
        torch.testing.assert_close(plain(x), ready(x), rtol=0, atol=1e-4)
    before = state_of(ready)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert_same_state(ready, before)


def test_layers_that_compute_in_float_are_named():
    assert dict(float_layers(convert(prepared()))).keys() >= {"in_c.0", "pool", "stages.s1.b1.after_block_norm"}
    named = dict(float_layers(convert(prepared(config=QuantConfig(quantize_input=True)))))
    assert "in_c.0" not in named and not any(".block." in name for name in named)


# ---- the published checkpoint ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(quantize_input=True)], ids=["default", "input too"])
def test_the_published_network_keeps_its_decisions_on_real_clips(shared, method, config):
    model = load_model(shared(CHECKPOINT)).model
    clips = torch.load(shared("golden/cpjku_dcase23/checkpoint_real_clips.pt"), weights_only=True)
    ready = prepare(model, config, clips["spec"][:1])
    calibrate(ready, lambda: clips["spec"].split(4), method)
    ready.eval()
    with torch.no_grad(), rounding_off(ready):
        torch.testing.assert_close(ready(clips["spec"]), clips["logits"], rtol=0, atol=1e-3)
    logits = convert(ready)(clips["spec"])
    assert logits.argmax(dim=1).tolist() == clips["argmax"]
    # The guide's own 8 bits move them by up to 0.6.
    assert (logits - clips["logits"]).abs().max() < 1.0
