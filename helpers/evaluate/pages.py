"""From what was scored to the page about it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from helpers.data import Data
from helpers.evaluate.scoring import Compared
from helpers.evaluate.systems import About, System
from helpers.report.page import write_page
from helpers.report.sections import Entry
from models import FRONTENDS, get_frontend


def write_page_of(
    folder: Path, data: Data, systems: Sequence[System], answers: Mapping[str, Tensor],
    compared: Mapping[str, Compared], command: Sequence[str], note: str = "",
) -> Path:  # fmt: skip
    """Writes `folder`/report.html about all answers, with what is known of the systems; its path.

    Args:
        answers, compared: as `answers_of` and `compare` of scoring.py give them.
    """
    about = {system.name: system.about() for system in systems}
    entries = {}
    for name, logits in answers.items():
        known = about.get(name.removesuffix("_by_device"), About())
        entries[name] = Entry(logits, known.options, known.cost, known.history)
    frontend = next((one.frontend for one in about.values() if one.frontend is not None), None)
    if data.store is not None and (frontend is None or frontend.sample_rate != data.store.sample_rate):
        frontend = get_frontend(next(iter(FRONTENDS)), sample_rate=data.store.sample_rate).eval()
    title = f"Evaluation of {systems[0].name}" + (f" and {len(systems) - 1} more" if len(systems) > 1 else "")
    return write_page(folder, data, entries, title, compared=compared, log_mel=frontend, command=command, note=note)
