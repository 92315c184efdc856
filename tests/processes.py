"""Processes of one group as threads of one process: quick, and with everything a test can look at."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from helpers.distributed import Processes


@dataclass(frozen=True)
class Threads(Processes):
    values: list[Any] = field(default_factory=list)  # of all ranks
    barrier: threading.Barrier = None

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait()
        gathered = list(self.values)
        self.barrier.wait()
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        return sum(self.gather(values))

    def largest(self, number: int) -> int:
        return max(self.gather(number))


def together(n: int, script: ModuleType, arguments: list[str], monkeypatch) -> list[Any]:
    """Calls a script's main as n processes would; what it returns, or raises, in each."""
    values, barrier, ranks = [None] * n, threading.Barrier(n, timeout=60), threading.local()
    monkeypatch.setattr("helpers.machine.join_processes", lambda _: Threads(ranks.rank, n, values, barrier))

    def main(rank: int) -> Any:
        ranks.rank = rank
        try:
            return script.main(arguments)
        except BaseException as error:
            barrier.abort()  # a process that ends ends the others
            return error

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(main, range(n)))
