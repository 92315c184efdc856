import numpy as np
import pytest
import torch

from datasets.tau import DataError, read_meta
from datasets.tau import train_rows as rows_for_training
from datasets.teacher_logits import read_teacher_logits
from tests.golden_inputs import wave


def test_published_form_matches_the_published_loader(golden, tmp_path):
    data = golden("dataset_index")
    (tmp_path / "evaluation_setup").mkdir()
    (tmp_path / "meta.csv").write_text(data["meta_csv"])
    (tmp_path / "evaluation_setup" / "fold1_train.csv").write_text(data["fold1_train_csv"])
    meta = read_meta(tmp_path)
    torch.save(wave((2 * len(meta), 10), data["logits_key"], 4.0).half(), tmp_path / "logits.pt")
    logits = read_teacher_logits(tmp_path / "logits.pt", meta, rows_for_training(meta))
    log_probabilities = (torch.from_numpy(logits).float() / data["temperature"]).log_softmax(1)
    torch.testing.assert_close(log_probabilities, data["train_teacher_logprob"], rtol=0, atol=1e-6)


def own_form(meta, files) -> dict:
    logits = torch.nn.functional.one_hot(torch.from_numpy(meta.scene[[meta.row_of[f] for f in files]]), 10).half()
    return {"files": list(files), "logits": logits, "scenes": list(meta.scenes)}


def test_own_form_is_matched_by_name(tau, tmp_path):
    meta = read_meta(tau.root)
    rows = rows_for_training(meta)
    shuffled = np.random.default_rng(0).permutation(meta.files)
    torch.save(own_form(meta, shuffled), tmp_path / "logits.pt")
    logits = read_teacher_logits(tmp_path / "logits.pt", meta, rows)
    assert (logits.argmax(1) == meta.scene[rows]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"files": c["files"][1:], "logits": c["logits"][1:]}, "no logits for 1 of"),
        (lambda c: c | {"scenes": c["scenes"][::-1]}, "is for the scenes tram"),
        (lambda c: c | {"logits": c["logits"][:, :9]}, "has logits"),
        (lambda c: {"files": c["files"]}, "lacks one of"),
        (lambda c: c | {"logits": c["logits"] * float("nan")}, "not finite"),
        (lambda c: torch.zeros(7, 10), "7 x 10"),
        (lambda c: torch.zeros(3), "no table of logits"),
    ],
)
def test_files_that_do_not_fit_are_refused(tau, tmp_path, change, message):
    meta = read_meta(tau.root)
    rows = rows_for_training(meta)
    torch.save(change(own_form(meta, meta.files[rows])), tmp_path / "logits.pt")
    with pytest.raises(DataError, match=message):
        read_teacher_logits(tmp_path / "logits.pt", meta, rows)


def test_rows_of_another_list_are_noticed(tau, tmp_path, monkeypatch):
    meta = read_meta(tau.root)
    rows = rows_for_training(meta)
    monkeypatch.setattr("datasets.teacher_logits.MIN_CLIPS_TO_JUDGE", 10)
    aligned = torch.nn.functional.one_hot(torch.from_numpy(meta.scene), 10).float()
    torch.save(aligned, tmp_path / "aligned.pt")
    torch.save(aligned.roll(1, dims=1), tmp_path / "shifted.pt")
    read_teacher_logits(tmp_path / "aligned.pt", meta, rows)
    with pytest.raises(DataError, match=r"right on 0\.0%"):
        read_teacher_logits(tmp_path / "shifted.pt", meta, rows)


def test_a_file_that_is_no_tensor_is_refused(tau, tmp_path):
    meta = read_meta(tau.root)
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"page\.pt is no file of teacher logits"):
        read_teacher_logits(tmp_path / "page.pt", meta, rows_for_training(meta))
    with pytest.raises(DataError, match=r"none\.pt is missing"):
        read_teacher_logits(tmp_path / "none.pt", meta, rows_for_training(meta))
