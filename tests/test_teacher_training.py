"""Training of teachers as users meet it: small networks of each kind, stopped, resumed, misused."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import run_training
from datasets.cache import open_joined_store, open_store
from datasets.crops import CroppedClips
from datasets.tau import read_meta, train_rows
from datasets.tau import test_rows as rows_for_test
from datasets.waveforms import Clips
from helpers import cli
from helpers.checkpoints.checkpoint import load_checkpoint, load_model
from helpers.errors import StoppedError
from helpers.fetch import resources
from helpers.losses import distillation
from helpers.report import report
from models import get_model
from models.passt import ARCHITECTURES, RELEASES
from tests.conftest import make_tau
from tests.golden_inputs import fill_state
from tests.http_server import FileServer, Served
from tests.test_beats_checkpoint import checkpoint_of
from tests.test_run_teacher_logits import expected

pytestmark = pytest.mark.slow

DATA = [
    "--logger", "none", "--dataset_dir", "tau", "--cache_path", "cache", "--resample_rate", "8000", "--dir_prob", "0",
    "--batch_size", "8", "--n_epochs", "1",
]  # fmt: skip
MEL = ["--fmax_aug_range", "200", "--freqm", "8", "--timem", "4", "--roll", "400"]
PASST_MEL = ["--window_size", "256", "--hop_size", "80", "--n_fft", "512", *MEL]
SMALL_PASST = {"embed_dim": 16, "depth": 1, "n_heads": 2}
SMALL_BEATS = {
    "encoder_layers": 2, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 4,
    "embed_dim": 16,
}  # fmt: skip


def flags(options: dict) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def recipe(name: str) -> list[str]:
    return ["--config", str(Path(run_training.__file__).parent / "recipes" / f"{name}.yaml")]


SMALL = {
    "cp_resnet": [
        *DATA, *recipe("cp_resnet"), "--window_size", "256", "--hop_size", "125", "--n_fft", "512", "--n_mels",
        "64", *MEL, "--base_channels", "8", "--cut_channels_s3", "8",
    ],
    "passt": [
        *DATA, *recipe("passt"), "--pretrained", "none", *PASST_MEL, "--n_mels", "32", "--input_fdim", "32",
        "--s_patchout_f", "1", "--input_tdim", "120", *flags(SMALL_PASST), "--lr", "1e-3",
    ],
    "beats": [
        *DATA, *recipe("beats_ssl"), "--pretrained", "none", *flags(SMALL_BEATS), "--encoder_layerdrop", "0.3",
        "--dropout", "0.1", "--lr", "1e-3",
    ],
}  # fmt: skip


PLOTS = {name: getattr(report, name) for name in ("write_curves", "write_confusion_matrix")}


def without_plots(patch: pytest.MonkeyPatch) -> None:
    """They take most of the time of a small run."""
    for name in PLOTS:
        patch.setattr(report, name, lambda *_: None)


def make_project(folder: Path) -> Path:
    """Two small data sets, the runs resnet, passt and student, and the store that they made."""
    make_tau(folder / "tau", ["bus", "park", "tram"], ["a", "b", "s1", "s4", "s5"], ["a", "b", "s1"])
    make_tau(folder / "own", ["kitchen", "office", "yard"], ["phone", "webcam"], ["phone"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        without_plots(patch)
        run_training.main([*SMALL["cp_resnet"], "--run_id", "resnet"])
        run_training.main([*SMALL["passt"], "--run_id", "passt"])
        student = SMALL["cp_resnet"][len(DATA) + 2 : -2]
        run_training.main([*DATA, *student, "--run_id", "student"])
    return folder


def work_in(folder: Path, project: Path, monkeypatch) -> Path:
    """Makes `folder` the working folder, with the data sets, the store and copies of the runs."""
    for name in ("tau", "own", "cache"):
        (folder / name).symlink_to(project / name)
    shutil.copytree(project / "DCASE23_Task1", folder / "DCASE23_Task1")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TAU22_DIR", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    without_plots(monkeypatch)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("teachers"))


@pytest.fixture
def here(project, tmp_path, monkeypatch) -> Path:
    return work_in(tmp_path, project, monkeypatch)


def train(run_id: str, teacher: str, *options: str) -> dict[str, float]:
    return run_training.main([*SMALL[teacher], *options, "--run_id", run_id])


def content(run_id: str) -> dict:
    return load_checkpoint(Path("DCASE23_Task1") / run_id / "checkpoints" / "last.pt")


def weights(run_id: str) -> dict[str, torch.Tensor]:
    return content(run_id)["model"]["state"]


def history(run_id: str) -> list[dict]:
    """The logged metrics, without the times."""
    text = (Path("DCASE23_Task1") / run_id / "metrics.jsonl").read_text()
    times = ("train/seconds", "train/clips_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in text.splitlines()]


def assert_same_weights(one: str, other: str) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(
    ("teacher", "network", "frontend"),
    [
        ("cp_resnet", {"base_channels": 8, "cut_channels_s3": 8}, {"n_mels": 64, "hop_length": 125}),
        ("passt", {**SMALL_PASST, "input_tdim": 120}, {"n_mels": 32, "hop_length": 80}),
        ("beats", {**SMALL_BEATS, "encoder_layerdrop": 0.3}, {"win_length": 200, "hop_length": 80}),
    ],
)
def test_a_run_leaves_everything_it_promises(here, monkeypatch, capsys, teacher, network, frontend):
    for name, plot in PLOTS.items():
        monkeypatch.setattr(report, name, plot)
    metrics = train("new", teacher, "--n_epochs", "2")
    printed = capsys.readouterr().out
    run = here / "DCASE23_Task1/new"
    assert {path.name for path in run.iterdir()} == {
        ".lock", "options.json", "metrics.jsonl", "checkpoints", "curves.png", "confusion_matrix.png",
        "report.md", "report.html", "devices.png", "reliability.png",
        "config.yaml",
    }  # fmt: skip
    options = json.loads((run / "options.json").read_text())
    assert options["model"] == teacher and options["n_classes"] == 10
    assert [row["epoch"] for row in history("new")] == [0, 1]
    assert history("new")[1]["test/acc"] == metrics["test/acc"]
    assert {"test/acc/unseen", "test/acc/device/s4"} <= set(metrics) and metrics["train/kd_loss"] == 0
    assert "python run_teacher_logits.py --project_name DCASE23_Task1 --teachers new" in printed

    loaded = load_model(run / "checkpoints/last.pt")
    assert loaded.content["model"]["name"] == teacher
    assert {name: getattr(loaded.model.config, name) for name in network} == network
    assert {name: getattr(loaded.frontend.config, name) for name in frontend} == frontend
    assert loaded.frontend.config.sample_rate == 8000
    meta = read_meta("tau")
    rows = rows_for_test(meta)
    logits = expected(str(run / "checkpoints/last.pt"), rows)
    assert (logits.argmax(1).numpy() == meta.scene[rows]).mean() == pytest.approx(metrics["test/acc"])


def test_a_data_set_with_its_own_labels(here):
    train("own", "cp_resnet", "--dataset_dir", "own")
    loaded = load_model("DCASE23_Task1/own/checkpoints/last.pt")
    assert loaded.scenes == ("kitchen", "office", "yard") and loaded.model.config.n_classes == 3


@pytest.mark.parametrize("teacher", ["cp_resnet", "passt", "beats"])
def test_a_run_stopped_within_an_epoch_ends_with_the_same_bits(here, monkeypatch, teacher):
    """Of the BEATs network too, whose file has options that the command line does not know."""
    chain = ["dir", "time_roll", "spec_mask", "freq_mixstyle", "mixup"]
    options = ["--cropped", "--n_epochs", "3", "--augment", *chain, "--mixup_alpha", "0.3"]
    if teacher == "passt":  # another rate at every step
        options += ["--schedule", "warmup_cosine", "--warmup_steps", "5"]
    else:
        options += ["--warm_up_len", "1"]
    if teacher == "beats":
        save_beats("beats.pt", deep_norm=False, activation_fn="relu", conv_pos=16, encoder_layerdrop=0.4)
        options += ["--pretrained", "beats.pt", "--freeze", "1"]
    train("whole", teacher, *options)
    n_steps, kd_loss = [0], distillation.kd_loss

    def terminate_in_the_second_epoch(*arguments):
        n_steps[0] += 1
        if n_steps[0] == 6:  # an epoch has four
            os.kill(os.getpid(), signal.SIGTERM)
        return kd_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "kd_loss", terminate_in_the_second_epoch)
        with pytest.raises(StoppedError, match="--project_name DCASE23_Task1 --resume stopped"):
            train("stopped", teacher, *options)
    where = content("stopped")["loop"]
    assert (where["epoch"], where["step"]) == (1, 2)
    Path("beats.pt").unlink(missing_ok=True)  # its weights are in the run now
    run_training.main(["--resume", "stopped"])
    assert_same_weights("whole", "stopped")
    assert history("whole") == history("stopped")


def test_cropped_training_sees_windows_and_scores_whole_clips(here, monkeypatch):
    seen, read = {"train": [], "test": []}, Clips.batch

    def recording(clips, index):
        batch = read(clips, index)
        seen["train" if isinstance(clips, CroppedClips) else "test"].append(batch.waveform.numpy())
        return batch

    monkeypatch.setattr(Clips, "batch", recording)
    train("cropped", "cp_resnet", "--cropped", "--n_epochs", "2", "--eval_every", "2")
    meta = read_meta("tau")
    store = open_store(meta, 8000, "cache", progress=False)
    joined = open_joined_store(meta, store, "cache", progress=False)
    clips = joined.waveforms[joined.rows(meta.files[train_rows(meta)])]  # segments of a recording side by side
    recordings = [clips[i : i + 3].reshape(-1) for i in range(0, len(clips), 3)]
    windows = np.concatenate(seen["train"])
    assert len(windows) == 2 * len(clips)
    found = [[find(recording, window) for recording in recordings] for window in windows]
    starts = [[start for start in row if start is not None] for row in found]
    assert all(len(row) == 1 for row in starts)
    assert sum(row[0] % 8000 != 0 for row in starts) > 0.9 * len(starts)
    assert {row[0] for row in starts[: len(clips)]} != {row[0] for row in starts[len(clips) :]}  # new in each epoch
    rows = rows_for_test(meta)
    whole = store.waveforms[store.rows(meta.files[rows])]
    scored = np.concatenate(seen["test"])
    assert len(scored) >= len(whole) and (scored[: len(whole)] == whole).all()


def find(recording: np.ndarray, window: np.ndarray) -> int | None:
    """First sample of a window in a recording; None when it is not in it."""
    candidates = np.flatnonzero(recording[: len(recording) - len(window) + 1] == window[0])
    return next((int(i) for i in candidates if np.array_equal(recording[i : i + len(window)], window)), None)


def test_a_batch_in_pieces_is_the_same_step(here, monkeypatch):
    """Without batch norm and patchout; the optimizer's first mean is a tenth of the gradient."""
    plain = ["--s_patchout_f", "0", "--input_tdim", "100", "--batch_size", "27", "--weight_decay", "0"]
    n_clips, kd_loss = [], distillation.kd_loss
    monkeypatch.setattr(distillation, "kd_loss", lambda *a: n_clips.append(len(a[0])) or kd_loss(*a))
    metrics = [train(f"in{n}", "passt", *plain, "--accumulate", n) for n in ("1", "3")]
    assert n_clips == [27, 9, 9, 9]
    assert metrics[0]["train/loss"] == pytest.approx(metrics[1]["train/loss"], rel=1e-6)
    one, three = (content(f"in{n}")["optimizer"]["state"] for n in ("1", "3"))
    assert one.keys() == three.keys()
    assert max(state["exp_avg"].abs().max() for state in one.values()) > 1e-3
    for i, state in one.items():
        assert state["step"] == three[i]["step"] == 1
        torch.testing.assert_close(three[i]["exp_avg"], state["exp_avg"], rtol=1e-4, atol=1e-7)  # other sums


def test_bf16_computes_in_16_bits_and_keeps_float32_weights(here):
    for precision in ("fp32", "bf16"):
        train(precision, "passt", "--precision", precision)
    losses = [history(precision)[0]["train/loss"] for precision in ("fp32", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)  # 8 bits of mantissa
    assert {value.dtype for value in weights("bf16").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("teacher", "extra"),
    [
        ("cp_resnet", ["--cropped", "--data_on_device", "yes", "--val_fraction", "0.34"]),
        ("passt", ["--grad_checkpointing", "--u_patchout", "2", "--optimizer", "adamw", "--accumulate", "2"]),
        ("beats", ["--precision", "fp16", "--grad_checkpointing", "--no-channels_last", "--freeze", "all"]),
    ],
)
def test_options_work(here, teacher, extra):
    assert np.isfinite(train("new", teacher, *extra)["train/loss"])


@pytest.mark.parametrize(("teacher", "extra"), [("cp_resnet", []), ("cp_resnet", ["--cropped"]), ("beats", [])])
def test_another_teacher_helps_where_it_is_asked_to(here, teacher, extra):
    meta = read_meta("tau")
    logits = 5 * torch.nn.functional.one_hot(torch.from_numpy(meta.scene), 10).half()
    torch.save({"files": meta.files.tolist(), "logits": logits, "scenes": list(meta.scenes)}, "logits.pt")
    metrics = train("kd", teacher, "--teacher_logits", "logits.pt", "--kd_lambda", "0.5", *extra)
    assert metrics["train/kd_loss"] > 0
    assert metrics["train/loss"] == pytest.approx(metrics["train/label_loss"] + metrics["train/kd_loss"], rel=1e-5)


def save_beats(path: str, n_predicted: int | None = 527, **options) -> dict[str, torch.Tensor]:
    """Writes a file in BEATs' authors' format; returns its weights under our names."""
    model = fill_state(get_model("beats", **{**SMALL_BEATS, "conv_pos": 16, "conv_pos_groups": 4, **options})).eval()
    torch.save(checkpoint_of(model, n_predicted), path)
    return {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}


def passt_bytes(path: str, **options) -> bytes:
    torch.save(fill_state(get_model("passt", **{**SMALL_PASST, "n_classes": 527, **options})).state_dict(), path)
    return Path(path).read_bytes()


WEIGHTS = ARCHITECTURES["passt_s_swa_p16_128_ap476"].weights
# n_heads leaves no trace in the weights; all else is in them.
FROM_AUDIOSET = [
    *DATA, *recipe("passt"), *PASST_MEL, "--n_heads", "2", "--lr", "0.01", "--warm_up_len", "0",
]  # fmt: skip


@pytest.fixture
def release(here, monkeypatch):
    """A server in the place of PaSST's release, and an own resources folder."""
    with FileServer({}) as server:
        fetch = resources.pretrained_file
        monkeypatch.setattr(
            "helpers.checkpoints.pretrained.pretrained_file",
            lambda network, url: fetch(network, url.replace(RELEASES, server.url("")), here / "resources"),
        )
        yield server


def test_passt_starts_from_audioset(here, release):
    release.files[f"/{WEIGHTS}"] = Served(passt_bytes("source.pt"))
    source = torch.load("source.pt", weights_only=True)
    for run_id in ("one", "two"):
        run_training.main([*FROM_AUDIOSET, "--freeze", "all", "--run_id", run_id])
    assert [path for path, _ in release.requests] == [f"/{WEIGHTS}"]  # fetched once
    assert list(json.loads(Path("resources/checksums.json").read_text())) == [Path(WEIGHTS).name]
    state, config = weights("one"), content("one")["model"]["config"]
    assert (config["embed_dim"], config["depth"], config["n_heads"], config["n_classes"]) == (16, 1, 2, 10)
    new = {"head.1.weight", "head.1.bias", "head_dist.weight", "head_dist.bias"}
    assert {name for name in source if state[name].shape != source[name].shape} == new
    moved = {name for name in source.keys() - new if not torch.equal(state[name], source[name])}
    assert moved == {"head.0.weight", "head.0.bias"}
    assert state["head.1.weight"].abs().max() > 0
    assert_same_weights("one", "two")


@pytest.mark.parametrize("n_predicted", [None, 527], ids=["self-supervised", "fine-tuned"])
def test_beats_starts_from_its_authors_file_and_keeps_what_is_frozen(here, monkeypatch, n_predicted):
    source = save_beats("beats.pt", n_predicted, encoder_layerdrop=0.5)
    modes, train_one_epoch = set(), run_training.train_one_epoch

    def watched(model, frontend, augment, loss_fn, *arguments):
        def loss_and_modes(logits, batch):
            modes.add(tuple(layer.training for layer in model.encoder.encoder.layers))
            return loss_fn(logits, batch)

        return train_one_epoch(model, frontend, augment, loss_and_modes, *arguments)

    monkeypatch.setattr(run_training, "train_one_epoch", watched)
    train("tuned", "beats", "--pretrained", "beats.pt", "--freeze", "1", "--encoder_layerdrop", "0", "--lr", "0.01")
    assert modes == {(False, True)}
    state, config = weights("tuned"), content("tuned")["model"]["config"]
    assert (config["n_classes"], config["conv_pos"], config["conv_pos_groups"]) == (10, 16, 4)  # of the file
    assert config["encoder_layerdrop"] == 0 and config["dropout"] == 0.1  # given
    assert state["classifier.linear.weight"].shape == (10, 32)
    # Without logits of its own the first layer's table of positions is that of all layers.
    moved = {name for name in source if not torch.equal(state[name], source[name])}
    table = "encoder.encoder.layers.1.self_attn.relative_attention_bias.weight"
    assert moved == {name for name in source if name.startswith("encoder.encoder.layers.1.")} - {table}


def test_an_earlier_run_is_a_start_too(here):
    source = weights("passt")
    options = [*DATA, *recipe("passt"), *PASST_MEL, "--n_mels", "32", "--lr", "0.01", "--warm_up_len", "0"]
    path = "DCASE23_Task1/passt/checkpoints/last.pt"
    for run_id, n_frozen in (("none", "0"), ("all", "all")):
        run_training.main([*options, "--pretrained", path, "--freeze", n_frozen, "--run_id", run_id])
        assert content(run_id)["model"]["config"] == content("passt")["model"]["config"]
        moved = {name for name in source if not torch.equal(weights(run_id)[name], source[name])}
        assert {"head.1.weight", "head.1.bias"} <= moved
        assert ("blocks.0.attn.qkv.weight" in moved, "patch_embed.proj.weight" in moved) == (n_frozen == "0", False)


def outcome(arguments: list[str], monkeypatch, capsys) -> str:
    """The last line on standard error of a command that must end with status 2 and without a traceback."""
    monkeypatch.setattr(sys, "argv", ["run_training.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.run(run_training.main)
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (None, "404"),
        (Served(b"<html>sign in</html>", content_type="text/html"), "the server sent a web page instead of"),
    ],
    ids=["not there", "a page of a proxy"],
)
def test_weights_that_do_not_arrive_are_one_line(release, monkeypatch, capsys, served, message):
    if served is not None:
        release.files[f"/{WEIGHTS}"] = served
    line = outcome([*FROM_AUDIOSET, "--run_id", "new"], monkeypatch, capsys)
    assert message in line and Path(WEIGHTS).name in line
    assert not Path("DCASE23_Task1/new").exists() and not list(Path("resources").glob("*.pt"))


def test_fetched_weights_that_were_swapped_are_noticed(release, monkeypatch, capsys):
    release.files[f"/{WEIGHTS}"] = Served(passt_bytes("source.pt"))
    run_training.main([*FROM_AUDIOSET, "--run_id", "one"])
    file = Path("resources") / Path(WEIGHTS).name
    file.write_bytes(passt_bytes("source.pt", depth=2))
    assert f"{file.name} has " in outcome([*FROM_AUDIOSET, "--run_id", "new"], monkeypatch, capsys)
    assert not Path("DCASE23_Task1/new").exists()
