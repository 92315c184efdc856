"""Who may import whom; the folders' own names must not be shadowed either."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "models": {"models", "helpers.errors"},
    "datasets": {"datasets", "helpers.errors"},  # which imports nothing: one kind of error for all
    "helpers": {"helpers", "datasets", "models"},
    "benchmarks": {"helpers", "datasets", "models", "benchmarks"},
}
FILES = [path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py")]
SUBMODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
OURS = {*MAY_IMPORT, *(path.stem for path in ROOT.glob("run_*.py"))}


def imported(path: Path, inside_functions: bool = True) -> set[str]:
    """Modules that a file imports, by their full names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner if inner <= SUBMODULES else inner | {node.module}
    return names


def is_below(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def modules() -> dict[str, Path]:
    """Our modules by their full names."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_they_may(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        ours = {name for name in imported(path) if is_below(name, OURS)}
        others = {name for name in ours if not is_below(name, MAY_IMPORT[folder])}
        assert others <= {"helpers"}, path  # of `from helpers.errors import ...`


def test_no_module_needs_itself():
    """Follows what each module imports when it is imported."""
    ours = modules()
    needs = {name: imported(path, inside_functions=False) & ours.keys() for name, path in ours.items()}

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " needs ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(needs[name]):
                walk(other, (*above, name))
            done.add(name)

    done: set[str] = set()
    for name in ours:
        walk(name, ())


# Where a single network, front end, loss or augmentation may be named: its own files, and the tables.
PARTS = {
    "models": {
        r"cp_?mobile": (
            "models/cp_mobile.py", "models/dcase24_baseline.py", "models/__init__.py", "models/published.py",
        ),
        r"cp_?resnet": ("models/cp_resnet.py", "models/__init__.py", "models/published.py"),
        r"^passt$|^Passt[A-Z]|models\.passt": ("models/passt.py", "models/__init__.py", "models/published.py"),
        r"(?<!dragonsearch_)(?<!dragonsearch)tf_?sepnet": (
            "models/tf_sepnet.py", "models/__init__.py", "models/published.py",
        ),
        r"^beats(_\w+)?$|^Beats|models\.beats": ("models/beats.py", "models/beats_checkpoint.py", "models/__init__.py"),
        r"^bc_?resnet|models\.bc_resnet": ("models/bc_resnet.py", "models/__init__.py"),
        r"qualcomm": ("models/qualcomm_bc_resnet.py", "models/__init__.py"),
        r"^cnn3$|^Cnn3(Config)?$|models\.cnn3": ("models/cnn3.py", "models/__init__.py"),
        r"dcase24_?baseline": ("models/dcase24_baseline.py", "models/__init__.py", "models/published.py"),
        r"^cnn6": ("models/cnn6_60k.py", "models/__init__.py", "models/published.py"),
        r"cnn_?gru": ("models/cnn_gru.py", "models/__init__.py", "models/published.py"),
        r"dragonsearch(?!_?mel)": ("models/dragonsearch_", "models/__init__.py"),
    },
    "models/frontends": {  # a network names the one that it takes by default
        r"cp_?mel|dcase24_?mel|sp4asc_?mel|dragonsearch_?mel|cnn3_?mel|kaldi_?fbank": ("models/",),
    },
    "helpers/augment": {
        r"time_?roll|freq_?mix_?style|spec_?mask|share_?mask|device_?impulse_?response|mix_?up|pitch_?shift|spec_?stripes|GainConfig"
        : ("helpers/augment/",),
    },
    "helpers/losses": {r"distillation|CrossEntropy|^[Ff]ocal": ("helpers/losses/",)},
}  # fmt: skip


@pytest.mark.parametrize("kind", PARTS)
def test_no_part_is_named_outside_its_file_and_table(kind):
    """In code, that is: names and strings that are no documentation."""
    for path in [*FILES, *ROOT.glob("run_*.py")]:
        if path.relative_to(ROOT).parts[0] == "benchmarks":
            continue
        names = set(words_of_code(path))
        for pattern, places in PARTS[kind].items():
            if not str(path.relative_to(ROOT)).startswith(places):
                named = {name for name in names if re.search(pattern, name, re.I)}
                assert not named, path


def words_of_code(path: Path) -> Iterator[str]:
    """Names of a file, and its strings but for docstrings and messages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+", node.value):
            yield node.value


def test_no_script_imports_another():
    for path in ROOT.glob("run_*.py"):
        assert not {name for name in imported(path) if name.startswith("run_")}, path


def test_torchaudio_imports_beside_this_torch():
    import torchaudio

    assert torchaudio.compliance.kaldi.fbank is not None
