"""The page that every evaluation leaves: one HTML file without scripts and requests, from `templates/page.html`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from datasets.files import replacing
from helpers.data import Data
from helpers.evaluate.scoring import Compared
from helpers.metrics import score
from helpers.report import sections
from helpers.report.sections import HERE, Entry, Section


@dataclass(frozen=True)
class Page:
    title: str
    about: str
    note: str
    numbers: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def write_page(
    folder: Path, data: Data, entries: Mapping[str, Entry], title: str, *,
    compared: Mapping[str, Compared] | None = None, log_mel: Callable[[Tensor], Tensor] | None = None,
    command: Sequence[str] = (), note: str = "",
) -> Path:  # fmt: skip
    """Writes `folder`/report.html, and its figures beside it as PNG files.

    Args:
        entries: by name; the first is the one that the others are compared with.
        compared: what `helpers.evaluate.scoring.compare` gives; None leaves intervals and differences out.
        log_mel: spectrograms (batch, 1, mel, time) of waveforms (batch, sample), for the clips that are shown; None
            shows none.
        command: that made the page, to repeat it.
        note: what a reader must know before the numbers.

    Raises:
        OSError: when the folder cannot be written to.
    """
    scored = {name: score(data.test, entry.logits, data.groups) for name, entry in entries.items()}
    first = next(iter(scored))
    numbers = [("macro accuracy", f"{100 * scored[first]['macro_avg_acc']:.2f} %"),
               ("accuracy", f"{100 * scored[first]['acc']:.2f} %"), ("log loss", f"{scored[first]['loss']:.3f}"),
               ("test clips", f"{len(data.test):,}")]  # fmt: skip
    parts = [
        sections.overview(data, entries, scored, compared or {}),
        sections.by_group("Scenes", "scene", data, entries, scored),
        sections.by_group("Recording devices", "device", data, entries, scored, [sections.bars(folder, data, scored)]),
        sections.cells(data, entries),
        sections.confusions(folder, data, entries),
        sections.by_group("Cities", "city", data, entries, scored),
        sections.sureness(folder, data, entries),
        sections.costs(entries),
        sections.curves(folder, entries),
        sections.hardest(data, entries, log_mel),
        sections.how(entries, command),
    ]
    about = f"{data.meta.root.name}: {len(data.test):,} clips of the test part, {len(data.meta.scenes)} scenes."
    page = Page(title, about, note, numbers, [section for section in parts if section is not None])
    path = folder / "report.html"
    with replacing(path) as file:
        file.write(render(page))
    return path


def render(page: Page) -> str:
    """The page as HTML; whatever names hold is text there."""
    import jinja2  # slow to import, and not needed for --help

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html").render(page=page)
