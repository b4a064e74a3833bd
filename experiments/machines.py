"""Time and traffic of a step on many machines, on paper, from pieces that are measured here: ZO_OPTIMIZATION_README.md.

python experiments/machines.py 1B            (11 GiB of memory, some minutes on two cores; 20M takes seconds)

A step of q queries on N machines is q/N queries measured on each, one all-gather, and the whole update on each. A query and
its part of the update take time in proportion to the model, so 7B is 1B scaled by its parameters.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reproduce_zo_paper as zo

zo.tune_process()  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402

import test_zo_optimization as benchmark  # noqa: E402

MACHINES, QUERIES = 64, 4096
TARGETS = {"1B": 1.0, "7B": 7.0}  # billions of parameters
FAMILIES = {
    "gaussian, in place": ("gaussian", 0),
    "rademacher, batched by 4": ("rademacher", 4),
    "low rank, batched by 4": ("lowrank", 4),
}
GATHERS = 300


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes: the second time, the first one warms up."""
    call()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def pieces(b: benchmark.Bench, name: str, group: int) -> tuple[float, float]:
    """Seconds of measuring one query, and of its part of the update."""
    family = zo.Isotropic(name)
    measured = b.queries(family, group or 1)
    measuring = seconds(lambda: b.estimate(measured, group)) / measured.q
    updated = b.queries(family, zo.FACTORS_AT_ONCE if name == "lowrank" else 2)
    outs, none = [tensor.matrix for tensor in b.tensors], np.full(updated.q, 1e-12)
    updating = seconds(lambda: zo.add_directions(outs, b.tensors, updated, none, b.workers)) / updated.q
    return measuring, updating


def gather(rank: int, size: int, port: int, answer: multiprocessing.Queue) -> None:
    """One of `size` processes on this machine: the median seconds of an all-gather of what 64 queries measure."""
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, size, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    mine = torch.zeros(1 + 2 * QUERIES // MACHINES, dtype=torch.float64)
    everyone, took = [torch.empty_like(mine) for _ in range(size)], []
    for _ in range(GATHERS):
        began = time.perf_counter()
        torch.distributed.all_gather(everyone, mine)
        took.append(time.perf_counter() - began)
    if rank == 0:
        answer.put(statistics.median(took))
    torch.distributed.destroy_process_group()


def gather_seconds(size: int, port: int) -> float:
    """What `gather` takes with `size` processes."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    processes = [context.Process(target=gather, args=(rank, size, port, answer)) for rank in range(size)]
    for process in processes:
        process.start()
    found = answer.get()
    for process in processes:
        process.join()
    return found


def main(size: str) -> None:
    """Measures, and prints the pieces and the extrapolation."""
    gathers = {n: gather_seconds(n, 29750 + n) for n in (2, 4)}
    print(
        "all-gather of 129 doubles on this machine: " + ", ".join(f"{n} processes {t * 1e3:.2f} ms" for n, t in gathers.items())
    )
    hop = gathers[2]  # the ring takes N - 1 such turns
    payload = 8 * (1 + 2 * QUERIES // MACHINES)
    with benchmark.bench(benchmark.sized_model(size), 4, 128) as b:
        parameters = sum(tensor.parameter.numel() for tensor in b.tensors) / 1e9
        forward = seconds(b.loss)
        print(
            f"{size}: {parameters:.3f}B parameters, a forward pass of 4 x 128 tokens {forward:.3f} s, {torch.get_num_threads()} threads\n"
        )
        print(
            "| directions | model | a query, s | its update, s | step of 64, s | measuring | update | exchange | step of 1, s | gain |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        for name, (family, group) in FAMILIES.items():
            measuring, updating = pieces(b, family, group)
            for target, billions in TARGETS.items():
                scale = billions / parameters
                query, update = measuring * scale, updating * scale
                parts = QUERIES / MACHINES * query, QUERIES * update, (MACHINES - 1) * hop
                step, alone = sum(parts), QUERIES * (query + update)
                cells = [
                    f"{query:.2f}",
                    f"{update:.3f}",
                    f"{step:.0f}",
                    *(f"{part / step:.1%}" for part in parts),
                    f"{alone:.0f}",
                ]
                print(f"| {name} | {target} | " + " | ".join([*cells, f"{alone / step:.1f} x"]) + " |", flush=True)
    print(
        f"\nbytes that leave a machine in a step: {payload} to each of {MACHINES - 1}, {payload * (MACHINES - 1) / 1e3:.1f} kB in all"
    )
    for target, billions in TARGETS.items():
        ring = 2 * (MACHINES - 1) / MACHINES * 4 * billions
        print(f"a float32 gradient's all-reduce, {target}: {ring:.1f} GB from each machine")


if __name__ == "__main__":
    main(*sys.argv[1:])
