"""Reading wav files with torch alone: torchaudio from 2.9 on needs another package for it."""

import struct
from pathlib import Path

import torch
from torch import Tensor

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # formats of a wav file


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """The samples (sample,) float32 in [-1, 1] of a wav file, its channels averaged, and its rate in Hz.

    Raises:
        ValueError: for anything but wav files of 8 to 32-bit integers, or floats.
    """
    data = Path(path).read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError(f"{path} is no wav file")
    position, layout = 12, None
    while position + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, position)
        chunk = data[position + 8 : position + 8 + size]
        if name == b"fmt ":
            kind, n_channels, rate, _, _, n_bits = struct.unpack_from("<HHIIHH", chunk)
            layout = struct.unpack_from("<H", chunk, 24)[0] if kind == EXTENSIBLE else kind, n_bits
        elif name == b"data" and layout is not None:
            n_whole = len(chunk) // (n_channels * n_bits // 8) * n_channels
            if not n_whole:
                raise ValueError(f"{path} holds no samples")
            samples = _decoded(chunk[: n_whole * n_bits // 8], *layout, path)
            return samples.view(-1, n_channels).mean(dim=1), rate
        position += 8 + size + size % 2
    raise ValueError(f"{path} holds no samples")


def _decoded(data: bytes, kind: int, n_bits: int, path: str | Path) -> Tensor:
    """Samples (sample * channel,) float32."""
    if kind == FLOAT and n_bits in (32, 64):
        return torch.frombuffer(bytearray(data), dtype=torch.float32 if n_bits == 32 else torch.float64).float()
    if kind != PCM or n_bits not in (8, 16, 24, 32):
        raise ValueError(f"{path} is a wav file of format {kind} with {n_bits} bits, which is not read here")
    if n_bits == 8:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).float() / 128 - 1
    if n_bits == 16:
        return torch.frombuffer(bytearray(data), dtype=torch.int16).float() / 2**15
    if n_bits == 32:
        return torch.frombuffer(bytearray(data), dtype=torch.int32).float() / 2**31
    parts = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 3).to(torch.int32)
    whole = parts[:, 0] | parts[:, 1] << 8 | parts[:, 2] << 16
    return torch.where(whole >= 2**23, whole - 2**24, whole).float() / 2**23
