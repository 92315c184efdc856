"""Writes networks as ONNX: float, half precision, or 8 bits in QDQ form, small and fast in ONNX Runtime.

PyTorch's exporter does the translation; this file adds the 8-bit operators, stores weights as int8 and what 16 bits
hold exactly as 16 bits, and leaves out everything that only describes where a node came from.
"""

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxscript import opset20 as op
from torch import Tensor, nn

from datasets.files import replacing
from models.layers.conv_unit import IntConv

DEPTHWISE_LANES = 16  # ONNX Runtime's depthwise int8 kernel takes so many channels at once, the rest one by one
IR_VERSION = 9  # of the file format, the oldest for opset 20: ONNX Runtime 1.17 reads it
MIN_COMPACT_VALUES = 8  # smaller constants are not worth a cast
# What the inputs of an operator are called, and its output.
ROLES = {
    "Conv": ("input", "weight", "bias"),
    "QuantizeLinear": ("input", "scale", "zero"),
    "DequantizeLinear": ("input", "scale", "zero"),
}
SHORT = {"QuantizeLinear": "q", "DequantizeLinear": "dq", "GlobalAveragePool": "mean", "ReduceMean": "mean"}


def export_onnx(model: nn.Module, example: Tensor, path: Path, input_name: str, metadata: Mapping[str, str]) -> Path:
    """Writes `model` with a free batch size to one file, replaced at once.

    Args:
        model: in eval mode, on the CPU; an integer network becomes QDQ form with uint8 activations.
        example: an input of the final shape and type; its batch size does not matter.
        metadata: goes into the file's metadata.
    """
    model = fix_biases(pad_depthwise(model), example[:1])
    table = {
        torch.ops.asc.quantize.default: _quantize,
        torch.ops.asc.dequantize.default: _dequantize,
        torch.ops.asc.dequantize_channels.default: _dequantize_channels,
    }
    example = torch.cat([example[:1]] * 2)  # of one clip the exporter would take the batch for fixed
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model, (example,), dynamo=True, verbose=False, custom_translation_table=table, opset_version=20,
            dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=[input_name], output_names=["logits"],
        )  # fmt: skip
    proto = program.model_proto
    _use_global_pool(proto.graph)
    _write_zero_points(proto.graph)
    _store_weights_small(proto.graph)
    _strip(proto)
    proto.ir_version = IR_VERSION
    helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto, full_check=True)
    with replacing(path, "wb") as file:
        file.write(proto.SerializeToString())
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its inner steps, and operators of packages that are not installed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- 8-bit operators ------------------------------------------------------------------------------------------------


def _constant(value: np.generic):
    return op.Constant(value=numpy_helper.from_array(np.asarray(value)))


def _scale_and_zero(scale: float, zero_point: int) -> tuple:
    """ONNX Runtime's kernels for x86 want activations as uint8: int8 shifted by 128, weights as int8."""
    return _constant(np.float32(scale)), _constant(np.uint8(zero_point + 128))


def _quantize(x, scale: float, zero_point: int):
    return op.QuantizeLinear(x, *_scale_and_zero(scale, zero_point))


def _dequantize(q, scale: float, zero_point: int):
    return op.DequantizeLinear(q, *_scale_and_zero(scale, zero_point))


def _dequantize_channels(q, scale):
    return op.DequantizeLinear(q, scale, axis=0)


# ---- rewriting ------------------------------------------------------------------------------------------------------


def pad_depthwise(model: nn.Module) -> nn.Module:
    """A copy of an integer network whose depthwise convolutions have a multiple of `DEPTHWISE_LANES` channels.

    Expansion, depthwise and projection inside one `nn.Sequential` get channels of zeros, which change no output.
    """
    model = copy.deepcopy(model)
    for parent in model.modules():
        layers = list(parent.children()) if isinstance(parent, nn.Sequential) else []
        for expand, depthwise, project in zip(layers, layers[1:], layers[2:], strict=False):
            if not all(isinstance(layer, IntConv) for layer in (expand, depthwise, project)):
                continue
            extra = -len(depthwise.weight) % DEPTHWISE_LANES
            if not depthwise.is_depthwise or expand.groups != 1 or project.groups != 1 or not extra:
                continue
            for layer, dim in ((expand, 0), (depthwise, 0), (project, 1)):
                layer.widen(extra, dim)
    return model


def fix_biases(model: nn.Module, example: Tensor) -> nn.Module:
    """Turns the biases of integer layers into whole numbers; the scale of a layer's input is known once it has run.

    Runtimes that would have to round float biases by themselves do not all: ONNX Runtime before 1.21 left such
    convolutions in float.
    """
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: layer.fix_bias(*inputs))
        for layer in model.modules() if hasattr(layer, "fix_bias")
    ]  # fmt: skip
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    return model


def _use_global_pool(graph: onnx.GraphProto) -> None:
    """Means over freq and time that keep these axes become GlobalAveragePool, which has an integer kernel."""
    values = {initializer.name: initializer for initializer in graph.initializer}
    for node in graph.node:
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in values:
            continue
        keeps = all(attribute.i for attribute in node.attribute if attribute.name == "keepdims")
        if keeps and numpy_helper.to_array(values[node.input[1]]).tolist() == [2, 3]:
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            del node.attribute[:]


def _write_zero_points(graph: onnx.GraphProto) -> None:
    """Gives weights and biases in integers zero points of 0, each its own.

    ONNX Runtime's exact mode (session.x64quantprecision) needs them, and makes unsigned weights of signed ones in their
    place: two layers must not share a tensor, which the exporter makes of two with the same values.
    """
    stored = {initializer.name: initializer for initializer in graph.initializer}
    seen: set[str] = set()
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored or len(node.input) > 2:
            continue
        values = numpy_helper.to_array(stored[node.input[0]])
        if node.input[0] in seen:
            node.input[0] = f"{node.input[0]}_{len(seen)}"
            graph.initializer.append(numpy_helper.from_array(values, node.input[0]))
        seen.add(node.input[0])
        zeros = np.zeros(len(values), values.dtype)
        node.input.append(f"{node.input[0]}_zero")
        graph.initializer.append(numpy_helper.from_array(zeros, node.input[2]))


def _store_weights_small(graph: onnx.GraphProto) -> None:
    """Float constants that 16 bits hold exactly are stored so, with a cast that runtimes do once, at load.

    Denormal numbers become 0.
    """
    casts = []
    for initializer in graph.initializer:
        if initializer.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(initializer)
        if (np.abs(values) < np.finfo(np.float32).tiny).any():  # left by weight decay in dead channels, and slow
            values = np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
        half = values.astype(np.float16, casting="unsafe") if np.abs(values).max(initial=0) < 65504 else None
        if half is None or values.size < MIN_COMPACT_VALUES or not np.array_equal(half.astype(np.float32), values):
            continue
        name = initializer.name
        initializer.CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
        casts.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _name_by_layer(graph: onnx.GraphProto) -> None:
    """Names nodes after the modules that they come from, `stages.s1.b1.block.0/Conv`, and values after their operator.

    Parameters keep their names, other constants are called by what they are and numbered; values are numbered too: the
    longest names a file has are needed once.
    """
    new = {value.name: value.name for value in [*graph.input, *graph.output]} | {"": ""}
    new |= {initializer.name: initializer.name for initializer in graph.initializer if "." in initializer.name}
    counts, modules = Counter(), Counter()

    def rename(old: str, kind: str) -> None:
        if old not in new:
            counts[kind] += 1
            new[old] = f"{kind}_{counts[kind]}"

    for node in graph.node:
        roles = ROLES.get(node.op_type, ())
        for i, name in enumerate(node.input):  # not known yet: a constant
            rename(name, roles[i] if i < len(roles) else "constant")
        for name in node.output:
            rename(name, SHORT.get(node.op_type, node.op_type.lower()))
        scopes = next((entry.value for entry in node.metadata_props if entry.key == "namespace"), "")
        module = scopes.split("/")[-2].split(":")[0].strip() if "/" in scopes else ""
        name = f"{module}/{node.op_type}" if module else node.op_type
        modules[name] += 1
        node.name = name if modules[name] == 1 else f"{name}_{modules[name]}"
        for names in (node.input, node.output):
            names[:] = [new[name] for name in names]
    for initializer in graph.initializer:
        initializer.name = new[initializer.name]


def _strip(proto: onnx.ModelProto) -> None:
    """Takes out traces of the exporter and what nobody uses."""
    graph = proto.graph
    opset = next(opset.version for opset in proto.opset_import if not opset.domain)
    used = {name for node in graph.node for name in node.input}
    unused = [initializer for initializer in graph.initializer if initializer.name not in used]
    for initializer in unused:
        graph.initializer.remove(initializer)
    _name_by_layer(graph)
    for initializer in graph.initializer:
        initializer.doc_string = ""
        del initializer.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        defaults = onnx.defs.get_schema(node.op_type, opset).attributes
        for attribute in list(node.attribute):
            if attribute.name in defaults and defaults[attribute.name].default_value == attribute:
                node.attribute.remove(attribute)
        del node.metadata_props[:]
    del graph.value_info[:]
    del graph.metadata_props[:]
    for value in [*graph.input, *graph.output]:
        del value.metadata_props[:]
    graph.name, graph.doc_string, proto.doc_string = "network", "", ""
    del proto.functions[:]
    used_domains = {node.domain for node in graph.node}
    for opset in list(proto.opset_import):
        if opset.domain not in used_domains:
            proto.opset_import.remove(opset)
    proto.producer_name, proto.producer_version = "low-complexity ASC toolkit", ""
