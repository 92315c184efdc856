import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from datasets.tau import SCENES, read_meta
from helpers import teachers
from helpers.checkpoints.checkpoint import CheckpointError, check_scenes, describe, load_model, save_checkpoint
from helpers.fetch import resources
from helpers.fetch.download import DownloadError
from helpers.machine import Machine
from helpers.runs import folder as runs_folder
from helpers.teachers import PartFile, find_teacher, find_teachers, load_teacher_model, mean_logits, unique_names
from models import FRONTENDS, MODELS, default_frontend, get_frontend, get_model
from models.published import ALIASES, OLD_NAMES, PUBLISHED, RELEASE, TEACHERS, published_name
from tests.golden_inputs import clip, fill_state, wave
from tests.http_server import FileServer, Served


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server in the place of the release, and an own resources folder."""
    with FileServer({}) as server:
        folder = tmp_path / "resources"
        fetch = resources.published_file
        monkeypatch.setattr(teachers, "published_file", lambda name: fetch(name, folder, server.url(f"/{name}.pt")))
        yield server, folder


def weights(tmp_path, architecture: str, **options) -> bytes:
    torch.save(fill_state(get_model(architecture, **options)).state_dict(), tmp_path / "weights")
    return (tmp_path / "weights").read_bytes()


def test_every_published_teacher_has_its_row():
    kinds = {"passt_dirfms": "passt", "passt_fms": "passt", "cpr_128k_dirfms": "cp_resnet", "cpr_128k_fms": "cp_resnet"}
    wanted = {f"{kind}_{n}": architecture for kind, architecture in kinds.items() for n in (1, 2, 3)}
    assert {name: teacher.architecture for name, teacher in TEACHERS.items()} == wanted
    assert all(teacher.url == f"{RELEASE}/{name}.pt" for name, teacher in TEACHERS.items())
    assert RELEASE == "https://github.com/fschmid56/cpjku_dcase23/releases/download/ensemble_logits"
    for architecture in MODELS:
        name, options = default_frontend(architecture)
        get_frontend(name, **options)


def test_rows_of_published_networks_are_whole():
    for name, row in PUBLISHED.items():
        assert row.architecture in MODELS and row.url.startswith("https://"), name
        assert row.sha256 is None or re.fullmatch("[0-9a-f]{64}", row.sha256), name
        assert (row.sha256 is None) == (row.options is not None), name  # a bare state dict, or what a file says itself
        if "raw.githubusercontent.com" in row.url:
            assert re.fullmatch("[0-9a-f]{40}", row.url.split("/")[5]), name  # by commit, not by branch
        if row.frontend is not None:
            get_frontend(row.frontend[0], **row.frontend[1])
    assert set(ALIASES.values()) <= PUBLISHED.keys() and not ALIASES.keys() & PUBLISHED.keys()


@pytest.mark.parametrize(
    ("name", "file", "golden"),
    [
        (
            "cpjku2023",
            "cpjku_dcase23/c0a7nzin/checkpoints/epoch=149-step=81900.ckpt",
            "cpjku_dcase23/checkpoint_real_clips",
        ),
        ("li2025_2", "dcase2025/li_sub2_checkpoint.ckpt", "dcase2025/li_sub2"),
        ("karasin2025_4", "dcase2025/karasin_sys4_checkpoint.ckpt", "dcase2025/karasin_sys4"),
        ("tan2025_1", "dcase2025/tan_sub1_checkpoint.pt", "dcase2025/tan_sub1"),
        ("zhou2025", "dcase2025/zhou_tfsepnet_checkpoint.ckpt", "dcase2025/zhou_tfsepnet"),
    ],
)  # fmt: skip
def test_a_published_student_is_fetched_by_name_and_gives_the_published_logits(
    tmp_path, monkeypatch, shared, caplog, name, file, golden
):
    content, data = shared(f"golden/{file}").read_bytes(), torch.load(shared(f"golden/{golden}.pt"), weights_only=True)
    with FileServer({"/weights.ckpt": Served(content)}) as server:
        fetch = partial(resources.published_file, folder=tmp_path, url=server.url("/weights.ckpt"))
        monkeypatch.setattr(runs_folder, "published_file", fetch)
        monkeypatch.setattr(teachers, "published_file", fetch)
        path, known_as = runs_folder.source_checkpoint("no_project", None, name)
        assert known_as == ALIASES.get(name, name)
        assert (path, known_as) == runs_folder.source_checkpoint("no_project", name, None)
        assert teachers.find_teachers([name], "no_project")[0].path == path
        assert len(server.requests) == 1
    loaded = load_model(path)
    assert loaded.is_recorded and "does not tell its front end" not in caplog.text  # its bytes are known
    log_mel = data["spec"] if "spec" in data else data["logmel"][None]
    logits = data["logits"] if "logits" in data else data["logits_fp32"]["general"][:1]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(log_mel), logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("device", ["a", "b", "c", "s1", "s2", "s3"])
def test_of_a_file_with_networks_for_devices_each_is_loaded_by_name(shared, device):
    path = shared("golden/dcase2025/karasin_sys4_checkpoint.ckpt")
    data = torch.load(shared("golden/dcase2025/karasin_sys4.pt"), weights_only=True)
    loaded = load_model(path, f"karasin2025_4_{device}")
    with torch.no_grad():
        logits = loaded.model(data["logmel"][None])
    torch.testing.assert_close(logits, data["logits_fp32"][device][:1], rtol=0, atol=1e-3)
    assert PUBLISHED[f"karasin2025_4_{device}"].file == "karasin2025_4.ckpt"  # one download for all
    both = [(name, path, PUBLISHED[name].within) for name in ("karasin2025_4", f"karasin2025_4_{device}")]
    teachers.check_distinct(both)
    with pytest.raises(CheckpointError, match="same file"):
        teachers.check_distinct([both[1], both[1]])


def test_another_file_under_the_address_of_a_published_one_is_refused(tmp_path):
    with (
        FileServer({"/weights.ckpt": Served(b"something else")}) as server,
        pytest.raises(DownloadError, match="sha256"),
    ):
        resources.published_file("li2025_1", tmp_path, server.url("/weights.ckpt"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_older_names_lead_to_what_took_their_place(old, new):
    if new is None:
        with pytest.raises(ValueError, match=f"{old} is published no more.*passt_dirfms_1"):
            published_name(old)
    else:
        assert published_name(old) == new
        assert new[-1] == old[-1] and ("dir" in new) == ("dir" in old)


def check_golden(data: dict, loaded) -> None:
    """From the waveform to the logits, with the golden weights in the place of the trained ones."""
    assert loaded.scenes == SCENES
    waveform = clip(data["clip_seconds"], data["clip_rate"], data["clip_key"], data["clip_batch"])
    with torch.no_grad():
        log_mel = loaded.frontend(waveform)
        assert list(log_mel.shape) == data["spec_shape"]
        torch.testing.assert_close(loaded.model(log_mel), data["logits"], rtol=0, atol=1e-3)


def test_a_published_cp_resnet_is_fetched_once_and_gives_the_published_logits(served, tmp_path, shared):
    data = torch.load(shared("golden/cpjku_dcase23/e2e_cpresnet_default.pt"), weights_only=True)
    server, folder = served
    server.files["/cpr_128k_fms_1.pt"] = Served(weights(tmp_path, "cp_resnet"))
    check_golden(data, load_teacher_model("cpr_128k_fms_1", "no_project"))
    load_teacher_model("cpr_128k_fms_1", "no_project")
    assert [path for path, _ in server.requests] == ["/cpr_128k_fms_1.pt"]
    assert (folder / "cpr_128k_fms_1.pt").is_file() and (folder / "checksums.json").is_file()
    check_golden(data, load_teacher_model(str(folder / "cpr_128k_fms_1.pt"), "no_project"))  # recognised


@pytest.mark.slow
def test_a_published_passt_gives_the_published_logits(tmp_path, monkeypatch, shared):
    data = torch.load(shared("golden/cpjku_dcase23/e2e_passt.pt"), weights_only=True)
    path = tmp_path / "passt_fms_3.pt"
    torch.save(fill_state(get_model("passt")).state_dict(), path)
    monkeypatch.setattr(teachers, "published_file", lambda name: tmp_path / f"{name}.pt")
    check_golden(data, load_teacher_model("passt_fms_3", "no_project"))
    assert load_teacher_model(str(path), "no_project").model.config.arch == "passt_s_swa_p16_128_ap476"
    path.unlink()  # 0.3 GB


def test_an_html_page_leaves_nothing(served):
    server, folder = served
    server.files["/passt_fms_1.pt"] = Served(b"<!DOCTYPE html><html>sign in</html>", content_type="text/html")
    with pytest.raises(DownloadError, match=r"web page instead of passt_fms_1\.pt"):
        load_teacher_model("passt_fms_1", "p")
    assert not (folder / "passt_fms_1.pt").exists() and not (folder / "checksums.json").exists()


def test_what_does_not_load_is_not_recorded(served, tmp_path):
    """So the real file is accepted once it can be had."""
    server, folder = served
    whole, address = weights(tmp_path, "cp_resnet"), "/cpr_128k_fms_2.pt"
    for content, problem in (
        (whole[:-4000], "damaged"),
        (b'{"message": "rate limit exceeded"}', "text file"),
        (weights(tmp_path, "cp_mobile"), "missing"),
    ):
        server.files[address] = Served(content)
        with pytest.raises(DownloadError, match=rf"not the file that is published.*{problem}.*removed") as caught:
            load_teacher_model("cpr_128k_fms_2", "p")
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
        assert not list(folder.iterdir())
    server.files[address] = Served(whole)
    load_teacher_model("cpr_128k_fms_2", "p")
    assert (folder / "checksums.json").is_file()


def test_a_file_that_is_swapped_later_is_noticed(served, tmp_path):
    server, folder = served
    server.files["/cpr_128k_fms_2.pt"] = Served(weights(tmp_path, "cp_resnet"))
    load_teacher_model("cpr_ms_2", "p")  # the older name
    torch.save(get_model("cp_resnet").state_dict(), folder / "cpr_128k_fms_2.pt")
    with pytest.raises(DownloadError, match=r"cpr_128k_fms_2\.pt has .* instead of"):
        load_teacher_model("cpr_128k_fms_2", "p")


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("cp_mobile", {}, r"missing; in_c\.0\.0\.weight, .* and \d+ more unknown"),
        (
            "cp_resnet",
            {"base_channels": 16, "cut_channels_s3": 18},
            r"\(16, 1, 5, 5\) for \(32, 1, 5, 5\).*and \d+ more",
        ),
        ("cp_resnet", {"n_classes": 527}, r"feed_forward\.0\.weight \(527, 92, 1, 1\) for \(10, 92, 1, 1\)"),
    ],
)
def test_weights_of_another_network_are_listed(served, tmp_path, architecture, options, message):
    server, _ = served
    server.files["/cpr_128k_dirfms_1.pt"] = Served(weights(tmp_path, architecture, **options))
    with pytest.raises(DownloadError, match=rf"cpr_128k_dirfms_1.* is not the cp_resnet.*{message}") as error:
        load_teacher_model("cpr_128k_dirfms_1", "p")
    assert len(str(error.value)) < 1200


def own(path, **options):
    model = fill_state(get_model("cp_resnet", base_channels=8, cut_channels_s3=9, **options))
    parts = {"model": describe(model, MODELS), "frontend": describe(get_frontend("cp_mel"), FRONTENDS)}
    save_checkpoint(path, parts | {"scenes": ["x", "y"]})


def _made(path: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def test_a_name_may_be_a_run_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own(tmp_path / "proj/abcd/checkpoints/last.pt", n_classes=2)
    own(tmp_path / "w.pt", n_classes=2)
    (tmp_path / "proj/empty/checkpoints").mkdir(parents=True)
    assert load_teacher_model("abcd", "proj").scenes == ("x", "y")
    assert load_teacher_model("w.pt", "proj").scenes == ("x", "y")
    for i, path in enumerate(("other/abcd/checkpoints/last.pt", "w.pt")):
        torch.save({"another file": i}, path if path == "w.pt" else _made(path))
    found = find_teachers(["abcd", "other/abcd/checkpoints/last.pt", "w.pt"], "proj")
    assert [source.name for source in found] == ["abcd", "abcd_2", "w"]
    with pytest.raises(
        CheckpointError, match=r"no teacher efgh: .*\(runs in proj: abcd\); published: .*passt_dirfms_1, "
    ):
        find_teacher("efgh", "proj")
    with pytest.raises(CheckpointError, match="published no more"):
        find_teacher("cpr_dir_1", "proj")


def test_all_names_are_checked_before_the_first_download(served):
    server, _ = served
    with pytest.raises(CheckpointError, match="no teacher nobody"):
        find_teachers(["cpr_128k_fms_1", "nobody"], "p")
    assert not server.requests


def test_names_are_told_apart():
    assert unique_names(["a", "b", "a", "a_2", "a"]) == ["a", "b", "a_2", "a_2_2", "a_3"]


def test_teachers_of_other_scenes_are_refused(own_tau, tmp_path):
    own(tmp_path / "w.pt", n_classes=2)
    source = find_teacher(str(tmp_path / "w.pt"), "p")
    with pytest.raises(CheckpointError, match=r"w\.pt knows the scenes x, y; .* has kitchen, office, yard"):
        check_scenes(source.path, source.load(), read_meta(own_tau.root), "take another teacher")
    with pytest.raises(
        CheckpointError, match=r"w\.pt does not take clips of 1000 samples: waveform must be .* with at least"
    ):
        teachers.scorer(source, source.load(), 1000, Machine())


def test_mean_of_logits_and_of_log_probabilities():
    a, b = wave((5, 3), "a", 4.0), wave((5, 3), "b", 4.0)
    torch.testing.assert_close(mean_logits([a, b]), (a + b) / 2)
    torch.testing.assert_close(mean_logits([a, b], [3, 1]), 0.75 * a + 0.25 * b)
    torch.testing.assert_close(mean_logits([a, b], [0, 2]), b)
    geometric = (a.softmax(1) * b.softmax(1)).sqrt().log()
    torch.testing.assert_close(mean_logits([a, b], average="log_probabilities"), geometric)
    # A constant added to a teacher's logits is no opinion; only the mean of log-probabilities ignores it.
    torch.testing.assert_close(mean_logits([a + 50, b], average="log_probabilities"), geometric, rtol=0, atol=1e-5)
    # In float32 the small one would be lost beside the large one.
    assert mean_logits([torch.tensor([[3e8]]), torch.tensor([[5.0]]), torch.tensor([[-3e8]])]).item() == pytest.approx(
        5 / 3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "one weight for each of the 0"),
        (([torch.zeros(2, 3)], [1, 1]), "one weight for each"),
        (([torch.zeros(2, 3)], [0.0]), "not all 0"),
        (([torch.zeros(2, 3)], [-1.0]), ">= 0"),
        (([torch.zeros(2, 3)], [math.nan]), "finite"),
        (([torch.zeros(2, 3), torch.zeros(2, 4)],), "the same clips and classes"),
        (([torch.zeros(2, 3)], None, "median"), "unknown average 'median'"),
    ],
)
def test_what_cannot_be_averaged_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_logits(*arguments)


def test_a_part_file_counts_only_whole_batches(tmp_path):
    rows = wave((10, 3), "rows")
    part = PartFile(tmp_path, "id", (10, 3), batch_size=4)
    part.write(rows[:4])
    part.write(rows[4:8])
    del part
    assert PartFile(tmp_path, "id", (10, 3), 4).n_done == 2
    with (tmp_path / "id.txt").open("a") as file:
        file.write("12ab")  # torn by a kill
    again = PartFile(tmp_path, "id", (10, 3), 4)
    assert again.n_done == 2
    again.write(rows[8:])
    again.logits.flush()
    again = PartFile(tmp_path, "id", (10, 3), 4)
    assert again.n_done == 3 and torch.equal(torch.from_numpy(again.logits[:]), rows)
    again.logits[5] = 0  # never arrived on the disk
    again.logits.flush()
    assert PartFile(tmp_path, "id", (10, 3), 4).n_done == 1
    PartFile.remove_others(tmp_path, ["id"])
    assert len(list(tmp_path.iterdir())) == 2
    PartFile.remove_others(tmp_path, ["other"])
    assert not list(tmp_path.iterdir())
