"""The mel front ends beside CpMel: what the published systems returned, independent references, and their forms."""

import librosa
import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from models import get_frontend
from models.frontends.mel import narrow, triangles
from models.layers.xnnpack import for_xnnpack
from tests.golden_inputs import clip

NAMES = ["dcase24_mel", "sp4asc_mel", "dragonsearch_mel", "cnn3_mel"]
# Uneven on purpose: frames that the hop does not divide, a window shorter than the transform, part of the band.
ODD = {"sample_rate": 16000, "n_fft": 600, "win_length": 433, "hop_length": 171, "n_mels": 27, "f_min": 40.0,
       "f_max": 7001.0}  # fmt: skip


def load(shared, name: str) -> dict:
    return torch.load(shared(f"golden/{name}.pt"), weights_only=True)


# ---- published systems ----------------------------------------------------------------------------------------------


def test_dcase24_mel_is_that_of_the_baselines(shared):
    data = load(shared, "dcase_baselines/frontend")
    frontend, resample = get_frontend("dcase24_mel").eval(), torchaudio.transforms.Resample(44100, 32000)
    for key, case in data["clips"].items():
        waveform = resample(clip(case["seconds"], case["rate"], key, 1))
        assert waveform.shape[1] == case["n_resampled"]
        torch.testing.assert_close(frontend(waveform)[0], case["logmel"], rtol=0, atol=3e-3)
    bank = triangles(frontend.config, "htk", None)
    assert [int(row.nonzero()[0]) for row in bank] == data["fb_first_bin"].tolist()
    assert [int(row.nonzero()[-1]) for row in bank] == data["fb_last_bin"].tolist()


def test_dcase24_mel_is_tans_with_his_numbers(shared):
    data = load(shared, "dcase2025/tan_sub1")
    samples, rate = soundfile.read(shared("audio/tau22_samples") / data["clips"][0], dtype="float32")
    frontend = get_frontend("dcase24_mel", sample_rate=rate, n_fft=8192, win_length=8192, hop_length=1364).eval()
    log_mel = frontend(torch.from_numpy(samples)[None])
    assert log_mel.shape == (1, 1, 256, 33)
    torch.testing.assert_close(log_mel[0], data["logmel"], rtol=0, atol=3e-3)


def test_sp4asc_mel_is_the_published_one(shared):
    frontend = get_frontend("sp4asc_mel").eval()
    for case in load(shared, "sp4asc/frontend")["cases"]:
        log_mel = frontend(clip(case["seconds"], case["rate"], case["key"], case["batch"]))
        difference = (log_mel.transpose(2, 3) - case["logmel"]).abs()
        assert difference.max() < 0.1 and difference.mean() < 1e-3  # dB


@pytest.mark.parametrize(("scale", "key"), [("power", "mel_linear_power"), ("ln", "log_mel_offset_1e-6")])
def test_dragonsearch_mel_is_the_published_one(shared, scale, key):
    data = load(shared, "dragonsearch/transforms")
    mel = get_frontend("dragonsearch_mel", scale=scale).eval()(clip(data["seconds"], data["rate"], data["key"], 1))
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if scale == "power" else {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(mel[0], data[key], **tolerance)


def test_cnn3_mel_is_that_of_dcase_util(shared):
    data, frontend = load(shared, "easy_dcase_task1/spec"), get_frontend("cnn3_mel").eval()
    torch.testing.assert_close(
        frontend(clip(*data["cnn3mel"]["clip"]))[:, 0], data["cnn3mel"]["out"], rtol=0, atol=1e-3
    )
    silence = frontend(torch.zeros(1, data["cnn3mel_silence"]["zeros"]))
    torch.testing.assert_close(silence.mean().item(), data["cnn3mel_silence"]["out_value"], rtol=0, atol=1e-3)


# ---- references -----------------------------------------------------------------------------------------------------


def reference(name: str, waveform: np.ndarray, options: dict) -> np.ndarray:
    """Spectrograms (mel, time) in float64, by librosa."""
    config = get_frontend(name, **options).config
    is_cnn3 = name == "cnn3_mel"
    spectrum = librosa.stft(
        waveform.astype(np.float64), n_fft=config.n_fft, hop_length=config.hop_length, win_length=config.win_length,
        window="hamming" if is_cnn3 else "hann", pad_mode="constant" if is_cnn3 else "reflect",
    )  # fmt: skip
    is_slaney = name in ("sp4asc_mel", "cnn3_mel")
    bank = librosa.filters.mel(
        sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels, fmin=config.f_min, fmax=config.f_max,
        htk=not is_slaney, norm="slaney" if is_slaney else None, dtype=np.float64,
    )  # fmt: skip
    bands = bank @ np.abs(spectrum) ** (1 if is_cnn3 else 2)
    scales = {
        "dcase24_mel": lambda x: np.log(x + 1e-5), "sp4asc_mel": lambda x: 10 * np.log10(np.maximum(x, 1e-10)),
        "dragonsearch_mel": lambda x: np.log(x + 1e-6), "cnn3_mel": lambda x: np.log(x + 2.0**-52),
    }  # fmt: skip
    return scales[name](bands)


@pytest.mark.parametrize("options", [{}, ODD], ids=["default", "odd"])
@pytest.mark.parametrize("name", NAMES)
def test_they_agree_with_librosa_in_float64(name, options):
    options = options | ({"scale": "ln"} if name == "dragonsearch_mel" else {})
    frontend = get_frontend(name, **options).eval()
    waveform = clip(0.7, frontend.sample_rate, "mel/librosa", 3)
    log_mel = frontend(waveform)
    assert log_mel.shape[3] == frontend.n_frames(waveform.shape[1])
    for ours, samples in zip(log_mel[:, 0], waveform.numpy(), strict=True):
        difference = np.abs(ours.numpy() - reference(name, samples, options))
        scale = 10 / np.log(10) if name == "sp4asc_mel" else 1  # of a decibel
        assert difference.max() < 2e-2 * scale and difference.mean() < 1e-4 * scale


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_gives_what_its_clips_give_alone(name):
    frontend = get_frontend(name, **ODD).eval()
    waveform = clip(1.0, 16000, "mel/batch", 5)
    alone = torch.cat([frontend(one[None]) for one in waveform])
    assert torch.equal(frontend(waveform), alone)
    assert torch.equal(frontend.train()(waveform.double()), alone)  # always float32


def test_cnn3_mel_takes_the_other_settings_of_dcase_util():
    waveform = clip(1.0, 16000, "mel/options", 1)
    plain = get_frontend("cnn3_mel", **ODD)(waveform)
    symmetric = get_frontend("cnn3_mel", **ODD, window_type="hann_symmetric")(waveform)
    assert not torch.allclose(plain, symmetric, atol=1e-2)
    power = get_frontend("cnn3_mel", **ODD, spectrogram_type="power", logarithmic=False)(waveform)
    magnitude = get_frontend("cnn3_mel", **ODD, logarithmic=False)(waveform)
    torch.testing.assert_close(magnitude.log(), plain, rtol=0, atol=1e-5)
    assert (power - magnitude).abs().max() > 1e-3
    normalised = get_frontend("cnn3_mel", **ODD, htk=True, normalize_mel_bands=True)
    assert torch.allclose(normalised.band_weight.amax(1), torch.ones(ODD["n_mels"]))


# ---- forms for files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_their_forms_for_files_give_the_same(name):
    frontend = get_frontend(name, **ODD, **({"scale": "ln"} if name == "dragonsearch_mel" else {})).eval()
    waveform = clip(1.0, 16000, "mel/export", 2)
    form = frontend.for_export(16000)
    torch.testing.assert_close(form(waveform), frontend(waveform), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(form(0 * waveform), frontend(0 * waveform), rtol=1e-4, atol=2e-4)  # silence
    xnnpack = for_xnnpack(torch.nn.Sequential(frontend.for_export(16000, store_matrices=True)), waveform[:1])
    torch.testing.assert_close(xnnpack(waveform[:1]), frontend(waveform[:1]), rtol=1e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_gives_the_same(name, tmp_path):
    import onnxruntime

    from helpers.export.onnx_file import export_onnx

    frontend = get_frontend(name, **ODD, **({"scale": "ln"} if name == "dragonsearch_mel" else {})).eval()
    waveform = clip(1.0, 16000, "mel/export", 2)
    path = export_onnx(frontend.for_export(16000).eval(), waveform, tmp_path / "frontend.onnx", "waveform", {})
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"waveform": waveform.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), frontend(waveform), rtol=1e-4, atol=2e-4)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dcase24_mel", {"win_length": 5000}, "n_fft must be >= win_length"),
        ("sp4asc_mel", {"f_max": 30000.0}, "f_min and f_max"),
        ("dragonsearch_mel", {"scale": "db"}, "scale must be power or ln, got 'db'"),
        ("cnn3_mel", {"window_type": "kaiser"}, "window_type must be one of hamming_asymmetric, "),
        ("cnn3_mel", {"spectrogram_type": "phase"}, "spectrogram_type must be magnitude or power"),
        ("cnn3_mel", {"hop_length": 0}, "hop_length"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_frontend(name, **options)


def test_clips_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="at least 2049 samples"):
        get_frontend("dcase24_mel")(torch.zeros(1, 2048))
    assert get_frontend("cnn3_mel")(torch.zeros(1, 1)).shape == (1, 1, 40, 1)  # zeros stand around it


def test_narrow_banks_are_the_whole_ones():
    bank = torch.tensor([[0.0, 0, 0, 0], [0, 2, 1, 0], [0, 0, 0, 3], [0.5, 0, 0, 0]])
    index, weight = narrow(bank)
    assert index.shape == (4, 2)
    assert torch.equal(torch.zeros(4, 4).scatter_add_(1, index, weight), bank)
