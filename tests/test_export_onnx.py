import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from helpers.checkpoints.checkpoint import load_model
from helpers.export.files import describe_file, write_onnx
from helpers.export.onnx_file import DEPTHWISE_LANES, export_onnx, pad_depthwise
from helpers.quantization import calibrate, convert, for_target, overflowing_layers, prepare
from models import FRONTENDS, get_frontend, get_model
from models.layers.add import IntAdd
from models.layers.conv_unit import IntConv, IntSums
from models.layers.core import QTensor, QuantConfig, quantize
from tests.conftest import SHARED
from tests.golden_inputs import clip, fill_state, wave
from tests.test_quantization import CHECKPOINT, network

pytestmark = pytest.mark.slow

ALL = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
EXTENDED = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
NONE = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
# Shortcuts with and without a pool, and depthwise convolutions of 72 channels, which are padded.
MIDDLE = {"base_channels": 24, "expansion_rate": 3.0, "n_blocks": (2,)}
SCENES = [f"scene {i}" for i in range(10)]
RATE = 8000
CONFIG = QuantConfig()


@pytest.fixture(scope="module")
def frontend():
    """Small, for clips of a second: 32 mel bands, 17 frames."""
    return get_frontend("cp_mel", sample_rate=RATE, win_length=1024, hop_length=500, n_fft=1024, n_mels=32).eval()


@pytest.fixture(scope="module")
def log_mel(frontend) -> torch.Tensor:
    return frontend(clip(1, RATE, "export", 6))  # (clip, 1, 32, 16)


def converted_network(log_mel: torch.Tensor, config=CONFIG, **options) -> nn.Module:
    ready = prepare(network(**{**MIDDLE, **options}), config, log_mel[:1])
    calibrate(ready, lambda: [log_mel], "minmax")
    return convert(ready)


@pytest.fixture(scope="module")
def int8(frontend, log_mel, tmp_path_factory) -> tuple[nn.Module, Path]:
    model = converted_network(log_mel)
    path = tmp_path_factory.mktemp("int8") / "network.onnx"
    return model, write_onnx(model, frontend, SCENES, RATE, "int8", False, path)


@pytest.fixture(scope="module")
def int8_whole(int8, frontend, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "waveform.onnx"
    return write_onnx(int8[0], frontend, SCENES, RATE, "int8", True, path)


def run(path: Path, x: torch.Tensor, n_threads: int = 1, level=ALL, exact: bool = False) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
    options.intra_op_num_threads, options.graph_optimization_level = n_threads, level
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {value.name: x.numpy()})[0])


def convolution_weights(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, onnx.TensorProto]]:
    """Every Conv and what its weights are stored as, behind whatever converts them."""
    made_by = {name: node for node in graph.node for name in node.output}
    stored = {initializer.name: initializer for initializer in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "Conv":
            name = node.input[1]
            while name not in stored:
                name = made_by[name].input[0]
            found.append((node, stored[name]))
    return found


# ---- int8 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [ALL, EXTENDED])
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("n_clips", [1, 5])
def test_onnx_runtime_gives_the_logits_of_the_integer_network(int8, log_mel, n_clips, n_threads, level):
    model, path = int8
    # Every level agrees; the mean over the logits is a float sum.
    for exact in (False, True):
        logits = run(path, log_mel[:n_clips], n_threads, level, exact)
        torch.testing.assert_close(logits, model(log_mel[:n_clips]), rtol=0, atol=1e-5)


def test_without_graph_optimisation_levels_differ_now_and_then(int8, log_mel):
    # Operator by operator in float: sums are rounded, biases are no whole numbers of steps, and values near a tie go
    # the other way. It is the noise of 8 bits over again, not an error; the decision stays.
    model, path = int8
    expected = model(log_mel)
    logits = run(path, log_mel, level=NONE)
    assert (logits - expected).abs().max() < 0.1 * (expected.max() - expected.min())
    assert torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))


def test_other_settings_agree_too(frontend, log_mel, tmp_path):
    config = QuantConfig(reduced_range=True, quantize_input=True)
    model = converted_network(log_mel, config, n_blocks=(1, 1), base_channels=8, channels_multiplier=2)
    path = write_onnx(model, frontend, SCENES, RATE, "int8", False, tmp_path / "network.onnx")
    for level in (ALL, EXTENDED):
        torch.testing.assert_close(run(path, log_mel, 1, level), model(log_mel), rtol=0, atol=1e-5)
    weights = [numpy_helper.to_array(stored) for _, stored in convolution_weights(onnx.load(path).graph)]
    assert max(np.abs(value.astype(int)).max() for value in weights) == 63


def test_all_weights_are_stored_as_int8(int8):
    _, path = int8
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    found = convolution_weights(proto.graph)
    assert len(found) == 10  # convolutions of the network, and its pool
    assert {stored.data_type for _, stored in found} == {TensorProto.INT8}
    assert max(np.abs(numpy_helper.to_array(stored).astype(int)).max() for _, stored in found) == 127
    groups = {attribute.i for node, _ in found for attribute in node.attribute if attribute.name == "group"}
    assert 80 in groups and 72 not in groups  # depthwise convolutions are padded
    # Activations are uint8: what kernels for x86 are written for.
    zero_points = {initializer.name: initializer.data_type for initializer in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant":
            zero_points[node.output[0]] = node.attribute[0].t.data_type
    kinds = {zero_points[node.input[2]] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    assert kinds == {TensorProto.UINT8}


def test_files_name_no_machine_and_no_source(int8):
    _, path = int8
    content = path.read_bytes()
    for trace in (b"stack_trace", b".py", b"pkg.", str(Path.cwd()).encode()):
        assert trace not in content
    proto = onnx.load(path)
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)
    assert {opset.domain for opset in proto.opset_import} == {""}
    assert not proto.functions


def test_nodes_and_weights_are_called_after_their_layers(int8, int8_whole):
    model, path = int8
    graph = onnx.load(path).graph
    layers = {name for name, module in model.named_modules() if isinstance(module, IntSums)}
    assert {node.name.removesuffix("/Conv") for node in graph.node if node.op_type == "Conv"} == layers
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    layers = {name for name, module in model.named_modules() if isinstance(module, IntConv)}
    assert {f"{name}.weight" for name in layers} <= {initializer.name for initializer in graph.initializer}
    others = [name for node in graph.node for name in node.output] + [value.name for value in graph.initializer]
    assert all(re.fullmatch(r"[a-z]+_[0-9]+(_half)?|logits|[a-z0-9_.]+", name) for name in others)
    prefixes = {node.name.split("/")[0].split(".")[0] for node in onnx.load(int8_whole).graph.node if "/" in node.name}
    assert prefixes == {"frontend", "network"}


def test_biases_are_whole_numbers_and_zero_points_are_written(int8):
    _, path = int8
    graph = onnx.load(path).graph
    stored = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv" and not node.name.startswith("in_c.0/")]
    assert len(convolutions) == 9
    for node in convolutions:
        for name, kind in zip(node.input[1:], (np.int8, np.int32), strict=True):
            values, _, zeros = made_by[name].input
            assert stored[values].dtype == stored[zeros].dtype == kind
            assert stored[zeros].shape == stored[values].shape[:1] and not stored[zeros].any()
    all_inputs = [made_by[name].input for node in convolutions for name in node.input[1:]]
    assert len({values for values, *_ in all_inputs}) == 2 * len(convolutions)  # exact mode changes them in place


def test_the_batch_size_is_free_and_names_are_plain(int8):
    _, path = int8
    graph = onnx.load(path).graph
    (value,), (logits,) = graph.input, graph.output
    assert (value.name, logits.name) == ("log_mel", "logits")
    dims = [[dim.dim_param or dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in (value, logits)]
    assert dims == [["batch", 1, 32, 16], ["batch", 10]]


def test_the_metadata_says_what_goes_in_and_comes_out(int8, frontend):
    _, path = int8
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.get_modelmeta().custom_metadata_map
    assert found == describe_file(frontend, SCENES, RATE, "int8")
    assert json.loads(found["labels"]) == SCENES
    assert (found["sample_rate_hz"], found["clip_samples"], found["clip_seconds"]) == ("8000", "8000", "1")
    assert json.loads(found["frontend"])["n_mels"] == 32
    assert found["precision"] == "int8"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in FRONTENDS),
        ("kaldi_fbank", {"dataset_mean": 3.0, "dataset_std": 0.7}),
        ("dragonsearch_mel", {"scale": "ln"}),
        ("cnn3_mel", {"spectrogram_type": "power", "logarithmic": False}),
    ],
)
def test_the_normalisation_that_the_metadata_states_is_that_of_the_front_end(name, options):
    frontend = get_frontend(name, **options).eval()
    formula = describe_file(frontend, SCENES, 16000, "fp32")["normalisation"].removeprefix("log_mel = ")
    frontend.offset = 0.0  # some add 2e-16 to every sample
    silence = frontend(torch.zeros(1, 16000))
    stated = eval(formula, {"ln": np.log, "log10": np.log10, "max": max, "power": 0.0, "magnitude": 0.0})
    np.testing.assert_allclose(silence.numpy(), stated, rtol=1e-5, atol=1e-20)


def test_writing_again_replaces_the_file_and_leaves_nothing_else(int8, frontend, tmp_path):
    model, path = int8
    target = tmp_path / "network.onnx"
    target.write_bytes(b"what was there")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert write_onnx(model, frontend, SCENES, RATE, "int8", False, target) == target
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]
    assert target.read_bytes() == path.read_bytes()  # the same bytes from the same network
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_padding_depthwise_convolutions_changes_no_bit(log_mel):
    model = converted_network(log_mel)
    padded = pad_depthwise(model)
    widths = [
        {module.groups for module in network.modules() if isinstance(module, IntConv) and module.groups > 1}
        for network in (model, padded)
    ]
    assert widths == [{72}, {80}]
    assert 80 % DEPTHWISE_LANES == 0
    assert torch.equal(padded(log_mel), model(log_mel))


class SumOfTwo(nn.Module):
    """Two rounded inputs and their sum, (batch, 2, 256, 256) to (batch, 256, 256)."""

    def __init__(self, a: tuple[float, int], b: tuple[float, int], out: tuple[float, int]):
        super().__init__()
        self.a, self.b, self.add = a, b, IntAdd(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = (QTensor(quantize(x[:, i], *c), *c) for i, c in enumerate((self.a, self.b)))
        return self.add(a, b).dequantize()


class Sums(nn.Module):
    """Several of them, each with inputs of its own: (batch, 2 n, 256, 256) to (batch, n, 256, 256)."""

    def __init__(self, sums: list[SumOfTwo]):
        super().__init__()
        self.sums = nn.ModuleList(sums)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([one(x[:, 2 * i : 2 * i + 2]) for i, one in enumerate(self.sums)], dim=1)


# Sums that only a fused multiply-add rounds as ONNX Runtime does.
FUSED = ((0.0141714262, 4), (0.0054707890, -128), (0.0153892832, -19))


def random_constants(seed: int) -> tuple[tuple[float, int], ...]:
    rng = np.random.default_rng(seed)
    scales = [float(np.float32(value)) for value in rng.uniform(0.01, 0.05, 3)]
    zero_points = [int(value) for value in rng.integers(-128, 128, 3)]
    return tuple(zip(scales, zero_points, strict=True))


def test_sums_agree_with_onnx_runtime_for_all_pairs_of_levels(tmp_path):
    all_constants = [FUSED, *map(random_constants, range(1, 8))]
    levels, pairs = torch.arange(-128, 128).float(), []
    for a, b, _ in all_constants:
        a, b = ((levels - zero) * scale for scale, zero in (a, b))
        pairs += torch.broadcast_tensors(a[:, None], b[None])
    x, model = torch.stack(pairs)[None], Sums([SumOfTwo(*constants) for constants in all_constants]).eval()
    found = run(export_onnx(model, x, tmp_path / "sum.onnx", "x", {}), x)
    for i, constants in enumerate(all_constants):
        assert torch.equal(found[:, i], model(x)[:, i]), constants


# ---- other precisions, front end ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_float_files_agree_with_pytorch(frontend, log_mel, tmp_path, precision, tolerance):
    model = network(**MIDDLE)
    target = for_target(model, precision)
    path = write_onnx(target, frontend, SCENES, RATE, precision, False, tmp_path / "network.onnx")
    assert all(value.dtype == torch.float32 for value in model.state_dict().values() if value.is_floating_point())
    for n_clips in (1, 5):
        for level in (ALL, NONE):
            logits = run(path, log_mel[:n_clips], 1, level)
            torch.testing.assert_close(logits, target(log_mel[:n_clips]), rtol=0, atol=tolerance)
            torch.testing.assert_close(logits, model(log_mel[:n_clips]), rtol=0, atol=tolerance)
    stored = {stored.data_type for _, stored in convolution_weights(onnx.load(path).graph)}
    assert stored == {TensorProto.FLOAT if precision == "fp32" else TensorProto.FLOAT16}
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node)


def test_files_with_the_front_end_take_waveforms(int8, int8_whole, log_mel):
    waveform = clip(1, RATE, "export", 6)
    logits, expected = run(int8_whole, waveform), int8[0](log_mel)
    # Spectrograms that differ in the last bits move a few values to the next level.
    assert (logits - expected).abs().max() < 0.05 * (expected.max() - expected.min())
    assert onnx.load(int8_whole).graph.input[0].name == "waveform"
    assert {stored.data_type for _, stored in convolution_weights(onnx.load(int8_whole).graph)} >= {TensorProto.INT8}


WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchaudio", "helpers", "models", "datasets"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
logits = session.run(["logits"], {"log_mel": np.load(sys.argv[2])})[0]
np.save(sys.argv[3], logits)
print(labels[int(logits[0].argmax())])
assert "torch" not in sys.modules
"""


def test_files_run_in_a_python_without_torch(int8, log_mel, tmp_path):
    model, path = int8
    np.save(tmp_path / "in.npy", log_mel.numpy())
    command = [sys.executable, "-c", WITHOUT_TORCH, str(path), str(tmp_path / "in.npy"), str(tmp_path / "out.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    expected = model(log_mel)
    assert done.stdout.strip() == SCENES[expected[0].argmax()]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected.numpy(), rtol=0, atol=1e-5)


# ---- the default network --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_int8(tmp_path_factory) -> tuple[nn.Module, Path]:
    """With the published weights where they are."""
    if (SHARED / CHECKPOINT).exists():
        model = load_model(SHARED / CHECKPOINT).model
    else:
        model = fill_state(get_model("cp_mobile"))
    clips = get_frontend("cp_mel").eval()(clip(1, 32000, "default", 4))
    ready = prepare(model, QuantConfig(), clips[:1])
    calibrate(ready, lambda: [clips], "mse")
    path = tmp_path_factory.mktemp("default") / "network.onnx"
    return convert(ready), write_onnx(convert(ready), get_frontend("cp_mel"), SCENES, 32000, "int8", False, path)


def test_the_default_network_takes_at_most_195_kb(default_int8):
    model, path = default_int8
    assert sum(module.weight.numel() for module in model.modules() if isinstance(module, IntConv)) > 120_000
    assert path.stat().st_size <= 195_000


def test_the_default_network_agrees_with_onnx_runtime(default_int8):
    model, path = default_int8
    x = wave((5, 1, 256, 64), "other", 0.5)
    for n_clips, n_threads in ((1, 1), (5, 2)):
        torch.testing.assert_close(run(path, x[:n_clips], n_threads), model(x[:n_clips]), rtol=0, atol=1e-5)


def test_the_published_network_agrees_with_onnx_runtime_on_real_clips(shared, default_int8):
    shared(CHECKPOINT)
    clips = torch.load(shared("golden/cpjku_dcase23/checkpoint_real_clips.pt"), weights_only=True)
    model, path = default_int8
    for n_threads in (1, 2):
        torch.testing.assert_close(run(path, clips["spec"], n_threads), model(clips["spec"]), rtol=0, atol=1e-5)
    without = run(path, clips["spec"], level=NONE)
    assert (without - model(clips["spec"])).abs().max() < 1.0  # within the noise of 8 bits, of logits up to 12
    assert run(path, clips["spec"]).argmax(dim=1).tolist() == clips["argmax"]


def test_a_quantized_input_leaves_nothing_to_chance_on_real_clips(shared, tmp_path):
    clips = torch.load(shared("golden/cpjku_dcase23/checkpoint_real_clips.pt"), weights_only=True)
    ready = prepare(load_model(shared(CHECKPOINT)).model, QuantConfig(quantize_input=True), clips["spec"][:1])
    calibrate(ready, lambda: [clips["spec"]], "mse")
    model = convert(ready)
    assert overflowing_layers(model) == []
    path = write_onnx(model, get_frontend("cp_mel"), SCENES, 32000, "int8", False, tmp_path / "network.onnx")
    for exact in (False, True):
        logits = run(path, clips["spec"], exact=exact)
        torch.testing.assert_close(logits, model(clips["spec"]), rtol=0, atol=1e-5)
