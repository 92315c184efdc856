"""Who may import whom; the folders' own names must not be shadowed either."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "models": {"models"},
    "datasets": {"datasets"},
    "helpers": {"helpers", "datasets", "models"},
    "benchmarks": {"helpers", "datasets", "models", "benchmarks"},
}
OURS = {*MAY_IMPORT, *(path.stem for path in ROOT.glob("run_*.py"))}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_they_may(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) & OURS <= MAY_IMPORT[folder], path


def test_no_script_imports_another():
    for path in ROOT.glob("run_*.py"):
        assert not {name for name in imported(path) if name.startswith("run_")}, path


def test_torchaudio_imports_beside_this_torch():
    import torchaudio

    assert torchaudio.compliance.kaldi.fbank is not None
