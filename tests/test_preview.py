from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import run_dataset
from datasets.cache import open_store
from datasets.tau import read_meta
from datasets.tau import train_rows as rows_for_training
from datasets.waveforms import Batch, Clips
from helpers.augment import AUGMENTATIONS
from helpers.augment.augmentation import Augmentation
from helpers.report import preview
from models import FRONTENDS, get_frontend
from tests.test_run_dataset import outcome

SMALL = ["--model", "cp_mobile", "--resample_rate", "8000", "--n_fft", "256", "--window_size", "256", "--hop_size",
         "128", "--n_mels", "40"]  # fmt: skip


@pytest.fixture
def pictures(monkeypatch) -> dict[str, tuple]:
    """What would be drawn, by file name: drawing takes most of the time."""
    found = {}

    def keep(path: Path, title, drawn, has_waveform, scale) -> None:
        found[path.name] = (title, drawn, has_waveform, scale)

    monkeypatch.setattr(preview, "write_picture", keep)
    return found


@pytest.fixture
def command(tau, tmp_path) -> list[str]:
    data = ["--dataset_dir", str(tau.root), "--cache_path", str(tmp_path / "cache")]
    return ["preview", "--out", str(tmp_path / "out"), *data, *SMALL]


def test_every_augmentation_of_the_table_is_drawn(command, pictures, tmp_path, tau):
    chain = [*AUGMENTATIONS]
    options = [
        "--mixup_alpha",
        "0.3",
        "--mask_share",
        "0.3",
        "--dir_prob",
        "0.05",
        "--time_width",
        "20",
        "--freqm",
        "12",
    ]
    options += ["--mel_width", "10", "--dirs_path", str(write_response(tmp_path / "responses"))]
    assert run_dataset.main([*command, "--augment", *chain, *options]) == 0
    names = [name.removesuffix(".png").split("_", 1)[-1] for name in pictures]
    assert sorted(names) == sorted([*chain, "chain"])
    for title, drawn, _, _ in pictures.values():
        assert preview.is_changed(drawn.before, drawn.after), title
    by_name = dict(zip(names, pictures.values(), strict=True))
    assert by_name["dir"][0][0] == f"dir: dir_prob 0.05, dirs_path {tmp_path / 'responses'}, dir_devices auto"
    assert [name for name, (_, _, has_waveform, _) in by_name.items() if not has_waveform] == [
        "spec_mask", "freq_mixstyle", "share_mask", "mixup", "spec_stripes"
    ]  # fmt: skip
    (line,) = preview.target_lines(by_name["mixup"][1], read_meta(tau.root).scenes)
    assert line.startswith("target: bus 1.00 -> ") and ", " in line


def write_response(folder: Path) -> Path:
    folder.mkdir()
    soundfile.write(folder / "one.wav", np.array([0.5, 0.3, -0.2, 0.1]), 8000)
    return folder


@dataclass(frozen=True)
class EchoConfig:
    echo_chance: Annotated[float, "share of clips with an echo"] = 0.02


class Echo(Augmentation):
    """As a newcomer adds it, with a probability under a name of its own."""

    stage = "waveform"

    def __init__(self, config: EchoConfig):
        super().__init__()
        self.config = config

    def forward(self, batch: Batch) -> Batch:
        on = torch.rand(len(batch.waveform), 1) < self.config.echo_chance
        return replace(batch, waveform=batch.waveform + on * 0.5 * batch.waveform.roll(100, dims=1))


def test_a_new_augmentation_needs_nothing_here(command, pictures, monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "echo", (EchoConfig, Echo))
    assert run_dataset.main([*command, "--augment", "echo"]) == 0
    title, drawn, _, _ = pictures["1_echo.png"]
    assert title[0] == "echo: echo_chance 0.02"
    before = drawn.before.waveform[0]
    torch.testing.assert_close(drawn.after.waveform[0], before + 0.5 * before.roll(100))  # with its whole strength
    assert drawn.n_changes == preview.N_CHANGES < drawn.n_draws


def test_what_is_off_is_named_instead_of_drawn(command, pictures, capsys):
    assert run_dataset.main([*command, "--augment", "time_roll", "share_mask"]) == 0
    assert [*pictures] == ["1_time_roll.png", "chain.png"]
    assert "share_mask changes nothing of audio/bus-paris-0-0-0-a.wav with --mask_share 0.0" in capsys.readouterr().out


def test_the_seed_decides_the_pictures(command, pictures):
    found = []
    for seed in (1, 1, 2):
        run_dataset.main([*command, "--augment", "time_roll", "--seed", str(seed)])
        found.append(pictures["1_time_roll.png"][1].after.waveform[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_named_clip_and_windows_of_its_recording(command, pictures, capsys):
    clip = "park-paris-10-10-1-b.wav"
    assert run_dataset.main([*command, "--cropped", "--augment", "--clip", clip]) == 0
    title, drawn, _, scale = pictures["1_cropped.png"]
    assert title[1].startswith(f"audio/{clip}, recorded by device b")
    assert scale.seconds == 1.0
    assert drawn.before.target[0].argmax() == scale.scenes.index("park")


def test_partners_come_from_other_recordings(tau, tmp_path):
    meta = read_meta(tau.root)
    clips = Clips(meta, rows_for_training(meta), open_store(meta, 8000, tmp_path / "cache", progress=False))
    index = preview.pick_clips(clips, None, seed=3)
    recordings = meta.recording[clips.rows][index.numpy()]
    assert meta.recording_devices[clips.recording_device[index[0]]] == "a"
    assert len(index) == preview.N_CLIPS
    assert recordings[0] not in recordings[1:]


@pytest.mark.parametrize("name", FRONTENDS)
def test_axes_in_hz_are_measured_the_right_way_round(name):
    bands = preview.bands_of(get_frontend(name).eval(), get_frontend(name).sample_rate)
    assert len(bands) >= 4
    assert [*bands.values()] == sorted(bands.values())
    assert bands[1000] < bands[5000]


def test_the_axis_of_known_mel_bands():
    """Band i of Kaldi's bank has its centre at an equal step on its mel scale."""
    frontend = get_frontend("kaldi_fbank").eval()
    mel = torch.linspace(1127 * torch.tensor(1 + 20 / 700).log(), 1127 * torch.tensor(1 + 8000 / 700).log(), 130)[1:-1]
    centres = 700 * ((mel / 1127).exp() - 1)
    for hz, band in preview.bands_of(frontend, 16000).items():
        assert abs((centres - hz).abs().argmin() - band) <= 1, hz


@pytest.mark.plots
def test_a_picture_is_a_png_with_both_rows(command, tmp_path):
    assert run_dataset.main([*command, "--augment", "time_roll", "spec_mask", "--freqm", "12"]) == 0
    sizes = {}
    for path in sorted((tmp_path / "out").iterdir()):
        with Image.open(path) as image:
            sizes[path.name] = image.size
    assert [*sizes] == ["1_time_roll.png", "2_spec_mask.png", "chain.png"]
    assert sizes["1_time_roll.png"][1] > sizes["2_spec_mask.png"][1]  # no waveforms where none changes


def test_a_recipe_of_another_script_is_read_for_its_augmentations(command, pictures, tmp_path):
    """And fetches no list of a subset for it."""
    recipe = tmp_path / "qat.yaml"
    recipe.write_text("freeze_params_epochs: 4\nprecision: int8\naugment: [gain]\ngain_p: 0.25\nsubset: 5\n")
    assert run_dataset.main([*command, "--config", str(recipe)]) == 0
    assert pictures["1_gain.png"][0][0].startswith("gain: gain_p 0.25")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clip", "none.wav"], "--clip none.wav is not in the training part of"),
        (["--augment"], "--augment names no augmentation"),
        (["--augment", "gain", "--hop_size", "9000", "--window_size", "16000", "--n_fft", "16384"], "samples"),
        (["--augment", "gain", "--gain_p", "2"], "gain_p must be in [0, 1], got 2.0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(command, options, message, monkeypatch, capsys):
    assert outcome([*command, *options], monkeypatch) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert message in errors[-1] and "Traceback" not in " ".join(errors)


def test_a_file_in_the_place_of_the_folder_is_one_line(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("")
    assert outcome([*command, "--augment", "gain"], monkeypatch) == 2
    assert f"File exists: {tmp_path / 'out'}" in capsys.readouterr().err
