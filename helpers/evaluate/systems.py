"""What can be scored: networks, exported files, and answers that others wrote down."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from datasets.audio import Sampling
from datasets.tau import DataError, Meta
from datasets.waveforms import Clips
from helpers.checkpoints.checkpoint import CheckpointError, LoadedModel, check_scenes
from helpers.complexity import Report, measure
from helpers.data import sampling_of
from helpers.evaluate.predictions import Predictions, is_predictions, read_predictions
from helpers.evaluate.test_time import TestTimeAugmentation, TestTimeConfig
from helpers.export import parity
from helpers.export.executorch_program import load_program, read_metadata
from helpers.loop import predict
from helpers.machine import Machine
from helpers.quantization import float_network, for_target
from helpers.report.report import read_history
from helpers.teachers import TeacherSource, find_teacher, unique_names
from models import FRONTENDS
from models.device_models import DeviceModels
from models.layers.fold import fold
from models.layers.mel_norm import MelNorm

ARTIFACTS = (".onnx", ".pte")
LARGEST_KEPT = 1_000_000  # parameters
NO_EPS = 1e-30  # of a norm without epsilon; PyTorch wants one


@dataclass(frozen=True)
class TreatmentConfig:
    precision: Annotated[
        Literal["stored", "fp32", "fp16", "bf16", "fp16_weights"],
        "of the network: stored (that of its checkpoint); fp16 and bf16 as the rules of 2024 and 2025 have it; "
        "fp16_weights (rounded, computed in fp32) as SP4ASC has it",
    ] = "stored"
    fold: Annotated[
        Literal["none", "exact", "without_eps"],
        "norms into convolutions: exact, or without the norms' epsilon as SP4ASC's published test script has it",
    ] = "none"
    general: Annotated[bool, "leave out the networks for single recording devices that a file may hold"] = False


@dataclass(frozen=True)
class Treatment:
    """How networks are run."""

    config: TreatmentConfig = field(default_factory=TreatmentConfig)
    copies: TestTimeConfig = field(default_factory=TestTimeConfig)
    temperature: float | None = None  # of the logits; None: what the checkpoint knows, else 1
    seed: int = 0  # of random copies


@dataclass(frozen=True)
class About:
    """What is known of a system.

    Args:
        options: of the run that trained it.
        cost: of its network, and the precision that its parameters are run at.
        history: metrics by epoch, as `read_history` gives them.
        frontend: what it sees of a waveform.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    cost: tuple[Report, str] | None = None
    history: Sequence[Mapping[str, float]] = ()
    frontend: nn.Module | None = None


class System(Protocol):
    """Something that answers for clips.

    Args:
        sampling: of the clips; None where none are needed.
    """

    name: str
    path: Path
    sampling: Sampling | None
    scenes: tuple[str, ...]
    n_samples: int  # of the clips that it was made for

    def check(self, meta: Meta) -> None:
        """Raises CheckpointError or DataError when it knows other scenes than the data set."""

    def prove(self, n_samples: int) -> None:
        """Raises CheckpointError or DataError when it does not take clips of so many samples."""

    def answers(self, clips: Clips, machine: Machine) -> dict[str, Tensor]:
        """Logits (clip, class) by name; a file with networks for single devices has two answers."""

    def about(self) -> About:
        """What a report says of it beside its scores."""

    def open(self, machine: Machine) -> tuple[nn.Module, nn.Module]:
        """What gives logits (batch, class) for spectrograms, and spectrograms for waveforms (batch, sample).

        Raises:
            DataError: when it does not hear.
        """


class NetworkSystem:
    """A network from a checkpoint, with its front end."""

    def __init__(self, source: TeacherSource, treatment: Treatment):
        self.source, self.treatment = source, treatment
        self.name, self.path = source.name, source.path
        self._kept: LoadedModel | None = None
        loaded = self.load()
        self.sampling = sampling_of(loaded.frontend)
        self.n_samples = loaded.content.get("clip_samples", self.sampling.rate)
        self.scenes = loaded.scenes or tuple(f"class {i}" for i in range(loaded.model.config.n_classes))

    def load(self) -> LoadedModel:
        """Network and front end on the CPU; large ones are not kept, as there may be dozens of them."""
        if self._kept is not None:
            return self._kept
        loaded = self.source.load()
        if sum(value.numel() for value in loaded.model.parameters()) <= LARGEST_KEPT:
            self._kept = loaded
        return loaded

    def check(self, meta: Meta) -> None:
        check_scenes(self.path, self.load(), meta, "take another network")

    def prove(self, n_samples: int) -> None:
        loaded = self.load()
        try:
            with torch.inference_mode():
                self._network(loaded.model, loaded).eval()(loaded.frontend.eval()(torch.zeros(1, n_samples)))
        except ValueError as error:
            raise CheckpointError(f"{self.path} does not take clips of {n_samples} samples: {error}") from error

    def answers(self, clips: Clips, machine: Machine) -> dict[str, Tensor]:
        loaded = self.load()
        networks = {self.name: self._network(loaded.model, loaded)}
        if loaded.device_models and not self.treatment.config.general:
            own = {device: self._network(model, loaded) for device, model in loaded.device_models.items()}
            networks[f"{self.name}_by_device"] = DeviceModels(networks[self.name], own)
        found = {}
        for name, network in networks.items():
            with drawn(self.treatment.seed):
                found[name] = predict(*self._ready(network, loaded, machine), clips, machine)
        return found

    def about(self) -> About:
        loaded = self.load()
        network = float_network(loaded.model) if loaded.precision == "int8" else copy.deepcopy(loaded.model).float()
        frontend = loaded.frontend.cpu().eval()
        with torch.inference_mode():
            shape = frontend(torch.zeros(1, self.n_samples)).shape[1:]
        precision = self.treatment.config.precision
        precision = {"stored": loaded.precision, "fp16_weights": "fp16"}.get(precision, precision)
        metrics = self.path.parent.parent / "metrics.jsonl"
        is_run = self.path.parent.name == "checkpoints" and metrics.is_file()
        return About(
            loaded.content.get("options", {}), (measure(network, tuple(shape)), precision),
            read_history(metrics) if is_run else (), frontend,
        )  # fmt: skip

    def open(self, machine: Machine) -> tuple[nn.Module, nn.Module]:
        loaded = self.load()
        return self._ready(self._network(loaded.model, loaded), loaded, machine)

    def _ready(self, network: nn.Module, loaded: LoadedModel, machine: Machine) -> tuple[nn.Module, nn.Module]:
        """Network and front end on the device."""
        model, frontend = machine.take(network).eval(), loaded.frontend.to(machine.device).eval()
        treatment, temperature = self.treatment, self.treatment.temperature
        if temperature is None:
            temperature = loaded.content.get("temperature", 1.0)
        if treatment.copies.n_tta:
            return TestTimeAugmentation(model, frontend, treatment.copies, temperature).eval(), nn.Identity()
        return (model if temperature == 1 else Tempered(model, temperature)), frontend

    def _network(self, model: nn.Module, loaded: LoadedModel) -> nn.Module:
        """One of the file's networks as it is to be run."""
        config, stored = self.treatment.config, loaded.precision
        precision = stored if config.precision == "stored" else config.precision
        if stored == "int8":
            if (precision, config.fold) != ("int8", "none"):
                raise CheckpointError(f"{self.path} holds an int8 network, which runs as it is: leave --precision and "
                                      "--fold away")  # fmt: skip
            return for_target(model, stored)
        if config.fold != "none":
            example = loaded.frontend.cpu().eval()(torch.zeros(1, self.n_samples))
            model = fold(model if config.fold == "exact" else without_eps(model), example)
        if precision == "fp16_weights":
            model = copy.deepcopy(model)
            for value in [*model.parameters(), *model.buffers()]:
                if value.is_floating_point():
                    value.data = value.data.half().float()
            return model
        return for_target(model, precision)


class ArtifactSystem:
    """An exported ONNX or ExecuTorch file, run by its own runtime on the CPU."""

    def __init__(self, path: Path, treatment: Treatment):
        self.name, self.path = path.stem, path
        about = self._metadata()
        try:
            self.scenes = tuple(json.loads(about["labels"]))
            rate, self.n_samples = int(about["sample_rate_hz"]), int(about["clip_samples"])
            temperature = float(about.get("temperature", 1))
            frontend = json.loads(about["frontend"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} does not say what goes in and comes out: export it with run_export.py") from error
        self.temperature = temperature if treatment.temperature is None else treatment.temperature
        if treatment.config != TreatmentConfig() or treatment.copies.n_tta:
            raise DataError(f"{path} runs as it is: leave --precision, --fold, --general and --n_tta away")
        frontend = _frontend(path, frontend)
        self.sampling = Sampling(rate, frontend.resampler)
        self.frontend = nn.Identity() if self.takes_waveform else frontend

    def check(self, meta: Meta) -> None:
        if tuple(meta.scenes) != self.scenes:
            raise DataError(f"{self.path} knows the scenes {', '.join(self.scenes)}; {meta.root} has "
                            f"{', '.join(meta.scenes)}")  # fmt: skip

    def prove(self, n_samples: int) -> None:
        if n_samples != self.n_samples:
            raise DataError(f"{self.path} takes clips of {self.n_samples} samples, the data set's have {n_samples} at "
                            f"{self.sampling.rate} Hz")  # fmt: skip

    def answers(self, clips: Clips, machine: Machine) -> dict[str, Tensor]:
        on_cpu = Machine(torch.device("cpu"), machine.batch_size, machine.n_ahead, processes=machine.processes)
        return {self.name: predict(*self.open(on_cpu), clips, on_cpu)}

    def about(self) -> About:
        return About()

    def open(self, machine: Machine) -> tuple[nn.Module, nn.Module]:
        if machine.device.type != "cpu":
            raise DataError(f"{self.path} runs on the CPU: use --torch_device cpu")
        return Tempered(Runtime(self.path), self.temperature), self.frontend

    @property
    def takes_waveform(self) -> bool:
        """Whether the front end is inside."""
        if self.path.suffix == ".pte":
            return "waveform" in self.path.stem or self._metadata().get("input") == "waveform"
        return parity.open_session(self.path).get_inputs()[0].name == "waveform"

    def _metadata(self) -> dict[str, str]:
        if self.path.suffix == ".pte":
            return read_metadata(self.path)
        try:
            return parity.open_session(self.path).get_modelmeta().custom_metadata_map
        except Exception as error:  # ONNX Runtime has its own classes, which derive from nothing in particular
            raise DataError(f"{self.path} is no file that ONNX Runtime reads: {str(error).splitlines()[0]}") from error


class PredictionsSystem:
    """Answers from a file."""

    sampling, scenes, n_samples = None, (), 0

    def __init__(self, path: Path):
        self.name, self.path = path.stem, path
        self.predictions: Predictions | None = None

    def check(self, meta: Meta) -> None:
        self.predictions = read_predictions(self.path, meta)

    def prove(self, n_samples: int) -> None:
        """It hears nothing."""

    def answers(self, clips: Clips, machine: Machine) -> dict[str, Tensor]:
        return {self.name: self.predictions.logits.float()}

    def about(self) -> About:
        return About()

    def open(self, machine: Machine) -> tuple[nn.Module, nn.Module]:
        raise DataError(f"{self.path} holds answers, not a network: it can be scored on the clips that it is about")


def find_systems(
    specs: Sequence[str], project: str, treatment: Treatment,
    believe: Callable[[Sequence[TeacherSource]], list[TeacherSource]] = list,
) -> list[System]:  # fmt: skip
    """What the names stand for: published networks, ids of runs, checkpoints, exported files, tables of answers.

    Args:
        believe: tells the networks what the command line states of their front ends.

    Raises:
        CheckpointError, DataError, DownloadError: for what is none of them, or cannot be fetched or read.
    """
    kinds: list[Any] = []
    for spec in specs:
        path = Path(spec)
        if path.is_file() and path.suffix in ARTIFACTS:
            kinds.append(ArtifactSystem(path, treatment))
        elif path.is_file() and is_predictions(path):
            kinds.append(PredictionsSystem(path))
        else:
            kinds.append(find_teacher(spec, project).fetch())
    believed = iter(believe([kind for kind in kinds if isinstance(kind, TeacherSource)]))
    systems = [NetworkSystem(next(believed), treatment) if isinstance(kind, TeacherSource) else kind for kind in kinds]
    for system, name in zip(systems, unique_names(["ensemble", *(system.name for system in systems)])[1:], strict=True):
        system.name = name
    return systems


class Runtime(nn.Module):
    """An exported file as a module on the CPU."""

    def __init__(self, path: Path):
        super().__init__()
        if path.suffix == ".pte":
            self.run = load_program(path)
            return
        session = parity.open_session(path, n_threads=torch.get_num_threads())
        name = session.get_inputs()[0].name
        self.run = lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Tempered(nn.Module):
    """A network whose logits are divided by a temperature."""

    def __init__(self, model: nn.Module, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature
        self.answers_by_device = getattr(model, "answers_by_device", False)

    def forward(self, log_mel: Tensor, *devices: Sequence[str]) -> Tensor:
        return self.model(log_mel, *devices).float() / self.temperature


def without_eps(model: nn.Module) -> nn.Module:
    """A copy whose batch norms do not add an epsilon to the variance."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, MelNorm)):
            module.eps = NO_EPS
    return model


def _frontend(path: Path, described: dict[str, Any]) -> nn.Module:
    """The front end that a file's metadata describe."""
    name = described.pop("name")
    for config, kind in FRONTENDS.values():
        if kind.__name__ == name:
            return kind(config(**described)).eval()
    raise DataError(f"{path} wants the front end {name}, which is not known here")


@contextmanager
def drawn(seed: int):
    """Random draws of their own, the same every time; those of others go on as before."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
