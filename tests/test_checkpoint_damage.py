"""Files given as a checkpoint that are damaged, altered, or something else: one line each, and never other weights."""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from helpers.checkpoints import checkpoint
from helpers.checkpoints.checkpoint import CheckpointError, describe, load_checkpoint, load_model, save_checkpoint
from models import FRONTENDS, MODELS, get_frontend, get_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def content() -> dict:
    """All that a checkpoint of a small run holds."""
    model = get_model("cp_mobile", n_classes=3, base_channels=8, n_blocks=(2, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(2, 1, 32, 16)).sum().backward()
    optimizer.step()
    return {
        "model": describe(model, MODELS),
        "frontend": describe(get_frontend("cp_mel", n_mels=32, n_fft=512, win_length=256), FRONTENDS),
        "scenes": ["x", "y", "z"],
        "recording_devices": ["a"],
        "clip_samples": 32000,
        "options": {"lr": 0.1},
        "data": {"scenes": "x, y, z"},
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "loop": {"epoch": 1, "step": 0, "n_clips": 0, "sums": None, "names": ["loss"], "best": 0.5},
        "rng": [{"cpu": torch.get_rng_state(), "cuda": None}],
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_no_flipped_bit_gives_other_content(content, tmp_path):
    path, draw = tmp_path / "last.pt", random.Random(0)
    save_checkpoint(path, content)
    whole, n_refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(whole)
        position = draw.randrange(8 * len(whole))
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert same(content, {k: v for k, v in load_checkpoint(path).items() if k != "format"})
        except CheckpointError:
            n_refused += 1
    assert n_refused > 100


def test_no_mutation_ends_in_another_error(content, tmp_path):
    path, draw = tmp_path / "last.pt", random.Random(1)
    save_checkpoint(path, content)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 4, 40])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        if draw.random() < 0.3:
            start = draw.randrange(len(damaged))
            del damaged[start : start + draw.randrange(len(damaged))]
        path.write_bytes(damaged)
        try:
            load_model(path)
        except CheckpointError as error:
            assert "\n" not in str(error).strip()


WRONG = [None, 3, "text", [], {}, [1], {"a": 1}, torch.zeros(2), -1, float("nan"), True]


def places(content: dict) -> list[tuple[str, ...]]:
    inner = ("model", "frontend", "loop", "optimizer")
    return [(name,) for name in content] + [(name, key) for name in inner for key in content[name]]


def altered(content: dict, place: tuple[str, ...], value) -> dict:
    if len(place) == 1:
        return content | {place[0]: value}
    return content | {place[0]: content[place[0]] | {place[1]: value}}


def test_entries_that_are_missing_or_of_another_kind_are_one_line(content, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"

    def holds(what: dict) -> None:
        monkeypatch.setattr(checkpoint, "read_torch_file", lambda _: {"format": checkpoint.FORMAT, **what})

    for place in places(content):
        for value in WRONG:
            holds(altered(content, place, value))
            try:
                load_model(path)
            except CheckpointError as error:
                assert str(path) in str(error)
        if len(place) == 1:
            holds({name: value for name, value in content.items() if name != place[0]})
            if place[0] in ("model", "frontend", "scenes", "optimizer", "scaler", "rng"):
                with pytest.raises(CheckpointError, match=f"{place[0]} is missing"):
                    load_checkpoint(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_channels": "wide"}, "does not fit"),
        ({"base_channels": -8}, "does not fit"),
        ({"n_blocks": 3}, "does not fit"),
        ({"colour": 1}, "does not fit"),
        ({"strides": 3}, "does not fit"),
    ],
)
def test_options_of_a_network_that_there_are_not(content, tmp_path, config, message):
    model = content["model"] | {"config": content["model"]["config"] | config}
    save_checkpoint(tmp_path / "last.pt", content | {"model": model})
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "last.pt")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(content, tmp_path, value):
    state = {name: tensor.clone() for name, tensor in content["model"]["state"].items()}
    state["in_c.0.0.weight"][0] = value
    save_checkpoint(tmp_path / "last.pt", content | {"model": content["model"] | {"state": state}})
    with pytest.raises(CheckpointError, match=r"NaN or infinite, first in in_c\.0\.0\.weight"):
        load_model(tmp_path / "last.pt")


def wav(path: Path) -> None:
    soundfile.write(path, np.zeros(100), 8000, format="WAV")


def script(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(path))


class Custom:
    pass


OTHER_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "wav": (wav, "is a wav file"),
    "csv": (lambda path: path.write_text("filename\tscene\na\tb\n"), "is a text file"),
    "random bytes": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(4000)), "is neither a checkpoint"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html>"), "is a web page"),
    "LFS pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "NumPy": (lambda path: np.save(path.open("wb"), np.zeros(3)), "is a NumPy array"),
    "NumPy archive": (lambda path: np.savez(path.open("wb"), np.zeros(3)), "is a zip archive"),
    "safetensors": (lambda path: path.write_bytes((16).to_bytes(8, "little") + b'{"a":{}}       '), "is a safetensors"),
    "ONNX": (lambda path: path.write_bytes(b"\x08\x0a\x12\x07pytorch"), "is an ONNX file"),
    "ExecuTorch": (lambda path: path.write_bytes(b"\x00\x00\x00\x00ET12" + bytes(100)), "is an ExecuTorch program"),
    "TorchScript": (script, "is a TorchScript program"),
    "module": (
        lambda path: torch.save(nn.Linear(2, 2), path),
        r"Python objects \(.*\.Linear\)",
    ),
    "class": (lambda path: torch.save({"a": Custom()}, path), r"Python objects \(.*Custom\)"),
    "empty": (lambda path: path.touch(), "is empty"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "tensor": (lambda path: torch.save(torch.zeros(2), path), "holds no checkpoint but a Tensor"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_called_by_their_kind(tmp_path, kind):
    write, message = OTHER_FILES[kind]
    write(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path / "x.ckpt")
    assert "weights_only" not in str(caught.value)


def test_a_checkpoint_with_the_options_of_argparse_loads(tmp_path):
    model = get_model("cp_mobile", base_channels=8)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    hyper = argparse.Namespace(lr=0.1)
    torch.save({"state_dict": state, "hyper_parameters": hyper}, tmp_path / "x.ckpt")
    assert load_model(tmp_path / "x.ckpt").model.config.base_channels == 8
