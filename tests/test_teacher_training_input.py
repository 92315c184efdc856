"""What can be wrong on the command line of a teacher's training: one line, exit status 2, nothing written."""

from pathlib import Path

import pytest
import torch

from models import get_model
from tests.test_teacher_training import SMALL, make_project, outcome, passt_bytes, work_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("teachers"))


@pytest.fixture
def here(project, tmp_path, monkeypatch) -> Path:
    return work_in(tmp_path, project, monkeypatch)


@pytest.mark.parametrize(
    ("teacher", "extra", "message"),
    [
        ("beats", ["--pretrained", "auto"], "--pretrained must name a file of weights for BEATs"),
        ("beats", ["--pretrained", "auto"], "BEATs_iter3_plus_AS2M.pt and BEATs_iter3_plus_AS2M_finetuned"),
        (
            "beats",
            ["--pretrained", "nope.pt"],
            "nope.pt: there is no such file and no such run (runs in DCASE23_Task1: ",
        ),
        ("beats", ["--pretrained", "tau/meta.csv"], "tau/meta.csv is a text file"),
        ("beats", ["--pretrained", "page.pt"], "page.pt is a web page"),
        ("beats", ["--pretrained", "DCASE23_Task1/passt/checkpoints/last.pt"], "holds a passt network"),
        ("passt", ["--pretrained", "resnet.pt"], "resnet.pt holds a cp_resnet network, --model is passt"),
        ("passt", ["--pretrained", "tensor.pt"], "tensor.pt holds no checkpoint but a Tensor"),
        ("passt", ["--pretrained", "others.pt"], "others.pt holds none of the networks cp_mobile, "),
        ("passt", ["--pretrained", "passt.pt", "--depth", "2"], "passt.pt: the weights do not fit this Passt: "),
        ("passt", ["--pretrained", "passt.pt", "--depth", "2"], "blocks.1.norm1.weight, blocks.1.norm1.bias, "),
        ("passt", ["--pretrained", "passt.pt", "--input_tdim", "120"], "time_new_pos_embed (1, 16, 1, 99) for "),
        ("passt", ["--pretrained", "auto", "--arch", "passt_deit_bd_p16_384"], "has no weights from AudioSet"),
        ("passt", ["--freeze", "99"], "n_layers to freeze must be in 0 .. 1, or None for all, got 99"),
        ("beats", ["--freeze", "x"], "--freeze takes a number of layers, all or none, got x"),
        ("beats", ["--freeze", "-1"], "--freeze takes a number of layers, all or none, got -1"),
        ("cp_resnet", ["--freeze", "1"], "--freeze is for transformers; cp_resnet learns as a whole"),
        ("cp_resnet", ["--pretrained", "auto"], "cp_resnet has no weights of its own to start from"),
        ("cp_resnet", ["--pretrained", "x"], "published as cp_resnet: li2025_teacher, cpr_128k_dirfms_1, "),
        ("cp_resnet", ["--model", "resnet50"], "choose from 'cp_mobile', 'cp_resnet', 'passt', 'beats'"),
        ("cp_resnet", ["--s_patchout_f", "3"], "unrecognized arguments: --s_patchout_f 3"),
        ("cp_resnet", ["--cut_channels_s3", "40"], "stage 3 has -8 channels: lower cut_channels_s3"),
        ("cp_resnet", ["--n_classes", "4"], "--n_classes 4, but tau has 10 scenes"),
        (
            "cp_resnet",
            ["--teacher_logits", "tensor.pt"],
            "--teacher_logits needs a loss that learns from them",
        ),
        ("cp_resnet", ["--kd_lambda", "0.5"], "no teacher logits are known for tau"),
        ("cp_resnet", ["--dataset_dir", "nowhere"], "nowhere/meta.csv is missing"),
        ("cp_resnet", ["--beta2", "1"], "--beta2: must be >= 0 and < 1"),
        ("cp_resnet", ["--hop_size", "2000"], "cannot take these clips: log_mel must have at least 17 mel bands"),
        (
            "cp_resnet",
            ["--n_fft", "65536"],
            "take these clips: waveform must be (batch, sample) with at least 32770 samples",
        ),
        ("passt", ["--n_mels", "64"], "cannot take these clips: log_mel must be (batch, 1, 32, time)"),
        ("passt", ["--s_patchout_t", "10"], "leaves nothing of the 2 x 9 patches of these clips"),
        ("passt", ["--run_id", "resnet"], "run resnet already exists in DCASE23_Task1"),
        ("passt", ["--run_id", "a/b"], "must be letters, digits, '.', '_' or '-', got 'a/b'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(here, monkeypatch, capsys, teacher, extra, message):
    Path("page.pt").write_bytes(b"<!doctype html><html>404 Not Found</html>")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({"other.weight": torch.zeros(3)}, "others.pt")
    torch.save(get_model("cp_resnet", base_channels=8, cut_channels_s3=8).state_dict(), "resnet.pt")
    passt_bytes("passt.pt")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    run_id = [] if "--run_id" in extra else ["--run_id", "new"]
    line = outcome([*SMALL[teacher], *run_id, *extra], monkeypatch, capsys)
    assert message in line
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nope"], "no run nope in DCASE23_Task1; there is passt, resnet, student"),
        (["--resume", "resnet", "--model", "passt"], "--model cannot change when a run is resumed"),
        (["--resume", "passt", "--freeze", "1"], "--freeze cannot change when a run is resumed"),
        (["--resume", "resnet", "--cropped"], "--cropped cannot change when a run is resumed"),
        (["--resume", "resnet", "--config", "x.yaml"], "--config means nothing with --resume"),
        (["--resume", "resnet", "--dataset_dir", "own"], "; now kitchen, office, yard)"),
        (["--resume", "passt", "--n_heads", "4"], "--n_heads cannot change when a run is resumed"),
    ],
)
def test_runs_that_cannot_go_on_this_way_are_one_line(here, monkeypatch, capsys, arguments, message):
    before = {path: path.read_bytes() for path in Path("DCASE23_Task1").rglob("*") if path.is_file()}
    assert message in outcome(arguments, monkeypatch, capsys)
    assert {path: path.read_bytes() for path in Path("DCASE23_Task1").rglob("*") if path.is_file()} == before
