"""What must happen before torch is imported; every script imports this first.

OpenMP's threads sleep when they have nothing to do. By default they spin, and on a machine that has other work they
take the cores from each other.
"""

import os
import sys

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():  # unless the user chose
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["GOMP_SPINCOUNT"] = "0"


def open_closed_streams() -> None:
    """Puts the null device in the place of a closed standard stream (`2>&-`), which the next opened file would take."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


def _say_interrupted(kind, error, trace, otherwise=sys.excepthook) -> None:
    """Says in one line that Ctrl-C came while modules were imported, which takes seconds."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
    else:
        otherwise(kind, error, trace)


open_closed_streams()
sys.excepthook = _say_interrupted
