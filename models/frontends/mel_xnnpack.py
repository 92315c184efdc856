"""The mel front ends of `mel_export.py` for XNNPACK, in ExecuTorch programs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class XnnMel(nn.Module):
    """`MelExport` with its constant matrices on the right, where XNNPACK packs them once, at load.

    Mirroring the ends of the clip and gathering frames and rows of filters stays with ExecuTorch's portable kernels.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.register_buffer("stage2", layer._stage2().transpose(1, 2).contiguous())  # (k1, (re/im, n2), (re/im, k2))
        layer.stage2 = layer.angle = layer.cos = layer.sin = None  # a program would carry them unused

    def forward(self, waveform: Tensor) -> Tensor:
        mel = self.layer
        y = F.linear(self._frames(waveform).transpose(1, 2), mel.stage1)  # (time, n2, (k1, re/im))
        y = y.unflatten(2, (-1, 2)).permute(2, 0, 3, 1).flatten(2)  # (k1, time, (re/im, n2))
        spectrum = torch.bmm(y, self.stage2)  # (k1, time, (re/im, k2))
        square = spectrum * spectrum
        power = square[:, :, : mel.q] + square[:, :, mel.q :]  # (k1, time, k2)
        power = power.transpose(1, 2).flatten(0, 1)  # ((k1, k2), time)
        if mel.is_magnitude:
            power = power.sqrt()
        bands = [
            F.linear(power.index_select(0, getattr(mel, f"rows{i}")).t(), getattr(mel, f"filters{i}"))
            for i in range(mel.n_blocks)
        ]
        return mel.compress_(torch.cat(bands, 1)).t().reshape(1, 1, -1, mel.n_frames)  # (batch, 1, mel, time)

    def _frames(self, waveform: Tensor) -> Tensor:
        """As in `MelExport`, but only the mirrored samples are gathered one by one."""
        mel = self.layer
        x = mel.emphasised(waveform)
        if mel.is_mirrored:
            end = x.shape[1] - 1
            parts = [x[:, 1 : mel.n_left + 1].flip(1), x, x[:, end - mel.n_right : end].flip(1)]
            x = torch.cat([part for part in parts if part.shape[1]], 1)
        else:
            x = F.pad(x, (mel.n_left, mel.n_right))
        if mel.n_zeros > 0:
            x = F.pad(x, (0, mel.n_zeros))
        elif mel.n_zeros < 0:
            x = x[:, : mel.n_zeros]
        x = x.reshape(1, -1, mel.piece).index_select(1, mel.piece_index)
        frames = x.view(-1, mel.n_gathered)  # (time, sample)
        if mel.n_gathered > len(mel.window):
            frames = frames[:, : len(mel.window)]
        return mel.windowed(frames, waveform).view(-1, len(mel.window) // mel.q, mel.q)  # (time, n1, n2)
