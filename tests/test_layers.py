"""Networks of newcomers, from layers of PyTorch and ours: what is found, counted, quantized, exported, and refused."""

import copy
import re
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from helpers.checkpoints.checkpoint import load_model, save_checkpoint
from helpers.complexity import measure
from helpers.export.files import write_onnx
from helpers.export.onnx_file import export_onnx, pad_depthwise
from helpers.export.parity import compare, integer_tolerance
from helpers.quantization import (
    QuantizationError,
    calibrate,
    convert,
    float_layers,
    float_network,
    for_target,
    freeze,
    overflowing_layers,
    prepare,
    quantizers,
    rounding_off,
    step_of_logits,
)
from models import MODELS, get_frontend
from models.layers import KINDS
from models.layers.add import Add
from models.layers.conv_unit import ConvUnit, FakeConv, FoldedNorm, IntConv
from models.layers.core import FakeLayer, Place, QTensor, QuantConfig
from models.layers.flow import trace
from models.layers.fold import fold
from models.layers.global_mean import GlobalMean
from models.layers.linear import FakeLinear, IntLinear
from models.layers.max_pool import IntMaxPool
from models.layers.relu import FakeRelu, IntRelu
from models.layers.weights import count_overflows, limit_pairs
from models.layers.xnnpack import for_xnnpack
from tests.golden_inputs import fill_state, wave

CONFIG = QuantConfig()


class SepBlock(nn.Module):
    """Depthwise 3x3, pointwise 1x1, norm, ReLU; halves mel, keeps time."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.depthwise = nn.Conv2d(c_in, c_in, 3, stride=(2, 1), padding=1, groups=c_in, bias=False)
        self.pointwise = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.norm = nn.BatchNorm2d(c_out)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.pointwise(self.depthwise(x))))


class SepNet(nn.Module):
    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config = config
        widths = [1] + [16 * 2**i for i in range(3)]
        self.blocks = nn.Sequential(*[SepBlock(a, b) for a, b in pairwise(widths)])
        self.head = nn.Linear(widths[-1], config.n_classes)

    def forward(self, log_mel: Tensor) -> Tensor:
        x = self.blocks(log_mel)  # (batch, channel, mel / 2**n_blocks, time)
        x = x.mean(dim=(2, 3))  # (batch, channel)
        return self.head(x)


class Mixed(nn.Module):
    """A shortcut, pools, biases, dropouts, dilation, uneven and named padding, one ReLU for all, two linear layers."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config = config
        self.stem = nn.Sequential(
            nn.Conv2d(1, 8, (5, 3), stride=2, padding=(2, 1)), nn.BatchNorm2d(8, affine=False), nn.ReLU(inplace=True)
        )
        self.left = nn.Conv2d(8, 8, 3, padding="same", dilation=(2, 1))
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout2d(0.1)
        self.add, self.relu = Add(), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.unit = ConvUnit(8, 12, 1, relu=False)
        self.wide = nn.Conv2d(12, 12, (1, 3), padding=(0, 2), groups=3, bias=False)
        self.smooth = nn.AvgPool2d((2, 1))
        self.flat, self.hidden, self.drop2 = nn.Flatten(), nn.Linear(12 * 3 * 8, 16), nn.Dropout(0.2)
        self.head = nn.Linear(16, config.n_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # (batch, 8, mel / 2, time / 2)
        x = self.relu(self.add(x, self.drop(self.norm(self.left(x)))))
        x = self.relu(self.unit(self.pool(x)))  # (batch, 12, mel / 4, time / 4)
        x = self.smooth(self.wide(x))
        return self.head(self.drop2(self.relu(self.hidden(self.flat(x)))))


NETWORKS = {"sepnet": SepNet, "mixed": Mixed}


def build(cls: type[nn.Module]) -> nn.Module:
    return fill_state(cls(SimpleNamespace(n_classes=10))).eval()


def clips(n: int = 6) -> Tensor:
    return wave((n, 1, 24, 24), "log-mel", 0.9) * torch.linspace(0.4, 1.4, n)[:, None, None, None]


def ready_network(model: nn.Module, config: QuantConfig = CONFIG, x: Tensor | None = None) -> nn.Module:
    x = clips() if x is None else x
    ready = prepare(model, config, x[:1])
    calibrate(ready, lambda: [x], "minmax")
    return ready.eval()


def train(ready: nn.Module, n_steps: int = 2) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(ready.train().parameters(), lr=1e-3)
    for _ in range(n_steps):
        optimizer.zero_grad()
        F.cross_entropy(ready(clips()), torch.arange(6)).backward()
        optimizer.step()
    calibrate(ready, lambda: [clips()], "minmax")
    ready.eval()


# ---- whole networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", NETWORKS.values(), ids=NETWORKS)
def test_prepared_networks_keep_weights_and_names_and_compute_the_same_without_rounding(cls):
    model = build(cls)
    before = copy.deepcopy(model.state_dict())
    ready = ready_network(model)
    ours = ready.state_dict()
    assert {name for name in ours if name not in before} == {
        f"{name}.{entry}" for name, _ in quantizers(ready) for entry in ("low", "high")
    }
    for name, value in before.items():
        assert torch.equal(ours[name], value) and torch.equal(model.state_dict()[name], value), name
    x = clips()
    with rounding_off(ready):
        torch.testing.assert_close(ready(x), model(x), rtol=0, atol=1e-4)
        for mode in (ready, model):
            mode.train()
            for module in mode.modules():
                if "Dropout" in type(module).__name__:
                    module.eval()
        torch.testing.assert_close(ready(x), model(x), rtol=0, atol=1e-4)  # with statistics of the batch
        for name, value in model.named_buffers():
            torch.testing.assert_close(ready.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    ready.eval(), model.eval()
    assert 1e-4 < (ready(x) - model(x)).abs().max() < 0.1 * model(x).abs().max()


@pytest.mark.parametrize("config", [CONFIG, QuantConfig(True, True)], ids=["default", "reduced, input too"])
@pytest.mark.parametrize("cls", NETWORKS.values(), ids=NETWORKS)
def test_every_converted_layer_gives_the_levels_of_the_fake_quantized_one(cls, config):
    ready = ready_network(build(cls), config)
    train(ready)
    converted, x, calls = convert(ready), clips(), []
    for name, module in ready.named_modules():
        if isinstance(module, FakeLayer):
            module.register_forward_hook(lambda _module, inputs, y, name=name: calls.append((name, inputs, y)))
    with torch.no_grad():
        logits = ready(x)
    integers: dict[int, Tensor | QTensor] = {}  # of the fake-quantized tensors
    for name, inputs, y in calls:
        known = [integers.get(id(value), value) for value in inputs]
        if not all(isinstance(value, QTensor) or value is x for value in known):
            continue  # read through a change of shape, a mean, or a dropout
        out = converted.get_submodule(name)(*known)
        if isinstance(out, QTensor):
            levels = torch.round(y / out.scale) + out.zero_point
            off = (levels - out.values).abs()
            # A bias is rounded to steps of the sums, which float products do not know, by a quarter of one in the mean.
            layer, share = converted.get_submodule(name), 5e-3
            if isinstance(layer, IntConv) and isinstance(known[0], QTensor):
                share = max(share, (layer.weight_scale * known[0].scale / out.scale).max().item() / 2)
            assert off.max() <= 1 and off.mean() <= share, name
            integers[id(y)] = out._replace(values=levels.to(torch.int8))
    assert len(integers) >= 6
    result = converted(x)
    # A value that rounds the other way moves the logits of its clip by a part of their step.
    assert (result - logits).abs().max() <= max(step_of_logits(converted), 0.02 * logits.abs().max())
    assert torch.equal(result.argmax(dim=1), logits.argmax(dim=1))


@pytest.mark.parametrize("cls", NETWORKS.values(), ids=NETWORKS)
def test_training_learns_everything_and_freezing_stops_the_norms(cls):
    ready = ready_network(build(cls))
    before = copy.deepcopy(ready.state_dict())
    train(ready)
    after = copy.deepcopy(ready.state_dict())
    for name, value in after.items():
        if name.endswith(("weight", "running_mean", "num_batches_tracked")):
            assert not torch.equal(value, before[name]), name
    freeze(ready)
    train(ready)
    for name, value in ready.state_dict().items():
        if "running" in name:
            assert torch.equal(value, after[name]), name
    plain, x = float_network(ready), clips()
    assert type(plain) is cls
    with rounding_off(ready):
        torch.testing.assert_close(plain(x), ready(x), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("cls", NETWORKS.values(), ids=NETWORKS)
def test_float_files_hold_no_norm(cls, precision, tmp_path):
    frontend = get_frontend("cp_mel", sample_rate=8000, win_length=512, hop_length=350, n_fft=512, n_mels=24).eval()
    model, x = build(cls), clips()
    scenes = [f"scene {i}" for i in range(10)]
    target = for_target(model, precision)
    path = write_onnx(target, frontend, scenes, 8400, precision, False, tmp_path / "network.onnx")
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node)
    torch.testing.assert_close(run(path, x, False), target(x), rtol=0, atol={"fp32": 1e-4, "fp16": 2e-2}[precision])


def run(path, x: Tensor, exact: bool, optimised_path: str = "") -> Tensor:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
    options.log_severity_level, options.optimized_model_filepath = 3, optimised_path
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"log_mel": x.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, QuantConfig(quantize_input=True)], ids=["default", "input too"])
@pytest.mark.parametrize("cls", NETWORKS.values(), ids=NETWORKS)
def test_onnx_runtime_gives_the_logits_of_the_integer_network(cls, config, tmp_path):
    ready = ready_network(build(cls), config)
    train(ready)
    model, x = convert(ready), clips()
    path = export_onnx(model, x, tmp_path / "network.onnx", "log_mel", {})
    optimised = str(tmp_path / "optimised.onnx")
    for n_clips in (1, 6):
        for exact in (False, True):
            logits = run(path, x[:n_clips], exact, optimised)
            torch.testing.assert_close(logits, model(x[:n_clips]), rtol=0, atol=1e-5)
    kinds = {node.op_type for node in onnx.load(optimised).graph.node}
    # Integer kernels, where the input is rounded for every layer.
    assert {"QLinearConv", "QGemm"} <= kinds and ("Conv" in kinds) == (not config.quantize_input)
    assert "Gemm" not in kinds
    weights = [value for value in onnx.load(path).graph.initializer if value.name.endswith("weight")]
    assert {value.data_type for value in weights} == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("cls", NETWORKS.values(), ids=NETWORKS)
def test_the_xnnpack_form_gives_nearly_the_same(cls):
    ready = ready_network(build(cls))
    model, x = convert(ready), clips()
    form = for_xnnpack(model, x[:1])
    assert not any(hasattr(module, "for_xnnpack") for module in form.modules())
    difference = (form(x) - model(x)).abs()
    assert difference.mean() <= step_of_logits(model) / 4
    program = torch.export.export(form, (x[:1],), strict=False)
    assert not any("asc." in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x[:1]), form(x[:1]))


@pytest.mark.parametrize("cls", NETWORKS.values(), ids=NETWORKS)
def test_all_of_it_is_counted_float_and_integer_before_and_after_folding(cls):
    model, shape = build(cls), (1, 24, 24)
    report = measure(model, shape)
    n_norms = sum(2 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.affine)
    biases = {"sepnet": 16 + 32 + 64, "mixed": 12}[cls.__name__.lower()]  # where a convolution had none
    assert report.trained.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.folded.n_parameters == report.trained.n_parameters - n_norms + biases
    assert report.folded.arithmetic_macs == report.trained.arithmetic_macs
    with pytest.raises(ValueError, match="fake quantization"):
        measure(prepare(model, CONFIG, clips(1)), shape)
    integer = measure(convert(ready_network(model)), shape).folded
    assert integer.n_parameters == report.folded.n_parameters
    assert integer.macs == report.folded.macs
    # An average pool is a convolution on the target.
    assert integer.arithmetic_macs - report.folded.arithmetic_macs in (0, 12 * 3 * 8 * 2)
    assert integer.stored_bytes < 1.3 * integer.n_parameters


@pytest.mark.parametrize("cls", NETWORKS.values(), ids=NETWORKS)
def test_quantized_checkpoints_reload(cls, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "newcomer", (SimpleNamespace, cls))
    frontend = get_frontend("cp_mel", sample_rate=8000, win_length=512, hop_length=350, n_fft=512, n_mels=24).eval()
    x = clips()
    assert frontend(torch.zeros(1, 8400)).shape[1:] == x.shape[1:]
    ready = ready_network(build(cls))
    train(ready)
    content = {
        "model": {"name": "newcomer", "config": {"n_classes": 10}, "state": ready.state_dict()},
        "frontend": {"name": "cp_mel", "config": vars(frontend.config), "state": {}},
        "precision": "int8", "quantization": vars(CONFIG), "scenes": [f"scene {i}" for i in range(10)],
        "clip_samples": 8400,
    }  # fmt: skip
    save_checkpoint(tmp_path / "last.pt", content)
    loaded = load_model(tmp_path / "last.pt")
    assert list(loaded.model.state_dict()) == list(ready.state_dict())
    assert torch.equal(loaded.model(x), ready(x))
    assert torch.equal(convert(loaded.model)(x), convert(ready)(x))


# ---- what is found --------------------------------------------------------------------------------------------------


def kinds_of(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if name}


def test_chains_are_found_by_what_reads_what():
    found = kinds_of(prepare(build(Mixed), CONFIG, clips(1)))
    assert found["stem.0"] == found["left"] == found["wide"] == "FakeConv"
    assert found["stem.1"] == found["norm"] == "FoldedNorm"
    assert found["stem.2"] == "Identity"  # part of the convolution
    assert found["relu"] == "FakeRelu"  # used three times: a layer of its own
    assert found["unit"] == "FakeConvUnit"
    assert found["hidden"] == found["head"] == "FakeLinear"


class Chain(nn.Module):
    """Layers one after the other, then the mean over freq and time."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(dim=(2, 3))


class AddThenRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.add, self.relu = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1), Add(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.add(self.a(x), self.b(x))).mean(dim=(2, 3))


def test_a_relu_behind_a_sum_is_the_lower_end_of_its_range():
    ready = ready_network(fill_state(AddThenRelu()).eval())
    assert type(ready.relu) is nn.Identity
    assert ready.add.output.low == 0 and ready.a.output.low < 0
    # Both convolutions read the float spectrogram.
    converted = convert(ready)
    assert [name for name, _ in float_layers(converted)] == ["a", "b"]
    torch.testing.assert_close(converted(clips()), ready(clips()), rtol=0, atol=1e-2)
    both = ready_network(fill_state(AddThenRelu()).eval(), QuantConfig(quantize_input=True))
    assert both.a.input is not None and both.b.input is not None and not float_layers(convert(both))


CONVOLUTIONS = {
    "bias": (nn.Conv2d(3, 6, 3, padding=1),),
    "no bias": (nn.Conv2d(3, 6, 3, bias=False),),
    "bias, norm": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)),
    "norm without weights": (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False), nn.ReLU()),
    "dilation": (nn.Conv2d(3, 6, 3, padding=(2, 4), dilation=(2, 4)), nn.ReLU()),
    "uneven": (nn.Conv2d(3, 6, (3, 5), stride=(2, 1), padding=(0, 2), groups=3), nn.BatchNorm2d(6)),
    "same": (nn.Conv2d(3, 6, (3, 1), padding="same"), nn.Dropout(0.3), nn.ReLU()),
    "valid": (nn.Conv2d(3, 6, 3, padding="valid"), nn.Identity(), nn.BatchNorm2d(6), nn.Identity()),
}


@pytest.mark.slow
@pytest.mark.parametrize("layers", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_of_every_form(layers, tmp_path):
    model = fill_state(Chain(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), *copy.deepcopy(layers))).eval()
    ready, x = ready_network(model), clips()
    with rounding_off(ready):
        torch.testing.assert_close(ready(x), model(x), rtol=0, atol=1e-4)
    converted = convert(ready)
    step = step_of_logits(converted)
    assert (converted(x) - ready(x)).abs().max() <= step
    assert (converted(x) - model(x)).abs().max() <= 3 * step
    path = export_onnx(converted, x, tmp_path / "network.onnx", "log_mel", {})
    torch.testing.assert_close(run(path, x, True), converted(x), rtol=0, atol=1e-5)
    folded = fold(model, x)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_depthwise_convolutions_in_a_sequence_of_plain_layers_are_padded_right():
    layers = (nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.Conv2d(6, 4, 1))
    for groups, n_padded in ((6, 16), (3, 6)):
        changed = (layers[0], nn.Conv2d(6, 6, 3, groups=groups, bias=False), layers[2])
        model, x = fill_state(Chain(*changed)).eval(), clips()
        converted = convert(ready_network(model, QuantConfig(quantize_input=True)))
        padded = pad_depthwise(converted)
        assert len(padded.layers[1].weight) == n_padded
        assert torch.equal(padded(x), converted(x))


def test_the_norm_of_a_convolution_is_no_child_of_it_and_moves_with_copies():
    ready = prepare(build(SepNet), CONFIG, clips(1))
    block = ready.blocks[0]
    assert isinstance(block.norm, FoldedNorm) and block.pointwise.norm is block.norm
    assert [name for name, _ in block.pointwise.named_children()] == ["output"]
    again = copy.deepcopy(ready).double()
    assert again.blocks[0].pointwise.norm is again.blocks[0].norm
    assert again.blocks[0].pointwise.norm.running_var.dtype == torch.float64


def test_the_flow_through_an_in_place_relu_is_seen():
    layers = (nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 1))
    flow = trace(nn.Sequential(*layers), clips(1))
    assert (flow.norm_of, flow.relu_of) == ({"0": "1"}, {"1": "2"})


# ---- linear ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [9, 700])  # sums within and beyond 24 bits
def test_linear_layers_are_those_of_64_bit_integers(n, bias):
    rng = np.random.default_rng(n)
    x = QTensor(torch.from_numpy(rng.integers(-128, 128, (5, n)).astype(np.int8)), 0.013, -17)
    weight = torch.from_numpy(rng.integers(-127, 128, (4, n)).astype(np.int8))
    scale = torch.from_numpy(rng.uniform(0.001, 0.01, 4).astype(np.float16)).float()
    offset = torch.from_numpy(rng.normal(0, 1, 4).astype(np.float16)) if bias else None
    step = scale * x.scale
    sums = (x.values.long() + 17) @ weight.long().T
    if bias:
        sums = sums + torch.round(offset.float() / step).long()
    layer = IntLinear(weight, scale, offset)
    assert torch.equal(layer(x), sums.float() * step)
    rounds = IntLinear(weight, scale, offset, (0.013, -17))
    assert torch.equal(rounds(x.dequantize()), layer(x))
    torch.testing.assert_close(layer.for_xnnpack(x)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_pairs_of_a_linear_layer_are_limited_as_kernels_add_them():
    weight = torch.tensor([[127, 127, 100, 28, 127], [127, -127, 64, 64, 127]])
    expected = torch.tensor([[64, 64, 100, 28, 127], [127, -127, 64, 64, 127]])
    assert torch.equal(limit_pairs(weight), expected)
    assert (count_overflows(weight), count_overflows(expected)) == (1, 0)
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight.fill_(1).mul_(torch.linspace(0.9, 1, 3)[:, None])
    for limit in (True, False):
        fake = FakeLinear(copy.deepcopy(layer), QuantConfig(limit_pairs=limit), Place(reads_float=True))
        fake.input.set_range(-1, 1)
        assert bool(overflowing_layers(nn.Sequential(fake.convert()))) == (not limit)
        x = wave((4, 6), "x", 0.5)
        assert (fake(x) - layer(x)).abs().max() < 0.06
        assert (fake.convert()(x) - fake(x)).abs().max() < 1e-3


def test_the_tolerance_of_linear_logits_takes_one_clip_on_a_tie_and_no_wrong_file():
    model, x = convert(ready_network(build(SepNet))), clips()
    step, logits = step_of_logits(model), model(x)
    tolerance = integer_tolerance(len(x), step)
    moved = model.head.input[0]  # one level of every feature up or down, in one clip
    hidden = []
    model.head.register_forward_pre_hook(lambda _module, inputs: hidden.append(inputs[0]))
    model(x)
    with torch.no_grad():
        features = hidden[0].clone()
        features[0, :4] += moved  # a few features of one clip
        one = model.head(features)
        wrong = model.head(hidden[0] * 1.5)
    assert compare("file", one, "integers", logits, ["a"] * 6, tolerance).passes
    assert not compare("file", wrong, "integers", logits, ["a"] * 6, tolerance).passes


# ---- the other kinds ------------------------------------------------------------------------------------------------


def test_relus_and_max_pools_are_exact():
    x = QTensor(torch.arange(-128, 128, dtype=torch.int8).view(1, 1, 16, 16), 0.05, -20)
    assert torch.equal(IntRelu()(x).dequantize(), F.relu(x.dequantize()))
    for options in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}):
        pool = nn.MaxPool2d(**options)
        out = IntMaxPool(pool)(x)
        assert out.values.dtype == torch.int8 and torch.equal(out.dequantize(), pool(x.dequantize()))
        assert torch.equal(IntMaxPool(pool).for_xnnpack(x)(x).values, out.values)
    assert torch.equal(IntRelu().for_xnnpack(x)(x).values, IntRelu()(x).values)
    assert torch.equal(FakeRelu(nn.ReLU(), CONFIG, Place())(x.dequantize()), F.relu(x.dequantize()))


def test_8_bit_values_answer_like_tensors_or_not_at_all():
    x = QTensor(torch.arange(-8, 16, dtype=torch.int8).view(1, 2, 3, 4), 0.5, 3)
    real = x.dequantize()
    torch.testing.assert_close(x.mean(dim=(2, 3)), real.mean(dim=(2, 3)))
    torch.testing.assert_close(torch.mean(x, dim=3), real.mean(dim=3))
    assert torch.equal(torch.flatten(x, 1).dequantize(), real.flatten(1))
    assert torch.equal(x.transpose(1, 2).dequantize(), real.transpose(1, 2))
    assert x.shape == real.shape and x.size(1) == 2
    for compute in (
        lambda: x + x, lambda: x * 2, lambda: 2 * x, lambda: -x, lambda: F.relu(x), lambda: torch.cat([x, x], 1),
        lambda: F.max_pool2d(x, 2), lambda: F.dropout(x), lambda: real + x, lambda: torch.add(x, x),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            compute()


# ---- what is refused ------------------------------------------------------------------------------------------------


class Computes(nn.Module):
    """A block that computes in its forward pass, in a network around it."""

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.compute = compute
        self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.compute(x, self.b(x))


class Around(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.head = block, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(dim=(2, 3)))


COMPUTATIONS = {
    "sum": (lambda x, y: x + y, "Add of models/layers/add.py"),
    "torch.add": (torch.add, "Add of models/layers/add.py"),
    "in place": (lambda x, y: y.add_(x), "Add of models/layers/add.py"),
    "cat": (lambda x, y: torch.cat([x, y]), "a layer of models/layers"),
    "relu": (lambda x, y: F.relu(y), "nn.ReLU"),
    "method": (lambda x, y: y.relu(), "nn.ReLU"),
    "max pool": (lambda x, y: F.max_pool2d(y, 2), "nn.MaxPool2d"),
    "dropout": (lambda x, y: F.dropout(y, 0.5, False), "nn.Dropout"),
    "product": (lambda x, y: x * y, "a layer of models/layers"),
    "slice": (lambda x, y: y[..., 1:], "a layer of models/layers"),
    "scale": (lambda x, y: 2 * y, "a layer of models/layers"),
    "largest": (lambda x, y: y.amax(dim=3, keepdim=True), "a layer of models/layers"),
}


@pytest.mark.parametrize(("compute", "instead"), COMPUTATIONS.values(), ids=COMPUTATIONS)
def test_modules_that_compute_activations_by_themselves_are_named(compute, instead):
    with pytest.raises(QuantizationError, match=rf"^block \(Computes\) computes .*{re.escape(instead)}") as caught:
        prepare(Around(Computes(compute)), CONFIG, clips(1))
    assert "\n" not in str(caught.value)


ALLOWED = {
    "flatten, view": lambda x, y: y.flatten(2).view(y.size(0), y.shape[1], *y.shape[2:]),
    "permute": lambda x, y: y.permute(0, 1, 3, 2).contiguous(),
    "torch.flatten": lambda x, y: torch.flatten(y, 2).unsqueeze(2),
    "mean, then float": lambda x, y: F.relu(y.mean(dim=3, keepdim=True) * 2 + 1),
    "half a mean": lambda x, y: torch.mean(y, 2, keepdim=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("compute", ALLOWED.values(), ids=ALLOWED)
def test_changes_of_shape_and_means_and_what_is_float_anyway_simply_work(compute, tmp_path):
    model, x = fill_state(Around(Computes(compute))).eval(), clips()
    ready = ready_network(model)
    converted = convert(ready)
    assert (converted(x) - ready(x)).abs().max() <= step_of_logits(converted)
    path = export_onnx(converted, x, tmp_path / "network.onnx", "log_mel", {})
    torch.testing.assert_close(run(path, x, True), converted(x), rtol=0, atol=1e-5)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.conv, self.pool = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), GlobalMean()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.conv(self.a(x))))


class LateNorm(nn.Module):
    """A norm whose convolution is read by something else too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.add, self.pool = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), Add(), GlobalMean()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.pool(self.add(x, self.norm(x)))


def conv_with(**options) -> nn.Module:
    return Chain(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, **options))


def pruned() -> nn.Module:
    model = conv_with()
    prune.l1_unstructured(model.layers[1], "weight", 0.5)
    return model


def parametrized() -> nn.Module:
    model = Chain(ConvUnit(1, 4, 3))
    nn.utils.parametrizations.weight_norm(model.layers[0][0])
    return model


REFUSED = {
    "reflected padding": (conv_with(padding=1, padding_mode="reflect"), r"layers\.1 \(Conv2d\).*padding_mode"),
    "uneven same": (Chain(nn.Conv2d(1, 4, 2, padding="same")), r"layers\.0 \(Conv2d\).*same"),
    "norm of the input": (Chain(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 1)), r"layers\.0 \(BatchNorm2d\)"),
    "norm behind a ReLU": (Chain(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), r"layers\.2 \(BatchNorm2d\)"),
    "norm behind a dropout": (
        Chain(nn.Conv2d(1, 4, 1), nn.Dropout(0.2), nn.BatchNorm2d(4)), r"layers\.2 \(BatchNorm2d\)",
    ),
    "norm without statistics": (
        Chain(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), r"layers\.1 .*running statistics",
    ),
    "a result read twice": (LateNorm(), r"norm \(BatchNorm2d\)"),
    "a convolution called twice": (Twice(), r"conv \(Conv2d\) is called 2 times"),
    "a transposed convolution": (Chain(nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 4, 2)), r"layers\.1 \(ConvTrans"),
    "a pool with indices": (
        Chain(nn.Conv2d(1, 4, 1), nn.AvgPool2d(2, ceil_mode=True)), r"layers\.1 \(AvgPool2d\).*ceil_mode",
    ),
    "pool of the input": (Chain(nn.AvgPool2d(2), nn.Conv2d(1, 4, 1)), r"layers\.0 \(AvgPool2d\) reads float values"),
    "an adaptive pool": (Chain(nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(2)), r"layers\.1 .*output_size"),
    "logits in 8 bits": (nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten()), "Sequential answers with 8-bit values"),
    "pruned": (pruned(), r"layers\.1 \(Conv2d\) is computed"),
    "parametrized": (parametrized(), r"layers\.0\.0 \(.*Conv2d\) is computed"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_8_bit_form_is_refused_by_name(model, message):
    with pytest.raises(QuantizationError, match=message) as caught:
        prepare(model, CONFIG, clips(1))
    assert "\n" not in str(caught.value)


def test_hooks_of_others_do_not_run_while_the_network_is_looked_at():
    model, calls = build(SepNet), []
    model.blocks.register_forward_hook(lambda *_: calls.append(1))
    prepare(model, CONFIG, clips(1))
    assert not calls and model.blocks._forward_hooks


def test_the_table_is_of_float_layers_and_fake_ones():
    assert all(issubclass(fake, FakeLayer) for fake in KINDS.values())
    assert KINDS[nn.Conv2d] is FakeConv and IntConv not in KINDS
