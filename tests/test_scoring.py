"""Systems of all kinds scored on a data set by run_evaluation.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import torch.nn.functional as F

import run_evaluation
from datasets.tau import DataError, read_meta
from datasets.tau import test_rows as rows_for_test
from helpers.checkpoints.checkpoint import CheckpointError, describe, save_checkpoint
from helpers.export.files import write_onnx
from models import FRONTENDS, MODELS, get_frontend, get_model
from models.layers.fold import fold
from tests.golden_inputs import fill_state
from tests.processes import together
from tests.test_run_teacher_logits import MEL, expected

pytestmark = pytest.mark.slow

DATA = ["--dataset_dir", "own", "--cache_path", "cache", "--project_name", "proj", "--batch_size", "8"]
SCENES = ["kitchen", "office", "yard"]


def save(path: str, n_classes: int = 3, **more) -> None:
    torch.manual_seed(len(path))
    model = get_model("cp_mobile", base_channels=8, n_classes=n_classes)
    parts = {"model": describe(model, MODELS), "frontend": describe(get_frontend("cp_mel", **MEL), FRONTENDS)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(Path(path), parts | {"scenes": SCENES[:n_classes]} | more)


@pytest.fixture
def here(own_tau, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TAU22_DIR", raising=False)
    save("proj/run/checkpoints/last.pt")
    save("other.pt")
    return tmp_path


def target() -> torch.Tensor:
    meta = read_meta("own")
    return torch.from_numpy(meta.scene[rows_for_test(meta)])


def logits_of(path: str) -> torch.Tensor:
    return expected(path, rows_for_test(read_meta("own")), root="own")


def export(checkpoint: str, path: str, with_frontend: bool, n_samples: int = 8000) -> None:
    from helpers.checkpoints.checkpoint import load_model

    loaded = load_model(checkpoint)
    write_onnx(loaded.model, loaded.frontend, SCENES, n_samples, "fp32", with_frontend, Path(path))


def test_networks_files_and_tables_are_scored_side_by_side(here, capsys):
    export("other.pt", "wave.onnx", True)
    export("other.pt", "mel.onnx", False)
    files = read_meta("own").files[rows_for_test(read_meta("own"))]
    probabilities = logits_of("other.pt").softmax(1)
    table = pd.DataFrame(probabilities.numpy(), columns=SCENES)
    table.insert(0, "filename", [Path(file).name for file in files])
    table.sample(frac=1, random_state=0).to_csv("table.csv", sep="\t", index=False)
    np.save("array.npy", logits_of("other.pt").numpy())
    names = ["other.pt", "wave.onnx", "mel.onnx", "table.csv", "array.npy"]
    metrics = run_evaluation.main([*DATA, "--model", "run", "--compare", *names, "--n_rounds", "50"])
    loss = F.cross_entropy(logits_of("other.pt"), target()).item()
    for name in ("other", "wave", "mel", "table", "array"):
        assert metrics[f"{name}/test/loss"] == pytest.approx(loss, abs=1e-3)
        assert metrics[f"{name}/test/acc"] == pytest.approx(metrics["other/test/acc"], abs=0.06)
    own = logits_of("proj/run/checkpoints/last.pt")
    assert metrics["run/test/loss"] == pytest.approx(F.cross_entropy(own, target()).item(), abs=1e-3)
    together = torch.stack([own, *[logits_of("other.pt")] * 3, probabilities.log(), logits_of("other.pt")]).mean(0)
    assert metrics["ensemble/test/loss"] == pytest.approx(F.cross_entropy(together, target()).item(), abs=1e-3)
    printed = capsys.readouterr().out
    assert "run/test (18 clips)" in printed and "95 % interval of 50 draws of recordings" in printed
    (folder,) = [path for path in Path("proj").iterdir() if path.name != "run"]
    assert json.loads((folder / "metrics.jsonl").read_text())["wave/test/acc"] == metrics["wave/test/acc"]
    written = pd.read_csv(folder / "run.csv", sep="\t")
    assert list(written.columns) == ["filename", "scene_label", *SCENES] and written.filename.tolist() == list(files)
    np.testing.assert_allclose(written[SCENES], own.softmax(1), atol=1e-5)
    # What was written is scored again, without the audio.
    shutil.rmtree("own/audio")
    shutil.rmtree("cache")
    again = run_evaluation.main([*DATA, "--model", str(folder / "run.csv"), "--n_rounds", "0"])
    for key in ("acc", "loss", "ece", "acc/device/phone"):
        assert again[f"run/test/{key}"] == pytest.approx(metrics[f"run/test/{key}"], abs=1e-5)


@pytest.mark.parametrize(
    ("ensemble", "join"),
    [
        ("logits", lambda a, b: (a + b) / 2),
        ("log_probabilities", lambda a, b: (a.log_softmax(1) + b.log_softmax(1)) / 2),
        ("probabilities", lambda a, b: ((a.softmax(1) + b.softmax(1)) / 2).log()),
    ],
)
def test_ensembles_average_what_is_asked_for(here, ensemble, join):
    np.save("a.npy", 3 * logits_of("other.pt").numpy())
    np.save("b.npy", logits_of("proj/run/checkpoints/last.pt").numpy())
    options = ["--model", "a.npy", "--compare", "b.npy", "--ensemble", ensemble, "--n_rounds", "0"]
    metrics = run_evaluation.main([*DATA, *options])
    wanted = join(*(torch.from_numpy(np.load(f"{name}.npy")) for name in "ab"))
    assert metrics["ensemble/test/loss"] == pytest.approx(F.cross_entropy(wanted, target()).item(), abs=1e-5)
    assert "ensemble/test/loss" not in run_evaluation.main([*DATA, *options, "--ensemble", "none"])


def test_precision_folding_temperature_and_copies_are_what_they_say(here):
    save("warm.pt", temperature=2.0)
    logits = logits_of("warm.pt")
    options = [*DATA, "--model", "warm.pt", "--n_rounds", "0"]
    loss = lambda *more: run_evaluation.main([*options, *more])["warm/test/loss"]  # noqa: E731
    assert loss() == pytest.approx(F.cross_entropy(logits / 2, target()).item(), abs=1e-3)
    plain = F.cross_entropy(logits, target()).item()
    assert loss("--temperature", "1") == pytest.approx(plain, abs=1e-3)
    assert loss("--temperature", "1", "--fold", "exact") == pytest.approx(plain, abs=1e-3)
    for precision in ("fp16", "bf16", "fp16_weights"):
        found = loss("--temperature", "1", "--precision", precision)
        assert found == pytest.approx(plain, abs=2e-2) and found != plain
    copies = ["--temperature", "1", "--n_tta", "3", "--tta", "roll", "--tta_shift", "0.05"]
    shifted = [
        expected("warm.pt", rows_for_test(read_meta("own")), [shift], root="own").softmax(1) for shift in (-400, 0, 400)
    ]
    wanted = F.nll_loss(torch.stack(shifted).mean(0).log(), target()).item()
    assert loss(*copies) == pytest.approx(wanted, abs=1e-3)


def test_half_precision_is_that_of_the_baselines(golden, shared):
    data = torch.load(shared("golden/dcase_baselines/net.pt"), weights_only=True)
    from helpers.quantization import for_target

    model = fill_state(get_model("dcase24_baseline")).eval()
    with torch.no_grad():
        found = for_target(model, "fp16")(data["logmel"])
        torch.testing.assert_close(found, data["logits_half_cpu"].float(), rtol=0, atol=5e-3)
        torch.testing.assert_close(fold(model, data["logmel"])(data["logmel"]), data["logits_fp32"], rtol=0, atol=1e-4)


def test_processes_share_the_clips(here, monkeypatch, capsys):
    arguments = [*DATA, "--model", "run", "--compare", "other.pt", "--n_rounds", "0"]
    alone = run_evaluation.main(arguments)
    for metrics in together(2, run_evaluation, arguments, monkeypatch):
        assert metrics == pytest.approx(alone, abs=1e-5)
    assert capsys.readouterr().out.count("metrics, answers and report are in") == 2


@pytest.fixture
def unlabelled(here) -> Path:
    """An evaluation set of three clips, with recording devices."""
    root = here / "eval"
    (root / "audio").mkdir(parents=True)
    (root / "evaluation_setup").mkdir()
    for i, clip in enumerate(sorted((here / "own/audio").iterdir())[:3]):
        shutil.copy(clip, root / f"audio/{i}.wav")
    lines = ["filename\tdevice_id", "audio/2.wav\ta", "audio/0.wav\tunknown", "audio/1.wav\ta"]
    (root / "evaluation_setup/fold1_test.csv").write_text("\n".join(lines) + "\n")
    return root


def test_an_evaluation_set_is_answered_in_the_order_of_its_list(unlabelled, capsys):
    options = ["--dataset_dir", "eval", *DATA[2:], "--model", "other.pt"]
    assert run_evaluation.main(options) == 0
    (folder,) = [path for path in Path("proj").iterdir() if path.name != "run"]
    assert f"3 answers are in {folder / 'other.csv'}" in capsys.readouterr().out
    written = pd.read_csv(folder / "other.csv", sep="\t")
    assert written.filename.tolist() == ["audio/2.wav", "audio/0.wav", "audio/1.wav"]
    assert written.scene_label.tolist() == written[SCENES].idxmax(axis=1).tolist()
    np.save("a.npy", np.zeros((3, 3)))
    with pytest.raises(DataError, match="has no labels to score them with"):
        run_evaluation.main([*options[:-1], "a.npy"])


def test_folders_of_scenes_are_counted(here, capsys):
    for scene in ("yard", "office"):
        (here / "clips" / scene).mkdir(parents=True)
        soundfile.write(here / "clips" / scene / "x.wav", 0.1 * np.random.default_rng(0).standard_normal(9000), 8000)
    assert run_evaluation.main(["--model", "other.pt", "clips"]) == 0
    assert "of 2 recordings whose scene is known are right: " in capsys.readouterr().out
    export("other.pt", "wave.onnx", True)
    assert run_evaluation.main(["--model", "wave.onnx", "clips/yard/x.wav"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "two.pt"], "two.pt knows the scenes kitchen, office; own has kitchen, office, yard"),
        (["--model", "long.onnx"], "long.onnx takes clips of 9000 samples, the data set's have 8000 at 8000 Hz"),
        (["--model", "bare.onnx"], "bare.onnx does not say what goes in and comes out"),
        (["--model", "text.onnx"], "text.onnx is no file that ONNX Runtime reads"),
        (["--model", "wave.onnx", "--n_tta", "3"], "wave.onnx runs as it is: leave"),
        (["--model", "few.npy"], "few.npy has 2 rows, "),
        (["--model", "nobody"], "no teacher nobody"),
        (["--model", "few.npy", "own/audio"], "few.npy holds answers, not a network"),
    ],
)
def test_what_does_not_fit_is_one_line(here, options, message):
    import onnx

    save("two.pt", n_classes=2)
    export("other.pt", "wave.onnx", True)
    export("other.pt", "long.onnx", True, 9000)
    model = onnx.load("wave.onnx")
    del model.metadata_props[:]
    onnx.save(model, "bare.onnx")
    Path("text.onnx").write_text("no")
    np.save("few.npy", np.zeros((2, 3)))
    with pytest.raises((CheckpointError, DataError), match=message):
        run_evaluation.main([*DATA, *options])
    assert [path.name for path in Path("proj").iterdir() if not path.name.startswith(".")] == ["run"]


def test_neither_recordings_nor_a_data_set_is_an_error(here, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_evaluation.main(["--model", "other.pt"])
    assert "name recordings to listen to, or a data set to score on" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_evaluation.main(["x.wav", "--compare", "other.pt"])
    assert "--compare is for scores on a data set" in capsys.readouterr().err
