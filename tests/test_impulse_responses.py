"""Folders of impulse responses as people have them; every message is one line that names the file."""

import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from datasets.impulse_responses import read_impulse_responses, response_files
from datasets.tau import DataError

IMPULSE = np.eye(1, 400)[0]


@pytest.fixture
def folder(tmp_path):
    soundfile.write(tmp_path / "good.wav", IMPULSE, 8000)
    return tmp_path


def test_what_is_not_meant_is_passed_over(folder):
    """Of a Mac, a file manager, a version control; and a folder that is called like a file."""
    for name in ("._good.wav", ".hidden.wav", ".git/x.wav", "__MACOSX/._good.wav", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
    (folder / "b.wav").mkdir()
    soundfile.write(folder / "b.wav" / "C.WAV", np.repeat(IMPULSE[:, None], 2, 1), 16000, format="WAV")
    assert [path.name for path in response_files(folder)] == ["C.WAV", "good.wav"]
    first, second = read_impulse_responses(folder, 8000)
    assert len(first) == 200 and len(second) == 400


def wav(path: Path, samples, rate: int = 8000, subtype: str = "FLOAT") -> None:
    soundfile.write(path, np.asarray(samples, np.float64), rate, subtype)


def patched(path: Path, offset: int, value: int) -> None:
    wav(path, IMPULSE, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, offset, value)
    path.write_bytes(content)


def lying_flac(path: Path) -> None:
    soundfile.write(path, IMPULSE, 8000, format="FLAC", subtype="PCM_16")
    content = bytearray(path.read_bytes())
    content[21] |= 15  # the number of samples has 36 bits from here
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)


FAULTS = {
    "pipe": (os.mkfifo, "no regular file"),
    "device": (lambda path: path.symlink_to("/dev/null"), "no regular file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "a link that leads nowhere"),
    "no bytes": (Path.touch, "cannot be read as audio"),
    "text": (lambda path: path.write_text("RIFF, they said"), "cannot be read as audio"),
    "no samples": (lambda path: wav(path, []), "silent or empty"),
    "silence": (lambda path: wav(path, np.zeros(100)), "silent or empty"),
    "almost silence": (lambda path: wav(path, IMPULSE * 1e-30), "silent or empty"),
    "NaN": (lambda path: wav(path, IMPULSE * np.nan), "NaN or infinite"),
    "infinity": (lambda path: wav(path, IMPULSE / 0), "NaN or infinite"),
    "beyond float32": (lambda path: wav(path, IMPULSE * 1e300, subtype="DOUBLE"), "NaN or infinite"),
    "integers in floats": (lambda path: wav(path, IMPULSE * 32767), "1 is full scale"),
    "a recording": (lambda path: wav(path, np.ones(61 * 8000), subtype="PCM_U8"), "lasts 61 s"),
    "1 Hz": (lambda path: patched(path, 24, 1), "a rate of 1 Hz"),
    "0 Hz": (lambda path: patched(path, 24, 0), "cannot be read|rate of 0 Hz"),
    "4 GHz": (lambda path: patched(path, 24, 2**32 - 1), "cannot be read|a rate of"),
    "2^36 samples": (lying_flac, "cannot hold the 68719476735 samples"),
}


@pytest.mark.filterwarnings("ignore:divide by zero|invalid value|overflow")
@pytest.mark.parametrize("make, problem", FAULTS.values(), ids=FAULTS)
def test_one_line_names_the_file(folder, make, problem):
    make(folder / "z.wav")
    with pytest.raises(DataError, match=problem) as caught:
        read_impulse_responses(folder, 8000)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'z.wav'} ") and "\n" not in message and len(message) < 400
    assert "extract" not in message and "learning rate" not in message and "--lr" not in message


def test_a_response_that_begins_after_the_end_of_a_clip_is_silence(folder):
    wav(folder / "late.wav", np.roll(IMPULSE, 300))
    assert len(read_impulse_responses(folder, 8000)) == 2
    with pytest.raises(DataError, match=r"late\.wav is silent or empty for the length of a clip"):
        read_impulse_responses(folder, 8000, n_samples=200)


def test_a_file_that_the_system_withholds_is_named(folder, monkeypatch):
    (folder / "z.wav").write_bytes(b"")  # fails in soundfile, as a file without permission does

    def denied(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DataError, match=r"z\.wav cannot be read: Permission denied"):
        read_impulse_responses(folder, 8000)


def test_a_folder_that_is_none_is_named(folder, monkeypatch):
    with pytest.raises(DataError, match=r"good\.wav is no folder: name the one"):
        response_files(folder / "good.wav")
    with pytest.raises(DataError, match="nowhere holds no impulse responses"):
        response_files(folder / "nowhere")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError):
        response_files(folder)


def test_mutated_files_are_read_or_named(folder):
    rng, path = random.Random(0), folder / "z.wav"
    kinds = [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("WAV", "GSM610"),
        ("WAVEX", "PCM_24"),
        ("FLAC", "PCM_16"),
        ("AIFF", "PCM_16"),
    ]
    n_refused = 0
    for i in range(300):
        kind, subtype = kinds[i % len(kinds)]
        soundfile.write(path, IMPULSE, 8000, format=kind, subtype=subtype)
        content = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(min(len(content), 60))  # the header
            content[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        path.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.1 else content)
        try:
            assert all(np.isfinite(response).all() for response in read_impulse_responses(folder, 8000))
        except DataError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error) and "extract" not in str(error)
            n_refused += 1
    assert 100 < n_refused < 300
