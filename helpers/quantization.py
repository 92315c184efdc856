"""Takes a trained network to 8 bits: fake quantization around it, ranges, freezing, conversion to integers.

The layers themselves are in `models/layers`; a network takes part when its forward pass is built from the kinds there.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from helpers.errors import UserError
from models.layers import HAND_ON, KINDS
from models.layers.conv_unit import FakeConv, FoldedNorm
from models.layers.core import LEVELS, ActivationQuantizer, Place, QuantConfig, Rounding
from models.layers.flow import Flow, trace

N_BINS = 2048
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What to use instead of a function.
INSTEAD = {
    **dict.fromkeys(["add", "__add__", "__radd__", "add_", "__iadd__", "sum"], "Add of models/layers/add.py"),
    **dict.fromkeys(["relu", "relu_"], "nn.ReLU"),
    **dict.fromkeys(["max_pool2d", "boolean_dispatch"], "nn.MaxPool2d"),
    **dict.fromkeys(["avg_pool2d"], "nn.AvgPool2d"),
    **dict.fromkeys(["adaptive_avg_pool2d"], "nn.AdaptiveAvgPool2d(1)"),
    **dict.fromkeys(["dropout", "dropout1d", "dropout2d"], "nn.Dropout"),
    **dict.fromkeys(["linear", "matmul", "__matmul__"], "nn.Linear"),
    **dict.fromkeys(["conv2d", "conv1d"], "nn.Conv2d"),
}


SHORT_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class QuantizationError(UserError, ValueError):
    """A network cannot run in 8 bits; one line that names the layer."""


class HalfPrecision(nn.Module):
    """Runs a network in 16-bit floats behind float32 inputs and logits."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float16):
        super().__init__()
        self.model = model.to(dtype)

    def forward(self, log_mel: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype  # a float32 copy of this is run to see how data flows
        return self.model(log_mel.to(dtype)).float()


def prepare(model: nn.Module, config: QuantConfig, example: Tensor) -> nn.Module:
    """A copy of a network whose layers are exchanged for those with fake quantization; weights and names are kept.

    Args:
        example: a log-mel spectrogram (1, channel, mel, time), with which a copy is run once to see what each layer
            reads: the first ones get float values, and norms and ReLUs become part of the layer that they alone read.

    Raises:
        QuantizationError: for a layer that has no 8-bit form, or a module that computes 8-bit values by itself.
    """
    if not any(type(module) in KINDS for module in model.modules()):
        raise QuantizationError(
            f"{type(model).__name__} has no layer that runs in 8 bits (models/layers/__init__.py lists those that do)"
        )
    _check_layers(model)
    flow = trace(model, example, _gives_8_bits)
    _check_flow(model, flow)
    model = copy.deepcopy(model)
    device = next(model.parameters()).device
    layers = [(name, module) for name, module in _layers(model) if type(module) in KINDS]
    names = {module: name for name, module in model.named_modules()}  # of modules with several, the one that `flow` has
    absorbed = set()
    for path, layer in layers:
        name = names[layer]
        if name in absorbed:
            continue
        last = flow.norm_of.get(name, name) if type(layer) is nn.Conv2d else name
        relu = flow.relu_of.get(last) if KINDS[type(layer)].absorbs_relu else None
        reads_float = not any(flow.reads.get(name, ()))
        place = Place(reads_float, relu is not None, flow.input_shapes.get(name, ()))
        try:
            if last != name:
                norm = FoldedNorm(model.get_submodule(last))
                fake = FakeConv(layer, config, place, norm)
                model.set_submodule(last, norm)
            else:
                fake = KINDS[type(layer)](layer, config, place)
        except ValueError as error:
            raise QuantizationError(f"layer {path} ({type(layer).__name__}) has no 8-bit form: {error}") from error
        fake = fake.train(layer.training).to(device)
        model.set_submodule(path, fake)
        if relu is not None:
            model.set_submodule(relu, nn.Identity().train(model.get_submodule(relu).training))
            absorbed.add(relu)
    return model


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of layers: of kinds, whole, and of whatever has no children."""

    def visit(parent: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in parent.named_children():
            if type(child) in KINDS or (next(child.children(), None) is None and not isinstance(child, CONTAINERS)):
                yield f"{path}{name}", child
            else:
                yield from visit(child, f"{path}{name}.")

    return visit(model, "")


def _gives_8_bits(module: nn.Module, reads: list[bool]) -> bool | None:
    if type(module) in KINDS:
        gives = KINDS[type(module)].gives
        return any(reads) if gives == "same" else gives == "levels"
    if isinstance(module, HAND_ON):
        return any(reads)
    # A norm that is part of a convolution: `_check_flow` refuses others.
    return any(reads) if type(module) is nn.BatchNorm2d else None


def _check_layers(model: nn.Module) -> None:
    for name, layer in _layers(model):
        if type(layer) not in KINDS and not isinstance(layer, (*HAND_ON, nn.BatchNorm2d)):
            raise QuantizationError(
                f"layer {name} ({type(layer).__name__}) has no 8-bit form: build it from the layers of "
                "models/layers/__init__.py, or export the network as fp32 or fp16"
            )
        for part_name, part in layer.named_modules(prefix=name):
            if hasattr(part, "weight") and part.weight is not None and "weight" not in part._parameters:
                raise QuantizationError(
                    f"the weight of layer {part_name} ({type(part).__name__}) is computed (pruned or parametrized): "
                    "make that permanent before quantizing"
                )


def _check_flow(model: nn.Module, flow: Flow) -> None:
    if flow.outside:
        name, function = flow.outside[0]
        where = f"{name} ({type(model.get_submodule(name)).__name__})" if name else type(model).__name__
        instead = INSTEAD.get(function, "a layer of models/layers/__init__.py")
        raise QuantizationError(f"{where} computes {function} of activations by itself: use {instead} there")
    norms = set(flow.norm_of.values())
    for name, layer in _layers(model):
        kind, what = KINDS.get(type(layer)), f"layer {name} ({type(layer).__name__})"
        if type(layer) is nn.BatchNorm2d and flow.calls[name] and name not in norms - flow.dropout_before:
            raise QuantizationError(
                f"{what} has no 8-bit form where it is: it must have running statistics, and alone read a Conv2d"
            )
        if kind is None or not flow.calls[name]:
            continue
        if not kind.may_be_shared and flow.calls[name] > 1:
            raise QuantizationError(f"{what} is called {flow.calls[name]} times: each call needs a layer of its own")
        if not kind.takes_float and not all(flow.reads[name]):
            raise QuantizationError(f"{what} reads float values, but takes 8-bit ones: put it behind a convolution")
        if len(set(flow.reads[name])) > 1:
            raise QuantizationError(f"{what} reads float values beside 8-bit ones")
    if flow.answers_in_8_bits:
        raise QuantizationError(
            f"{type(model).__name__} answers with 8-bit values: let it end in a mean over freq and time, or nn.Linear"
        )


def switch(model: nn.Module, **states: bool) -> None:
    """Sets `rounding` or `norm_frozen` in all layers of a prepared network."""
    for module in model.modules():
        if isinstance(module, Rounding):
            for name, state in states.items():
                setattr(module, name, state)


@contextmanager
def rounding_off(model: nn.Module) -> Iterator[nn.Module]:
    """The prepared network as plain float32, for the time of a with block."""
    switch(model, rounding=False)
    try:
        yield model
    finally:
        switch(model, rounding=True)


def convert(model: nn.Module) -> nn.Module:
    """The integer network that a prepared one stands for: a copy, in eval mode, on the same device."""
    unseen = [name for name, quantizer in quantizers(model) if not quantizer.has_range]
    if unseen:
        raise QuantizationError(f"{unseen[0]} has no range yet: calibrate the network before converting it")
    converted = copy.deepcopy(model).eval()
    device = next(model.parameters()).device
    for module in list(converted.modules()):
        for name, child in module.named_children():
            if hasattr(child, "convert"):
                setattr(module, name, child.convert().eval().to(device))
            elif isinstance(child, HAND_ON) and not isinstance(child, nn.Flatten):
                setattr(module, name, nn.Identity())  # dropouts take tensors only
    return converted


def float_network(model: nn.Module) -> nn.Module:
    """The network that `prepare` was given, with the weights that a prepared one has now."""
    plain = type(model)(model.config)
    state = model.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain.eval()


def float_layers(network: nn.Module) -> list[tuple[str, str]]:
    """Names of the layers of an integer network that compute in float, wholly or in part, and what they do there."""
    layers = [(name, module) for name, module in network.named_modules() if hasattr(module, "float_part")]
    return [(name, module.float_part) for name, module in layers if module.float_part]


def overflowing_layers(network: nn.Module) -> list[tuple[str, int]]:
    """Layers of an integer network whose products x86 CPUs without VNNI may not add exactly, and in how many pairs.

    A fact of the weights, whatever CPU this is: each of two neighbours times the largest activation, added in 16 bits.
    """
    layers = [(name, layer) for name, layer in network.named_modules() if hasattr(layer, "n_overflows")]
    return [(name, n) for name, layer in layers if (n := layer.n_overflows())]


def step_of_logits(network: nn.Module) -> float:
    """What one level of the 8-bit values behind an integer network's logits is worth in these.

    Where the logits are means, the scale of the values that these are of; where they come from a linear layer, what
    they move by when each of its inputs moves one level up or down.
    """
    step = 0.0
    for layer in network.modules():
        if hasattr(layer, "step_of_output"):
            step = layer.step_of_output(step)
    return step


def for_target(model: nn.Module, precision: str) -> nn.Module:
    """The network as the target computes it, float log-mel to float logits; `precision` as in a checkpoint."""
    if precision == "int8":
        return convert(model)
    if precision in SHORT_FLOATS:
        return HalfPrecision(copy.deepcopy(model), SHORT_FLOATS[precision])
    return model


def quantizers(model: nn.Module) -> list[tuple[str, ActivationQuantizer]]:
    """Names and activation quantizers of a prepared network."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    make_batches: Callable[[], Iterable[Tensor]],
    method: Literal["minmax", "percentile", "mse"] = "mse",
    percentile: float = 99.99,
) -> None:
    """Chooses the activations' ranges of a prepared network without training it.

    Args:
        make_batches: gives the same batches of log-mel spectrograms anew with each call, on the network's device.
        method: `minmax` takes the extremes; `percentile` leaves out 100 - `percentile` percent of the values at each
            end that is not 0; `mse` takes the range with the least mean squared rounding error.
    """
    was_training = model.training
    model.eval()
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    counts: dict[str, Tensor] = {}

    def note_range(name: str) -> Callable:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = inputs[0].aminmax()
            low, high = low.clamp_max(0), high.clamp_min(0)
            if name in ranges:
                low, high = torch.minimum(low, ranges[name][0]), torch.maximum(high, ranges[name][1])
            ranges[name] = low, high

        return hook

    def note_histogram(name: str) -> Callable:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = ranges[name]
            for part in inputs[0].float().flatten().split(1 << 24):  # float32 counts stop there
                histogram = torch.histc(part, N_BINS, low.item(), max(high.item(), low.item() + 1e-6))
                counts[name] = counts.get(name, 0) + histogram.double().cpu()

        return hook

    with rounding_off(model):
        for note in (note_range,) if method == "minmax" else (note_range, note_histogram):
            hooks = [quantizer.register_forward_pre_hook(note(name)) for name, quantizer in quantizers(model)]
            try:
                for log_mel in make_batches():
                    model(log_mel)
            finally:
                for hook in hooks:
                    hook.remove()
    missing = [name for name, _ in quantizers(model) if name not in ranges]
    if missing:
        raise QuantizationError(f"{missing[0]} saw no activations: no clips to calibrate with, or an unused layer")
    for name, quantizer in quantizers(model):
        low, high = (value.item() for value in ranges[name])
        if method == "percentile":
            low, high = _percentile_range(counts[name], low, high, percentile)
        elif method == "mse":
            low, high = _mse_range(counts[name], low, high)
        quantizer.set_range(low, high)
    model.train(was_training)


def _percentile_range(counts: Tensor, low: float, high: float, percentile: float) -> tuple[float, float]:
    edges = torch.linspace(low, high, N_BINS + 1, dtype=torch.float64)
    share = counts.cumsum(0) / counts.sum()
    first = int((share > 1 - percentile / 100).nonzero()[0]) if low < 0 else 0
    last = int((share >= percentile / 100).nonzero()[0])
    return min(edges[first].item(), 0.0), max(edges[last + 1].item(), 0.0)


def _mse_range(counts: Tensor, low: float, high: float) -> tuple[float, float]:
    """Searches both ends over 30 .. 100 % of the observed ones, one after the other."""
    edges = torch.linspace(low, high, N_BINS + 1, dtype=torch.float64)
    values = (edges[:-1] + edges[1:]) / 2

    def error(a: float, b: float) -> float:
        scale = max((b - a) / LEVELS, 1e-12)
        rounded = torch.round(values.clamp(a, b) / scale) * scale
        return float((counts * (values - rounded) ** 2).sum())

    shares = torch.linspace(0.3, 1, 71).tolist()
    best_high = min((share * high for share in shares), key=lambda b: error(low, b)) if high > 0 else 0.0
    best_low = min((share * low for share in shares), key=lambda a: error(a, best_high)) if low < 0 else 0.0
    return best_low, best_high


def freeze(model: nn.Module) -> None:
    """Batch-norm statistics stay as they are from now on; weights go on learning."""
    switch(model, norm_frozen=True)
