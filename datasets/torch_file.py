"""Reads what `torch.save` wrote, without running code of the file, and says what any other file is."""

import argparse
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from datasets.files import ContentError

# What people pass by mistake: how such files begin.
BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer, the file itself was not fetched: run `git lfs pull` where it is"),
    (b"RIFF", "a wav file"),
    (b"fLaC", "a FLAC file"),
    (b"OggS", "an Ogg file"),
    (b"ID3", "an MP3 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them"),
    (b"\x89PNG", "a picture"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a compressed file: unpack it first"),
    (b"7z\xbc\xaf", "a compressed file: unpack it first"),
    (b"\xfd7zXZ", "a compressed file: unpack it first"),
    (b"Rar!", "a compressed file: unpack it first"),
    (b"<!DOCTYPE", "a web page, saved in the place of a file: fetch it anew"),
    (b"<html", "a web page, saved in the place of a file: fetch it anew"),
)
FORBIDDEN = re.compile(r"GLOBAL `?([A-Za-z_][\w.]*)")  # the class that torch names in its refusal


def read_torch_file(path: Path) -> Any:
    """The content of a file of `torch.save`, on the CPU: tensors and plain values; no code of the file is run.

    The checksums in the file are compared, where it has any.

    Raises:
        OSError: when it is missing or cannot be read.
        ContentError: when it is another kind of file, holds other objects, or is damaged; what it is and what to do.
    """
    if path.is_dir():
        raise ContentError("is a folder: name the file in it")
    if not path.is_file() and path.exists():
        raise ContentError("is no regular file")
    with path.open("rb") as file:
        start = file.read(4096)
    if not start:
        raise ContentError("is empty: fetch or write it anew")
    is_zip = start.startswith(b"PK")
    if (kind := _kind(path, start, is_zip)) is not None:
        raise ContentError(f"is {kind}")
    if is_zip:
        _compare_checksums(path)
    try:
        # A plain bag of values that argparse makes, and Lightning saves with its checkpoints.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno is not None:
            raise
        raise ContentError("is damaged: fetch or write it anew") from error
    except Exception as error:  # for damaged files torch raises whatever its innermost reader meets
        if found := FORBIDDEN.search(str(error)):
            raise ContentError(
                f"holds Python objects ({found[1]}), which only code of the file could bring back: ask for the weights "
                "alone, as torch.save(model.state_dict(), ...) writes them"
            ) from error
        what = "neither a checkpoint nor a file that is known here"
        if is_zip:
            what = "damaged: fetch or write it anew"
        elif start[:1] == b"\x80":
            what = "a pickle, but not one of torch.save: ask for a file that torch.save wrote"
        raise ContentError(f"is {what}") from error


def _kind(path: Path, start: bytes, is_zip: bool) -> str | None:
    """What a file is that `torch.save` did not write; None where it may have."""
    for beginning, kind in BEGINNINGS:
        if start.lstrip()[: len(beginning)].lower() == beginning.lower():
            return kind
    if start[4:8] in (b"ET12", b"ET13"):
        return "an ExecuTorch program: name the checkpoint that it was made from"
    if re.match(rb"\x08[\x03-\x1f][\x12\x1a\x22\x3a]", start):  # version, then producer or graph
        return "an ONNX file: name the checkpoint that it was made from"
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite file"
    if start[257:262] == b"ustar":
        return None if path.suffix in (".pt", ".pth") else "a tar archive: unpack it first"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 27:
        return "a safetensors file: convert it with torch.save(safetensors.torch.load_file(...), ...)"
    if not is_zip and _is_text(start):
        return "a text file"
    if not is_zip:
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises many kinds for a damaged archive; that is told by those who read it
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program: name the checkpoint that it was made from"
    return None if any(name.endswith("data.pkl") for name in names) else "a zip archive: unpack it first"


def _is_text(start: bytes) -> bool:
    try:
        text = start[:-3].decode("utf-8") if len(start) > 100 else start.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\r\n\t" for character in text)


def _compare_checksums(path: Path) -> None:
    """torch does not: a flipped bit would be another weight."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many kinds for a damaged archive
        raise ContentError("is damaged: fetch or write it anew") from error
    if damaged is not None:
        raise ContentError(f"is damaged ({damaged} has another checksum): fetch or write it anew")
