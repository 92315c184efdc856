import os

import numpy as np
import pytest
import torch

from datasets.audio import FULL_SCALE, read_audio, to_int16
from helpers.checkpoints.checkpoint import CheckpointError, describe, load_checkpoint, load_model, save_checkpoint
from models import FRONTENDS, MODELS, get_frontend, get_model
from tests.golden_inputs import clip, fill_state

PUBLISHED = "golden/cpjku_dcase23/c0a7nzin/checkpoints/epoch=149-step=81900.ckpt"


def content_of(model, frontend) -> dict:
    parts = {"model": describe(model, MODELS), "frontend": describe(frontend, FRONTENDS)}
    return parts | {"scenes": ["x", "y", "z"]}


def test_the_published_checkpoint_gives_the_published_logits_on_real_clips(shared):
    data = torch.load(shared("golden/cpjku_dcase23/checkpoint_real_clips.pt"), weights_only=True)
    loaded = load_model(shared(PUBLISHED))
    folder = shared("audio/tau22_samples")
    waveform = torch.from_numpy(np.stack([read_audio(folder / file, 32000) for file in data["files"]]))
    with torch.no_grad():
        log_mel = loaded.frontend(waveform)
        logits = loaded.model(log_mel)
        stored = torch.from_numpy(to_int16(waveform.numpy())).float() / FULL_SCALE
        logits_from_store = loaded.model(loaded.frontend(stored))
    torch.testing.assert_close(log_mel, data["spec"], rtol=0, atol=3e-4)
    torch.testing.assert_close(logits, data["logits"], rtol=0, atol=1e-3)
    assert logits.argmax(1).tolist() == data["argmax"]
    assert [loaded.scenes[i] for i in data["labels"]] == [file.split("-")[0] for file in data["files"]]
    # 16-bit storage is a rounding 98 dB below full scale; the logits of these quiet clips move by up to 0.03.
    torch.testing.assert_close(logits_from_store, data["logits"], rtol=0, atol=0.05)


def test_the_published_checkpoint_on_synthetic_clips(shared):
    data = torch.load(shared("golden/cpjku_dcase23/checkpoint_synthetic.pt"), weights_only=True)
    loaded = load_model(shared(PUBLISHED))
    waveform = clip(data["clip_seconds"], data["clip_rate"], data["clip_key"], data["clip_batch"])
    logits = loaded.model(loaded.frontend(waveform))
    torch.testing.assert_close(logits, data["logits"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base_channels": 24, "channels_multiplier": 1.5, "expansion_rate": 2.0},
        {"base_channels": 8, "channels_multiplier": 1.9, "expansion_rate": 1.7, "n_classes": 3},
        {
            "base_channels": 64,
            "channels_multiplier": 1.6,
            "expansion_rate": 4.0,
            "n_blocks": (2, 2, 2),
            "in_channels": 2,
        },
    ],
)
def test_a_lightning_checkpoint_of_other_widths_is_recognised(tmp_path, options):
    model = fill_state(get_model("cp_mobile", **options)).eval()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "1.9.4"}, tmp_path / "other.ckpt")
    loaded = load_model(tmp_path / "other.ckpt")
    x = torch.rand(2, model.config.in_channels, 64, 32)
    assert torch.equal(loaded.model(x), model(x))


def test_our_own_come_back_as_they_were(tmp_path):
    model = fill_state(get_model("cp_mobile", n_classes=3, base_channels=8, strides={"b3": (1, 2)})).eval()
    frontend = get_frontend("cp_mel", n_mels=64, hop_length=750)
    save_checkpoint(tmp_path / "own.pt", content_of(model, frontend))
    loaded = load_model(tmp_path / "own.pt")
    assert loaded.model.config == model.config
    assert loaded.frontend.config == frontend.config
    assert loaded.scenes == ("x", "y", "z")
    waveform = clip(1.0, 32000, "own", 2)
    assert torch.equal(loaded.model(loaded.frontend(waveform)), model(frontend.eval()(waveform)))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    content = content_of(get_model("cp_mobile", base_channels=8), get_frontend("cp_mel"))
    save_checkpoint(path, content | {"clip_samples": 1})

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, content | {"clip_samples": 2})
    assert load_checkpoint(path)["clip_samples"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_disk_that_fills_while_writing_is_reported_as_such(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    from helpers.checkpoints.checkpoint import _save

    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        _save({"loop": torch.zeros(100_000)}, file)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("<html>"), "is a web page"),
        (lambda path: torch.save([1, 2], path), "holds no checkpoint but a list"),
        (lambda path: torch.save({"weights": torch.zeros(3)}, path), "found: weights"),
        (
            lambda path: torch.save({"state_dict": {"model.fc.weight": torch.zeros(3)}}, path),
            "none of the networks cp",
        ),
        (lambda path: torch.save({"state_dict": Malicious()}, path), r"holds Python objects \(posix.mkdir\)"),
    ],
)
def test_foreign_files_are_one_clear_error(tmp_path, monkeypatch, write, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "some.pt")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "some.pt")
    assert not (tmp_path / "pwned").exists()


def test_a_truncated_checkpoint_is_one_clear_error(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, content_of(get_model("cp_mobile"), get_frontend("cp_mel")))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(path)


def test_weights_of_another_width_are_refused(tmp_path):
    content = content_of(get_model("cp_mobile", base_channels=16), get_frontend("cp_mel"))
    content["model"]["config"]["base_channels"] = 32
    save_checkpoint(tmp_path / "last.pt", content)
    with pytest.raises(CheckpointError, match="does not fit the network it describes"):
        load_model(tmp_path / "last.pt")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pt is missing"):
        load_model(tmp_path / "none.pt")
