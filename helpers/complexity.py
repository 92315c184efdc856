"""Size and cost of a network as the challenge counts them, and the limits that it sets.

The rules (DCASE Task 1; its counter is torchinfo 1.8), which are known to overlook things:

- parameters: the elements of all parameters, shared ones once; buffers, such as a batch norm's statistics, are free;
- MACs of a convolution: elements of weight and bias, times the positions of the output; of any other module without
  children: elements of weight and bias, once; of recurrent ones, at every step. Nothing for activations, pools, sums,
  products of two tensors, functions called without a module, and parameters with other names;
- a module that is called twice costs twice; what a mask of `torch.nn.utils.prune` hides costs nothing, except bytes,
  until folding makes the mask permanent.

One addition: integers cannot be parameters, so a buffer called weight or bias counts like one.

The limit on bytes holds for the folded network (`models/layers/fold.py`), which is what the target stores. That on MACs
holds for the network as it was trained: the rules' counter would take each bias that folding leaves for a MAC at every
position of the output. `arithmetic_macs` is what convolutions and matrix products really multiply, in modules or
functions, their biases left out.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.errors import UserError
from helpers.report.text import align
from models.layers.conv_unit import ConvUnit
from models.layers.core import Rounding
from models.layers.fold import fold

MAX_PARAMETER_BYTES = 128_000
MAX_MACS = 30_000_000
# The challenge's prices. An int8 file is larger: int32 biases, scales, and what it keeps in float.
BYTES_PER_VALUE = {"int8": 1, "fp16": 2, "bf16": 2, "fp32": 4}


class LimitError(UserError, ValueError):
    """A network breaks a limit of the challenge; one line with the numbers."""


@dataclass(frozen=True)
class Layer:
    """One call of a module without children, or the parameters that a module with children has itself."""

    name: str
    kind: str  # name of the class
    unit: str  # the `ConvUnit` that it is a part of, else its own name: what trained and folded network share
    input_shape: tuple[int, ...]  # of one clip, batch axis included; () where the module itself is never called
    output_shape: tuple[int, ...]
    n_parameters: int  # 0 from the second call on
    macs: int
    peak_values: int  # most activations alive during one of its operations, see `Cost`


@dataclass(frozen=True)
class Cost:
    """What one network costs for one clip.

    Peak activation memory: while an operation (convolution, sum, in-place ReLU, ...) runs, its inputs and outputs are
    alive, and so is every tensor from the operation that made it to the last one that reads it, such as the input of a
    block until it was added. The network's input lives until its last reader, its output until the end. A view shares
    the memory of its tensor. Parameters, buffers and the workspace inside an operation do not count. `peak_values` is
    the largest sum of elements over all operations, as they run in eval mode in float32: take it from the float
    network, since integer layers are emulated with wide temporaries.
    """

    layers: tuple[Layer, ...]  # in order of execution
    n_parameters: int
    macs: int
    arithmetic_macs: int
    peak_values: int
    peak_layer: str
    n_stored: int  # elements of all parameters, those that a pruning mask hides included
    stored_bytes: int  # of all parameters, at the precision that they have now

    def parameter_bytes(self, precision: str = "int8") -> int:
        """Bytes of the parameters at int8, fp16, bf16 or fp32, or as they are now ("stored").

        Raises:
            ValueError: for an unknown precision.
        """
        if precision == "stored":
            return self.stored_bytes
        return self.n_stored * _bytes_per_value(precision)

    def peak_bytes(self, precision: str = "int8") -> int:
        """Peak activation memory with every activation at this precision.

        Raises:
            ValueError: for an unknown precision.
        """
        return self.peak_values * _bytes_per_value(precision)


@dataclass(frozen=True)
class Report:
    input_shape: tuple[int, ...]  # of one clip, without batch axis
    trained: Cost
    folded: Cost


@dataclass(frozen=True)
class Complexity:
    n_parameters: int
    macs: int  # multiply-accumulates of convolutions and matrix products for one clip, without biases


def measure(model: nn.Module, input_shape: tuple[int, ...]) -> Report:
    """Counts a network before and after folding; it stays as it is, a float32 copy on the CPU runs.

    Args:
        input_shape: of one clip without batch axis, such as (channel, mel, time).

    Raises:
        ValueError: for a network with fake quantization, of whose convolutions the rules see nothing.
    """
    units = [name for name, module in model.named_modules() if isinstance(module, ConvUnit)]
    folded = fold(_without_masks(_copy(model)).cpu(), torch.zeros(1, *input_shape))
    return Report(tuple(input_shape), _cost(model, input_shape, units), _cost(folded, input_shape, units))


def measure_second(model: nn.Module, frontend: nn.Module) -> Report:
    """Counts a network for a clip of one second, which is what the challenge's limit on MACs is about."""
    device = next(frontend.buffers()).device
    log_mel = frontend.eval()(torch.zeros(1, frontend.sample_rate, device=device))
    return measure(model, tuple(log_mel.shape[1:]))


def count_complexity(model: nn.Module, input_shape: tuple[int, ...]) -> Complexity:
    """Parameters, and MACs of one input of `input_shape` (channel, mel, time), of the network as it was trained."""
    cost = _cost(model, input_shape, [])
    return Complexity(cost.n_parameters, cost.arithmetic_macs)


def peak_values(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Most activations alive at once for one input of `input_shape`, see `Cost`; of any module, a front end too."""
    return _cost(model, input_shape, []).peak_values


def check_limits(report: Report, precision: str = "int8", is_folded: bool = True) -> list[str]:
    """Says which limits a network breaks, in words with the numbers; empty when it keeps them.

    Args:
        precision: at which parameters are stored: int8, fp16, bf16, fp32, or "stored" for what they have now.
        is_folded: whether what is stored is the folded network, or the trained one with its norms.
    """
    n_bytes = (report.folded if is_folded else report.trained).parameter_bytes(precision)
    n_macs, breaches = report.trained.macs, []
    if n_bytes > MAX_PARAMETER_BYTES:
        name = "their stored precision" if precision == "stored" else precision
        breaches.append(f"{n_bytes:,} bytes of parameters at {name}, limit {MAX_PARAMETER_BYTES:,}")
    if n_macs > MAX_MACS:
        breaches.append(f"{n_macs:,} MACs for one clip, limit {MAX_MACS:,}")
    return breaches


def enforce_limits(report: Report, precision: str = "int8") -> None:
    """Refuses a network that breaks a limit.

    Raises:
        LimitError: naming every breach of `check_limits`.
    """
    breaches = check_limits(report, precision)
    if breaches:
        raise LimitError(f"the network is over the challenge's limits: {'; '.join(breaches)}")


def table(report: Report) -> str:
    """Both networks layer by layer, then totals beside the limits. The parts of a `ConvUnit` share a row."""
    header = ("layer", "type", "output", "parameters", "folded", "MACs", "folded", "values alive")
    trained, folded = _rows(report.trained), _rows(report.folded)
    rows = [header]
    for unit in trained | folded:
        before, after = trained.get(unit), folded.get(unit)
        parts = before or after
        rows.append(
            (
                unit or "(network)",
                parts[0].kind if len(parts) == 1 else "ConvUnit",
                "x".join(map(str, parts[-1].output_shape[1:])),
                *_sums("n_parameters", before, after),
                *_sums("macs", before, after),
                f"{max(part.peak_values for part in after):,}" if after else "",
            )
        )
    costs = (report.trained, report.folded)
    totals = [f"{getattr(cost, name):,}" for name in ("n_parameters", "macs") for cost in costs]
    rows.append(("total", "", "", *totals, f"{report.folded.peak_values:,}"))
    return "\n".join([*(line.rstrip() for line in align(rows, n_left=3)), "", *_summary(report)])


def _summary(report: Report) -> Iterator[str]:
    cost = report.folded
    n_bytes = ", ".join(f"{cost.parameter_bytes(p):,} at {p}" for p in ("int8", "fp16", "fp32"))
    yield f"parameters, bytes: {n_bytes}, {cost.stored_bytes:,} as stored; limit {MAX_PARAMETER_BYTES:,}"
    yield (
        f"MACs for one clip: {report.trained.macs:,}; limit {MAX_MACS:,}; folded, with biases {cost.macs:,}; without "
        f"biases {cost.arithmetic_macs:,}"
    )
    if cost.arithmetic_macs > report.trained.macs:
        yield f"the challenge's counter overlooks {cost.arithmetic_macs - report.trained.macs:,} MACs"
    n_bytes = ", ".join(f"{cost.peak_bytes(p):,} at {p}" for p in ("int8", "fp32"))
    units = [layer.unit for layer in cost.layers if layer.name == cost.peak_layer] or [cost.peak_layer]
    yield f"peak activation memory for one clip, bytes: {n_bytes}; in {units[0] or 'the network itself'}"
    breaches = check_limits(report)
    yield f"over the limits: {'; '.join(breaches)}" if breaches else "within the limits at int8"


def _rows(cost: Cost) -> dict[str, list[Layer]]:
    rows: dict[str, list[Layer]] = {}
    for layer in cost.layers:
        rows.setdefault(layer.unit, []).append(layer)
    return rows


def _sums(name: str, *groups: list[Layer] | None) -> Iterator[str]:
    for group in groups:
        yield f"{sum(getattr(layer, name) for layer in group):,}" if group else ""


def _bytes_per_value(precision: str) -> int:
    if precision not in BYTES_PER_VALUE:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(BYTES_PER_VALUE)}")
    return BYTES_PER_VALUE[precision]


def _cost(model: nn.Module, input_shape: tuple[int, ...], units: list[str]) -> Cost:
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, and not needed for --help

    if any(isinstance(module, Rounding) for module in model.modules()):
        raise ValueError("a network with fake quantization cannot be counted: count the float or the integer network")
    stored = {id(value): value for module in model.modules() for _, value, _ in _own_parameters(module)}.values()
    # A copy, so that nothing that learns in eval mode (observers, for one) does; float32, which every CPU computes.
    model = _copy(model).cpu().float().eval()
    names = {module: name for name, module in model.named_modules()}
    trace, counted = _Trace(model), set()
    calls: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...], int, int]] = []  # the fields of `Layer`

    def enter(module: nn.Module, _args: tuple) -> None:
        trace.owners.append(names[module])

    def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        trace.owners.pop()
        is_leaf = next(module.children(), None) is None
        if is_leaf or any(True for _ in _own_parameters(module)):
            shape = _shape(output)
            n_parameters, macs = _count_once(module, counted), _macs(module, shape) if is_leaf else 0
            calls.append((module, _shape((args, kwargs)), shape, n_parameters, macs))

    for module in names:
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, with_kwargs=True)
    clip = torch.zeros(1, *input_shape)
    with torch.no_grad(), FlopCounterMode(display=False) as flops, trace:
        trace.use(clip)
        trace.use(model(clip))
    for module in names:  # parameters that only functions read
        if n_parameters := _count_once(module, counted):
            calls.append((module, (), (), n_parameters, 0))

    live = trace.live_values()
    peaks: dict[str, int] = {}
    for (owner, _), n_values in zip(trace.steps, live, strict=True):
        peaks[owner] = max(n_values, peaks.get(owner, 0))
    layers = tuple(
        Layer(names[m], type(m).__name__, _unit(names[m], units), *counts, peaks.get(names[m], 0))
        for m, *counts in calls
    )
    return Cost(
        layers=layers,
        n_parameters=sum(layer.n_parameters for layer in layers),
        macs=sum(layer.macs for layer in layers),
        arithmetic_macs=flops.get_total_flops() // 2,
        peak_values=max(live),
        peak_layer=max(peaks, key=peaks.__getitem__),
        n_stored=sum(value.numel() for value in stored),
        stored_bytes=sum(value.numel() * value.element_size() for value in stored),
    )


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules that keep results, such as pruned ones: those cannot be copied as they are."""
    results = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach() for value in results})


def _without_masks(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            if name.endswith("_orig") and hasattr(module, name.removesuffix("_orig") + "_mask"):
                prune.remove(module, name.removesuffix("_orig"))
    return model


def _unit(name: str, units: list[str]) -> str:
    return next((unit for unit in units if name.startswith(f"{unit}.")), name)


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Name, tensor and number of counted elements of what the module itself holds."""
    for name, value in module.named_parameters(recurse=False):
        plain = name.removesuffix("_orig")
        mask = getattr(module, f"{plain}_mask", None) if plain != name else None
        yield (name, value, value.numel()) if mask is None else (plain, value, int(mask.sum()))
    for name, value in module.named_buffers(recurse=False):
        if name in ("weight", "bias"):
            yield name, value, value.numel()


def _count_once(module: nn.Module, counted: set[int]) -> int:
    """Elements that the module holds and that are not in `counted`, to which they are added."""
    new = {id(value): n_elements for _, value, n_elements in _own_parameters(module) if id(value) not in counted}
    counted.update(new)
    return sum(new.values())


def _macs(module: nn.Module, output_shape: tuple[int, ...]) -> int:
    macs = 0
    for name, _, n_elements in _own_parameters(module):
        if name in ("weight", "bias"):
            is_conv = "Conv" in type(module).__name__  # the counter's own criterion
            macs += n_elements * (math.prod(output_shape[2:]) if is_conv else 1)
        elif "weight" in name or "bias" in name:  # meant for recurrent modules: (batch, step, feature)
            macs += n_elements * math.prod(output_shape[:2])
    return macs


def _shape(value: Any) -> tuple[int, ...]:
    return next((tuple(tensor.shape) for tensor in _tensors(value)), ())


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested sequences and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Trace(TorchDispatchMode):
    """Records the memory that each operation reads and writes, below all modules: a sum in `forward` is seen too."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.owners = [""]  # names of the modules that are running, innermost last
        self.steps: list[tuple[str, set[int]]] = []  # module, and addresses of what is read or written
        self.sizes: dict[int, int] = {}  # elements at an address
        self._constants = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._kept: list[Any] = []  # an address stands for one tensor only as long as none is freed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.use((args, kwargs, result))
        return result

    def use(self, value: Any) -> None:
        step: set[int] = set()
        for tensor in _tensors(value):
            storage, address = tensor.untyped_storage(), _address(tensor)
            if storage.nbytes() and address not in self._constants:
                self._kept.append(storage)
                self.sizes[address] = storage.nbytes() // tensor.element_size()
                step.add(address)
        self.steps.append((self.owners[-1], step))

    def live_values(self) -> list[int]:
        """Elements alive at each step, each tensor from its first to its last."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for i, (_, step) in enumerate(self.steps):
            for address in step:
                first.setdefault(address, i)
                last[address] = i
        change = [0] * (len(self.steps) + 1)
        for address, size in self.sizes.items():
            change[first[address]] += size
            change[last[address] + 1] -= size
        live = [change[0]]
        for value in change[1:-1]:
            live.append(live[-1] + value)
        return live


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
