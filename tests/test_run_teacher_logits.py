"""Logits of teachers as their users write them: from checkpoints and files, stopped, misused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import run_teacher_logits
import run_teacher_validation
from datasets.audio import FULL_SCALE
from datasets.cache import open_store
from datasets.tau import SCENES, DataError, read_meta, train_rows
from datasets.tau import test_rows as rows_for_test
from datasets.teacher_logits import read_teacher_logits
from helpers.checkpoints.checkpoint import CheckpointError, describe, load_model, save_checkpoint
from helpers.fetch.download import file_hash
from helpers.teachers import PartFile
from models import FRONTENDS, MODELS, get_frontend, get_model
from tests.golden_inputs import fill_state
from tests.processes import together
from tests.test_foreign import SMALL_BEATS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MEL = {"sample_rate": 8000, "n_fft": 512, "win_length": 256, "hop_length": 125, "n_mels": 64, "fmax_aug_range": 200}
DATA = ["--dataset_dir", "tau", "--cache_path", "cache", "--project_name", "proj", "--batch_size", "8"]


def save(path: Path, model, frontend, scenes=SCENES) -> None:
    parts = {"model": describe(model, MODELS), "frontend": describe(frontend, FRONTENDS)}
    save_checkpoint(path, parts | {"scenes": list(scenes)})


@pytest.fixture
def here(tau, tmp_path, monkeypatch) -> Path:
    """A working folder with the data set, the run `resnet` at 8 kHz and the file beats.pt at 16 kHz."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TAU22_DIR", raising=False)
    resnet = fill_state(get_model("cp_resnet", base_channels=8, cut_channels_s3=8))
    save(tmp_path / "proj/resnet/checkpoints/last.pt", resnet, get_frontend("cp_mel", **MEL))
    save(tmp_path / "beats.pt", fill_state(get_model("beats", **SMALL_BEATS)), get_frontend("kaldi_fbank"))
    return tmp_path


def expected(
    checkpoint: str, rows: np.ndarray, shifts=(0,), log_probabilities: bool = False, root: str = "tau"
) -> torch.Tensor:
    """Clip by clip, from the store to the mean over shifted copies, float64."""
    loaded = load_model(checkpoint)
    meta = read_meta(root)
    store = open_store(meta, loaded.frontend.config.sample_rate, "cache", progress=False)
    waveform = torch.from_numpy(store.read(store.rows(meta.files[rows])).astype(np.float32)) / FULL_SCALE
    with torch.no_grad():
        copies = [loaded.model(loaded.frontend(waveform.roll(shift, 1))).double() for shift in shifts]
    return torch.stack([copy.log_softmax(1) if log_probabilities else copy for copy in copies]).mean(0)


def test_teachers_of_two_rates_become_one_file(here, capsys):
    metrics = run_teacher_logits.main(
        [*DATA, "--teachers", "resnet", "beats.pt", "--weights", "2", "1", "--output", "o/l.pt"]
    )
    meta = read_meta("tau")
    rows = train_rows(meta)
    content = torch.load("o/l.pt", weights_only=True)
    run = "proj/resnet/checkpoints/last.pt"
    mean = (2 * expected(run, rows) + expected("beats.pt", rows)) / 3
    assert content["files"] == meta.files[rows].tolist() and content["scenes"] == list(SCENES)
    assert content["logits"].dtype == torch.float16
    torch.testing.assert_close(content["logits"].double(), mean, rtol=2e-3, atol=1e-3)
    assert metrics["ensemble"] == pytest.approx((mean.argmax(1).numpy() == meta.scene[rows]).mean(), abs=0.05)
    assert list(metrics) == ["resnet", "beats", "ensemble"]
    first, second = content["provenance"]["teachers"]
    assert (first["path"], first["sha256"], first["weight"]) == (run, file_hash(Path(run), "sha256"), 2.0)
    assert (second["name"], second["architecture"]) == ("beats", "Beats")
    assert content["provenance"]["n_clips"] == len(rows) and content["provenance"]["average"] == "logits"
    assert os.listdir("o") == ["l.pt"]
    assert (read_teacher_logits("o/l.pt", meta, rows) == content["logits"].numpy()).all()
    assert "run_training.py --dataset_dir tau --teacher_logits o/l.pt" in capsys.readouterr().out


def test_copies_are_shifted_evenly_and_averaged(here):
    assert run_teacher_logits.shifts(1, 4000, 32000) == [0]
    assert run_teacher_logits.shifts(3, 4000, 16000) == [-2000, 0, 2000]
    assert run_teacher_logits.shifts(5, 4000, 32000) == [-4000, -2000, 0, 2000, 4000]
    options = ["--teachers", "resnet", "--n_shifts", "4", "--max_shift", "1200", "--average", "log_probabilities"]
    run_teacher_logits.main([*DATA, *options, "--part", "test", "--output", "l.pt"])
    content, rows = torch.load("l.pt", weights_only=True), rows_for_test(read_meta("tau"))
    wanted = expected("proj/resnet/checkpoints/last.pt", rows, (-300, -100, 100, 300), log_probabilities=True)
    torch.testing.assert_close(content["logits"].double(), wanted.log_softmax(1), rtol=2e-3, atol=1e-3)
    assert content["provenance"]["teachers"][0]["shifts"] == [-300, -100, 100, 300]


def test_every_clip_of_the_data_set_can_be_asked_for(here):
    run_teacher_logits.main([*DATA, "--teachers", "resnet", "--part", "all", "--precision", "bf16", "--output", "l.pt"])
    content = torch.load("l.pt", weights_only=True)
    assert content["files"] == read_meta("tau").files.tolist()
    wanted = expected("proj/resnet/checkpoints/last.pt", np.arange(len(content["files"])))
    difference = (content["logits"].double() - wanted).abs().max()
    assert 0 < difference < 0.1 * wanted.abs().max()


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(here, monkeypatch):
    options = [*DATA, "--teachers", "beats.pt", "resnet", "--n_shifts", "2"]
    run_teacher_logits.main([*options, "--output", "whole.pt"])
    written, write = [], PartFile.write

    def stop_after_six(part: PartFile, logits: torch.Tensor) -> None:
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(len(logits))
        write(part, logits)

    with monkeypatch.context() as patch:
        patch.setattr(PartFile, "write", stop_after_six)
        with pytest.raises(KeyboardInterrupt):
            run_teacher_logits.main([*options, "--output", "l.pt"])
    assert not Path("l.pt").exists() and Path("l.pt.parts").is_dir()
    monkeypatch.setattr(PartFile, "write", lambda part, logits: written.append(len(logits)) or write(part, logits))
    run_teacher_logits.main([*options, "--output", "l.pt"])
    assert sum(written) == 2 * len(train_rows(read_meta("tau")))  # each clip once for each teacher
    assert Path("l.pt").read_bytes() == Path("whole.pt").read_bytes()
    assert not Path("l.pt.parts").exists()


def test_several_processes_share_the_clips_and_write_the_bytes_of_one(here, monkeypatch, capsys):
    options = [*DATA, "--teachers", "beats.pt", "resnet"]  # 27 clips: batches of 8, 8, 8 and 3
    run_teacher_logits.main([*options, "--output", "whole.pt"])
    capsys.readouterr()
    written, write = [], PartFile.write

    def stop_at_the_sixth(part: PartFile, logits: torch.Tensor) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(len(logits))
        write(part, logits)

    with monkeypatch.context() as patch:
        patch.setattr(PartFile, "write", stop_at_the_sixth)
        first, *_ = together(2, run_teacher_logits, [*options, "--output", "l.pt"], monkeypatch)
        assert isinstance(first, KeyboardInterrupt)
    # Another number of processes goes on, and has fewer batches than processes at the end.
    monkeypatch.setattr(PartFile, "write", lambda part, logits: written.append(len(logits)) or write(part, logits))
    metrics = together(3, run_teacher_logits, [*options, "--output", "l.pt"], monkeypatch)
    assert list(metrics[0]) == ["beats", "resnet", "ensemble"] and metrics[1:] == [{}, {}]
    assert written == [8, 8, 8, 3, 8, 8, 8, 3]  # each clip once for each teacher
    assert Path("l.pt").read_bytes() == Path("whole.pt").read_bytes()
    assert not Path("l.pt.parts").exists()
    assert capsys.readouterr().out.count("logits are in l.pt") == 1


def test_logits_that_are_not_finite_end_all_processes_with_one_line(here, monkeypatch):
    poison("beats.pt", lambda content: content["model"]["state"]["classifier.linear.weight"].fill_(3e38))
    answers = together(2, run_teacher_logits, [*DATA, "--teachers", "beats.pt", "--output", "o.pt"], monkeypatch)
    (message,) = {str(answer) for answer in answers} - {""}  # empty in a thread that the other has ended
    assert "not finite for 8 of 8 clips, first audio/bus-paris-0-0-0-a.wav" in message


@pytest.mark.parametrize("change", ["n_shifts", "average", "teacher", "clips", "batch_size"])
def test_answers_of_another_task_are_not_gone_on_with(here, monkeypatch, change):
    options = [*DATA, "--teachers", "resnet", "--output", "l.pt"]
    n_written, write = [0], PartFile.write

    def stop_after_two(part: PartFile, logits: torch.Tensor) -> None:
        if n_written[0] == 2:
            raise KeyboardInterrupt
        n_written[0] += 1
        write(part, logits)

    with monkeypatch.context() as patch:
        patch.setattr(PartFile, "write", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            run_teacher_logits.main(options)
    if change == "teacher":
        resnet = fill_state(get_model("cp_resnet", base_channels=8, cut_channels_s3=8, s2_group=1))
        save(here / "proj/resnet/checkpoints/last.pt", resnet, get_frontend("cp_mel", **MEL))
    options += {
        "n_shifts": ["--n_shifts", "2"], "average": ["--average", "log_probabilities"], "teacher": [],
        "clips": ["--part", "test"], "batch_size": ["--batch_size", "5"],
    }[change]  # fmt: skip
    run_teacher_logits.main(options)
    run_teacher_logits.main([*options, "--output", "fresh.pt"])
    assert Path("l.pt").read_bytes() == Path("fresh.pt").read_bytes()


def test_a_killed_process_goes_on(here):
    options = [*DATA[:-1], "1", "--teachers", "beats.pt", "--n_shifts", "6"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_teacher_logits.main([*options, "--output", "whole.pt"])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "run_teacher_logits.py"), *options, "--output", "l.pt"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    n_lines, deadline = 0, time.monotonic() + 60
    while n_lines < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
        n_lines = sum(path.read_text().count("\n") for path in Path("l.pt.parts").glob("*.txt"))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and n_lines >= 3
    assert not Path("l.pt").exists()
    run_teacher_logits.main([*options, "--output", "l.pt"])
    torch.set_num_threads(threads)
    assert Path("l.pt").read_bytes() == Path("whole.pt").read_bytes()


def test_files_of_logits_are_teachers_too(here):
    meta = read_meta("tau")
    rows = train_rows(meta)
    torch.manual_seed(0)
    one, two = torch.randn(2 * len(meta), 10).half(), torch.randn(len(rows), 10)
    torch.save(one, "ensemble_logits.pt")
    torch.save(two, "predictions_train.pt")
    listed = Path("tau/evaluation_setup/fold1_train.csv").read_text().split()[1:]
    run_teacher_logits.main([*DATA, "--teachers", "ensemble_logits.pt", "predictions_train.pt", "--output", "a.pt"])
    content = torch.load("a.pt", weights_only=True)
    order = [listed.index(file) for file in meta.files[rows]]
    wanted = (one[torch.from_numpy(rows)].double() + two[order].double()) / 2
    torch.testing.assert_close(content["logits"].double(), wanted, rtol=1e-3, atol=1e-3)
    assert not Path("cache").exists()  # nothing was to be heard

    run_teacher_logits.main([*DATA, "--teachers", "a.pt", "resnet", "--output", "b.pt"])
    again = torch.load("b.pt", weights_only=True)
    wanted = (content["logits"].double() + expected("proj/resnet/checkpoints/last.pt", rows)) / 2
    torch.testing.assert_close(again["logits"].double(), wanted, rtol=2e-3, atol=2e-3)
    assert again["provenance"]["teachers"][0]["provenance"] == content["provenance"]


def test_a_clip_without_logits_is_named(here):
    meta = read_meta("tau")
    files = meta.files[train_rows(meta)][1:]
    torch.save({"files": files.tolist(), "logits": torch.zeros(len(files), 10), "scenes": list(SCENES)}, "l.pt")
    missing = meta.files[train_rows(meta)][0]
    with pytest.raises(DataError, match=f"no logits for 1 of 27 training clips, first {missing}"):
        run_teacher_logits.main([*DATA, "--teachers", "resnet", "l.pt", "--output", "o.pt"])
    assert not Path("o.pt").exists() and not Path("o.pt.parts").exists()


def test_an_existing_file_stays_unless_asked(here):
    Path("o.pt").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"o\.pt exists: give another --output, or --overwrite"):
        run_teacher_logits.main([*DATA, "--teachers", "resnet", "--output", "o.pt"])
    assert Path("o.pt").read_bytes() == b"precious"
    run_teacher_logits.main([*DATA, "--teachers", "resnet", "--output", "o.pt", "--overwrite"])
    assert torch.load("o.pt", weights_only=True)["provenance"]["part"] == "train"


def poison(path: str, change) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("prepare", "teachers", "message"),
    [
        (lambda: None, ["nobody"], r"no teacher nobody.*runs in proj: resnet\); published: .*passt_dirfms_1"),
        (lambda: None, ["passt_dir_1"], "published no more"),
        (lambda: Path("page.pt").write_text("<html>"), ["page.pt"], "is a web page"),
        (lambda: poison("beats.pt", lambda c: c.update(scenes=list("abcdefghij"))), ["beats.pt"], "scenes a, b, c"),
        (lambda: poison("beats.pt", lambda c: c["model"]["state"]["classifier.linear.bias"].fill_(torch.nan)),
         ["beats.pt"], r"weights that are NaN or infinite, first in classifier\.linear\.bias"),
        (lambda: poison("beats.pt", lambda c: c["model"]["state"]["classifier.linear.weight"].fill_(3e38)),
         ["beats.pt"], r"not finite for 8 of 8 clips, first audio/bus-paris-0-0-0-a\.wav"),
        (lambda: poison("beats.pt", lambda c: c["model"]["state"].pop("classifier.linear.bias")), ["beats.pt"],
         r"classifier\.linear\.bias missing"),
        (lambda: poison("beats.pt", lambda c: c["model"]["state"]["classifier.linear.bias"].fill_(1e6)), ["beats.pt"],
         "leaves the range of 16-bit floats for 27 of 27"),
    ],
    ids=["unknown", "gone", "page", "scenes", "nan", "overflow", "missing", "range"],
)  # fmt: skip
def test_what_cannot_be_used_is_one_clear_error(here, prepare, teachers, message):
    prepare()
    with pytest.raises((CheckpointError, DataError), match=message):
        run_teacher_logits.main([*DATA, "--teachers", *teachers, "--output", "o.pt"])
    assert not Path("o.pt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "1", "2"], "each of the 1 teachers"),
        (["--weights", "0"], "not all 0"),
        (["--weights", "-1"], "must be >= 0"),
        (["--val_fraction", "0.1"], "--val_fraction means nothing here"),
        (["--n_shifts", "0"], "must be >= 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(here, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        run_teacher_logits.main([*DATA, "--teachers", "resnet", *options])
    assert error.value.code == 2 and message in capsys.readouterr().err


STATED = ["--resample_rate", "8000", "--hop_size", "100", "--window_size", "256", "--n_fft", "512", "--n_mels", "64",
          "--fmax_aug_range", "200"]  # fmt: skip


def test_a_front_end_that_a_file_does_not_record_is_believed(here):
    model = fill_state(get_model("cp_resnet")).eval()
    torch.save(model.state_dict(), "foreign.pt")
    options = [*DATA, "--part", "test", "--output"]
    run_teacher_logits.main([*options, "with.pt", "--teachers", "resnet", "foreign.pt", *STATED])
    meta = read_meta("tau")
    rows = rows_for_test(meta)
    store = open_store(meta, 8000, "cache", progress=False)
    frontend = get_frontend("cp_mel", **MEL | {"hop_length": 100}).eval()
    with torch.no_grad():
        waveform = torch.from_numpy(store.read(store.rows(meta.files[rows])).astype(np.float32)) / FULL_SCALE
        answers = (model(frontend(waveform)) + expected("proj/resnet/checkpoints/last.pt", rows)) / 2
    content = torch.load("with.pt", weights_only=True)
    torch.testing.assert_close(content["logits"].double(), answers.double(), rtol=2e-3, atol=1e-3)
    recorded, stated = content["provenance"]["teachers"]
    assert "frontend" not in recorded and stated["frontend"]["hop_length"] == 100
    metrics = run_teacher_validation.main([*DATA, "--logger", "none", "--checkpoint", "foreign.pt", *STATED])
    with torch.no_grad():
        right = model(frontend(waveform)).argmax(1).numpy() == meta.scene[rows]
    assert metrics["foreign/test/acc"] == pytest.approx(right.mean(), abs=0.03)


def test_a_front_end_that_every_file_records_is_not_overruled(here, capsys):
    with pytest.raises(SystemExit):
        run_teacher_logits.main([*DATA, "--teachers", "resnet", "--output", "o.pt", "--hop_size", "320"])
    assert "--hop_size 320, but proj/resnet/checkpoints/last.pt has 125" in capsys.readouterr().err
    run_teacher_logits.main([*DATA, "--teachers", "resnet", "--output", "o.pt", "--hop_size", "125"])
