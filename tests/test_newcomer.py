"""Four parts as somebody new would add them: a file and a line in a table each, and every script takes them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

import run_export
import run_qat
import run_training
from datasets.waveforms import Batch
from helpers.augment import AUGMENTATIONS
from helpers.augment.augmentation import Augmentation
from helpers.checkpoints.checkpoint import load_checkpoint, load_model
from helpers.losses import LOSSES
from models import FRONTENDS, MODELS
from models.bounds import Bounds, check_numbers
from models.frontends.frontend import Frontend
from models.frontends.spectrogram import Spectrogram
from tests.conftest import write_nothing

pytestmark = pytest.mark.slow

# ---- models/sep_net.py: "sep_net": (SepNetConfig, SepNet) in MODELS ------------------------------------------------


@dataclass(frozen=True)
class SepNetConfig:
    n_classes: Annotated[int, "number of scenes", Bounds(1)] = 10
    width: Annotated[int, "channels of block 1; every block doubles them", Bounds(1)] = 12

    def __post_init__(self):
        check_numbers(self)


class SepBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.depthwise = nn.Conv2d(c_in, c_in, 3, stride=(2, 1), padding=1, groups=c_in, bias=False)
        self.pointwise = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.norm = nn.BatchNorm2d(c_out)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.pointwise(self.depthwise(x))))


class SepNet(nn.Module):
    def __init__(self, config: SepNetConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.Sequential(SepBlock(1, config.width), SepBlock(config.width, 2 * config.width))
        self.head = nn.Linear(2 * config.width, config.n_classes)

    def forward(self, log_mel: Tensor) -> Tensor:
        x = self.blocks(log_mel)  # (batch, channel, mel / 4, time)
        return self.head(x.mean(dim=(2, 3)))


# ---- models/frontends/db_mel.py: "db_mel": (DbMelConfig, DbMel) in FRONTENDS ---------------------------------------


@dataclass(frozen=True)
class DbMelConfig:
    sample_rate: Annotated[int, "sampling rate in Hz", Bounds(1)] = 8000
    n_fft: Annotated[int, "length of the Fourier transform in samples", Bounds(1)] = 256
    hop_length: Annotated[int, "step from frame to frame in samples", Bounds(1)] = 160
    n_bands: Annotated[int, "mel bands", Bounds(1)] = 24

    def __post_init__(self):
        check_numbers(self)


class DbMel(Frontend):
    normalisation = "decibels / 20 + 2"

    def __init__(self, config: DbMelConfig):
        super().__init__()
        self.config = config
        self.spectrogram = Spectrogram(torch.hann_window(config.n_fft), config.hop_length)
        filters = torchaudio.functional.melscale_fbanks(
            config.n_fft // 2 + 1, 0.0, config.sample_rate / 2, config.n_bands, config.sample_rate
        )
        self.register_buffer("filters", filters.t().contiguous(), persistent=False)  # (mel, bin)

    def forward(self, waveform: Tensor) -> Tensor:
        mel = self.filters @ self.spectrogram(waveform)  # (batch, mel, time)
        return (10 * torch.log10(mel.clamp_min(1e-10)) / 20 + 2).unsqueeze(1)


# ---- helpers/augment/gain.py: "gain": (GainConfig, Gain) in AUGMENTATIONS ------------------------------------------


@dataclass(frozen=True)
class GainConfig:
    gain_db: Annotated[float, "largest change of level to either side, in dB; 0 is off", Bounds(0, 100)] = 6.0

    def __post_init__(self):
        check_numbers(self)


class Gain(Augmentation):
    stage = "waveform"

    def __init__(self, config: GainConfig):
        super().__init__()
        self.gain_db = config.gain_db

    def forward(self, batch: Batch) -> Batch:
        if not self.training or self.gain_db == 0:
            return batch
        db = self.gain_db * (2 * torch.rand(len(batch.waveform), 1, device=batch.waveform.device) - 1)
        return dataclasses.replace(batch, waveform=batch.waveform * 10 ** (db / 20))


# ---- helpers/losses/focal.py: "focal": (FocalConfig, Focal) in LOSSES ----------------------------------------------


@dataclass(frozen=True)
class FocalConfig:
    focal_gamma: Annotated[float, "how much less sure answers count", Bounds(0)] = 2.0

    def __post_init__(self):
        check_numbers(self)


class Focal:
    def __init__(self, config: FocalConfig):
        self.gamma = config.focal_gamma

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        log_p = F.log_softmax(logits, dim=1)
        return -((1 - log_p.exp()) ** self.gamma * batch.target * log_p).sum(dim=1).mean()


# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tau, tmp_path, monkeypatch) -> Path:
    for table, name, part in (
        (MODELS, "sep_net", (SepNetConfig, SepNet)), (FRONTENDS, "db_mel", (DbMelConfig, DbMel)),
        (AUGMENTATIONS, "gain", (GainConfig, Gain)), (LOSSES, "focal", (FocalConfig, Focal)),
    ):  # fmt: skip
        monkeypatch.setitem(table, name, part)
    monkeypatch.chdir(tmp_path)
    return tmp_path


OPTIONS = [
    "--model", "sep_net", "--width", "8", "--frontend", "db_mel", "--n_bands", "16", "--augment", "gain",
    "freq_mixstyle", "--gain_db", "3", "--loss", "focal", "--focal_gamma", "1", "--dataset_dir", "tau",
    "--cache_path", "cache",
    "--logger", "none", "--batch_size", "8", "--lr", "0.01", "--warm_up_len", "0",
]  # fmt: skip
EXPORT = ["--latency_rounds", "0", "--n_clips", "8", "--inputs", "waveform"]


def weights(run: str) -> dict[str, Tensor]:
    return load_checkpoint(Path("DCASE23_Task1") / run / "checkpoints/last.pt")["model"]["state"]


def test_help_lists_their_options_and_those_of_no_other(here, capsys):
    with pytest.raises(SystemExit):
        run_training.main([*OPTIONS, "--help"])
    printed = capsys.readouterr().out
    for option in ("--width", "--n_bands", "--gain_db", "--focal_gamma", "--mixstyle_p"):
        assert option in printed
    for option in ("--base_channels", "--fmax_aug_range", "--roll", "--temperature"):
        assert option not in printed


def test_they_are_counted(here, capsys):
    result = run_training.main([*OPTIONS, "--dry_run"])
    assert result["n_parameters"] == sum(value.numel() for value in SepNet(SepNetConfig(width=8)).parameters())
    assert "depthwise" in capsys.readouterr().out


def test_they_train_resume_and_export(here):
    run_training.main([*OPTIONS, "--n_epochs", "2", "--run_id", "whole"])
    run_training.main([*OPTIONS, "--n_epochs", "1", "--run_id", "parted"])
    run_training.main(["--resume", "parted", "--n_epochs", "2"])
    whole, parted = weights("whole"), weights("parted")
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    last = "DCASE23_Task1/whole/checkpoints/last.pt"
    assert run_export.main(["--checkpoint", last, *EXPORT]) == 0
    loaded = load_model(last)
    assert loaded.frontend.config == DbMelConfig(n_bands=16) and loaded.model.config.width == 8
    session = onnxruntime.InferenceSession("DCASE23_Task1/whole/export/waveform_fp32.onnx")
    assert session.get_modelmeta().custom_metadata_map["normalisation"] == DbMel.normalisation
    waveform = 0.1 * torch.randn(2, 8000)
    with torch.no_grad():
        wanted = loaded.model(loaded.frontend(waveform))
    (found,) = session.run(None, {"waveform": waveform.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-3, atol=1e-4)


def test_the_run_keeps_a_recipe_that_gives_the_same_run(here):
    run_training.main([*OPTIONS, "--n_epochs", "1", "--run_id", "one"])
    run_training.main(["--config", "DCASE23_Task1/one/config.yaml", "--run_id", "two"])
    one, two = weights("one"), weights("two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_they_run_in_8_bits(here, monkeypatch):
    """Depthwise and pointwise convolutions, norm, ReLU, mean and linear head are found where they stand."""
    run_training.main([*OPTIONS, "--n_epochs", "1", "--run_id", "float"])
    data = [word for word in OPTIONS[OPTIONS.index("--dataset_dir") :] if word not in ("--warm_up_len", "0")]
    options = [*data, "--loss", "focal", "--augment", "gain", "--n_epochs", "2", "--freeze_params_epochs", "1"]
    monkeypatch.setattr(run_qat, "write_onnx", write_nothing)
    run_qat.main([*options, "--wandb_id", "float", "--run_id", "int8"])
    last = "DCASE23_Task1/int8/checkpoints/last.pt"
    assert run_export.main(["--checkpoint", last, *EXPORT]) == 0
    names = {path.name for path in Path("DCASE23_Task1/int8/export").iterdir()}
    assert names == {"waveform_int8.onnx", "waveform_fp32.onnx", "parity.md"}
