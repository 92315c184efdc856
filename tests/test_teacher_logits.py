import random
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.tau import DataError, read_meta
from datasets.tau import test_rows as rows_for_test
from datasets.tau import train_rows as rows_for_training
from datasets.teacher_logits import is_logits, read_logits, read_teacher_logits
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
        (lambda c: {"files": c["files"]}, "logits is missing"),
        (lambda c: c | {"logits": c["logits"] * float("nan")}, "not finite"),
        (lambda c: c | {"logits": c["logits"].float() + 1e5}, "beyond the range of 16-bit"),
        (lambda c: c | {"logits": c["logits"].tolist()}, "logits is of type list where Tensor"),
        (
            lambda c: c | {"files": c["files"] * 2, "logits": torch.cat([c["logits"], 1 - c["logits"]])},
            "twice, with diff",
        ),
        (lambda c: c | {"logits": c["logits"].float() * 1j}, "logits are strided complex64 on cpu"),
        (lambda c: c | {"logits": c["logits"].to_sparse()}, "logits are sparse_coo"),
        (lambda c: c | {"files": 3}, "files is of type int"),
        (lambda c: c | {"scenes": None}, "scenes is None"),
        (lambda c: [c], "holds an object of type list"),
        (lambda c: torch.zeros(7, 10), "7 x 10"),
        (lambda c: torch.zeros(27, 10, dtype=torch.int8), "logits are strided int8"),
        (lambda c: torch.zeros(3), r"has the shape \(3,\)"),
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


def test_a_bad_teacher_whose_clips_have_names_is_warned_of(tau, tmp_path, monkeypatch, caplog):
    meta = read_meta(tau.root)
    rows = rows_for_training(meta)
    monkeypatch.setattr("datasets.teacher_logits.MIN_CLIPS_TO_JUDGE", 10)
    content = own_form(meta, meta.files)
    content["logits"] = content["logits"].roll(1, dims=1)
    torch.save(content, tmp_path / "logits.pt")
    assert (read_teacher_logits(tmp_path / "logits.pt", meta, rows) == content["logits"][rows].numpy()).all()
    assert "right on 0.0% of the training clips, chance is 10.0%" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_any_floating_type_with_or_without_gradients(tau, tmp_path, dtype):
    meta = read_meta(tau.root)
    rows = rows_for_training(meta)
    content = own_form(meta, [*meta.files, meta.files[0]])  # a clip may come again with the same row
    values = content["logits"].to(dtype)
    torch.save(content | {"logits": values.requires_grad_()}, tmp_path / "named.pt")
    torch.save(torch.nn.Parameter(values[:-1].detach()), tmp_path / "bare.pt")
    for file in ("named.pt", "bare.pt"):
        logits = read_teacher_logits(tmp_path / file, meta, rows)
        assert (torch.from_numpy(logits) == values[:-1][rows].half()).all()


@pytest.mark.parametrize(("separator", "folder"), [("\t", "audio/"), (",", ""), (";", "audio/")])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_the_table_of_a_challenge_entry_is_read(tau, tmp_path, separator, folder, kind):
    meta = read_meta(tau.root)
    rows = rows_for_training(meta)
    logits = predictions(meta.files).double()
    scores = logits.softmax(1) if kind == "probabilities" else logits
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]  # of the columns
    lines = [separator.join(["filename", "scene_label", *(meta.scenes[i] for i in order)])]
    for file, row in zip(meta.files, scores.tolist(), strict=True):
        name = file.replace("audio/", folder)
        lines.append(separator.join([name, "bus", *(f"{row[i]:.12f}" for i in order)]))
    (tmp_path / "entry.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    got = torch.from_numpy(read_logits(tmp_path / "entry.csv", meta, rows))
    torch.testing.assert_close(got.log_softmax(1), logits[rows].log_softmax(1), rtol=0, atol=1e-6)
    (tmp_path / "entry.csv").write_text("\n".join(lines).replace("tram", "train"))
    with pytest.raises(DataError, match="is for the scenes"):
        read_logits(tmp_path / "entry.csv", meta, rows)
    (tmp_path / "entry.csv").write_text("\n".join([*lines[:2], lines[2] + "x"]))
    with pytest.raises(DataError, match="scores that are no numbers"):
        read_logits(tmp_path / "entry.csv", meta, rows)


def test_no_mutation_of_a_file_ends_in_another_error(tau, tmp_path):
    meta = read_meta(tau.root)
    rows = rows_for_training(meta)
    path, draw = tmp_path / "logits.pt", random.Random(4)
    torch.save(own_form(meta, meta.files), path)
    whole = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 4, 40])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        if draw.random() < 0.3:
            start = draw.randrange(len(damaged))
            del damaged[start : start + draw.randrange(len(damaged))]
        path.write_bytes(damaged)
        try:
            logits = read_teacher_logits(path, meta, rows)
            assert (logits.argmax(1) == meta.scene[rows]).all()
        except DataError as error:
            assert "logits.pt" in str(error) and "\n" not in str(error)


def test_a_file_that_is_no_tensor_is_refused(tau, tmp_path):
    meta = read_meta(tau.root)
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"page\.pt is no file of teacher logits"):
        read_teacher_logits(tmp_path / "page.pt", meta, rows_for_training(meta))
    with pytest.raises(DataError, match=r"none\.pt is missing"):
        read_teacher_logits(tmp_path / "none.pt", meta, rows_for_training(meta))


def predictions(files: list[str]) -> torch.Tensor:
    """A row for each clip that only its name decides."""
    return torch.stack([wave((10,), file, 4.0) for file in files])


def listed_in(path: Path) -> list[str]:
    return path.read_text().split()[1:]


def shuffle_list(path: Path) -> list[str]:
    files = np.random.default_rng(3).permutation(listed_in(path)).tolist()
    path.write_text("\n".join(["filename", *files]) + "\n")
    return files


@pytest.mark.parametrize("subset", ["train", "test", "valid", "total", "split5"])
def test_predictions_follow_the_rows_of_their_list(tau, tmp_path, subset):
    setup, split = tau.root / "evaluation_setup", tmp_path / "lists" / "five.csv"
    split.parent.mkdir()
    split.write_text((setup / "fold1_train.csv").read_text())
    meta = read_meta(tau.root)
    test = subset in ("test", "valid")
    source = split if subset == "split5" else setup / f"fold1_{'evaluate' if test else 'train'}.csv"
    files = list(meta.files) if subset == "total" else shuffle_list(source)
    torch.save(predictions(files), tmp_path / f"predictions_{subset}.pt")
    rows = rows_for_test(meta) if test else rows_for_training(meta)
    asked = []
    logits = read_logits(tmp_path / f"predictions_{subset}.pt", meta, rows, lambda n: asked.append(n) or split)
    assert (torch.from_numpy(logits) == predictions(meta.files[rows])).all()
    assert asked == ([5] if subset == "split5" else [])
    assert (
        read_teacher_logits(tmp_path / f"predictions_{subset}.pt", meta, rows, lambda _: split)
        == logits.astype(np.float16)
    ).all()


def test_a_list_beside_the_predictions_comes_first(tau, tmp_path):
    meta = read_meta(tau.root)
    rows = rows_for_training(meta)[:7]
    files = list(meta.files[rows][::-1])
    (tmp_path / "train.csv").write_bytes(("filename\tscene_label\r\n" + "".join(f"{f}\tx\r\n" for f in files)).encode())
    torch.save(predictions(files), tmp_path / "predictions_train.pt")
    logits = read_logits(tmp_path / "predictions_train.pt", meta, rows)
    assert (torch.from_numpy(logits) == predictions(meta.files[rows])).all()
    rest = rows_for_training(meta)
    with pytest.raises(DataError, match=f"no logits for 20 of 27 training clips, first {meta.files[rest[7]]}"):
        read_logits(tmp_path / "predictions_train.pt", meta, rest)


def test_predictions_that_do_not_fit_their_list_are_refused(tau, tmp_path):
    meta = read_meta(tau.root)
    rows = rows_for_training(meta)
    torch.save(torch.zeros(26, 10), tmp_path / "predictions_train.pt")
    with pytest.raises(DataError, match=r"has 26 rows of logits, but .*fold1_train\.csv lists 27 clips"):
        read_logits(tmp_path / "predictions_train.pt", meta, rows)
    torch.save(torch.zeros(27, 3), tmp_path / "predictions_train.pt")
    with pytest.raises(DataError, match="has logits of 3 scenes, the data set has 10"):
        read_logits(tmp_path / "predictions_train.pt", meta, rows)
    for name in ("split5", "mine"):
        torch.save(torch.zeros(27, 10), tmp_path / f"predictions_{name}.pt")
        with pytest.raises(DataError, match=rf"follows the rows of {name}\.csv: put that list beside it"):
            read_logits(tmp_path / f"predictions_{name}.pt", meta, rows)


def test_logits_are_told_from_checkpoints(tau):
    meta = read_meta(tau.root)
    assert is_logits(torch.zeros(3, 10)) and is_logits(own_form(meta, meta.files) | {"provenance": {}})
    assert not is_logits({"model": {}, "scenes": []}) and not is_logits([1])
