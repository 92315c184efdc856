"""The mel front ends of `mel.py` for exported files: the same numbers, from matrix products alone.

Runtimes on phones, in browsers and on boards have no fast Fourier transform (or a slow one: the spectra of one 1-second
clip take 9.4 ms with the STFT operator of ONNX Runtime, on one thread) and no embedding bag. `MelExport` writes the
transform as two dense stages and the filters as a few dense blocks.

The transform. n_fft = p * q; sample n = q * n1 + n2; bin k = k1 + p * k2:

    stage 1   Y[k1, n2] = sum over n1 of x[q n1 + n2] e^(-2 pi i q n1 k1 / n_fft)         one real matrix for all n2
    stage 2   X[k1, k2] = sum over n2 of Y[k1, n2] e^(-2 pi i n2 (k1 + p k2) / n_fft)     one real matrix for each k1

The waveform is real, so k1 = 0 .. p // 2 suffices: the others are conjugates, with the same power. Of the rows n1 only
those that the window reaches take part. Where a frame stands in the transform changes the phase alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.frontends.mel import Mel
from models.frontends.mel_xnnpack import XnnMel

# Weights (bands x bins) of one block of filters: larger blocks multiply more zeros, smaller ones are more operators.
BLOCK_WEIGHTS = 4096
# Frames are gathered from pieces of the waveform; shorter ones than this (samples) cost more than cutting the frames.
MIN_PIECE = 32


class MelExport(nn.Module):
    """Maps waveforms (batch, n_samples) to mel spectrograms (batch, 1, mel, time), as the front end in eval mode does.

    Standard operators only, no control flow, any batch size. `forward` computes the matrix of stage 2 from tables: the
    file stays small (0.5 MB at the default config, with the matrix 1.4 MB), and a runtime that folds constants, as ONNX
    Runtime does, computes it once, at load. Then a 1-second clip takes 1.5 ms (one thread, Xeon at 2.5 GHz).

    Float32 throughout. Largest differences from float64 at the default config, on a scale on which log-mel values of
    real clips deviate by 0.5 (in brackets those of `CpMel`): recordings and noise 3e-5 (2e-5), noise of amplitude 1e-4
    and below, down to silence, 3e-7 (2e-7). Where a band lies 90 to 110 dB below a loud pure tone of the same frame,
    rounding shows in both: 0.9 of full scale at 100 Hz 4e-5 (2e-5), 1 kHz 3e-4 (1e-4), 7 kHz 2.3e-3 (1.0e-3).

    Args:
        frontend: the front end to rewrite; its window and weights are taken over.
        n_samples: length of every waveform in samples; the frames are laid out for it.
        store_matrices: keep the matrix of stage 2 as a buffer, for runtimes that do not fold constants (ExecuTorch).

    Raises:
        ValueError: for n_samples too short for one reflected frame; in `forward` for waveforms of another length.
    """

    def __init__(self, frontend: Mel, n_samples: int, store_matrices: bool = False):
        super().__init__()
        self.config, self.n_samples = frontend.config, n_samples
        self.offset, self.preemphasis, self.compress_ = frontend.offset, frontend.preemphasis, frontend.compress_
        self.is_centred, self.is_mirrored = frontend.is_centred, frontend.is_mirrored
        self.removes_mean, self.is_magnitude = frontend.removes_mean, frontend.is_magnitude
        self.n_frames = frontend.n_frames(n_samples)
        self.p, self.q = split_transform(self.config.n_fft, len(frontend.window))
        self._lay_out_frames(frontend.window)
        self._lay_out_transform()
        self._lay_out_filters(frontend.band_index, frontend.band_weight)
        self.stage2: Tensor | None
        self._keep("stage2", self._stage2() if store_matrices else None)

    def for_xnnpack(self, _waveform: Tensor) -> XnnMel:
        return XnnMel(self)

    def forward(self, waveform: Tensor) -> Tensor:
        if waveform.ndim != 2 or waveform.shape[1] != self.n_samples:
            raise ValueError(f"waveform must be (batch, {self.n_samples}) samples, got {tuple(waveform.shape)}")
        # Time comes first until stage 1 and last after it, so that whatever is gathered lies in one piece. ONNX Runtime
        # reads the transposed operand of stage 2 in place.
        y = self.stage1 @ self._frames(waveform)  # (batch x time, (k1, re/im), n2)
        y = y.view(-1, self.p // 2 + 1, 2 * self.q).permute(1, 2, 0)  # (k1, (re/im, n2), batch x time)
        spectrum = (self._stage2() if self.stage2 is None else self.stage2) @ y  # (k1, (re/im, k2), batch x time)
        power = (spectrum * spectrum).unflatten(1, (2, self.q)).sum(1).flatten(0, 1)  # ((k1, k2), batch x time)
        if self.is_magnitude:
            power = power.sqrt()
        bands = [
            getattr(self, f"filters{i}") @ power.index_select(0, getattr(self, f"rows{i}"))
            for i in range(self.n_blocks)
        ]
        mel = self.compress_(torch.cat(bands))  # (mel, batch x time)
        return mel.view(self.config.n_mels, -1, self.n_frames).transpose(0, 1).unsqueeze(1)

    def _frames(self, waveform: Tensor) -> Tensor:
        """Windowed frames (batch x time, n1, n2) of the emphasised waveform, mirrored at its ends."""
        x = self.emphasised(waveform)
        if self.n_left or self.n_right:
            x = F.pad(x, (self.n_left, self.n_right), mode="reflect" if self.is_mirrored else "constant")
        if self.n_zeros > 0:  # read only where the window is zero
            x = F.pad(x, (0, self.n_zeros))
        elif self.n_zeros < 0:  # in no frame
            x = x[:, : self.n_zeros]
        x = x.reshape(-1, x.shape[1] // self.piece, self.piece).index_select(1, self.piece_index)
        frames = x.view(-1, self.n_gathered)  # (batch x time, sample)
        if self.n_gathered > len(self.window):
            frames = frames[:, : len(self.window)]
        return self.windowed(frames, waveform).view(-1, len(self.window) // self.q, self.q)

    def windowed(self, frames: Tensor, waveform: Tensor) -> Tensor:
        """Frames (batch x time, sample) without their mean, where that is taken out, times the window."""
        if self.removes_mean:
            sums = waveform[:, : self.n_mean].unflatten(1, (-1, self.mean_part)).sum(2)  # (batch, part)
            parts = sums.index_select(1, self.mean_index).view(-1, self.n_averaged // self.mean_part)
            means = parts.sum(1, keepdim=True) / self.n_averaged  # (batch x time, 1)
            frames = frames - (1 - self.preemphasis) * means
        return frames * self.window

    def emphasised(self, waveform: Tensor) -> Tensor:
        if self.offset:
            waveform = waveform + self.offset
        if not self.preemphasis:
            return waveform
        # y[t] = x[t + 1] - 0.97 x[t]: without a fused multiply-add, rounding 0.97 x[t] would show in low notes.
        before = waveform[:, :-1]
        return (waveform[:, 1:] - before) + (1 - self.preemphasis) * before

    def _stage2(self) -> Tensor:
        """Matrices (k1, (re/im, k2), (re/im, n2)): (cos - i sin)(re + i im) = cos re + sin im + i (cos im - sin re)."""
        angle = self.angle.long()
        cos, sin = self.cos[angle], self.sin[angle]  # (k1, k2, n2)
        return torch.cat([torch.cat([cos, sin], 2), torch.cat([-sin, cos], 2)], 1)

    def _lay_out_frames(self, window: Tensor) -> None:
        """Which pieces of the padded waveform make which frame; the window, with zeros up to whole rows n1."""
        config, hop = self.config, self.config.hop_length
        self.piece, n_window = split_frame(len(window), hop, self.q)
        self._keep("window", F.pad(window, (0, n_window - len(window))))
        n_pieces = -(-n_window // self.piece)
        self.n_gathered = n_pieces * self.piece
        start = torch.arange(self.n_frames)[:, None] * (hop // self.piece)
        self._keep("piece_index", (start + torch.arange(n_pieces)).flatten())  # ((time, piece),)
        # n_fft / 2 samples are mirrored at both ends, and the window stands in the middle of n_fft samples.
        n_outside = config.n_fft // 2 if self.is_centred else 0
        self.n_left = n_outside - (config.n_fft - len(window)) // 2 if self.is_centred else 0
        n_missing = (
            (self.n_frames - 1) * hop + self.n_gathered - self.n_left - (self.n_samples - bool(self.preemphasis))
        )
        self.n_right = min(max(n_missing, 0), n_outside)
        self.n_zeros = n_missing - self.n_right
        if self.removes_mean:  # as `frame_means`: from sums over the parts that frames have in common
            self.n_averaged = len(window) + bool(self.preemphasis)
            self.mean_part = math.gcd(self.n_averaged, hop)
            self.n_mean = self.n_samples // self.mean_part * self.mean_part
            start = torch.arange(self.n_frames)[:, None] * (hop // self.mean_part)
            parts = torch.arange(self.n_averaged // self.mean_part)
            self._keep("mean_index", (start + parts).flatten())  # ((time, part),)

    def _lay_out_transform(self) -> None:
        """Matrix of stage 1; tables of cosine and sine with the places that stage 2 reads."""
        n_fft, p, q = self.config.n_fft, self.p, self.q
        turn = 2 * math.pi / n_fft * torch.arange(n_fft, dtype=torch.float64)
        cos, sin = turn.cos().float(), turn.sin().float()
        self._keep("cos", cos)
        self._keep("sin", sin)
        k1, n1, n2 = torch.arange(p // 2 + 1)[:, None], torch.arange(len(self.window) // q), torch.arange(q)
        angle = k1 * n1 * q % n_fft  # in units of 2 pi / n_fft
        self._keep("stage1", torch.stack([cos[angle], -sin[angle]], 1).flatten(0, 1))  # ((k1, re/im), n1)
        # As 16-bit numbers, and not computed: PyTorch's exporter would store the products, in 64 bits.
        angle = (k1 + p * n2)[:, :, None] * n2 % n_fft  # (k1, k2, n2)
        self._keep("angle", angle.to(torch.int16 if n_fft <= 1 << 15 else torch.int32))

    def _lay_out_filters(self, index: Tensor, weight: Tensor) -> None:
        """The filter bank as dense blocks of bands (mel, bin), each with the rows of its bins in `power`."""
        n_fft, p, q = self.config.n_fft, self.p, self.q
        bins = torch.arange(n_fft // 2)  # the Nyquist bin has no weight
        computed = torch.where(bins % p <= p // 2, bins, n_fft - bins)  # the bin of the same power
        row = computed % p * q + computed // p
        bank = weight.new_zeros(len(index), len(bins)).scatter_add_(1, index, weight)
        first = index[:, 0].tolist()
        last = torch.where(bank > 0, bins + 1, 0).amax(1).maximum(index[:, 0] + 1).tolist()  # an empty band: one bin
        blocks = [(0, 1)]
        for band in range(1, len(bank)):
            start = blocks[-1][0]
            if (band + 1 - start) * (last[band] - first[start]) <= BLOCK_WEIGHTS:
                blocks[-1] = (start, band + 1)
            else:
                blocks.append((band, band + 1))
        self.n_blocks = len(blocks)
        for i, (start, end) in enumerate(blocks):
            run = slice(first[start], max(last[start:end]))
            self._keep(f"filters{i}", bank[start:end, run])
            self._keep(f"rows{i}", row[run])

    def _keep(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value if value is None else value.contiguous(), persistent=False)


def split_transform(n_fft: int, win_length: int) -> tuple[int, int]:
    """The factors (p, q) of n_fft with the fewest multiplications in both stages together."""

    def cost(p: int) -> int:
        q = n_fft // p
        return (p // 2 + 1) * (2 * q * -(-win_length // q) + (2 * q) ** 2)

    p = min((p for p in range(1, n_fft + 1) if n_fft % p == 0), key=cost)
    return p, n_fft // p


def split_frame(win_length: int, hop_length: int, q: int) -> tuple[int, int]:
    """Length of the pieces that frames are gathered from (divides the hop), and of the window with its zeros.

    Where pieces make a whole number of rows of q samples, hardly longer than the window, frames are complete as they
    are gathered. Elsewhere hops are gathered and cut, which moves everything once more.
    """
    n_rows = -(-win_length // q)
    for piece in range(hop_length, MIN_PIECE - 1, -1):
        step = math.lcm(piece, q)
        n_window = -(-win_length // step) * step
        if hop_length % piece == 0 and n_window <= 1.05 * n_rows * q:
            return piece, n_window
    return hop_length, n_rows * q
