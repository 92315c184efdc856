"""Takes a trained network to 8 bits: fake quantization around it, ranges, freezing, conversion to integers.

The layers themselves are in `models/quantized.py` and `models/integer.py`; a network takes part when its forward pass
is built from layers that stand in `QUANTIZED`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from helpers.errors import UserError
from models.blocks import HalfPrecision
from models.integer import LEVELS, IntConv
from models.quantized import QUANTIZED, ActivationQuantizer, QuantConfig, Switches, count_overflows

N_BINS = 2048
# Layers that hand activations on unchanged.
TRANSPARENT = (nn.Sequential, nn.ModuleList, nn.Identity, nn.Dropout)


class QuantizationError(UserError, ValueError):
    """A network cannot run in 8 bits; one line that names the layer."""


def prepare(model: nn.Module, config: QuantConfig) -> nn.Module:
    """A copy of a network whose layers are exchanged for those with fake quantization; weights and names are kept.

    Raises:
        QuantizationError: for a layer that has no counterpart.
    """
    model = copy.deepcopy(model)
    device = next(model.parameters()).device
    first = next((module for module in model.modules() if type(module) in QUANTIZED), None)
    if first is None:
        raise QuantizationError(
            f"{type(model).__name__} has no layer that runs in 8 bits (models/quantized.py lists those that do)"
        )

    def exchange(parent: nn.Module, path: str) -> None:
        for name, child in parent.named_children():
            if type(child) in QUANTIZED:
                fake = QUANTIZED[type(child)](child, config, child is first)
                setattr(parent, name, fake.train(child.training).to(device))
                continue
            n_inside = sum(1 for _ in child.children())
            if not n_inside and not isinstance(child, TRANSPARENT):
                raise QuantizationError(
                    f"layer {path}{name} ({type(child).__name__}) has no 8-bit form: build it from the layers of "
                    "models/quantized.py, or export the network as fp32 or fp16"
                )
            exchange(child, f"{path}{name}.")

    exchange(model, "")
    return model


def switch(model: nn.Module, **states: bool) -> None:
    """Sets `rounding` or `norm_frozen` in all layers of a prepared network."""
    for module in model.modules():
        if isinstance(module, Switches):
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
            if isinstance(child, Switches) and hasattr(child, "convert"):
                setattr(module, name, child.convert().to(device))
            elif isinstance(child, nn.Dropout):
                setattr(module, name, nn.Identity())  # takes tensors only
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
    found = []
    for name, layer in network.named_modules():
        if not isinstance(layer, IntConv) or layer.float_part:
            continue
        is_depthwise = layer.groups == len(layer.weight) and layer.weight.shape[1] == 1  # added in 32 bits
        if not is_depthwise and (n := count_overflows(layer.weight)):
            found.append((name, n))
    return found


def step_of_logits(network: nn.Module) -> float:
    """Scale of the 8-bit values whose means are an integer network's logits."""
    return [layer for layer in network.modules() if isinstance(layer, IntConv)][-1].output[0]


def for_target(model: nn.Module, precision: str) -> nn.Module:
    """The network as the target computes it, float log-mel to float logits; `precision` as in a checkpoint."""
    if precision == "int8":
        return convert(model)
    return HalfPrecision(copy.deepcopy(model)) if precision == "fp16" else model


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
