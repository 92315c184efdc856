"""The inference package of DCASE 2025 Task 1: an installable folder that needs torch, torchaudio and itself.

Its networks and front ends are the files of `models/` that these systems need, found by their imports.
Source of the contract: https://github.com/CPJKU/dcase2025_task1_inference.
"""

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import soundfile
import torch
from torch import Tensor, nn

from datasets.files import plain
from datasets.tau import SCENES
from helpers.complexity import measure_second
from helpers.errors import UserError
from helpers.submission.rules import PROBED_DEVICES
from helpers.submission.tables import half_state
from models import FRONTENDS, MODELS
from models.device_models import DeviceModels

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "template"
MODELS_IMPORT = re.compile(r"^(\s*)(from|import) models(?=[.\s])", re.MULTILINE)
DUMMY_RATE = 44100
RUN_PACKAGE = """
import importlib, json, sys, torch
name, n_systems, scratch = sys.argv[1], int(sys.argv[2]), sys.argv[3]
wanted = json.load(open(f"{scratch}/wanted.json"))
modules = [importlib.import_module(f"{name}.{name}_{i}") for i in range(1, n_systems + 1)]
answers = [torch.stack(module.predict(wanted["files"], wanted["devices"])[0]).float() for module in modules]
torch.save(answers, f"{scratch}/logits.pt")
"""


class PackageError(UserError, RuntimeError):
    """A package that was written does not do what it should; one line."""


def write_package(
    folder: Path, name: str, systems: Sequence[tuple[str, DeviceModels, nn.Module]], test_list: Sequence[Sequence[str]]
) -> None:
    """Writes the package into a folder that is not there yet.

    Args:
        name: <Lastname>_<Institute>_task1.
        systems: of each a line about it, its networks and front end.
        test_list: names and scenes of the development set's test part, in the order of its list.
    """
    package = folder / name
    package.mkdir(parents=True)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(SOURCES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    for template in sorted(SOURCES.glob("*.jinja")):
        text = environment.get_template(template.name).render(name=name, systems=[about for about, *_ in systems])
        (folder / template.stem).write_text(text, encoding="utf-8")
    _write_module(package / "__init__.py", '"""Inference for DCASE 2025 Task 1, see the README."""\n')
    for file in ("inference.py", "wav.py"):
        shutil.copyfile(SOURCES / file, package / file)
    for i in range(1, len(systems) + 1):
        shutil.copyfile(SOURCES / "system.py", package / f"{name}_{i}.py")
    write_networks(package / "networks", f"{name}.networks", [(model, frontend) for _, model, frontend in systems])
    _write_module(package / "ckpts/__init__.py")
    for i, (_, model, frontend) in enumerate(systems, start=1):
        torch.save(checkpoint_of(model, frontend), package / "ckpts" / f"{name}_{i}.pt")
    _write_module(package / "resources/__init__.py")
    noise = 0.01 * np.random.default_rng(0).standard_normal(DUMMY_RATE)
    soundfile.write(package / "resources/dummy.wav", noise, DUMMY_RATE, subtype="PCM_24")
    with open(package / "resources/test.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["filename", "scene_label"])
        writer.writerows(test_list)


def checkpoint_of(model: DeviceModels, frontend: nn.Module) -> dict[str, Any]:
    """Weights in the published layout, and what the package needs to build the parts again."""

    def described(part: nn.Module, table: Mapping) -> dict[str, Any]:
        return {"name": _name_of(part, table), "config": plain(part.config)}

    return {
        "network": described(model.base_model, MODELS),
        "frontend": described(frontend, FRONTENDS),
        "scenes": list(SCENES),
        "state_dict": {f"multi_device_model.{name}": value for name, value in half_state(model).items()},
    }


def write_networks(folder: Path, package: str, systems: Sequence[tuple[DeviceModels, nn.Module]]) -> None:
    """Writes a package of the networks and front ends, with tables of them, and all that they import of `models/`."""
    tables = {
        "NETWORKS": {_name_of(model.base_model, MODELS): MODELS for model, _ in systems},
        "FRONTENDS": {_name_of(frontend, FRONTENDS): FRONTENDS for _, frontend in systems},
    }
    parts = [part for names in tables.values() for name, table in names.items() for part in table[name]]
    for module in sources_of([DeviceModels.__module__, *(part.__module__ for part in parts)]):
        source = _file_of(module)
        target = folder / source.relative_to(ROOT / "models")
        _write_module(target, MODELS_IMPORT.sub(rf"\1\2 {package}", source.read_text(encoding="utf-8")))
    lines = ['"""Networks and front ends by name: config and class."""', ""]
    lines += sorted({f"from {part.__module__.replace('models', package, 1)} import {part.__name__}" for part in parts})
    for title, names in tables.items():
        lines += ["", f"{title} = {{"]
        for name, table in names.items():
            config, kind = table[name]
            lines.append(f'    "{name}": ({config.__name__}, {kind.__name__}),')
        lines.append("}")
    _write_module(folder / "__init__.py", "\n".join(lines) + "\n")
    for below in [path for path in folder.rglob("*") if path.is_dir()]:
        if not (below / "__init__.py").exists():
            _write_module(below / "__init__.py")


def sources_of(modules: Sequence[str]) -> list[str]:
    """The modules and all of `models/` that they import, directly or not."""
    found, open_ones = set(), list(modules)
    while open_ones:
        module = open_ones.pop()
        if module in found:
            continue
        found.add(module)
        for node in ast.walk(ast.parse(_file_of(module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "models":
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                open_ones += [name for name in (node.module, *inside) if name != "models" and _file_of(name).is_file()]
    return sorted(found)


def answers_of_package(
    folder: Path, name: str, n_systems: int, files: Sequence[Path], devices: Sequence[str]
) -> list[Tensor]:  # fmt: skip
    """Logits (clip, class) of every system of a written package, which runs by itself in another process.

    Raises:
        PackageError: with the last line of what it says where it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wanted = {"files": [str(file.resolve()) for file in files], "devices": list(devices)}
        Path(scratch, "wanted.json").write_text(json.dumps(wanted), encoding="utf-8")
        command = [sys.executable, "-c", RUN_PACKAGE, name, str(n_systems), scratch]
        alone = {**os.environ, "PYTHONPATH": str(folder.resolve()), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=scratch, env=alone, capture_output=True, text=True)
        if done.returncode:
            raise PackageError(f"the package does not run: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
        return torch.load(Path(scratch, "logits.pt"), weights_only=True)


def complexity_of(model: DeviceModels, frontend: nn.Module) -> dict[str, Any]:
    """The content of complexity.json for networks in half precision; `Params` are bytes, as published.

    Devices that share a network are counted once.
    """
    counted: dict[int, dict[str, int]] = {}
    by_device = {}
    for device in PROBED_DEVICES:
        network = model.for_device(device)
        if id(network) not in counted:
            cost = measure_second(network, frontend).trained
            counted[id(network)] = {"MACs": cost.macs, "Params": cost.parameter_bytes("fp16")}
        by_device[device] = counted[id(network)]
    most = {key: max(one[key] for one in by_device.values()) for key in ("MACs", "Params")}
    return {"per_device": by_device, "max_MACs": most["MACs"], "max_Params": most["Params"]}


def _name_of(part: nn.Module, table: Mapping) -> str:
    return next(name for name, (_, kind) in table.items() if type(part) is kind)


def _file_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def _write_module(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
