"""From sound files and the names of their recording devices to logits.

Depends on torch, torchaudio and the files of this package alone.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torchaudio
from torch import Tensor, nn

from .networks import FRONTENDS, NETWORKS
from .networks.device_models import DeviceModels
from .wav import read_wav

BATCH_SIZE = 64
PREFIX = "multi_device_model."  # of the weights in a checkpoint


class System(nn.Module):
    """A front end in float32 and its networks in half precision; `model` holds these, see networks/device_models.py."""

    def __init__(self, frontend: nn.Module, model: DeviceModels, scenes: Sequence[str]):
        super().__init__()
        self.frontend, self.model, self.scenes = frontend, model, tuple(scenes)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def open_system(path: str | Path) -> System:
    """Builds what a checkpoint describes, in eval mode on the CPU; weights load strictly.

    Raises:
        ValueError: for a file of another kind.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not content.keys() >= {"network", "frontend", "scenes", "state_dict"}:
        raise ValueError(f"{path} is no checkpoint of this package")
    state = {name.removeprefix(PREFIX): value for name, value in content["state_dict"].items()}
    devices = dict.fromkeys(name.split(".")[1] for name in state if name.startswith("device_models."))

    def network() -> nn.Module:
        config, kind = NETWORKS[content["network"]["name"]]
        return kind(config(**content["network"]["config"])).half()

    model = DeviceModels(network(), {device: network() for device in devices})
    model.load_state_dict(state)
    config, kind = FRONTENDS[content["frontend"]["name"]]
    return System(kind(config(**content["frontend"]["config"])), model, content["scenes"]).eval()


@torch.inference_mode()
def log_mels(paths: Sequence[str | Path], system: System) -> list[Tensor]:
    """Log-mel spectrograms (1, 1, mel, time) float16 of sound files, in their order, on the system's device."""
    waveforms, rate = [], system.frontend.sample_rate
    for path in paths:
        waveform, own_rate = read_wav(path)
        is_other = own_rate != rate
        waveforms.append((resampler(own_rate, rate, system.frontend.resampler) if is_other else None, waveform))
    results: list[Tensor | None] = [None] * len(waveforms)
    for places in _alike([(id(resample), len(waveform)) for resample, waveform in waveforms]):
        batch = torch.stack([waveforms[i][1] for i in places])
        resample = waveforms[places[0]][0]
        batch = (batch if resample is None else resample(batch)).to(system.device)
        for i, log_mel in zip(places, system.frontend(batch).half(), strict=True):
            results[i] = log_mel[None]
    return results


@torch.inference_mode()
def answers(paths: Sequence[str | Path], device_ids: Sequence[str], system: System) -> list[Tensor]:
    """Logits (class,) of sound files in their order, on the CPU, by the network of each one's recording device.

    Memory stays as it is however many files there are.

    Raises:
        ValueError: when there are not as many devices as files.
    """
    if len(paths) != len(device_ids):
        raise ValueError(f"{len(paths)} files and {len(device_ids)} recording devices: each file needs one")
    results: list[Tensor | None] = [None] * len(paths)
    for own in _alike([id(system.model.for_device(device)) for device in device_ids]):
        network = system.model.for_device(device_ids[own[0]])
        for start in range(0, len(own), BATCH_SIZE):
            places = own[start : start + BATCH_SIZE]
            inputs = log_mels([paths[i] for i in places], system)
            for same in _alike([tuple(x.shape) for x in inputs]):
                for j, logits in zip(same, network(torch.cat([inputs[j] for j in same])).cpu(), strict=True):
                    results[places[j]] = logits.clone()
    return results


def _alike(keys: Sequence) -> Iterator[list[int]]:
    """The places of equal keys, in order."""
    groups: dict = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    yield from groups.values()


@lru_cache
def resampler(own_rate: int, rate: int, name: str) -> nn.Module:
    """The filter that the front end wants: torchaudio's, or one that comes close to soxr's."""
    if name == "sinc":
        return torchaudio.transforms.Resample(own_rate, rate)
    return torchaudio.transforms.Resample(
        own_rate, rate, "sinc_interp_kaiser", lowpass_filter_width=128, rolloff=0.96, beta=14.77
    )
