"""What must happen before torch is imported; every script imports this first.

OpenMP's threads that wait for each other spin for a moment and then sleep. By default libgomp's spin for long, and on a
machine that has other work they take the cores from each other; those that sleep at once lose time on a quiet machine
(benchmarks/busy_machine.py).

Imports make hundreds of thousands of objects and no garbage: looking for some costs a third of their time. `cli.run`
exempts them from every later search, and goes back to the usual thresholds.
"""

import gc
import os
import sys

SPIN_COUNT = 1000  # turns of libgomp's waiting loop
THRESHOLDS = gc.get_threshold()

gc.set_threshold(1_000_000)

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():  # unless the user chose
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


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
