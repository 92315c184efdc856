"""Scoring teachers as their users do."""

import json
from pathlib import Path

import pytest
import torch

import run_teacher_validation
from datasets.tau import SCENES
from datasets.tau import test_rows as rows_for_test
from helpers import teachers
from helpers.checkpoints.checkpoint import CheckpointError, describe, save_checkpoint
from helpers.evaluate import systems
from models import FRONTENDS, MODELS, get_frontend, get_model
from tests.golden_inputs import fill_state
from tests.processes import together
from tests.test_foreign import SMALL_BEATS
from tests.test_run_teacher_logits import MEL, expected, read_meta

pytestmark = pytest.mark.slow

OPTIONS = [
    "--dataset_dir",
    "tau",
    "--cache_path",
    "cache",
    "--project_name",
    "proj",
    "--logger",
    "none",
    "--batch_size",
    "8",
]


def save(path: Path, model, frontend, scenes=SCENES) -> None:
    parts = {"model": describe(model, MODELS), "frontend": describe(frontend, FRONTENDS)}
    save_checkpoint(path, parts | {"scenes": list(scenes)})


@pytest.fixture
def here(tau, tmp_path, monkeypatch) -> Path:
    """A working folder with the run `resnet` at 8 kHz, beats.pt at 16 kHz, and two published files at 32 kHz."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TAU22_DIR", raising=False)
    resnet = fill_state(get_model("cp_resnet", base_channels=8, cut_channels_s3=8))
    save(tmp_path / "proj/resnet/checkpoints/last.pt", resnet, get_frontend("cp_mel", **MEL))
    save(tmp_path / "beats.pt", fill_state(get_model("beats", **SMALL_BEATS)), get_frontend("kaldi_fbank"))
    torch.save(fill_state(get_model("cp_resnet")).state_dict(), tmp_path / "cpr_128k_fms_1.pt")
    torch.save(
        get_model("cp_resnet", base_channels=16, cut_channels_s3=18).state_dict(), tmp_path / "cpr_128k_fms_2.pt"
    )
    monkeypatch.setattr(teachers, "published_file", lambda name: tmp_path / f"{name}.pt")
    return tmp_path


def accuracy(logits: torch.Tensor) -> float:
    meta = read_meta("tau")
    return (logits.argmax(1).numpy() == meta.scene[rows_for_test(meta)]).mean()


def test_several_teachers_are_scored_alone_and_together(here, capsys):
    metrics = run_teacher_validation.main([*OPTIONS, "--model_name", "cpr_ms_1", "--checkpoint", "resnet", "beats.pt"])
    rows = rows_for_test(read_meta("tau"))
    paths = {
        "cpr_128k_fms_1": "cpr_128k_fms_1.pt", "resnet": "proj/resnet/checkpoints/last.pt", "beats": "beats.pt",
    }  # fmt: skip
    answers = {name: expected(path, rows) for name, path in paths.items()}
    answers["ensemble"] = torch.stack(list(answers.values())).mean(0)
    target = torch.from_numpy(read_meta("tau").scene[rows])
    for name, logits in answers.items():
        assert metrics[f"{name}/test/acc"] == pytest.approx(accuracy(logits), abs=0.03)
        loss = torch.nn.functional.cross_entropy(logits, target).item()
        assert metrics[f"{name}/test/loss"] == pytest.approx(loss, rel=1e-3)
        assert {f"{name}/test/acc/device/s5", f"{name}/test/acc/unseen", f"{name}/test/macro_avg_acc"} <= metrics.keys()
    assert {key.split("/")[0] for key in metrics} == set(answers)

    output = capsys.readouterr().out
    assert all(f"\n{name} " in output for name in answers) and "cpr_128k_fms_1/test (45 clips)" in output
    (run,) = (path for path in Path("proj").iterdir() if path.name != "resnet")
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["ensemble/test/acc"] == metrics["ensemble/test/acc"]


def test_a_checkpoint_alone_switches_the_default_off(here):
    metrics = run_teacher_validation.main([*OPTIONS, "--checkpoint", "resnet"])
    assert {key.split("/")[0] for key in metrics} == {"resnet"}
    assert run_teacher_validation.make_parser().parse_args([]).model_name == ["passt_dirfms_1"]


def test_published_defaults():
    args = run_teacher_validation.make_parser().parse_args([])
    assert (args.project_name, args.experiment_name) == ("DCASE23_Task1", "CPJKU_Teacher_Validation")
    assert (args.batch_size, args.cache_path) == (32, "datasets/cpath")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model_name", "passt_x"], r"no teacher passt_x.*passt_dirfms_1, passt_dirfms_2.*cpr_128k_fms_3"),
        (["--model_name", "cpr_dir_2"], "cpr_dir_2 is published no more"),
        (["--model_name", "cpr_128k_fms_1", "cpr_128k_fms_2"], r"in_c\.0\.weight \(16, 1, 5, 5\) for \(32, 1, 5, 5\)"),
        (["--checkpoint", "resnet", "other.pt"], r"other\.pt knows the scenes a, b; tau has airport"),
        (["--checkpoint", "none.pt"], r"no teacher none\.pt: there is no such file"),
        (["--checkpoint", "long.pt"], r"long\.pt does not take clips of 8000 samples"),
        (["--checkpoint", "resnet", "long.pt"], r"long\.pt does not take clips of 8000 samples"),
    ],
)
def test_what_cannot_be_scored_is_told_before_any_scoring(here, monkeypatch, options, message):
    save(here / "other.pt", get_model("cp_resnet", n_classes=2), get_frontend("cp_mel"), "ab")
    long = get_frontend("cp_mel", **(MEL | {"n_fft": 16384}))
    save(here / "long.pt", get_model("cp_resnet", base_channels=8, cut_channels_s3=8), long)
    monkeypatch.setattr(systems, "predict", lambda *_: pytest.fail("scored too early"))
    with pytest.raises(CheckpointError, match=message):
        run_teacher_validation.main([*OPTIONS, *options])
    assert [path.name for path in Path("proj").iterdir()] == ["resnet"]


def test_several_processes_share_the_clips_and_write_one_run(here, monkeypatch, capsys):
    arguments = [*OPTIONS, "--checkpoint", "resnet", "beats.pt"]
    alone = run_teacher_validation.main(arguments)
    capsys.readouterr()
    scored, predict = [], systems.predict

    def counting(model, frontend, clips, *rest):
        processes = rest[-1].processes
        scored.append(processes.count(len(clips)))
        return predict(model, frontend, clips, *rest)

    monkeypatch.setattr(systems, "predict", counting)
    for metrics in together(2, run_teacher_validation, [*arguments, "--project_name", "proj"], monkeypatch):
        assert metrics == pytest.approx(alone, abs=1e-5)
    assert sorted(scored) == [22, 22, 23, 23]  # two teachers
    assert len([path for path in Path("proj").iterdir() if path.name != "resnet"]) == 2  # one alone, one together
    assert capsys.readouterr().out.count("metrics are in") == 1
