"""CochlScene in TAU's layout: 13 scenes of its own, for pre-training.

Source: I.-Y. Jeong, J. Park, "CochlScene: Acquisition of acoustic scene data using crowdsourcing", APSIPA 2022,
https://arxiv.org/abs/2211.02289; https://zenodo.org/records/7080122, Creative Commons Attribution-ShareAlike 3.0.

    <root>/{Train,Val,Test}/<Scene>/<Scene>_user<user>_<recording>_<piece>.wav     10 s, 44.1 kHz, mono

    <out>/audio/<Scene>-cochlscene-user<user>-<recording>_<piece>-<k>-phone.wav    1 s, k from 0 to 9

What kind of phone recorded is not told, so there is one recording device. The column `recording` of meta.csv names the
user: recordings that are held out are all of some users. Train is the training part and Test the test part; the files
of Val are in meta.csv and in evaluation_setup/fold1_validate.csv, but in neither part.
"""

import hashlib
import logging
import re
from pathlib import Path

from datasets.audio import read_format
from datasets.files import replacing
from datasets.segments import N_SEGMENTS, Clip, cut_clips, segment_name, write_table, writing_to
from datasets.tau import META_COLUMNS, RECORDING_COLUMN, DataError

log = logging.getLogger(__name__)

PAGE = "https://zenodo.org/records/7080122"
PARTS = {"Train": "fold1_train.csv", "Val": "fold1_validate.csv", "Test": "fold1_evaluate.csv"}
CITY, DEVICE = "cochlscene", "phone"
FILE = re.compile(r"(?P<scene>[A-Za-z]+)_(?P<user>user\d+)_(?P<recording>\d+)_(?P<piece>\d+)\.wav")
README = f"""# CochlScene, cut into segments of one second

By Il-Young Jeong and Jeongsoo Park, "CochlScene: Acquisition of acoustic scene data using crowdsourcing", APSIPA 2022,
{PAGE}, licensed under Creative Commons Attribution-ShareAlike 3.0
(https://creativecommons.org/licenses/by-sa/3.0/). Changes: each file of ten seconds was cut into ten, no sample was
touched, and named as TAU Urban Acoustic Scenes 2022 Mobile names its clips. What is passed on of it keeps that license.
"""


def convert_cochlscene(root: Path, out: Path, progress: bool = True) -> int:
    """Writes CochlScene as a data set in TAU's layout; returns the number of segments.

    Goes on where an earlier run stopped; meta.csv is written last.

    Args:
        root: the folder of Train, Val and Test, or the one above it.
        out: folder of the new data set.

    Raises:
        DataError: for folders, names and clips that do not fit, and for a folder that holds something else.
    """
    import pandas

    rows, clips, n_odd = [], [], 0
    for part, files in find_files(root).items():
        for path, found in files:
            place = f"{CITY}-{found['user']}"
            whole = f"audio/{found['scene']}-{place}-{found['recording']}_{found['piece']}-{DEVICE}.wav"
            form = read_format(path)
            n_seconds = min(N_SEGMENTS, form.n_frames // form.sample_rate)
            n_odd += form.n_frames != N_SEGMENTS * form.sample_rate
            names = [segment_name(whole, k) for k in range(n_seconds)]
            rows += [(part, name, found["scene"], place, DEVICE, found["user"]) for name in names]
            if names:
                clips.append(Clip(path, [out / name for name in names], is_whole=False))
    if n_odd:
        log.warning("%d files are not ten seconds long; of these the whole seconds are kept, ten at most", n_odd)
    table = pandas.DataFrame(rows, columns=["part", *META_COLUMNS, RECORDING_COLUMN])
    digest = hashlib.sha256("\n".join(table.part + table.filename).encode()).hexdigest()[:16]
    with writing_to(out, "segments of CochlScene", digest):
        cut_clips(clips, progress)
        with replacing(out / "README.md") as file:
            file.write(README)
        for part, name in PARTS.items():
            write_table(out / "evaluation_setup" / name, table[table.part == part][["filename", "scene_label"]])
        write_table(out / "meta.csv", table.drop(columns="part"))
    return len(table)


def find_files(root: Path) -> dict[str, list[tuple[Path, re.Match]]]:
    """The files of each part, sorted by name, and what their names say.

    Raises:
        DataError: when a part is missing or a name does not fit.
    """
    root = next((folder for folder in (root, root / "CochlScene") if (folder / "Train").is_dir()), root)
    found: dict[str, list[tuple[Path, re.Match]]] = {}
    for part in PARTS:
        if not (root / part).is_dir():
            raise DataError(
                f"{root / part} is missing: name the extracted CochlScene, which holds {', '.join(PARTS)} ({PAGE})"
            )
        found[part] = []
        for path in sorted((root / part).glob("*/*.wav")):
            if path.name.startswith("."):  # what Macs leave beside files
                continue
            name = FILE.fullmatch(path.name)
            if name is None or name["scene"] != path.parent.name:
                raise DataError(f"{path} is not named <Scene>_user<user>_<recording>_<piece>.wav after its folder")
            found[part].append((path, name))
        if not found[part]:
            raise DataError(f"{root / part} holds no <Scene>/*.wav: extract CochlScene again ({PAGE})")
    return found
