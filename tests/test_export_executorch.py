import json
import logging

import pytest
import torch
from torch import nn

from helpers.checkpoints.checkpoint import load_model
from helpers.export import executorch_program as ee
from helpers.quantization import calibrate, convert, prepare, step_of_logits
from models import get_frontend, get_model
from models.frontends.mel_export import MelExport
from models.layers.core import QuantConfig
from models.layers.fold import fold
from tests.golden_inputs import clip, fill_state
from tests.students import clips_of
from tests.test_layers import NETWORKS, build, clips, ready_network
from tests.test_quantization import CHECKPOINT, network, prepared, spectrograms

needs_executorch = pytest.mark.skipif(
    not ee.is_installed(), reason=f"needs ExecuTorch, an optional package: {ee.INSTALL}"
)
# What XNNPACK does not take of the front end: it mirrors the ends of the clip and gathers frames and rows of filters.
GATHERING = {"aten::flip", "aten::index_select"}


class Convolution(nn.Sequential):
    """The smallest program worth writing."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU())
        with torch.no_grad():
            self[0].weight.copy_(torch.linspace(-1, 1, 36).view(4, 1, 3, 3))
            self[0].bias.fill_(0.1)


EXAMPLE = torch.zeros(1, 1, 6, 5)


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """An integer network with a pool in one shortcut, and its program."""
    model = convert(prepared())
    path = tmp_path_factory.mktemp("int8") / "network.pte"
    metadata = {"labels": json.dumps(["bus", "metro, underground"]), "sample_rate_hz": "32000"}
    return model, ee.export_executorch(model, spectrograms(1), path, metadata), metadata


def plan(path):
    """Delegates and portable operators of a program's forward method."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    (forward,) = [p for p in deserialize_pte_binary(path.read_bytes()).program.execution_plan if p.name == "forward"]
    return [delegate.id for delegate in forward.delegates], {operator.name for operator in forward.operators}


# ---- int8 -----------------------------------------------------------------------------------------------------------


@needs_executorch
def test_the_program_gives_the_logits_of_the_integer_network(int8):
    model, path, _ = int8
    log_mel = torch.cat([spectrograms(24), spectrograms(24).flip(3)])
    expected, logits = model(log_mel), ee.run_program(path, log_mel)
    difference = (logits - expected).abs().amax(dim=1)
    # All but the mean of the logits is integers; a sum near the middle of two levels may go the other way.
    assert (difference < 1e-5).float().mean() > 0.8
    assert difference.max() < 0.1 * (expected.max() - expected.min())
    assert torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))


@needs_executorch
def test_xnnpack_runs_all_of_the_network(int8):
    assert plan(int8[1]) == (["XnnpackBackend"], set())


@needs_executorch
def test_the_logits_do_not_depend_on_run_and_threads(int8):
    log_mel = spectrograms(6)
    one = ee.load_program(int8[1], n_threads=1)
    first, again = one(log_mel), one(log_mel)
    assert torch.equal(first, again)
    assert torch.equal(ee.load_program(int8[1], n_threads=2)(log_mel), first)


@needs_executorch
def test_metadata_comes_back(int8):
    _, path, metadata = int8
    assert ee.read_metadata(path) == metadata


@needs_executorch
def test_other_settings_agree_too(tmp_path):
    config = QuantConfig(reduced_range=True, quantize_input=True)
    model = convert(prepared(network(n_blocks=(1,), strides={}), config))
    log_mel = spectrograms(8)
    path = ee.export_executorch(model, log_mel[:1], tmp_path / "network.pte")
    expected, logits = model(log_mel), ee.run_program(path, log_mel)
    assert ((logits - expected).abs().amax(dim=1) < 1e-5).float().mean() > 0.7
    assert torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))


@needs_executorch
@pytest.mark.parametrize("cls", NETWORKS.values(), ids=NETWORKS)
def test_networks_of_plain_layers_agree_in_float_and_in_8_bits(cls, tmp_path):
    network, log_mel = build(cls), clips(12)
    path = ee.export_executorch(fold(network, log_mel[:1]), log_mel[:1], tmp_path / "float.pte")
    torch.testing.assert_close(ee.run_program(path, log_mel), network(log_mel), rtol=0, atol=1e-5)
    model = convert(ready_network(network, x=log_mel))
    path = ee.export_executorch(model, log_mel[:1], tmp_path / "int8.pte")
    expected, logits = model(log_mel), ee.run_program(path, log_mel)
    assert ((logits - expected).abs().amax(dim=1) < 1e-5).float().mean() > 0.7
    assert torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))


@needs_executorch
def test_the_published_network_on_real_clips(shared, tmp_path):
    loaded = load_model(shared(CHECKPOINT))
    clips = torch.load(shared("golden/cpjku_dcase23/checkpoint_real_clips.pt"), weights_only=True)["wave32k"]
    log_mel = loaded.frontend(clips)
    ready = prepare(loaded.model, QuantConfig(), log_mel[:1])
    calibrate(ready, lambda: [log_mel])
    model = convert(ready)
    path = ee.export_executorch(model, log_mel[:1], tmp_path / "network.pte")
    expected, logits = model(log_mel), ee.run_program(path, log_mel)
    # Measured: all but a few clips in a hundred alike, and at most 0.13 apart; 8 bits themselves are 0.2 from float32.
    assert (logits - expected).abs().mean() < 0.02
    assert torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))
    # 124,862 weights and biases: weights in one byte each and once, 12 bytes a channel, 35 kB that describe the graph.
    assert path.stat().st_size < 195_000


# ---- float, front end -----------------------------------------------------------------------------------------------


@needs_executorch
def test_a_float_program_gives_the_logits_of_the_network(tmp_path):
    model, log_mel = network(), spectrograms(6)
    path = ee.export_executorch(fold(model), log_mel[:1], tmp_path / "network.pte")
    assert plan(path) == (["XnnpackBackend"], set())
    torch.testing.assert_close(ee.run_program(path, log_mel), model(log_mel), rtol=0, atol=1e-4)


@needs_executorch
def test_a_program_with_the_front_end_takes_waveforms(tmp_path):
    frontend = get_frontend("cp_mel", sample_rate=8000, win_length=1024, hop_length=500, n_fft=1024, n_mels=32).eval()
    model = fold(network(n_blocks=(1,), strides={}))
    waveform = clip(1, 8000, "executorch", 4)
    whole = nn.Sequential(MelExport(frontend, waveform.shape[1]), model)
    path = ee.export_executorch(whole, waveform[:1], tmp_path / "waveform.pte")
    delegates, operators = plan(path)
    assert set(delegates) == {"XnnpackBackend"}
    assert operators == GATHERING
    # Spectrograms differ by the order of float32 sums.
    torch.testing.assert_close(ee.run_program(path, waveform), model(frontend(waveform)), rtol=0, atol=1e-3)


# ---- files and errors -----------------------------------------------------------------------------------------------


@needs_executorch
def test_writing_replaces_the_file_quietly_and_leaves_nothing_else(tmp_path, caplog, recwarn):
    path = tmp_path / "new folder" / "network.pte"
    model = Convolution()
    for content in (b"", b"what was there"):
        if content:
            first = path.read_bytes()
            path.write_bytes(content)
        with caplog.at_level(logging.WARNING):
            assert ee.export_executorch(model, EXAMPLE, path) == path
    assert path.read_bytes() == first  # the same bytes from the same network
    assert [file.name for file in path.parent.iterdir()] == ["network.pte"]
    assert ee.read_metadata(path) == {}
    assert not caplog.records
    assert not len(recwarn)
    assert logging.root.manager.disable == logging.NOTSET
    for trace in (b"stack_trace", b".py", str(tmp_path).encode()):
        assert trace not in first


@needs_executorch
def test_a_failed_export_says_so_and_keeps_what_was_there(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    path = tmp_path / "network.pte"
    path.write_bytes(b"what was there")
    with pytest.raises(Exception, match="data-dependent"):
        ee.export_executorch(Branching(), EXAMPLE, path)
    assert path.read_bytes() == b"what was there"
    assert logging.root.manager.disable == logging.NOTSET


@needs_executorch
def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        ee.run_program(tmp_path / "nothing.pte", EXAMPLE)


def test_without_executorch_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(ee, "find_spec", lambda name: None)
    path = tmp_path / "network.pte"
    calls = [
        lambda: ee.export_executorch(Convolution(), EXAMPLE, path),
        lambda: ee.run_program(path, EXAMPLE),
        lambda: ee.read_metadata(path),
    ]
    for call in calls:
        with pytest.raises(ee.ExecuTorchMissingError, match=r"requirements-executorch\.txt") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not path.exists()


STUDENTS = {
    "tf_sepnet": ({"base_channels": 8}, (72, 80)),
    "bc_resnet": ({"base_channels": 6, "sub_bands": 2}, (48, 48)),
}


@needs_executorch
@pytest.mark.parametrize("name", STUDENTS)
def test_networks_of_other_kinds_of_layers_run_in_8_bits(name, tmp_path):
    options, shape = STUDENTS[name]
    model, x = fill_state(get_model(name, **options)).eval(), clips_of(*shape)
    with torch.no_grad():
        path = ee.export_executorch(fold(model, x[:1]), x[:1], tmp_path / "fp32.pte", {})
        torch.testing.assert_close(ee.run_program(path, x), model(x), rtol=0, atol=1e-4)
        integers = convert(ready_network(model, x=x))
        path = ee.export_executorch(integers, x[:1], tmp_path / "int8.pte", {})
        # Roundings that fall the other way would be steps; the mean over the positions is float.
        assert (ee.run_program(path, x) - integers(x)).abs().max() <= step_of_logits(integers)
