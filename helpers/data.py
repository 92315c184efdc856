"""From options to the parts of a data set: what every training and scoring script needs before its loop."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import nn

from datasets.cache import WaveformStore, open_store
from datasets.impulse_responses import read_impulse_responses, response_files
from datasets.synthetic import SYNTHETIC_NOTICE, write_synthetic
from datasets.tau import (
    SUBSETS,
    DataError,
    Meta,
    device_groups,
    hold_out_recordings,
    read_meta,
    read_split,
    test_rows,
    train_rows,
)
from datasets.teacher_logits import read_teacher_logits
from datasets.waveforms import Clips
from helpers.augment import AugmentConfig, build_augment
from helpers.distributed import local_rank
from helpers.fetch.resources import RESOURCES, micirp_folder, subset_file, teacher_logits_file
from models.bounds import Bounds, check_numbers

log = logging.getLogger(__name__)

SYNTHETIC_DIR = RESOURCES / "synthetic"
MEMORY_SHARE = 0.6  # of the free memory of a GPU that the waveforms may take


@dataclass(frozen=True)
class DataConfig:
    dataset: Annotated[Literal["tau22", "synthetic"], "tau22 or any folder laid out like it; or generated sounds"] = (
        "tau22"
    )
    dataset_dir: Annotated[str | None, "folder of meta.csv; without it the environment variable TAU22_DIR"] = None
    cache_path: Annotated[str, "folder of the waveform stores, built when missing"] = "datasets/cpath"
    subset: Annotated[
        int, f"percent of TAU22's training part, one of {', '.join(map(str, SUBSETS))}", Bounds(1, 100)
    ] = 100
    val_fraction: Annotated[
        float, "share of the training recordings held out to select best.pt; 0 is off", Bounds(0, 1, below=True)
    ] = 0.0

    def __post_init__(self):
        check_numbers(self)
        if self.subset not in SUBSETS:
            raise ValueError(f"subset must be one of {', '.join(map(str, SUBSETS))}, got {self.subset}")


@dataclass(frozen=True)
class Data:
    meta: Meta
    store: WaveformStore
    train: Clips
    val: Clips | None  # held out of the training part; None unless asked for
    test: Clips
    groups: dict[str, tuple[str, ...]]  # names of recording devices by device group


def dataset_root(config: DataConfig) -> Path:
    """The folder of meta.csv; writes the embedded data set when that is asked for.

    Raises:
        DataError: when no folder is named.
    """
    if config.dataset == "synthetic":
        log.warning(SYNTHETIC_NOTICE)
        return write_synthetic(Path(config.dataset_dir or SYNTHETIC_DIR), progress=True)
    named = config.dataset_dir or os.environ.get("TAU22_DIR")
    if not named:
        raise DataError(
            "no data set named: give its folder with --dataset_dir or TAU22_DIR (`python run_dataset.py download` "
            "fetches TAU22), or try everything on generated sounds with --dataset synthetic"
        )
    return Path(named)


def load_data(config: DataConfig, sample_rate: int, seed: int) -> Data:
    """Reads lists and labels, opens the waveform store (built when missing) and cuts out the parts.

    Raises:
        DataError: for anything in the data set that does not fit, with the file and the remedy.
    """
    meta = read_meta(dataset_root(config))
    rows, val = train_rows(meta), None
    if config.subset != 100:
        rows = np.intersect1d(rows, read_split(meta, subset_file(config.subset)))
    groups = device_groups(meta, rows)
    if config.val_fraction > 0:
        rows, val = hold_out_recordings(meta, rows, config.val_fraction, seed)
        log.info("%d clips of whole recordings are held out, told apart by %s", len(val), meta.recordings_by)
    test = test_rows(meta)
    both = np.intersect1d(rows, test)
    if len(both):
        raise DataError(f"{len(both)} clips are in the training and in the test part, first {meta.files[both[0]]}")
    # Under torchrun the first process of a machine has been here before the others.
    store = open_store(meta, sample_rate, config.cache_path, checked=local_rank() not in (None, 0))
    return Data(
        meta=meta,
        store=store,
        train=Clips(meta, rows, store),
        val=None if val is None else Clips(meta, val, store),
        test=Clips(meta, test, store),
        groups=groups,
    )


def check_n_classes(given: int | None, data: Data) -> int:
    """The number of scenes; `given` is what the user expects, None anything.

    Raises:
        DataError: when there are others.
    """
    n_classes = len(data.meta.scenes)
    if given not in (None, n_classes):
        raise DataError(f"--n_classes {given}, but {data.meta.root} has {n_classes} scenes: leave the option away")
    return n_classes


def load_augment(
    config: AugmentConfig, data: Data, data_config: DataConfig, mask_value: float, temperature: float | None = None
) -> nn.ModuleDict:
    """The chain of augmentations with the impulse responses that it needs; arguments as those of `build_augment`.

    Raises:
        DataError: for an unknown device or missing responses; DownloadError when MicIRP's cannot be fetched.
    """
    responses, dir_devices = load_responses(config, data, data_config)
    return build_augment(config, responses, dir_devices, data.store.n_samples, mask_value, temperature)


def load_responses(
    config: AugmentConfig, data: Data, data_config: DataConfig
) -> tuple[list[np.ndarray], list[int] | None]:
    """Impulse responses at the rate of the data, and positions of the recording devices they are meant for.

    Without a folder they are those of the embedded data set, else MicIRP's, fetched when missing. `dir_devices` is
    names joined by commas, `all`, or `auto`: a as published, else the most frequent in training. `dir_prob` 0 reads
    nothing.

    Raises:
        DataError: for an unknown device or missing responses; DownloadError when MicIRP's cannot be fetched.
    """
    meta = data.meta
    if config.dir_prob == 0:
        return [], None
    folder = responses_folder(config, data, data_config)
    responses = read_impulse_responses(folder, data.store.sample_rate, data.store.n_samples)
    if config.dir_devices == "all":
        return responses, None
    if config.dir_devices == "auto":
        most_frequent = Counter(data.train.recording_device.tolist()).most_common(1)[0][0]
        names = ["a"] if "a" in meta.recording_devices else [meta.recording_devices[most_frequent]]
    else:
        names = [name.strip() for name in config.dir_devices.split(",")]
    unknown = [name for name in names if name not in meta.recording_devices]
    if unknown:
        raise DataError(
            f"--dir_devices names {', '.join(unknown)}; the data set has {', '.join(meta.recording_devices)}"
        )
    return responses, [meta.recording_devices.index(name) for name in names]


def responses_folder(config: AugmentConfig, data: Data, data_config: DataConfig) -> Path:
    """The folder of the impulse responses: as named, else the embedded data set's own, else MicIRP's, fetched."""
    if config.dirs_path is not None:
        return Path(config.dirs_path)
    return data.meta.root / "dirs" if data_config.dataset == "synthetic" else micirp_folder()


def load_teacher(data: Data, kd_lambda: float, path: str | None, demanded: bool) -> bool:
    """Attaches teacher logits to the training part where distillation is wanted; returns whether it is on.

    Args:
        kd_lambda: weight of the labels; 1 wants no teacher.
        path: file of logits; None: the published ones, for TAU22 alone.
        demanded: the user asked for distillation explicitly, so going on without is an error.

    Raises:
        DataError: when logits are demanded but there are none, or the file does not fit.
    """
    if kd_lambda == 1:
        return False
    if path is None and not data.meta.is_tau22:
        if demanded:
            raise DataError(
                f"no teacher logits are known for {data.meta.root}: name a file with --teacher_logits, or train on the "
                "labels alone with --kd_lambda 1"
            )
        log.info(
            "distillation is off: there are no teacher logits for this data set (name a file with --teacher_logits)"
        )
        return False
    logits = read_teacher_logits(path or teacher_logits_file(), data.meta, data.train.rows, subset_file)
    data.train.teacher_logits = torch.from_numpy(logits)
    return True


def data_digests(data: Data, config: DataConfig, augment: AugmentConfig | None = None) -> dict[str, str]:
    """What a run is trained and scored on, in short: part -> digest; the folders that it lies in do not matter.

    Args:
        augment: whose impulse responses count; None for a run without training.
    """
    meta = data.meta
    digests = {"scenes": ", ".join(meta.scenes)}
    for name, clips in (("training clips", data.train), ("held-out clips", data.val), ("test clips", data.test)):
        if clips is not None:
            labels = [[meta.scenes[i] for i in meta.scene[clips.rows]], meta.recording_device[clips.rows].tolist()]
            digests[name] = _digest(repr([clips.files.tolist(), *labels]).encode())
            digests[f"audio of the {name}"] = _digest(repr(data.store.source_checksums(clips.store_rows)).encode())
    digests["length and rate of a clip"] = f"{data.store.n_samples} samples at {data.store.sample_rate} Hz"
    if data.train.teacher_logits is not None:
        digests["teacher logits"] = _digest(data.train.teacher_logits.cpu().numpy().tobytes())
    if augment is not None and augment.dir_prob > 0:
        files = response_files(responses_folder(augment, data, config))
        digests["impulse responses"] = _digest(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files))
    return digests


def changed_data(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names what is not what it was, of two `data_digests`; what people can read with both values."""
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    readable = {"scenes", "length and rate of a clip"}
    return [f"{name} ({then.get(name)}; now {now.get(name)})" if name in readable else name for name in names]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def place_on_device(clips: Clips, mode: str, device: torch.device) -> bool:
    """Moves the waveforms of a part into the memory of `device`; returns whether it did.

    Args:
        mode: auto (a GPU, when they take at most 60 % of its free memory), yes, no.
    """
    if mode == "auto":
        wanted = device.type == "cuda" and clips.n_bytes <= MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    else:
        wanted = mode == "yes"
    if wanted:
        clips.load_onto(device)
    return wanted
