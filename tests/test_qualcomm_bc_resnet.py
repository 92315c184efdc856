import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.complexity import measure
from models import get_frontend
from models.qualcomm_bc_resnet import QualcommBcResnet, QualcommBcResnetConfig
from tests.golden_inputs import fill_state, wave
from tests.students import check_8_bits, check_float_file, check_published, check_recognised, check_scripts, clips_of

SMALL = {"tau": 0.5, "n_classes": 5}


def build(**options) -> QualcommBcResnet:
    return QualcommBcResnet(QualcommBcResnetConfig(**options))


@pytest.mark.parametrize("case", [0, 1])
def test_matches_the_published_network(golden, case):
    case = golden("easy_qualcomm_bcresnet")["cases"][case]
    model = check_published(
        "qualcomm_bc_resnet", case | {"config": {"tau": case["tau"], "num_classes": case["num_classes"]}}
    )
    assert model.config.widths[1] == case["base_c"]


@pytest.mark.parametrize(
    ("tau", "n_parameters", "arithmetic_macs", "macs"),
    [
        (1, 9_232, 2_482_156, 2_484_584), (1.5, 17_154, 4_607_994, 4_611_630), (2, 27_284, 7_323_672, 7_328_516),
        (3, 54_168, 14_524_548, 14_531_808), (6, 187_812, 50_283_336, 50_297_844),
        (8, 321_068, 85_919_328, 85_938_668),
    ],
)  # fmt: skip
def test_sizes_are_the_published_ones(tau, n_parameters, arithmetic_macs, macs):
    cost = measure(build(tau=tau, n_classes=12), (1, 40, 101)).trained
    assert (cost.n_parameters, cost.arithmetic_macs, cost.macs) == (n_parameters, arithmetic_macs, macs)


def test_the_network_is_what_its_paper_says():
    """Written with functions, band by band and with dilated taps that are added up, from the state dict."""
    model = fill_state(build(**SMALL, in_channels=2)).double().eval()
    state, x = model.state_dict(), wave((2, 2, 40, 23), "log-mel").double()

    def norm(x: Tensor, name: str, bands: slice = slice(None)) -> Tensor:
        gain, bias, mean, variance = (
            state[f"{name}.{entry}"][bands][:, None, None]
            for entry in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) * gain / (variance + 1e-5).sqrt() + bias

    def along_time(x: Tensor, kernel: Tensor, step: int) -> Tensor:  # (batch, channel, 1, time)
        padded = F.pad(x, (step, step))
        return sum(padded[..., i * step : i * step + x.shape[3]] * kernel[:, 0, :, i, None] for i in range(3))

    def block(x: Tensor, name: str, stride: int, dilation: int, is_first: bool) -> Tensor:
        y, last = x, f"{name}.f2.{int(is_first)}.block"
        if is_first:
            y = F.conv2d(x, state[f"{name}.f2.0.block.0.weight"])
            y = norm(y, f"{name}.f2.0.block.1").relu()
        y = F.conv2d(y, state[f"{last}.0.weight"], stride=(stride, 1), padding=(1, 0), groups=y.shape[1])
        parts = [norm(part, f"{last}.1.ssnorm", slice(i, None, 5)) for i, part in enumerate(y.chunk(5, dim=2))]
        y = torch.cat(parts, dim=2)
        branch = along_time(y.mean(dim=2, keepdim=True), state[f"{name}.f1.0.block.0.weight"], dilation)
        branch = norm(branch, f"{name}.f1.0.block.1")
        branch = F.conv2d(branch * branch.sigmoid(), state[f"{name}.f1.1.weight"])
        return (y + branch + (0 if is_first else x)).relu()

    y = norm(F.conv2d(x, state["cnn_head.0.weight"], stride=(2, 1), padding=2), "cnn_head.1").relu()
    for stage, n_blocks in enumerate((2, 2, 4, 4)):
        for i in range(n_blocks):
            y = block(y, f"BCBlocks.{stage}.{i}", 2 if i == 0 and stage in (1, 2) else 1, 2**stage, i == 0)
    y = F.conv2d(y, state["classifier.0.weight"], padding=(0, 2), groups=y.shape[1])
    y = norm(F.conv2d(y, state["classifier.1.weight"]), "classifier.2").relu().mean(dim=(2, 3))
    y = y @ state["classifier.5.weight"][:, :, 0, 0].T + state["classifier.5.bias"]
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("tau", "shape"), [(0.7, (40, 1)), (1.3, (39, 37)), (0.25, (80, 101))])
def test_takes_any_length_and_a_batch_gives_what_its_clips_give(tau, shape):
    model, x = fill_state(build(**(SMALL | {"tau": tau}))).eval(), wave((3, 1, *shape), "batch")
    torch.testing.assert_close(model(x), torch.cat([model(one) for one in x.split(1)]), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"5 sub-bands must divide .* 32, 16, 8 for 64 mel bands: take 40, or a mult"):
        build(**SMALL)(torch.zeros(1, 1, 64, 20))
    for options in ({"tau": 0}, {"tau": 0.1}, {"tau": float("nan")}, {"tau": 1000}, {"dropout": 1}, {"n_classes": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            build(**options)


def test_dropout_takes_whole_channels():
    model, x = fill_state(build(**SMALL, dropout=0.5)).train(), wave((2, 1, 40, 20), "x")
    block, taps = model.BCBlocks[0][0], []
    block.f1.register_forward_hook(lambda _module, _x, y: taps.append(y))
    model(x)
    assert all(channel.eq(0).all() or channel.ne(0).all() for channel in taps[0].flatten(0, 1))
    assert torch.equal(model.eval()(x), model(x))


def test_the_default_front_end_fits():
    name, options = QualcommBcResnet.default_frontend
    log_mel = get_frontend(name, **options).eval()(wave((2, 16000), "x"))
    assert build(**SMALL).eval()(log_mel).shape == (2, 5)


@pytest.mark.parametrize("tau", [1.5, 0.5])
def test_is_read_off_its_shapes(tmp_path, tau):
    check_recognised("qualcomm_bc_resnet", tmp_path / "w.pt", n_classes=12, tau=tau, in_channels=2)


@pytest.mark.slow
def test_runs_as_float_files(tmp_path):
    check_float_file(fill_state(build(**SMALL)).eval(), clips_of(40, 37), tmp_path)


@pytest.mark.slow
def test_runs_in_8_bits(tmp_path):
    _, kinds = check_8_bits(fill_state(build(**SMALL)).eval(), clips_of(40, 37), tmp_path)
    assert {"QLinearConv", "QLinearAdd", "GatherND"} <= set(kinds)


@pytest.mark.slow
def test_trains_resumes_and_exports(tau, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_scripts("qualcomm_bc_resnet", ["--tau", "0.5"], monkeypatch, int8=False)
