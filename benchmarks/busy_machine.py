"""Training on a machine that has other work: OpenMP threads that spin while they wait, beside threads that sleep.

  python benchmarks/busy_machine.py                 two threads, batch 60: alone, then beside two busy programs
  python benchmarks/busy_machine.py --programs 4

*spin* is libgomp's own default, *sleep* never spins, *brief* spins for a moment, as the scripts have it
(helpers/start.py). Each side runs forward and backward
passes of the default student in a process of its own; the sides take turns round by round. The table shows medians over
the rounds: clips a second, and the seconds of CPU that the process took in a second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.start import SPIN_COUNT

SIDES = {
    "spin": {"GOMP_SPINCOUNT": "300000"},
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "brief": {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
}


def work(args: argparse.Namespace) -> tuple[float, float]:
    """Clips, and seconds of CPU, per second."""
    import torch  # not before the environment is set

    from helpers.memory import keep_freed_memory
    from models import get_model

    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    model = get_model("cp_mobile").to(memory_format=torch.channels_last)
    log_mel, target = torch.randn(args.batch_size, 1, 256, 64), torch.arange(args.batch_size) % 10

    def step() -> None:
        torch.nn.functional.cross_entropy(model(log_mel), target).backward()

    step()  # warms up
    n_steps, started, cpu = 0, time.perf_counter(), time.process_time()
    while not n_steps or time.perf_counter() - started < args.seconds:
        step()
        n_steps += 1
    passed = time.perf_counter() - started
    return n_steps * args.batch_size / passed, (time.process_time() - cpu) / passed


def measure(side: str, argv: list[str]) -> tuple[float, float]:
    bare = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, __file__, *argv, "--worker"]
    done = subprocess.run(command, env=bare | SIDES[side], stdout=subprocess.PIPE, text=True, check=True)
    return tuple(json.loads(done.stdout))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--programs", type=int, default=2, help="busy programs beside it, one thread each")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=list(SIDES), help="which to compare (default: all)"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(work(args)))
        return {}
    print(f"{args.threads} threads, batch {args.batch_size}; medians of {args.rounds} rounds")
    print(f"{'beside':<18}{'waiting':<10}{'clips/s':>9}{'CPU s/s':>9}")
    results = {}
    for n_programs in (0, args.programs):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_programs)]
        try:
            rounds = [{side: measure(side, argv) for side in args.sides} for _ in range(args.rounds)]
        finally:
            for process in busy:
                process.kill()
                process.wait()
        for side in args.sides:
            clips, cpu = (statistics.median(values) for values in zip(*(one[side] for one in rounds), strict=True))
            print(f"{f'{n_programs} busy programs':<18}{side:<10}{clips:>9.1f}{cpu:>9.2f}")
            results[f"{side} {n_programs}"] = clips
    return results


if __name__ == "__main__":
    main()
