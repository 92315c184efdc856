import math

import onnxruntime
import pytest
import soundfile
import soxr
import torch
import torchaudio
from torch import Tensor, nn

from helpers.export.onnx_file import export_onnx
from models.frontends.kaldi_fbank import KaldiFbank, KaldiFbankConfig, mel_bank
from models.layers.xnnpack import for_xnnpack
from tests.golden_inputs import clip

RATE = 16000
# Kaldi's settings in a few corners: other rates, frames of a power of two, frames without common parts, gaps between.
OPTIONS = {
    "beats": {},
    "mel_from_zero": {"n_mels": 64, "f_min": 0.0, "f_max": 7000.0},
    "8_kHz": {"sample_rate": 8000, "n_mels": 40},
    "44.1_kHz": {"sample_rate": 44100},
    "power_of_two": {"win_length": 512, "hop_length": 128},
    "coprime": {"win_length": 401, "hop_length": 160},
    "gaps": {"win_length": 160, "hop_length": 400, "n_mels": 23},
    "normalised": {"dataset_mean": -3.0, "dataset_std": 2.5},
}


def reference(config: KaldiFbankConfig, waveform: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """torchaudio, clip by clip, as the published front end calls it: (batch, mel, time)."""
    clips = [
        torchaudio.compliance.kaldi.fbank(
            clip[None].to(dtype) * 2**15,
            num_mel_bins=config.n_mels,
            sample_frequency=config.sample_rate,
            # Half a sample more: torchaudio cuts off, and 401 / 16000 s in ms is 400.99...
            frame_length=1000 * (config.win_length + 0.5) / config.sample_rate,
            frame_shift=1000 * (config.hop_length + 0.5) / config.sample_rate,
            low_freq=config.f_min,
            high_freq=config.f_max,
        )
        for clip in waveform
    ]
    return (torch.stack(clips).transpose(1, 2) - config.dataset_mean) / (2 * config.dataset_std)


def steps(waveform: Tensor) -> Tensor:
    """On the grid of 16-bit samples."""
    return (waveform * 2**15).round() / 2**15


def test_matches_the_published_front_end(golden):
    data = golden("fbank_beats")
    fbank = KaldiFbank(KaldiFbankConfig())(clip(*data["clip"]))
    assert fbank.shape == (1, 1, 128, 98)
    # The published values are float32 themselves, 3e-5 off.
    torch.testing.assert_close(fbank[:, 0].transpose(1, 2), data["out"], rtol=0, atol=1e-4)
    silence = KaldiFbank(KaldiFbankConfig())(torch.zeros(1, data["silence"]["zeros"]))
    torch.testing.assert_close(silence, torch.full_like(silence, data["silence"]["out_value"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_torchaudio_clip_by_clip(options):
    config = KaldiFbankConfig(**options)
    waveform = clip(0.7, config.sample_rate, "fbank/options", 3) * torch.tensor([[1.0], [1e-3], [0.3]])
    waveform[2] += 0.1  # an offset, which is taken out of every frame
    fbank = KaldiFbank(config)(waveform)[:, 0]
    # Both float32; a band that reads next to nothing of the loudest bins has the largest error.
    torch.testing.assert_close(fbank, reference(config, waveform), rtol=0, atol=5e-4 / config.dataset_std)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_filters_are_torchaudios_to_the_bit(options):
    config = KaldiFbankConfig(**options)
    bank, _ = torchaudio.compliance.kaldi.get_mel_banks(
        config.n_mels, config.n_fft, float(config.sample_rate), config.f_min, config.f_max, 100.0, -500.0, 1.0
    )
    assert torch.equal(mel_bank(config), bank)


def test_rounds_no_worse_than_torchaudio():
    waveform = clip(1.0, RATE, "fbank/float64", 4)
    config = KaldiFbankConfig()
    exact = reference(config, waveform, torch.float64)
    ours = (KaldiFbank(config)(waveform)[:, 0] - exact).abs().max()
    torchaudios = (reference(config, waveform) - exact).abs().max()
    assert ours < max(2 * torchaudios, 1e-5)


@pytest.mark.parametrize("value", [0.25, -1.0, 3 / 2**15])
def test_nothing_is_left_of_constant_frames(value):
    waveform = steps(clip(1.0, RATE, "fbank/constant", 2))
    waveform[:, 6000:12000] = value
    config = KaldiFbankConfig()
    fbank = KaldiFbank(config)(waveform)[:, 0]
    floor = (math.log(2**-23) - config.dataset_mean) / (2 * config.dataset_std)
    inside = fbank[..., -(-6000 // 160) : (12000 - 400) // 160 + 1]
    torch.testing.assert_close(inside, torch.full_like(inside, floor), rtol=0, atol=1e-6)
    torch.testing.assert_close(fbank, reference(config, waveform), rtol=0, atol=1e-4)


def test_matches_torchaudio_on_real_clips(shared):
    files = sorted(shared("audio/tau22_samples").rglob("*.wav"))[:4]
    clips = [soxr.resample(*soundfile.read(file, dtype="float32"), RATE, quality="HQ")[:RATE] for file in files]
    waveform = torch.stack([torch.from_numpy(clip) for clip in clips])
    config = KaldiFbankConfig()
    fbank = KaldiFbank(config)(waveform)[:, 0]
    # Recordings of MP3 quality have bands 90 dB below the loudest: there float32 transforms differ by some 1e-4.
    torch.testing.assert_close(fbank, reference(config, waveform), rtol=0, atol=1e-3)


@pytest.mark.parametrize("n_samples", [400, 559, 560, 16000, 16123, 160000])
def test_a_batch_equals_its_clips_one_by_one(n_samples):
    # More clips than a piece of the batch holds, and a rest.
    n_clips = 23 if n_samples <= RATE else 2
    waveform, frontend = clip(n_samples / RATE, RATE, "fbank/batch", n_clips), KaldiFbank(KaldiFbankConfig())
    fbank = frontend(waveform)
    assert fbank.shape == (n_clips, 1, 128, 1 + (n_samples - 400) // 160)
    single = torch.cat([frontend(w[None]) for w in waveform])
    torch.testing.assert_close(fbank, single, rtol=0, atol=1e-5)
    assert frontend(waveform[:0]).shape == (0, *fbank.shape[1:])


def test_frames_end_with_the_last_whole_one():
    waveform, frontend = clip(1.0, RATE, "fbank/end"), KaldiFbank(KaldiFbankConfig())
    other = waveform.clone()
    other[:, 97 * 160 + 400 :] = 0.5
    assert torch.equal(frontend(waveform), frontend(other))
    other[:, 97 * 160 + 398] = 0.5  # within the last frame, where the window is not yet 0
    assert torch.equal(frontend(waveform)[..., :97], frontend(other)[..., :97])
    assert not torch.equal(frontend(waveform)[..., 97], frontend(other)[..., 97])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_spectra_in_float32(dtype):
    waveform, frontend = clip(1.0, RATE, "fbank/autocast", 2), KaldiFbank(KaldiFbankConfig())
    with torch.autocast("cpu", dtype=dtype):
        fbank = frontend(waveform)
    assert fbank.dtype == torch.float32
    assert torch.equal(fbank, frontend(waveform))
    assert torch.equal(fbank, frontend(waveform.double()))


def test_result_serves_in_training_and_leaves_the_waveform_alone():
    waveform, frontend = clip(1.0, RATE, "fbank/graph", 2), KaldiFbank(KaldiFbankConfig()).train()
    before, conv = waveform.clone(), nn.Conv2d(1, 2, 3)
    fbank = frontend(waveform.requires_grad_())
    assert not fbank.requires_grad
    conv(fbank).sum().backward()  # the convolution keeps its input for the gradient
    assert conv.weight.grad.abs().min() > 0
    assert torch.equal(waveform.detach(), before)
    assert torch.equal(fbank, frontend.eval()(waveform))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_its_forms_for_files_give_the_same(options):
    frontend = KaldiFbank(KaldiFbankConfig(**options))
    rate = frontend.sample_rate
    waveform = clip(0.7, rate, "fbank/export", 2) * torch.tensor([[1.0], [1e-3]])
    waveform[1] += 0.1
    n_samples, atol = waveform.shape[1], 1e-3 / frontend.config.dataset_std
    fbank = frontend(waveform)
    torch.testing.assert_close(frontend.for_export(n_samples)(waveform), fbank, rtol=0, atol=atol)
    xnnpack = for_xnnpack(nn.Sequential(frontend.for_export(n_samples, store_matrices=True)), waveform[:1])
    torch.testing.assert_close(xnnpack(waveform[:1]), fbank[:1], rtol=0, atol=atol)
    constant = steps(torch.full_like(waveform, 0.3))  # of which nothing may be left
    assert torch.equal(frontend.for_export(n_samples)(constant), frontend(constant))


@pytest.mark.slow
@pytest.mark.parametrize("options", ["beats", "coprime"])
def test_onnx_runtime_gives_the_same(options, tmp_path):
    frontend = KaldiFbank(KaldiFbankConfig(**OPTIONS[options]))
    waveform = torch.cat([clip(1.0, RATE, "fbank/onnx", 2), steps(torch.full((1, RATE), 0.3))])
    path = export_onnx(frontend.for_export(RATE).eval(), waveform, tmp_path / "frontend.onnx", "waveform", {})
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"waveform": waveform.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), frontend(waveform), rtol=0, atol=2e-4)


def test_keeps_no_state():
    assert KaldiFbank(KaldiFbankConfig()).state_dict() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"f_max": 8001.0}, "8000"),
        ({"f_min": 900.0, "f_max": 800.0}, "f_min"),
        ({"win_length": 2}, "win_length"),
        ({"hop_length": 0}, "hop_length"),
        ({"n_mels": 0}, "n_mels"),
        ({"dataset_std": 0.0}, "dataset_std"),
        ({"sample_rate": 0}, "sample_rate"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        KaldiFbankConfig(**options)


@pytest.mark.parametrize("shape", [(2, 399), (16000,), (2, 1, 16000)])
def test_refuses_clips_without_a_frame_and_other_shapes(shape):
    with pytest.raises(ValueError, match="400 samples"):
        KaldiFbank(KaldiFbankConfig())(torch.zeros(shape))


@pytest.mark.requires_cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_matches_the_cpu_on_a_gpu():
    waveform, frontend = clip(1.0, RATE, "fbank/cuda", 5), KaldiFbank(KaldiFbankConfig())
    on_cpu = frontend(waveform)
    on_gpu = frontend.cuda()(waveform.cuda())
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-4)
