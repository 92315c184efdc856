import numpy as np
import pytest
import torch
import torchaudio
from scipy.signal import stft

from models import get_frontend
from models.frontends.cp_mel import LOG_OFFSET, CpMel, CpMelConfig
from models.published import PUBLISHED
from tests.golden_inputs import clip

CONFIGS = ["mel_cpresnet_eval", "mel_passt_eval", "mel_student_train_pinned"]


def dense(index: torch.Tensor, weight: torch.Tensor, n_bins: int) -> torch.Tensor:
    """The bands as a full matrix (mel, bin)."""
    return torch.zeros(len(index), n_bins).scatter_add_(1, index, weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_published_front_end(golden, name):
    data = golden(name)
    frontend = get_frontend(
        "cp_mel",
        sample_rate=data["sr"],
        n_fft=data["n_fft"],
        win_length=data["win_length"],
        hop_length=data["hopsize"],
        n_mels=data["n_mels"],
        f_min=data["fmin"],
        f_max=data["fmax"],
        fmin_aug_range=data["fmin_aug_range"],
        fmax_aug_range=data["fmax_aug_range"],
    ).train(bool(data["training"]))
    waveform = clip(data["clip_seconds"], data["clip_rate"], data["clip_key"], data["clip_batch"])
    # 3e-4: the published front end is float32, up to 9e-5 off a float64 one.
    torch.testing.assert_close(frontend(waveform)[:, 0], data["output"], rtol=0, atol=3e-4)


def test_fmax_of_a_training_draw_matches_the_published_one(golden):
    data = golden("mel_student_fmax15001")
    waveform = clip(data["clip_seconds"], data["clip_rate"], data["clip_key"], data["clip_batch"])
    log_mel = get_frontend("cp_mel", f_max=15001.0).eval()(waveform)
    torch.testing.assert_close(log_mel[:, 0], data["output"], rtol=0, atol=3e-4)


@pytest.mark.parametrize("name", ["melbank_student", "melbank_passt"])
def test_filters_match_the_published_bank(golden, name):
    data = golden(name)
    config = CpMelConfig(
        sample_rate=data["sr"], n_fft=data["n_fft"], win_length=800, n_mels=data["n_mels"], f_max=data["fmax"]
    )
    frontend = CpMel(config)
    bank = dense(frontend.band_index, frontend.band_weight, data["shape"][1])
    torch.testing.assert_close(bank[data["rows"]], data["row_values"], rtol=0, atol=1e-4)
    torch.testing.assert_close(bank.sum(1), data["row_sum"], rtol=0, atol=1e-3)
    torch.testing.assert_close(bank.sum(0), data["col_sum"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("f_min", "f_max"), [(0.0, 15500.0), (20.0, 15001.0), (0.0, 16000.0), (300.0, 4000.0)])
def test_filters_match_torchaudio(f_min, f_max):
    frontend = CpMel(CpMelConfig(f_min=f_min, f_max=f_max, fmax_aug_range=1))
    reference, _ = torchaudio.compliance.kaldi.get_mel_banks(256, 4096, 32000, f_min, f_max, 100.0, -500.0, 1.0)
    # Both float32, with differently ordered arithmetic on mel values near 3000.
    torch.testing.assert_close(dense(frontend.band_index, frontend.band_weight, 2048), reference, rtol=0, atol=1e-3)


def test_matches_an_independent_computation_in_float64():
    waveform = clip(1.0, 32000, "mel/scipy", 2)
    emphasised = (waveform[:, 1:] - 0.97 * waveform[:, :-1]).double().numpy()
    window = np.hanning(3072)
    padded = np.pad(emphasised, ((0, 0), (2048, 2048)), mode="reflect")
    _, _, spectrum = stft(
        padded, window=np.pad(window, 512), nperseg=4096, noverlap=4096 - 500, boundary=None, padded=False
    )
    power = np.abs(spectrum * window.sum()) ** 2  # SciPy divides by the sum of the window
    bank, _ = torchaudio.compliance.kaldi.get_mel_banks(256, 4096, 32000, 0.0, 15500.0, 100.0, -500.0, 1.0)
    reference = (np.log(bank.double().numpy() @ power[:, :2048] + LOG_OFFSET) + 4.5) / 5
    log_mel = get_frontend("cp_mel").eval()(waveform)[:, 0]
    torch.testing.assert_close(log_mel.double(), torch.from_numpy(reference), rtol=0, atol=3e-4)


def test_every_draw_of_the_edges_fits_the_bands():
    """The widest filter of any draw lies within its run of bins: row sums agree with a dense bank."""
    frontend = CpMel(CpMelConfig(fmin_aug_range=200, fmax_aug_range=2000))
    for f_min, f_max in [(0.0, 14000.0), (0.0, 16000.0), (199.0, 14000.0), (199.0, 16000.0)]:
        index, weight = frontend.bands(torch.tensor(f_min), torch.tensor(f_max))
        reference, _ = torchaudio.compliance.kaldi.get_mel_banks(256, 4096, 32000, f_min, f_max, 100.0, -500.0, 1.0)
        torch.testing.assert_close(dense(index, weight, 2048), reference, rtol=0, atol=1e-3)


def test_training_draws_whole_hertz_over_the_published_range():
    frontend = get_frontend("cp_mel", fmin_aug_range=3)
    torch.manual_seed(0)
    draws = [frontend._draw_edges(torch.device("cpu")) for _ in range(3000)]
    f_min, f_max = (torch.stack(edges).numpy() for edges in zip(*draws, strict=True))
    assert set(f_min) == {0.0, 1.0, 2.0}
    assert f_max.min() >= 15001
    assert f_max.max() <= 16000
    assert (f_max == f_max.round()).all()
    assert abs(f_max.mean() - 15500.5) < 20  # 4 standard errors of a uniform mean


def test_training_varies_and_eval_does_not():
    waveform, frontend = clip(1.0, 32000, "mel/vary"), get_frontend("cp_mel")
    torch.manual_seed(0)
    assert not torch.equal(frontend.train()(waveform), frontend(waveform))
    assert torch.equal(frontend.eval()(waveform), frontend(waveform))


def test_a_batch_equals_its_clips_one_by_one():
    waveform, frontend = clip(1.0, 32000, "mel/batch", 5), get_frontend("cp_mel").eval()
    single = torch.cat([frontend(w[None]) for w in waveform])
    torch.testing.assert_close(frontend(waveform), single, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_spectra_in_float32(dtype):
    waveform, frontend = clip(1.0, 32000, "mel/autocast", 2), get_frontend("cp_mel").eval()
    with torch.autocast("cpu", dtype=dtype):
        log_mel = frontend(waveform)
    assert log_mel.dtype == torch.float32
    assert torch.equal(log_mel, frontend(waveform))


def test_keeps_no_state():
    assert get_frontend("cp_mel").state_dict() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"f_max": 17000.0}, "16000"),
        ({"f_min": 9000.0, "f_max": 8000.0}, "f_min"),
        ({"win_length": 5000}, "n_fft"),
        ({"n_mels": 0}, "n_mels"),
        ({"f_max": 400.0}, "f_max down to -99 Hz"),
        ({"f_min": 1000.0, "f_max": 1600.0, "fmin_aug_range": 200}, "lower fmax_aug_range"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        get_frontend("cp_mel", **options)


def test_refuses_a_clip_too_short_to_reflect():
    with pytest.raises(ValueError, match="2050 samples"):
        get_frontend("cp_mel")(torch.zeros(1, 1000))


@pytest.mark.parametrize("shape", [(0,), (32000,), (1, 1, 32000), (2, 0), ()])
def test_refuses_other_axes_than_batch_and_sample(shape):
    with pytest.raises(ValueError, match=r"waveform must be \(batch, sample\)"):
        get_frontend("cp_mel")(torch.zeros(shape))


def test_no_clips_are_no_spectrograms():
    assert get_frontend("cp_mel")(torch.zeros(0, 32000)).shape == (0, 1, 256, 64)


@pytest.mark.parametrize("name", ["cp_mel", "kaldi_fbank"])
@pytest.mark.parametrize("change", ["double", "half"])
def test_computes_in_float32_whatever_precision_the_network_gets(name, change):
    frontend = get_frontend(name).eval()
    waveform = clip(1.0, 32000, "mel/double", 2)
    expected = frontend(waveform)
    assert torch.equal(getattr(frontend, change)()(waveform.double()), expected)


def test_training_draws_no_edge_beyond_half_the_rate():
    frontend = get_frontend("cp_mel", f_max=16000.0).train()
    drawn = torch.stack([frontend._draw_edges(torch.device("cpu"))[1] for _ in range(200)])
    assert 15501 <= drawn.min() < 15900 and drawn.max() == 16000


@pytest.mark.parametrize(("options", "n_empty"), [({}, 0), ({"n_fft": 1024, "win_length": 800}, 13)])
def test_bands_without_a_bin_are_counted(options, n_empty, caplog):
    frontend = get_frontend("cp_mel", **options).eval()
    log_mel = frontend(clip(1.0, 32000, "mel/empty", 1))[0, 0]
    assert int((log_mel.std(dim=1) == 0).sum()) == n_empty
    assert (f"{n_empty} of 256 mel bands hold no bin" in caplog.text) == (n_empty > 0)


def test_filters_for_another_rate_than_the_waveforms():
    """Jeong's entry of 2025, which does not resample: torchaudio's filters for 32 kHz over a spectrum of 44.1 kHz."""
    frontend = CpMel(CpMelConfig(**PUBLISHED["jeong2025_1"].frontend[1])).eval()
    waveform = clip(1.0, 44100, "jeong")
    emphasised = waveform[:, 1:] - 0.97 * waveform[:, :-1]
    window = torch.hann_window(2048, periodic=False)
    power = torch.stft(emphasised, 2048, 744, window=window, return_complex=True).abs().square()
    bank, _ = torchaudio.compliance.kaldi.get_mel_banks(256, 2048, 32000, 0.0, 16000.0, 100.0, -500.0, 1.0)
    expected = ((bank @ power[:, :-1] + 1e-5).log() + 4.5) / 5
    torch.testing.assert_close(frontend(waveform)[:, 0], expected, rtol=0, atol=3e-3)
    assert frontend(torch.zeros(1, 44100)).shape == (1, 1, 256, 60)  # as published
