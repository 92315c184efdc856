"""The inference package of 2025 by itself: what it needs, what it answers, which files it reads."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from helpers.quantization import for_target
from helpers.submission.package import write_package
from helpers.submission.template.wav import read_wav
from models import MODELS, default_frontend, get_frontend, get_model
from models.device_models import DeviceModels

pytestmark = pytest.mark.slow

LABEL = "Golden_TEAM_task1"
# Without teachers, and without those that take ten seconds at their defaults.
STUDENTS = [name for name, (_, network) in MODELS.items() if not hasattr(network, "pretrained_url")]
STUDENTS = [name for name in STUDENTS if not name.startswith("dragonsearch_baseline")]
ALONE = """
import sys, torch
from Golden_TEAM_task1 import Golden_TEAM_task1_1 as system
assert not {"numpy", "soundfile", "models", "helpers"} & set(sys.modules), "more than torch and torchaudio"
"""


@pytest.fixture(scope="module")
def only_torch(tmp_path_factory) -> Path:
    """A folder of packages that holds torch, torchaudio, and what these say they need."""
    folder = tmp_path_factory.mktemp("only_torch")
    names, done = ["torch", "torchaudio", "torchaudio_cpu", "markupsafe", "mpmath"], set()
    while names:
        name = names.pop()
        if name in done:
            continue
        done.add(name)
        distribution = importlib.metadata.distribution(name)
        needed = [line for line in distribution.requires or () if "extra ==" not in line]
        present = {one.metadata["Name"].lower().replace("_", "-") for one in importlib.metadata.distributions()}
        found = [re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in needed]
        names += [other for other in found if other in present]
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


def run_alone(packages: Path, site: Path, code: str) -> None:
    """Runs code with nothing but Python, torch, torchaudio and what is installed in `site`."""
    start = "import torchaudio_cpu; torchaudio_cpu.install()\n"  # what the .pth file does, which only site.py reads
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{site}{os.pathsep}{packages}"}
    done = subprocess.run([sys.executable, "-S", "-c", start + code], env=environment, cwd=site, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_package_installs_and_needs_torch_and_torchaudio_alone(only_torch, tmp_path):
    """Every student is in it as a system of its own, with a network for a device, and answers as it does here."""
    systems, wanted = [], []
    for i, name in enumerate(STUDENTS, start=1):
        torch.manual_seed(i)
        networks = [get_model(name).eval() for _ in range(2)]
        kind, options = default_frontend(name)
        frontend = get_frontend(kind, **options).eval()
        systems.append((name, DeviceModels(networks[0], {"s1": networks[1]}), frontend))
        rate, noise = frontend.sample_rate, 0.1 * np.random.default_rng(0).standard_normal(frontend.sample_rate)
        soundfile.write(tmp_path / f"{i}.wav", noise, rate, subtype="PCM_24")
        with torch.inference_mode():
            log_mel = frontend(torch.from_numpy(soundfile.read(tmp_path / f"{i}.wav", dtype="float32")[0])[None])
            wanted.append([for_target(network, "fp16")(log_mel)[0] for network in (networks[0], networks[1])])
    write_package(tmp_path / LABEL, LABEL, systems, [("audio/x.wav", "park")])
    torch.save(wanted, tmp_path / "wanted.pt")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(tmp_path / "site"), str(tmp_path / LABEL)], check=True)
    code = f"""
{ALONE}
import importlib
for i, (general, own) in enumerate(torch.load({str(tmp_path / "wanted.pt")!r}), start=1):
    system = importlib.import_module(f"{LABEL}.{LABEL}_{{i}}")
    logits, scenes = system.predict([f"{tmp_path}/{{i}}.wav"] * 3, ["a", "s1", "unknown"], use_cuda=False)
    assert len(scenes) == 10 and scenes[0] == "airport"
    for found, ours in zip(logits, (general, own, general)):
        assert found.shape == (10,) and (found.float() - ours).abs().max() < 2e-2 * (1 + ours.abs().max()), i
    model = system.load_model()
    inputs = system.load_inputs([f"{tmp_path}/{{i}}.wav"], ["a"], model)
    assert inputs[0].dtype == torch.float16 and inputs[0].shape[:2] == (1, 1)
    assert system.get_model_for_device(model, "s9") is system.get_model_for_device(model, "")
    assert system.get_model_for_device(model, "s1") is not system.get_model_for_device(model, "a")
    assert len(model.model.state_dict()) == 2 * len(model.model.base_model.state_dict())
from importlib.resources import files
assert files("{LABEL}.resources").joinpath("test.csv").read_text() == "filename\\tscene_label\\naudio/x.wav\\tpark\\n"
"""
    run_alone(only_torch, tmp_path / "site", code)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("form", ["WAV", "WAVEX"])
def test_the_package_reads_wav_files_as_soundfile_does(tmp_path, subtype, form):
    samples = np.random.default_rng(0).uniform(-1, 1, (999, 2))
    soundfile.write(tmp_path / "x.wav", samples, 22050, subtype=subtype, format=form)
    found, rate = read_wav(tmp_path / "x.wav")
    wanted = soundfile.read(tmp_path / "x.wav", dtype="float32")[0].mean(axis=1)
    assert rate == 22050
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("content", [b"", b"RIFF0000WAVE", b"OggS" + bytes(60)])
def test_the_package_names_what_is_no_wav_file(tmp_path, content):
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.wav (is no wav file|holds no samples)"):
        read_wav(tmp_path / "x.wav")
