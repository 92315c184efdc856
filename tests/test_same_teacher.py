import shutil

import pytest
import torch

import run_teacher_logits
from helpers.checkpoints.checkpoint import CheckpointError
from helpers.teachers import find_teachers
from models import get_model


def both(specs, project):
    yield lambda: find_teachers(specs, project)
    yield lambda: run_teacher_logits.find_sources(specs, [1.0] * len(specs), project)


@pytest.mark.parametrize("kind", ["path", "link", "copy", "run"])
def test_one_file_under_two_names_is_refused(tmp_path, kind):
    path = tmp_path / "p" / "r" / "checkpoints" / "last.pt"
    path.parent.mkdir(parents=True)
    torch.save(get_model("cp_mobile", base_channels=8).state_dict(), path)
    second = {
        "path": path.parent / ".." / "checkpoints" / "last.pt", "link": tmp_path / "l.pt", "copy": tmp_path / "c.pt",
        "run": "r",
    }[kind]  # fmt: skip
    if kind == "link":
        second.symlink_to(path)
    if kind == "copy":
        shutil.copy(path, second)
    for find in both([str(path), str(second)], str(tmp_path / "p")):
        with pytest.raises(CheckpointError) as caught:
            find()
        assert f"{path} and {second} are the same file or copies" in str(caught.value)


def test_other_files_of_one_size_are_two_teachers(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save(get_model("cp_mobile", base_channels=8).state_dict(), tmp_path / name)
    for find in both([str(tmp_path / "a.pt"), str(tmp_path / "b.pt")], str(tmp_path)):
        assert len(find()) == 2
