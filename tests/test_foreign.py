import logging
from collections import OrderedDict

import pytest
import torch
import torchaudio
from torch import nn
from torch.ao import quantization

from datasets.tau import SCENES
from helpers.checkpoints.checkpoint import CheckpointError, load_model
from helpers.checkpoints.foreign import ForeignError, recognise
from models import get_model
from tests.golden_inputs import fill_state, wave

pytestmark = pytest.mark.slow

SMALL_PASST = {"embed_dim": 64, "depth": 2, "n_heads": 1}
SMALL_BEATS = {
    "encoder_layers": 2, "encoder_embed_dim": 48, "encoder_ffn_embed_dim": 96, "encoder_attention_heads": 4,
    "embed_dim": 32, "conv_pos": 16, "conv_pos_groups": 4,
}  # fmt: skip


def beats_state(model) -> dict:
    """Filled, with one table of positions for all layers, as the network has."""
    return fill_state(model).eval().state_dict()


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({}, {"rho": 8, "cut_channels_s3": 36, "s2_group": 2}),
        ({"rho": 3, "n_classes": 3}, {"rho": 3}),
        (
            {"rho": 11, "base_channels": 16, "cut_channels_s2": 4, "cut_channels_s3": 8, "s3_group": 4},
            {"rho": 9},
        ),  # 9, 10, 11: the same
        ({"n_blocks": (1, 2, 0), "in_channels": 2, "s1_group": 4}, {"n_blocks": (1, 2, 0), "s1_group": 4}),
        ({"base_channels": 24, "channels_multiplier": 1.5, "cut_channels_s3": 0, "s2_group": 1}, {"base_channels": 24}),
    ],
)
def test_cp_resnet_is_read_off_its_shapes(tmp_path, options, read, prefix):
    model = fill_state(get_model("cp_resnet", **options)).eval()
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state} if prefix else state, tmp_path / "w.pt")
    loaded = load_model(tmp_path / "w.pt")
    for name, value in read.items():
        assert getattr(loaded.model.config, name) == value
    x = wave((2, model.config.in_channels, 64, 20), "x")
    assert torch.equal(loaded.model(x), model(x))
    assert loaded.frontend.config.hop_length == 750
    assert loaded.scenes == (SCENES if model.config.n_classes == 10 else ())


@pytest.mark.parametrize(
    ("options", "input_tdim"),
    [
        ({}, 998),
        ({"arch": "passt_s_f128_20sec_p16_s10_ap474"}, 2000),
        ({"arch": "passt_s_swa_p16_s14_128_ap471", "n_classes": 4}, 998),
        ({"input_tdim": 106}, 106),
        ({"fstride": 16, "tstride": 16, "input_tdim": 96, "in_channels": 2}, 96),
        ({"input_fdim": 66, "input_tdim": 56, "s_patchout_f": 0}, 56),
    ],
)
def test_passt_is_read_off_its_shapes(tmp_path, options, input_tdim):
    model = fill_state(get_model("passt", **(SMALL_PASST | options))).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loaded = load_model(tmp_path / "w.pt")
    config = loaded.model.config
    assert (config.grid, config.fstride, config.tstride) == (
        model.config.grid,
        model.config.fstride,
        model.config.tstride,
    )
    assert config.input_tdim == input_tdim
    x = wave((1, config.in_channels, model.config.input_fdim, 60), "x")
    assert torch.equal(loaded.model(x), model(x))
    front = loaded.frontend.config
    assert (front.n_fft, front.win_length, front.hop_length, front.n_mels) == (1024, 800, 320, config.input_fdim)


@pytest.mark.parametrize(
    "options", [{}, {"n_classes": 3, "conv_bias": True, "gru_rel_pos": False}], ids=["ours", "other"]
)
@pytest.mark.parametrize("form", ["authors", "lightning", "bare"])
def test_beats_is_read_in_all_forms(tmp_path, options, form):
    model = get_model("beats", **(SMALL_BEATS | options))
    state = beats_state(model)
    if form == "authors":
        names = {
            f"{n.removeprefix('encoder.')}".replace("classifier.linear.", "predictor."): v for n, v in state.items()
        }
        cfg = {
            name: value for name, value in vars(model.config).items() if name not in ("n_classes", "grad_checkpointing")
        }
        content = {"cfg": cfg | {"predictor_class": model.config.n_classes}, "model": names}
    elif form == "lightning":
        content = {"state_dict": {f"backbone.{name}": value for name, value in state.items()}, "epoch": 3}
    else:
        content = state
    torch.save(content, tmp_path / "w.pt")
    loaded = load_model(tmp_path / "w.pt")
    x = wave((2, 1, 128, 98), "x")
    torch.testing.assert_close(loaded.model(x), model(x), rtol=0, atol=1e-6)
    assert loaded.frontend.config.sample_rate == 16000
    assert loaded.model.config.deep_norm and loaded.model.config.max_distance == 800


def test_an_encoder_alone_is_refused():
    state = beats_state(get_model("beats", **SMALL_BEATS))
    bare = {name: value for name, value in state.items() if name.startswith("encoder.")}
    with pytest.raises(ForeignError, match=r"x\.pt is no whole beats network: 'classifier\.linear\.weight'"):
        recognise("x.pt", bare)
    cfg = {**vars(get_model("beats", **SMALL_BEATS).config)}
    model = {name.removeprefix("encoder."): value for name, value in bare.items()}
    with pytest.raises(ForeignError, match=r"x\.pt is a beats network without a classifier"):
        recognise("x.pt", {"cfg": cfg, "model": model})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"weights": torch.zeros(3)},
            r"holds none of the networks cp_mobile.*found: weights",
        ),
        (
            {"state_dict": {"backbone.conv.weight": torch.zeros(3)}},
            "holds none of the networks cp_mobile.*backbone.conv",
        ),
        ({"stage1.block1.conv1.weight": torch.zeros(8, 8, 3, 3)}, "no whole cp_resnet network: 'in_c.0.weight'"),
        ({"state_dict": {7: torch.zeros(3)}}, "found: state_dict"),
        ({"patch_embed.proj.weight": torch.zeros(3)}, "no passt network, its weights have other shapes"),
        ({"stage1.block1.conv1.weight": torch.zeros(3), "in_c.0.weight": torch.zeros(8)}, "no cp_resnet network, its"),
        ({"cfg": {}, "model": {}}, "weights of the BEATs checkpoint|cfg of the BEATs checkpoint"),
        ({str(i): torch.zeros(1) for i in range(300)}, "0, 1, 2, 3, 4 and 295 more"),
    ],
)
def test_foreign_content_is_one_clear_error(content, message):
    with pytest.raises(ForeignError, match=message):
        recognise("x.pt", content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: v for n, v in s.items() if not n.startswith("stage3")}, "of another shape|missing"),
        (lambda s: s | {"head.weight": torch.zeros(2)}, "head.weight unknown"),
        (lambda s: {n: v for n, v in s.items() if "bn1" not in n}, r"bn1.*and \d+ more missing"),
        (
            lambda s: s | {"stage1.block2.conv2.weight": torch.zeros(32, 16, 3, 3)},
            r"\(32, 16, 3, 3\) for \(32, 32, 3, 3\)",
        ),
    ],
)
def test_loading_is_strict_and_lists_what_differs(tmp_path, change, message):
    torch.save(change(get_model("cp_resnet").state_dict()), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(tmp_path / "w.pt")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("stage", ["999999999", "9" * 5000, "²", "٣"])
def test_names_with_odd_numbers_do_not_load(tmp_path, stage):
    """The first would be a list of as many stages."""
    state = get_model("cp_mobile", base_channels=8).state_dict()
    torch.save(state | {f"stages.s{stage}.b1.block.2.0.weight": torch.zeros(8, 8, 1, 1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"no whole cp_mobile network|unknown"):
        load_model(tmp_path / "w.pt")


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "net.", "net_swa.", "module._orig_mod.model."])
@pytest.mark.parametrize("keys", [(), ("state_dict",), ("model_state_dict",), ("model",), ("net",), ("x", "model")])
def test_a_wrapped_network_is_found(prefix, keys):
    state = get_model("cp_mobile", base_channels=8).state_dict()
    content = {f"{prefix}{name}": value for name, value in state.items()}
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    part = recognise("x.pt", content)["model"]
    assert part["state"].keys() == state.keys() and part["config"]["base_channels"] == 8


@pytest.mark.parametrize("student", ["", "model.", "student."])
def test_of_a_student_beside_its_teacher_the_student_is_taken(student, caplog):
    state = get_model("cp_mobile", base_channels=8).state_dict()
    content = {f"{student}{name}": value for name, value in state.items()}
    for prefix in ("teacher_model.", "teacher."):
        content |= {f"{prefix}{name}": value for name, value in get_model("cp_mobile").state_dict().items()}
    content |= {"projection.weight": torch.zeros(3), "proj_s.0.bias": torch.zeros(3)}
    with caplog.at_level(logging.INFO):
        part = recognise("x.pt", content)["model"]
    assert part["state"].keys() == state.keys() and part["config"]["base_channels"] == 8
    assert "not used: teacher_model.in_c" in caplog.text


def test_two_networks_are_refused_by_name():
    state = get_model("cp_mobile", base_channels=8).state_dict()
    content = {"net": state, "net_swa": {name: value + 1 for name, value in state.items()}}
    with pytest.raises(ForeignError, match=r"cp_mobile in net\.\* and cp_mobile in net_swa\.\*"):
        recognise("x.pt", content)
    assert recognise("x.pt", {"net": state, "model": dict(state)})["model"]["name"] == "cp_mobile"  # the same twice


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.half() if v.is_floating_point() else v,
        lambda v: v.bfloat16() if v.is_floating_point() else v,
        lambda v: v.double() if v.is_floating_point() else v,
        lambda v: nn.Parameter(v) if v.is_floating_point() else None,
    ],
    ids=["fp16", "bf16", "double", "parameter, without counters"],
)
def test_other_kinds_of_tensors_load(tmp_path, change):
    model = fill_state(get_model("cp_mobile", base_channels=8)).eval()
    state = OrderedDict((name, change(value)) for name, value in model.state_dict().items())
    torch.save(OrderedDict((n, v) for n, v in state.items() if v is not None), tmp_path / "w.pt")
    x = wave((2, 1, 64, 20), "x")
    torch.testing.assert_close(load_model(tmp_path / "w.pt").model(x), model(x), rtol=0.1, atol=0.3)


def test_the_published_qat_checkpoint_is_folded_back(tmp_path):
    source = fill_state(get_model("cp_mobile", base_channels=8)).eval()
    x = wave((2, 1, 64, 20), "x")
    expected = source(x)
    model, units = fill_state(get_model("cp_mobile", base_channels=8)).eval(), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) and len(module) in (2, 3) and isinstance(module[0], nn.Conv2d):
            units.append([f"{name}.{i}" for i, part in enumerate(module) if not isinstance(part, nn.Identity)])
    quantization.fuse_modules(model, units, inplace=True)
    model.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model, inplace=True)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert "model.in_c.0.0.bias" in state and any("activation_post_process" in name for name in state)
    packed = torch.quantize_per_tensor(torch.zeros(8, 1, 3, 3), 0.1, 0, torch.qint8)
    torch.save({"state_dict": state | {"model_int8.in_c.0.0.weight": packed}}, tmp_path / "w.ckpt")
    torch.testing.assert_close(load_model(tmp_path / "w.ckpt").model(x), expected, rtol=1e-4, atol=1e-4)


def baseline_buffers(n_fft: int, win_length: int, n_mels: int, rate: int) -> dict[str, torch.Tensor]:
    mel = torchaudio.transforms.MelSpectrogram(rate, n_fft, win_length, 500, n_mels=n_mels)
    buffers = {f"mel.1.{name}": value for name, value in mel.state_dict().items()}
    return {"mel.0.kernel": torch.zeros(320, 1, 459)} | buffers


@pytest.mark.parametrize(
    "sizes", [(4096, 3072, 256, 32000), (8192, 8192, 256, 44100), (1024, 800, 64, 16000)], ids=["2024", "Tan", "small"]
)
def test_the_front_end_is_read_off_its_buffers_beside_the_network(tmp_path, caplog, sizes):
    model = fill_state(get_model("cp_mobile", base_channels=8))
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": baseline_buffers(*sizes) | state}, tmp_path / "w.ckpt")
    config = load_model(tmp_path / "w.ckpt").frontend.config
    assert (type(config).__name__, config.n_fft, config.win_length, config.n_mels) == ("Dcase24MelConfig", *sizes[:3])
    assert config.sample_rate == sizes[3] and config.f_max == sizes[3] / 2
    assert "do not tell the hop" in caplog.text


def test_a_file_that_does_not_tell_its_front_end_is_not_guessed_silently(tmp_path, caplog):
    torch.save(fill_state(get_model("cp_mobile", base_channels=8)).state_dict(), tmp_path / "w.pt")
    load_model(tmp_path / "w.pt")
    assert "does not tell its front end: taken is cp_mel with sample_rate 32000" in caplog.text
    assert "--hop_size" in caplog.text
    odd = baseline_buffers(4096, 3072, 256, 32000)
    odd["mel.1.mel_scale.fb"] = odd["mel.1.mel_scale.fb"].flip(1)  # filters of somebody's own
    torch.save(odd | {f"m.{k}": v for k, v in get_model("cp_mobile").state_dict().items()}, tmp_path / "odd.pt")
    assert type(load_model(tmp_path / "odd.pt").frontend.config).__name__ == "CpMelConfig"


def test_of_a_container_with_networks_for_devices_the_general_one_is_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    general, others = get_model("cp_mobile", base_channels=8), [get_model("cp_mobile", base_channels=8) for _ in "ab"]
    state = {f"base_model.{name}": value for name, value in general.state_dict().items()}
    for device, model in zip("ab", others, strict=True):
        state |= {f"device_models.{device}.{name}": value for name, value in model.state_dict().items()}
    flat = {"state_dict": {f"multi_device_model.{name}": value for name, value in state.items()}}
    nested = {
        "original_model": general.state_dict(),
        "device_models": {device: model.state_dict() for device, model in zip("ab", others, strict=True)},
        "multi_device_student": {f"original_model.{name}": value for name, value in general.state_dict().items()},
    }
    for content in (flat, nested):
        torch.save(content, tmp_path / "w.pt")
        loaded = load_model(tmp_path / "w.pt").model.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in general.state_dict().items())
        own = load_model(tmp_path / "w.pt").device_models
        assert [*own] == ["a", "b"]
        for device, model in zip("ab", others, strict=True):
            assert all(torch.equal(own[device].state_dict()[k], v) for k, v in model.state_dict().items())
    torch.save({"device_models": nested["device_models"]}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"more than one network .*device_models.a"):
        load_model(tmp_path / "w.pt")
