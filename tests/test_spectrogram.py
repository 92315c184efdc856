import pytest
import torch

from models.frontends.spectrogram import Spectrogram


@pytest.mark.parametrize(("n", "hop", "centred"), [(64, 20, True), (50, 25, False), (63, 10, True), (256, 100, False)])
def test_it_is_the_short_time_fourier_transform(n, hop, centred):
    waveform, window = torch.randn(3, 1000), torch.hann_window(n)
    spectrogram = Spectrogram(window, hop, centred)
    wanted = torch.stft(waveform, n, hop, window=window, center=centred, return_complex=True).abs() ** 2
    found = spectrogram(waveform)
    assert found.shape == wanted.shape and spectrogram.n_frames(1000) == found.shape[2]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.max().item())


def test_its_form_for_files_gives_the_same():
    waveform, spectrogram = torch.randn(2, 8000), Spectrogram(torch.hann_window(512), 125)
    padded = torch.nn.functional.pad(waveform[:, None], (256, 256), mode="reflect")[:, 0]
    wanted = spectrogram(waveform)
    torch.testing.assert_close(spectrogram._convolved(padded), wanted, rtol=1e-3, atol=1e-6 * wanted.max().item())


@pytest.mark.parametrize("shape", [(2, 20), (1, 2, 1000)])
def test_clips_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"waveform must be \(batch, sample\) with at least 33 samples"):
        Spectrogram(torch.hann_window(64), 10)(torch.zeros(shape))
