"""Submissions: what is written beside what the published scripts write, and what bad input gets."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import torchinfo
import yaml

import run_submission
from datasets.files import ContentError
from datasets.tau import SCENES, DataError
from helpers.checkpoints.checkpoint import CheckpointError, describe, load_model, save_checkpoint
from helpers.complexity import LimitError
from helpers.submission.about import AboutError, template
from helpers.submission.check import check_submission
from helpers.submission.rules import RULES
from models import FRONTENDS, MODELS, get_frontend, get_model
from models.device_models import DeviceModels
from tests.conftest import make_tau
from tests.golden_inputs import clip, fill_state

pytestmark = pytest.mark.slow

GOLDEN = "golden/dcase_baselines"
LABEL = "Golden_TEAM_task1"
SPLITS = ("5", "10", "25", "50", "100")


def write_about(path: Path, year: int) -> None:
    path.write_text(template(RULES[year]).replace('"..."', "words"))


# ---- what the published scripts wrote -------------------------------------------------------------------------------


@pytest.fixture
def published(shared, tmp_path, monkeypatch):
    """The tiny data sets of the golden submissions, and the network in a file as its authors save it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TAU22_DIR", raising=False)

    def build(year: int) -> tuple[Path, list[str]]:
        golden = shared(f"{GOLDEN}/submission_{year}")
        for one in json.loads((golden / "audio_sources.json").read_text())["files"]:
            path = Path("dev", one["file"]) if one["file"].startswith("audio/") else Path(one["file"])
            path.parent.mkdir(parents=True, exist_ok=True)
            samples = clip(1.0, 44100, one["key"])[0].numpy() * one["gain"]
            soundfile.write(path, np.round(samples * 32767).astype(np.int16), 44100, subtype="PCM_16")
        evaluation = Path(f"TAU-urban-acoustic-scenes-{year}-mobile-evaluation")
        for folder in ("dev", evaluation):
            Path(folder, "evaluation_setup").mkdir()
        shutil.copy(golden / "meta.csv", "dev")
        shutil.copy(next(golden.glob("split*.csv")), "dev/evaluation_setup/fold1_train.csv")
        shutil.copy(golden / "test.csv", "dev/evaluation_setup/fold1_evaluate.csv")
        shutil.copy(golden / "fold1_test.csv", evaluation / "evaluation_setup")
        network = get_model("dcase24_baseline")
        if year == 2025:
            network = DeviceModels(
                network, {name: copy.deepcopy(network) for name in ("a", "b", "c", "s1", "s2", "s3")}
            )
        override = torch.load(golden / "logits.pt", weights_only=True)["override"]
        prefix = "multi_device_model." if year == 2025 else "model."
        state = fill_state(network).state_dict() | override
        torch.save({"state_dict": {prefix + name: value for name, value in state.items()}}, "last.ckpt")
        write_about(Path("about.yaml"), year)
        names = ["last.ckpt"] if year == 2025 else [f"{split}=last.ckpt" for split in SPLITS]
        options = ["--year", str(year), "--label", LABEL, "--model", *names, "--dataset_dir", "dev", "--about",
                   "about.yaml", "--evaluation_dir", str(evaluation), "--n_clips", "10", "--batch_size", "8",
                   "--output", "out"]  # fmt: skip
        return golden, options

    return build


def test_2024_is_what_the_published_script_wrote(published, capsys):
    golden, options = published(2024)
    assert run_submission.main(options) == 0
    wanted = pd.read_csv(golden / "output.csv", sep="\t")
    outputs = sorted(Path(f"out/task1/{LABEL}_1").glob("*.csv"))
    assert [path.name for path in outputs] == sorted(f"{LABEL}_1.output.split_{split}.csv" for split in SPLITS)
    for path in outputs:
        found = pd.read_csv(path, sep="\t")
        assert list(found.columns) == list(wanted.columns) and found.filename.tolist() == wanted.filename.tolist()
        assert found.scene_label.tolist() == wanted.scene_label.tolist()
        # Half precision has steps of 0.0005 below 1; resampling in float32 may round the other way.
        np.testing.assert_allclose(found[list(SCENES)], wanted[list(SCENES)], rtol=0, atol=1e-3)
        texts = pd.read_csv(path, sep="\t", dtype=str)[list(SCENES)].to_numpy().ravel()
        assert all(text == str(np.float16(text)) for text in texts)
    left = Path(f"out/predictions/{LABEL}_1.split_5")
    info, published_info = (json.loads((folder / "info.json").read_text()) for folder in (left, golden))
    assert (info["MACs"], info["Params"]) == (published_info["MACs"], published_info["Params"])
    assert info["test"][0].keys() == published_info["test"][0].keys() and len(info["test"][0]) == 69
    assert info["test"][0] == pytest.approx(published_info["test"][0], abs=5e-3)
    meta = yaml.safe_load(Path(f"out/task1/{LABEL}_1/{LABEL}_1.meta.yaml").read_text())
    wanted_costs = {"total_model_size": 122_296, "total_parameters": 61_148, "macs": 29_419_156}  # of the baseline
    assert meta["system"]["complexity"] == wanted_costs
    scores, published_scores = meta["results"]["development_dataset"]["split_25"], published_info["test"][0]
    for kind, names in (("class_wise", SCENES), ("device_wise", ("a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6"))):
        assert {*scores[kind]} == {*names}
        for name in names:
            assert scores[kind][name]["accuracy"] == pytest.approx(100 * published_scores[f"test/acc.{name}"], abs=0.01)
            assert scores[kind][name]["logloss"] == pytest.approx(published_scores[f"test/loss.{name}"], abs=5e-3)
    assert scores["overall"]["accuracy"] == pytest.approx(100 * published_scores["test/macro_avg_acc"], abs=0.01)
    state = torch.load(left / "model_state_dict.pt", weights_only=True)
    manifest = torch.load(golden / "logits.pt", weights_only=True)["model_state_dict_manifest"]
    described = {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in state.items()}
    assert described == {name: [kind, list(shape)] for name, (kind, shape) in manifest.items()}
    assert "out passes the checks" in capsys.readouterr().out


def test_2025_is_what_the_published_package_wrote(published):
    golden, options = published(2025)
    assert run_submission.main(options) == 0
    left = Path(f"out/predictions/{LABEL}_1")
    wanted, found = (pd.read_csv(folder / "output.csv", sep="\t") for folder in (golden, left))
    assert list(found.columns) == list(wanted.columns) and found.filename.tolist() == wanted.filename.tolist()
    assert found.scene_label.tolist() == wanted.scene_label.tolist()
    np.testing.assert_allclose(found[list(SCENES)], wanted[list(SCENES)], rtol=0, atol=1e-3)
    for name in ("complexity.json", "test_accuracy.json"):
        assert json.loads((left / name).read_text()) == json.loads((golden / name).read_text())
    state = torch.load(left / "model_state_dict.pt", weights_only=True)
    assert len(state) == 882 and state["device_models.s3.feed_forward.0.weight"].dtype == torch.float16
    meta = yaml.safe_load((left / f"{LABEL}_1.meta.yaml").read_text())
    assert meta["results"]["development_dataset"].keys() == {"overall", "class_wise", "device_wise"}


def test_other_folders_are_checked(published, capsys):
    _, options = published(2024)
    run_submission.main(options)
    system = Path(f"out/task1/{LABEL}_1")
    (system / f"{LABEL}_1.technical_report.pdf").write_text("paper")
    assert run_submission.main(["--year", "2024", "--check", "out", "--n_clips", "10"]) == 0
    capsys.readouterr()
    assert run_submission.main(["--year", "2024", "--check", "out"]) == 1
    printed = capsys.readouterr().out
    assert "10 different clips, the evaluation set has 135,730" in printed
    (system / "notes.txt").write_text("x")
    meta = system / f"{LABEL}_1.meta.yaml"
    meta.write_text(meta.read_text().replace("macs:", "max:"))
    problems = check_submission(Path("out"), RULES[2024], 10).problems
    assert problems == [f"{meta.name}: system.complexity.macs is missing",
                        f"{LABEL}_1/notes.txt belongs to no submission"]  # fmt: skip


# ---- our own networks, and bad input --------------------------------------------------------------------------------


def save(path: str, n_classes: int = 10, **options) -> None:
    model = get_model("cp_mobile", n_classes=n_classes, **({"base_channels": 8} | options))
    parts = {"model": describe(model, MODELS), "frontend": describe(get_frontend("cp_mel", sample_rate=8000, n_mels=32,
             n_fft=512, win_length=512, hop_length=250), FRONTENDS)}  # fmt: skip
    save_checkpoint(Path(path), parts | {"scenes": list(SCENES[:n_classes]), "clip_samples": 4000})


@pytest.fixture
def here(tmp_path, monkeypatch) -> list[str]:
    """A data set with all scenes, an evaluation set of it, a network; the options that are the same every time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TAU22_DIR", raising=False)
    tau = make_tau(tmp_path / "own", list(SCENES), ["a", "s1"], ["a"], n_segments=1, rate=8000, seconds=0.5)
    Path("eval/audio").mkdir(parents=True)
    Path("eval/evaluation_setup").mkdir()
    for i, row in enumerate(tau.rows[:3]):
        shutil.copy(Path("own", row[0]), f"eval/audio/{i}.wav")
    lines = ["filename\tdevice_id", "audio/2.wav\ta", "audio/0.wav\tunknown", "audio/1.wav\ts1"]
    Path("eval/evaluation_setup/fold1_test.csv").write_text("\n".join(lines) + "\n")
    save("net.pt")
    write_about(Path("about.yaml"), 2025)
    return ["--label", "Doe_TU_task1", "--dataset_dir", "own", "--evaluation_dir", "eval", "--about", "about.yaml",
            "--n_clips", "3", "--output", "out"]  # fmt: skip


def test_several_systems_and_a_second_run(here, capsys):
    save("other.pt", base_channels=16)
    options = [*here, "--model", "net.pt", "--model", "other.pt"]
    assert run_submission.main(options) == 0
    package = Path("out/Doe_TU_task1/Doe_TU_task1")
    assert sorted(path.name for path in (package / "ckpts").glob("*.pt")) == ["Doe_TU_task1_1.pt", "Doe_TU_task1_2.pt"]
    loaded = load_model("other.pt")
    saved = torch.load("out/predictions/Doe_TU_task1_2/model_state_dict.pt", weights_only=True)
    assert saved.keys() == {f"base_model.{name}" for name in loaded.model.state_dict()}
    # Counted by the organisers' tool.
    counted = json.loads(Path("out/predictions/Doe_TU_task1_2/complexity.json").read_text())["per_device"]["s10"]
    shape = tuple(loaded.frontend(torch.zeros(1, 8000)).shape)
    summary = torchinfo.summary(loaded.model, input_size=shape, verbose=0)
    assert counted == {"MACs": summary.total_mult_adds, "Params": 2 * summary.total_params}
    before = Path("out/predictions/Doe_TU_task1_1/output.csv").read_bytes()
    with pytest.raises(ContentError, match="out is there already: name another folder with --output, or"):
        run_submission.main(options)
    assert run_submission.main([*options, "--force"]) == 0
    assert Path("out/predictions/Doe_TU_task1_1/output.csv").read_bytes() == before
    assert run_submission.main(["--check", "out", "--n_clips", "3"]) == 0
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith("out")) == ["out"]


def test_2023_has_one_table_and_energy(here):
    write_about(Path("about.yaml"), 2023)
    assert run_submission.main([*here, "--year", "2023", "--model", "net.pt"]) == 0
    folder = Path("out/task1/Doe_TU_task1_1")
    assert sorted(path.name for path in folder.iterdir()) == ["Doe_TU_task1_1.meta.yaml", "Doe_TU_task1_1.output.csv"]
    meta = yaml.safe_load((folder / "Doe_TU_task1_1.meta.yaml").read_text())
    assert meta["system"]["energy_consumption"].keys() == {"training", "inference", "baseline_inference"}
    assert meta["system"]["complexity"]["total_parameters_non_zero"] > 0
    assert meta["results"]["development_dataset"]["overall"]["logloss"] > 0


def test_runs_tell_their_share_of_the_training_part(here):
    write_about(Path("about.yaml"), 2024)
    for split in SPLITS:
        content = torch.load("net.pt", weights_only=True)
        torch.save(content | {"options": {"subset": int(split)}}, f"run{split}.pt")
    runs = [f"run{split}.pt" for split in reversed(SPLITS)]
    assert run_submission.main([*here, "--year", "2024", "--model", *runs]) == 0
    assert len(list(Path("out/task1/Doe_TU_task1_1").glob("*.csv"))) == 5


BAD = [
    (["--model", "net.pt", "--label", "Doe"], SystemExit, "must be <Lastname>_<Institute>_task1"),
    (["--model", "net.pt", "net.pt"], SystemExit, "a system of 2025 is one network"),
    ([*["--model", "net.pt"] * 5], SystemExit, "at most 4 systems"),
    (["--year", "2024", "--model", "5=net.pt", "5=net.pt"], SystemExit, "two networks for 5 percent"),
    (["--year", "2024", "--model", "5=net.pt"], SystemExit, "lacks networks for 10, 25, 50, 100 percent"),
    (["--year", "2024", "--model", "net.pt"], SystemExit, "does not say on how much it was trained"),
    ([], SystemExit, "--model is needed"),
    (["--model", "two.pt"], CheckpointError, "two.pt knows the scenes airport, bus, not those of the challenge"),
    (["--model", "edge.pt"], LimitError, r"129,\d+ bytes of parameters at fp16, limit 128,000"),
    (["--model", "large.pt"], LimitError, r"large.pt: the network is over the challenge's limits: [\d,]+ bytes"),
    (["--model", "table.npy"], CheckpointError, "a submission needs the network itself"),
    (["--model", "net.pt", "--about", "none.yaml"], AboutError, "--print_about` writes one to fill in"),
    (["--model", "net.pt", "--about", "open.yaml"], AboutError, "open.yaml: fill in submission.name"),
    (
        ["--model", "net.pt", "--about", "odd.yaml"],
        AboutError,
        "odd.yaml: system.description must hold entries by name",
    ),
    (
        ["--model", "net.pt", "--about", "less.yaml"],
        AboutError,
        "less.yaml: 0 authors are corresponding.*description.pip",
    ),
    (["--model", "net.pt", "--evaluation_dir", "nowhere"], DataError, "--evaluation_dir nowhere: no such folder"),
    (["--model", "net.pt", "--evaluation_dir", "own"], DataError, "fold1_test.csv"),
    (["--model", "net.pt", "--evaluation_dir", "older"], DataError, "tells no recording devices"),
    (["--model", "net.pt", "--evaluation_dir", "gone"], DataError, "1 of 3 clips of gone have no audio file"),
    (["--model", "net.pt", "--evaluation_dir", "broken"], DataError, "0.wav"),
    (["--check", "nowhere"], SystemExit, "no such folder"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[case[2][:40] for case in BAD])
def test_bad_input_is_one_line_and_nothing_is_written(here, capsys, options, error, message):
    write_about(Path("about.yaml"), 2024 if "2024" in options else 2025)
    save("two.pt", n_classes=2)
    save("large.pt", base_channels=64)
    save("edge.pt", base_channels=24, channels_multiplier=2.5, expansion_rate=2.0)  # folded it would be small enough
    np.save("table.npy", np.zeros((3, 10)))
    Path("odd.yaml").write_text("submission: {name: x}\nsystem: {description: 4}\n")
    less = yaml.safe_load(Path("about.yaml").read_text())
    less["submission"]["authors"], less["system"]["external_datasets"] = 3, 5
    del less["system"]["description"]["pipeline"]
    Path("less.yaml").write_text(yaml.safe_dump(less))
    Path("open.yaml").write_text(template(RULES[2025]))
    for name in ("older", "gone", "broken"):
        shutil.copytree("eval", name)
    Path("older/evaluation_setup/fold1_test.csv").write_text("filename\naudio/0.wav\n")
    Path("gone/audio/1.wav").unlink()
    Path("broken/audio/0.wav").write_bytes(b"no sound")
    with pytest.raises(error) as raised:
        run_submission.main([*here, *options])
    said = capsys.readouterr().err if error is SystemExit else str(raised.value)
    assert re.search(message, said), said
    if error is SystemExit:
        assert raised.value.code == 2
    assert not [path for path in Path().iterdir() if path.name.startswith("out")]


def test_what_fails_on_the_way_leaves_nothing(here, monkeypatch):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    Path("out").mkdir()
    monkeypatch.setattr("run_submission.prove_package", full)
    with pytest.raises(OSError, match="No space"):
        run_submission.main([*here, "--model", "net.pt"])
    assert not list(Path("out").iterdir()) and not list(Path().glob("out.*"))


def test_a_package_that_answers_something_else_is_refused(here, monkeypatch):
    from helpers.submission.package import PackageError

    monkeypatch.setattr("run_submission.answers_of_package", lambda *_: [torch.randn(3, 10)])
    with pytest.raises(PackageError, match="Doe_TU_task1_1 answers something else"):
        run_submission.main([*here, "--model", "net.pt"])


def test_the_file_for_authors_is_printed(capsys):
    for year, rules in RULES.items():
        assert run_submission.main(["--year", str(year), "--print_about"]) == 0
        content = yaml.safe_load(capsys.readouterr().out)
        wanted = {*rules.description} - {"input_sampling_rate", "acoustic_features", "framework"}
        assert content["system"]["description"].keys() == wanted
        assert ("energy_consumption" in content["system"]) == (year == 2023)
