"""Shared fixtures: golden files, the material beside the repository (skipped where missing), and small data sets."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

GOLDEN = Path(__file__).parent / "golden"
# Real clips, published checkpoints and large golden files are not in the repository.
SHARED = Path(os.environ.get("ASC_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """Loads a golden file of this repository by name."""
    return lambda name: torch.load(GOLDEN / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Path of a file beside the repository; the test is skipped where it is missing."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs {name}, which is not part of the repository (folder in ASC_SHARED)")
        return path

    return find


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first: short ones then fill what is left of the time of several processes."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def empty_plots(request, monkeypatch) -> None:
    """Reports with empty plots, whose drawing takes four fifths of a small run; not under the mark `plots`."""
    if request.node.get_closest_marker("plots") is None:
        for module in ("report", "sections"):
            for name in ("write_curves", "write_confusion_matrix"):
                monkeypatch.setattr(f"helpers.report.{module}.{name}", lambda *arguments: arguments[-1].touch())
        for name in ("write_device_bars", "write_reliability"):
            monkeypatch.setattr(f"helpers.report.figures.{name}", lambda *arguments: arguments[-1].touch())


def write_nothing(*arguments: Any) -> Path:
    """In the place of `write_onnx`, most of the time of a small run, in tests that do not look at the file."""
    arguments[-1].write_bytes(b"")
    return arguments[-1]


class TauFolder:
    """A small data set in TAU's layout: a tone in noise per clip; scenes differ in the tone."""

    def __init__(self, root: Path, rate: int = 44100, seconds: float = 1.0):
        self.root, self.rate, self.seconds = root, rate, seconds
        self.rows: list[tuple[str, str, str, str]] = []
        (root / "audio").mkdir(parents=True)
        (root / "evaluation_setup").mkdir()

    def add(self, scene: str, city: str, recording: int, segment: int, device: str) -> str:
        file = f"audio/{scene}-{city}-{recording}-{recording}-{segment}-{device}.wav"
        rng = np.random.default_rng([len(self.rows), 7])
        t = np.arange(round(self.rate * self.seconds)) / self.rate
        x = 0.3 * np.sin(2 * np.pi * 200 * (1 + hash_of(scene) % 17) * t) + 0.05 * rng.standard_normal(len(t))
        soundfile.write(self.root / file, x, self.rate, subtype="PCM_24")
        self.rows.append((file, scene, f"{city}-{recording}", device))
        return file

    def write_lists(self, train: list[str], test: list[str]) -> None:
        lines = ["\t".join(row) for row in [("filename", "scene_label", "identifier", "source_label"), *self.rows]]
        (self.root / "meta.csv").write_text("\n".join(lines) + "\n")
        for name, files in (("fold1_train", train), ("fold1_evaluate", test)):
            (self.root / "evaluation_setup" / f"{name}.csv").write_text("\n".join(["filename", *files]) + "\n")


def hash_of(text: str) -> int:
    return sum((i + 1) * byte for i, byte in enumerate(text.encode()))


def make_tau(
    root: Path, scenes: list[str], devices: list[str], train_devices: list[str], n_segments: int = 3, **kwargs
):
    """Two recordings of each scene on each device, `n_segments` each: the first trains, the second tests."""
    folder = TauFolder(root, **kwargs)
    train, test = [], []
    for i, scene in enumerate(scenes):
        for device in devices:
            for segment in range(n_segments):
                if device in train_devices:
                    train.append(folder.add(scene, "paris", 10 * i, segment, device))
                test.append(folder.add(scene, "milan", 10 * i + 1, segment, device))
    folder.write_lists(train, test)
    return folder


@pytest.fixture(scope="session")
def small_tau(tmp_path_factory) -> TauFolder:
    root = tmp_path_factory.mktemp("small_tau") / "tau"
    return make_tau(root, ["bus", "park", "tram"], ["a", "b", "s1", "s4", "s5"], ["a", "b", "s1"])


@pytest.fixture
def tau(small_tau: TauFolder, tmp_path: Path) -> TauFolder:
    """A copy of its own of 27 training and 45 test clips of the published scenes bus, park and tram."""
    folder = copy.deepcopy(small_tau)
    folder.root = tmp_path / "tau"
    shutil.copytree(small_tau.root, folder.root)
    return folder


@pytest.fixture
def own_tau(tmp_path: Path) -> TauFolder:
    """A data set with its own labels and devices."""
    return make_tau(tmp_path / "own", ["kitchen", "office", "yard"], ["phone", "webcam"], ["phone"])
