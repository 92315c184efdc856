"""The network of the 2024 and 2025 baselines against what the published code returned, and published checkpoints."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.checkpoints.checkpoint import load_model
from helpers.checkpoints.foreign import recognise
from helpers.complexity import measure
from models import get_model
from models.cp_mobile import CpMobile
from models.dcase24_baseline import Dcase24Baseline
from tests.golden_inputs import fill_state, wave
from tests.students import SMALL_MEL, check_8_bits, check_scripts, has_the_manifest

NET = "golden/dcase_baselines/net.pt"


def build(**options) -> nn.Module:
    return get_model("dcase24_baseline", **options)


@pytest.fixture
def net(shared) -> dict:
    return torch.load(shared(NET), weights_only=True)


def test_every_copy_for_a_device_matches_the_published_one(golden):
    data = golden("dcase_baselines_multi_device")
    container = nn.Module()
    container.base_model = build(**data["config"])
    container.device_models = nn.ModuleDict({device: build(**data["config"]) for device in data["train_devices"]})
    has_the_manifest(container.base_model, data["names_of_one_submodel"])
    assert len(container.state_dict()) == data["n_state_entries"]
    fill_state(container).eval()
    x = wave(tuple(data["input_shape"]), data["input_key"], data["input_scale"])
    outputs, models = data["outputs"], container.device_models
    for name in ("none", "all_s5", "all_unknown"):
        torch.testing.assert_close(container.base_model(x), outputs[name], rtol=0, atol=1e-4)
    for device in ("a", "s3"):
        torch.testing.assert_close(models[device](x), outputs[f"all_{device}"], rtol=0, atol=1e-4)
    clips = zip(x.split(1), data["batch_devices_mixed"], strict=True)
    mixed = torch.cat([(models[d] if d in models else container.base_model)(clip) for clip, d in clips])
    torch.testing.assert_close(mixed, outputs["mixed"], rtol=0, atol=1e-4)
    half = container.base_model.half()(x.half())
    assert half.dtype == torch.float16 and (half.float() - outputs["none"]).abs().max() < 3e-2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_matches_the_published_network(net, layout):
    model = fill_state(build(**net["config"], strides=net["strides"])).eval().to(memory_format=layout)
    assert model.config.widths == build().config.widths and model.state_dict().keys() == build().state_dict().keys()
    has_the_manifest(model, net["manifest"])
    x = net["logmel"]
    torch.testing.assert_close(model(x), net["logits_fp32"], rtol=0, atol=1e-4)
    for key, case in net["extra"].items():
        x_of_case = wave(tuple(case["shape"]), case.get("key", key), case["scale"])
        torch.testing.assert_close(model(x_of_case), case["logits_fp32"], rtol=0, atol=1e-4)
    model.double()
    torch.testing.assert_close(model(x.double()), net["logits_fp64"], rtol=0, atol=1e-9)
    half = fill_state(build()).eval().half()
    torch.testing.assert_close(half(x.half()), net["logits_half_cpu"], rtol=0, atol=5e-3)
    torch.testing.assert_close(half.float()(x.half().float()), net["logits_fp16weights_fp32math"], rtol=0, atol=1e-4)


def test_every_stage_gives_what_the_published_one_does(net):
    model, seen = fill_state(build()).eval(), {}
    names = {"feed_forward": "pool"}  # the published one holds the mean too, and keeps its axes
    for name in net["activations_fp32"]:
        module = model.get_submodule(names.get(name, name))
        module.register_forward_hook(lambda _m, _x, y, name=name: seen.update({name: y.clone()}))
    model(net["logmel"])
    for name, wanted in net["activations_fp32"].items():
        y = seen[name]
        assert list(y.shape) == wanted["shape"][: y.ndim]
        found = [y.mean(), y.std(), y.abs().max(), *y.flatten()[:8]]
        expected = [wanted["mean"], wanted["std"], wanted["absmax"], *wanted["first8"]]
        torch.testing.assert_close(torch.stack(found), torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_training_matches_the_published_network_in_float64(net):
    train = net["train"]
    model = fill_state(build()).double().train()
    x = wave(tuple(train["input_shape"]), train["input_key"], train["input_scale"]).double()
    steps = train["adamw_fp64"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=steps["weight_decay"])
    losses = []
    for step, lr in enumerate(steps["lr_used"]):
        logits = model(x)
        loss = F.cross_entropy(logits, train["labels"])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            wanted = train["fp64"]
            torch.testing.assert_close(logits, wanted["logits"], rtol=1e-8, atol=1e-10)
            norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
            assert norms == pytest.approx(wanted["grad_norms"], rel=1e-6, abs=1e-12)
            assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(wanted["grad_norm"], rel=1e-6)
            for name, value in wanted["running_after"].items():
                torch.testing.assert_close(model.state_dict()[name].float(), value, rtol=1e-6, atol=1e-7)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(steps["losses"], rel=1e-6)
    norm = math.sqrt(sum(p.detach().square().sum().item() for p in model.parameters()))
    assert norm == pytest.approx(steps["param_norm_after"], rel=1e-6)


def test_parameters_and_cost_are_the_published_ones():
    cost = measure(build(), (1, 256, 65)).trained
    assert (cost.n_parameters, cost.macs) == (61_148, 29_419_156)


@pytest.mark.parametrize("device", ["general", "a", "b", "c", "s1", "s2", "s3"])
def test_the_winner_of_2025_loads_strictly_and_gives_the_published_logits(shared, device):
    path = shared("golden/dcase2025/karasin_sys4_checkpoint.ckpt")
    data = torch.load(shared("golden/dcase2025/karasin_sys4.pt"), weights_only=True)
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    prefix = "multi_device_model." + ("base_model." if device == "general" else f"device_models.{device}.")
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    assert [(name, list(value.shape)) for name, value in own.items()] == [
        (name, list(shape)) for name, shape in data["manifest"].items() if name in own
    ]
    part = recognise(path, own)["model"]
    assert part["name"] == "dcase24_baseline"
    model = get_model(part["name"], **part["config"])
    model.load_state_dict(part["state"])
    i = data["clips"].index(data["logmel_clip"])
    logits = model.eval()(data["logmel"][None])
    torch.testing.assert_close(logits[0], data["logits_fp32"][device][i], rtol=0, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == data["n_params"]


def plain(state: dict[str, Tensor], x: Tensor, strides: dict[str, tuple[int, int]]) -> Tensor:
    """The network by hand, from the specification: functions on a state dict, block names in order of their number."""

    def unit(x: Tensor, name: str, **options) -> Tensor:
        weight = state[f"{name}.0.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2, **options)
        entries = ("running_mean", "running_var", "weight", "bias")
        mean, var, gain, bias = (state[f"{name}.1.{entry}"][:, None, None] for entry in entries)
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    x = unit(unit(x, "in_c.0", stride=2).relu(), "in_c.1", stride=2).relu()
    blocks = {name.split(".block.")[0] for name in state if ".block." in name}
    for block in sorted(blocks, key=lambda name: int(name.rsplit(".b", 1)[1])):
        stride = strides.get(block.rsplit(".", 1)[1], (1, 1))
        y = unit(x, f"{block}.block.0").relu()
        y = unit(y, f"{block}.block.1", stride=stride, groups=y.shape[1]).relu()
        y = unit(y, f"{block}.block.2")
        if x.shape[1] == y.shape[1]:
            if stride != (1, 1):  # zeros around, all nine values count
                ones = x.new_full((x.shape[1], 1, 3, 3), 1 / 9)
                x = F.conv2d(x, ones, stride=stride, padding=1, groups=x.shape[1])
            y = y + x
        x = y.relu()
    return unit(x, "feed_forward").flatten(2).mean(dim=2)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 1, 256, 65)),
        ({"base_channels": 20, "channels_multiplier": 1.3, "expansion_rate": 2.7}, (3, 1, 63, 17)),
        ({"base_channels": 1, "n_blocks": (1, 3), "strides": {"b3": (3, 2)}, "n_classes": 3}, (2, 1, 40, 51)),
        ({"in_channels": 2, "strides": {"b2": (2, 2), "b3": (2, 1)}}, (1, 2, 37, 9)),
        ({"base_channels": 16, "n_blocks": (2, 2, 2), "strides": {}}, (1, 1, 7, 5)),
    ],
)
def test_agrees_with_one_written_by_hand(options, shape):
    model = fill_state(build(**options)).double().eval()
    x = wave(shape, "baseline/by hand").double()
    torch.testing.assert_close(model(x), plain(model.state_dict(), x, model.config.strides), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x), torch.cat([model(clip) for clip in x.split(1)]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base_channels": 24, "channels_multiplier": 2.3, "expansion_rate": 3.0, "n_classes": 4},
        {"base_channels": 16, "n_blocks": (2, 2, 2)},
        {"expansion_rate": 2.2, "in_channels": 2},
    ],
)
def test_it_and_its_forks_are_read_off_their_shapes(tmp_path, options):
    model = fill_state(build(**options)).eval()
    content = {f"model.{name}": value for name, value in model.state_dict().items()}
    content |= {"mel.0.kernel": torch.zeros(320, 1, 459), "mel.1.spectrogram.window": torch.zeros(3072)}
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "last.ckpt")
    loaded = load_model(tmp_path / "last.ckpt").model
    assert type(loaded) is Dcase24Baseline
    for name in ("channels_multiplier", "expansion_rate"):  # at the defaults where they fit
        if name not in options:
            assert getattr(loaded.config, name) == getattr(build().config, name)
    x = wave((2, model.config.in_channels, 64, 20), "x")
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-6)


def test_neither_network_claims_the_weights_of_the_other():
    ours, theirs = build(base_channels=8).state_dict(), get_model("cp_mobile", base_channels=8).state_dict()
    assert recognise("x.pt", ours)["model"]["name"] == "dcase24_baseline"
    assert recognise("x.pt", theirs)["model"]["name"] == "cp_mobile"
    with pytest.raises(ValueError, match="have response norms"):
        Dcase24Baseline.recognise(theirs)
    with pytest.raises(LookupError, match="after_block_norm"):
        CpMobile.recognise(ours)


@pytest.mark.parametrize("options", [{}, {"base_channels": 20, "expansion_rate": 1.5}], ids=["default", "odd"])
def test_runs_in_8_bits_and_onnx_runtime_agrees(tmp_path, options):
    x = wave((4, 1, 64, 33), "baseline/8 bits", 2.0) * torch.linspace(0.5, 1.5, 4)[:, None, None, None]
    integers, _ = check_8_bits(fill_state(build(**options)).eval(), x, tmp_path)
    stored = measure(integers, (1, 64, 33)).folded
    assert stored.n_parameters == measure(build(**options), (1, 64, 33)).folded.n_parameters


@pytest.mark.slow
def test_trains_resumes_and_exports(tau, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_scripts("dcase24_baseline", [*SMALL_MEL, "--base_channels", "8"], monkeypatch, int8=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": {"b7": (1, 1)}}, "the blocks are b1, b2"),
        ({"expansion_rate": 0.0}, "expansion_rate"),
        ({"base_channels": 1 << 14, "channels_multiplier": 3.0}, "the widest layer has"),
        ({"n_blocks": (1, 1)}, "strides name 'b3'"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
