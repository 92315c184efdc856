"""From options to the parts of a data set: what every training and scoring script needs before its loop."""

import hashlib
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from datasets.audio import Sampling
from datasets.cache import WaveformStore, open_joined_store, open_store
from datasets.crops import CroppedClips, ShiftedClips
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
from helpers.distributed import local_rank
from helpers.fetch.resources import RESOURCES, subset_file, teacher_logits_file
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

    val_devices: Annotated[
        str | None,
        "recording devices kept out of training, such as s2,s3: the held-out recordings then tell how well unknown "
        "devices are heard (val/acc/held_out)",
    ] = None

    def __post_init__(self):
        check_numbers(self)
        if self.val_devices and not self.val_fraction:
            raise ValueError("val_devices needs recordings that are held out: val_fraction above 0")
        if self.subset not in SUBSETS:
            raise ValueError(f"subset must be one of {', '.join(map(str, SUBSETS))}, got {self.subset}")


@dataclass(frozen=True)
class Data:
    meta: Meta
    store: WaveformStore | None  # None where only the labels are wanted
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


def sampling_of(frontend: Any) -> Sampling:
    """How clips are brought to a front end."""
    return Sampling(frontend.sample_rate, frontend.resampler)


def load_data(
    config: DataConfig, sampling: Sampling | int, seed: int, cropped: bool = False, crop_shift: float = 0.0
) -> Data:
    """Reads lists and labels, opens the waveform store (built when missing) and cuts out the parts.

    Args:
        sampling: of the clips; a rate in Hz, or that of a front end.
        seed: of the recordings that are held out.
        cropped: the training part is made of windows of whole recordings instead of their segments.
        crop_shift: of windows that are not anywhere, but multiples of so many seconds from where the segments are.

    Raises:
        DataError: for anything in the data set that does not fit, with the file and the remedy.
    """
    meta = read_meta(dataset_root(config))
    rows, val = train_rows(meta), None
    if config.subset != 100:
        rows = np.intersect1d(rows, subset_rows(meta, config.subset))
    groups = device_groups(meta, rows)
    if config.val_fraction > 0:
        rows, val = hold_out_recordings(meta, rows, config.val_fraction, seed)
        log.info("%d clips of whole recordings are held out, told apart by %s", len(val), meta.recordings_by)
    if config.val_devices:
        rows, groups = keep_devices_out(meta, rows, val, config.val_devices, groups)
    test = test_rows(meta)
    both = np.intersect1d(rows, test)
    if len(both):
        raise DataError(f"{len(both)} clips are in the training and in the test part, first {meta.files[both[0]]}")
    # Under torchrun the first process of a machine has been here before the others.
    checked = local_rank() not in (None, 0)
    store = open_store(meta, sampling, config.cache_path, checked=checked)
    train = Clips(meta, rows, store)
    if crop_shift > 0 and not cropped:
        raise DataError(f"crop_shift {crop_shift:g} says where windows are: train on windows with --cropped")
    if cropped:
        joined = open_joined_store(meta, store, config.cache_path, checked=checked)
        train = ShiftedClips(meta, rows, joined, step=crop_shift) if crop_shift else CroppedClips(meta, rows, joined)
    return Data(
        meta=meta,
        store=store,
        train=train,
        val=None if val is None else Clips(meta, val, store),
        test=Clips(meta, test, store),
        groups=groups,
    )


def keep_devices_out(
    meta: Meta, rows: np.ndarray, val: np.ndarray, names: str, groups: dict[str, tuple[str, ...]]
) -> tuple[np.ndarray, dict[str, tuple[str, ...]]]:
    """Rows for training without those of some recording devices, and device groups with these as `held_out`.

    Args:
        rows, val: for training, and held out, which keeps them.
        names: of the devices, parted by commas.

    Raises:
        DataError: for a device without clips on either side, or when none are left to train with.
    """
    devices = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    known = {meta.recording_devices[i] for i in meta.recording_device[rows]}
    held = {meta.recording_devices[i] for i in meta.recording_device[val]}
    for name in devices:
        if name not in known or name not in held:
            raise DataError(f"--val_devices {name}: the training part and what is held out have clips of "
                            f"{', '.join(sorted(known & held))}")  # fmt: skip
    numbers = [meta.recording_devices.index(name) for name in devices]
    left = rows[~np.isin(meta.recording_device[rows], numbers)]
    if not len(left):
        raise DataError(f"--val_devices {names} leaves no clips to train with")
    return left, groups | {"held_out": devices}


def load_labels(config: DataConfig) -> Data:
    """The parts of a data set without their audio, for those who know the answers already.

    Raises:
        DataError: as `load_data`.
    """
    meta = read_meta(dataset_root(config))
    rows, test = train_rows(meta), test_rows(meta)
    return Data(meta, None, Clips(meta, rows, None), None, Clips(meta, test, None), device_groups(meta, rows))


def subset_rows(meta: Meta, subset: int) -> np.ndarray:
    """Rows of the list split<subset>.csv: the data set's own beside its other lists, else TAU22's, fetched once.

    Raises:
        DataError: for another data set that has no such list; DownloadError when TAU22's cannot be fetched.
    """
    own = meta.root / "evaluation_setup" / f"split{subset}.csv"
    if own.is_file():
        return read_split(meta, own)
    if not meta.is_tau22:
        raise DataError(
            f"--subset {subset} names a list of TAU22's clips; {meta.root} is another data set: take all with "
            f"--subset 100, or put a list of its own at {own}"
        )
    return read_split(meta, subset_file(subset))


def check_n_classes(given: int | None, data: Data) -> int:
    """The number of scenes; `given` is what the user expects, None anything.

    Raises:
        DataError: when there are others.
    """
    n_classes = len(data.meta.scenes)
    if given not in (None, n_classes):
        raise DataError(f"--n_classes {given}, but {data.meta.root} has {n_classes} scenes: leave the option away")
    return n_classes


def load_teacher(data: Data, path: str | None, loss_fn: Any, given: Collection[str]) -> None:
    """Attaches teacher logits to the training part where the loss learns from them.

    Args:
        path: file of logits; None: the published ones, for TAU22 alone.
        given: options of the command line; where it asks for distillation, going on without is an error.

    Raises:
        DataError: when logits are asked for but there are none, or nobody reads them, or the file does not fit.
    """
    if getattr(loss_fn, "teacher_temperature", None) is None:
        if "teacher_logits" in given and "kd_lambda" not in given:
            raise DataError("--teacher_logits needs a loss that learns from them: a --kd_lambda below 1, the weight of "
                            "the labels")  # fmt: skip
        return
    if path is None and not data.meta.is_tau22:
        if {"kd_lambda", "teacher_logits"} & set(given):
            raise DataError(
                f"no teacher logits are known for {data.meta.root}: name a file with --teacher_logits, or train on the "
                "labels alone with --kd_lambda 1"
            )
        log.info(
            "distillation is off: there are no teacher logits for this data set (name a file with --teacher_logits)"
        )
        return
    logits = read_teacher_logits(path or teacher_logits_file(), data.meta, data.train.rows, subset_file)
    data.train.teacher_logits = torch.from_numpy(logits)


def data_digests(data: Data) -> dict[str, str]:
    """What a run is trained and scored on, in short: part -> digest; the folders that it lies in do not matter."""
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
