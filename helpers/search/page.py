"""What a search has found: results.csv, and a page with its best trials, the options that matter, and slices."""

import base64
import csv
import io
import logging
import re
from pathlib import Path
from typing import Any

import jinja2

from datasets.files import replacing
from helpers.search.space import text_of
from helpers.search.study import finished, row_of

log = logging.getLogger(__name__)

N_FOR_IMPORTANCE = 8  # trials with a score
N_COLUMNS = 3  # slices side by side


def write_results(folder: Path, study: Any, objective: str) -> None:
    """Writes results.csv and search.html into the folder of a study."""
    rows = [dict(row_of(trial)) for trial in study.get_trials(deepcopy=False)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(folder / "results.csv") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, autoescape=True
    )
    shown = sorted(rows, key=lambda row: (row["score"] is None, -(row["score"] or 0), row["trial"]))
    page = environment.get_template("search.html.jinja").render(
        name=study.study_name, objective=objective, columns=columns, rows=shown,
        counts={state: sum(row["state"] == state for row in rows) for state in dict.fromkeys(r["state"] for r in rows)},
        importances=importances(study), slices=slices(study, objective),
    )  # fmt: skip
    with replacing(folder / "search.html") as file:
        file.write(page)


def importances(study: Any) -> dict[str, float]:
    """How much of the spread of scores each option explains, largest first; empty with few trials."""
    import optuna

    if len(finished(study)) < N_FOR_IMPORTANCE:
        return {}
    try:
        return optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError) as error:  # as where all scores are the same
        log.info("no importances: %s", error)
        return {}


def slices(study: Any, objective: str) -> str:
    """Score over each option, as a PNG in base64; "" without scores."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trials = finished(study)
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    if not names:
        return ""
    n_rows = -(-len(names) // N_COLUMNS)
    figure = Figure(figsize=(11, 2.8 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(names):
        axes = figure.add_subplot(n_rows, N_COLUMNS, i + 1)
        own = [trial for trial in trials if name in trial.params]
        kind = own[0].distributions[name]
        values = [trial.params[name] for trial in own]
        if hasattr(kind, "choices"):
            values = [kind.choices.index(value) for value in values]
            axes.set_xticks(range(len(kind.choices)), [_label(choice) for choice in kind.choices], rotation=20)
        axes.scatter(values, [trial.value for trial in own], c=[trial.number for trial in own], s=18, cmap="viridis")
        if getattr(kind, "log", False):
            axes.set_xscale("log")
        axes.set_xlabel(name)
        if i % N_COLUMNS == 0:
            axes.set_ylabel(objective)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _label(choice: Any) -> str:
    """A list as its parts below each other."""
    text = text_of(choice)
    return re.sub(r'["\[\]]', "", text).replace(", ", "\n") or "nothing" if text.startswith("[") else text
