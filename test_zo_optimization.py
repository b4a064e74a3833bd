"""Benchmarks and tests of the zeroth-order estimator of reproduce_zo_paper.py.

As a program it measures five groups and prints each figure beside its target; under pytest the same functions assert,
at a scale that takes a minute and a half on two cores, and nothing depends on the time.

    python test_zo_optimization.py                              all groups, about a quarter of an hour on two cores
    python test_zo_optimization.py --full --json tables.json    q = 8, 16, 32 and models up to 1B (24 GiB of memory)
    python test_zo_optimization.py --only speed --queries 8 --repetitions 9 --profile
    pytest test_zo_optimization.py

    speed           seconds of one step, update included, over those of its 2q forward passes alone
    ranks           seconds of a step of two processes, a thread each, over those of one; bytes that are sent
    memory          peak beyond the parameters, by allocator statistics and by the process's resident size
    equivalence     in place against batched, drift of the weights, and the signal-to-noise of c over epsilon
    compatibility   calls without the new arguments, commands without the new flags, models of other kinds

Sections: Material, Tables, Speed, Ranks, Memory, Equivalence, Signal to noise, Compatibility, Program, Tests.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import ctypes
import functools
import gc
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import reproduce_zo_paper as zo

MEMORY_CHILD = "--memory_child"
if "torch" not in sys.modules and MEMORY_CHILD not in sys.argv:
    zo.tune_process()  # before torch is imported, as the script does

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

CPU = torch.device("cpu")
FAMILIES = {
    "gaussian": zo.Isotropic("gaussian"),
    "rademacher": zo.Isotropic("rademacher"),
    "lowrank r=1": zo.Isotropic("lowrank", 1),
    "lowrank r=2": zo.Isotropic("lowrank", 2),
}


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Material: models, token ids, scalars                                                             │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


class StandInTokenizer:
    """What `build_model` asks of a tokenizer: benchmarks use random token ids and need no data."""

    bos_token_id = eos_token_id = 0

    def __init__(self, size: str):
        self.size = 4096 if size == "tiny" else 50257

    def __len__(self) -> int:
        return self.size


def sized_model(size: str, seed: int = 0) -> torch.nn.Module:
    """The script's own model of that size."""
    return zo.build_model(zo.Config(model_size=size, seed=seed), StandInTokenizer(size))


COMMON = {"vocab_size": 211, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "attn_implementation": "eager"}
LLAMA_LIKE = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2_LIKE = {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT_LIKE = {**COMMON, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_MODELS = {
    "Llama": ("Llama", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "GPT-2": ("GPT2", GPT2_LIKE),
    "Qwen2": ("Qwen2", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "OPT": ("OPT", {**OPT_LIKE, "max_position_embeddings": 64, "word_embed_proj_dim": 24}),
    "Llama, biases, untied head": (
        "Llama",
        {**LLAMA_LIKE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "Phi, head with bias": ("Phi", {**LLAMA_LIKE, "tie_word_embeddings": False}),
}


def small_model(name: str, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A small model of transformers; its weights are a function of its shape, biases included."""
    kind, settings = SMALL_MODELS.get(name, (name, LLAMA_LIKE))
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.to(dtype).eval()


def random_ids(vocabulary: int, rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids, int64 [rows, tokens]."""
    return torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def all_tensors(model: torch.nn.Module) -> list[zo.Tensor]:
    return zo.trainable_tensors(model.named_parameters())


def small_blocks() -> contextlib.AbstractContextManager:
    """Blocks and tiles so small that small models have several of each."""
    sizes = {"TILE_TOKENS": 16, "TILE_VOCABULARY": 64, "SLAB_VOCABULARY": 64}
    return mock.patch.multiple(zo, BLOCK_ELEMENTS={"cpu": 1 << 10}, BLOCK_ELEMENTS_ACCELERATOR=1 << 10, **sizes)


class Bench:
    """A model, its tensors, one batch that every query sees, and workers: what a step needs."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, workers: zo.Workers, compute_dtype: torch.dtype | None = None):
        self.model, self.ids, self.workers = model, ids, workers
        self.tensors = all_tensors(model)
        self.objective = zo.Objective(model, workers, compute_dtype)

    def batch(self, query: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ids, self.ids

    def queries(self, family: zo.Isotropic, q: int, epsilon: float = 1e-3, step: int = 0) -> zo.Queries:
        return zo.Queries(family, 0, step, q, epsilon)

    def estimate(self, queries: zo.Queries, group: int = 0, grid: zo.Grid | None = None) -> zo.Estimate:
        """In place (group 0) or batched."""
        return zo.projected_gradients(self.objective, self.tensors, self.batch, queries, group, grid)

    def grid(self, queries: zo.Queries) -> zo.Grid:
        """Settles the weights, as a step does before it measures."""
        return zo.Grid(self.tensors, queries.epsilon, queries.family.largest, self.workers)

    def loss(self) -> float:
        return self.objective.losses(self.ids, self.ids).item()

    def optimizer(self, name: str = "sgd") -> zo.Optimizer:
        return zo.Optimizer(name, self.tensors, 0.0, zo.outer_parameters(self.model), self.workers)

    def step(self, family: zo.Isotropic, group: int, q: int, number: int, optimizer: zo.Optimizer) -> None:
        """One step as the trainer does it: settle, measure, update."""
        queries = self.queries(family, q, step=number)
        grid = self.grid(queries)
        estimate = self.estimate(queries, group, grid)
        optimizer.apply_estimate(queries, estimate.projected_grads, LEARNING_RATE)


LEARNING_RATE = 1e-7  # an update costs the same at any rate; this one leaves the model where it is


@contextlib.contextmanager
def bench(
    model: torch.nn.Module, rows: int, tokens: int, compute_dtype: torch.dtype | None = None, device: torch.device = CPU
) -> Iterator[Bench]:
    """A Bench on random tokens, for as long as its workers live."""
    with zo.Workers(device) as workers:
        yield Bench(model.to(device), random_ids(model.config.vocab_size, rows, tokens).to(device), workers, compute_dtype)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Tables                                                                                           │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘
# A table is a list of rows, a row a dict from column to value; `target` and `result` are columns like others.


def judged(value: float, at_most: float, shown: str | None = None) -> dict[str, str]:
    """The two last columns of a row that has a target."""
    return {"target": f"<= {shown or f'{at_most:g}'}", "result": "met" if value <= at_most else "short"}


def joined_targets(*parts: dict[str, str]) -> dict[str, str]:
    """Several targets of one row in its two last columns."""
    return {"target": "; ".join(part["target"] for part in parts), "result": "; ".join(part["result"] for part in parts)}


def cell(value) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if value == 0:
        return "0"
    return f"{value:.1e}" if not 1e-3 <= abs(value) < 1e5 else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def print_table(title: str, about: str, rows: list[dict]) -> None:
    """An aligned table: text to the left, numbers to the right."""
    print(f"\n{title}\n{about}\n", flush=True)
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    cells = [[cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    number = [all(isinstance(row.get(column), (int, float, type(None))) for row in rows) for column in columns]

    def line(values: Sequence[str]) -> str:
        return "  ".join(v.rjust(w) if n else v.ljust(w) for v, w, n in zip(values, widths, number)).rstrip()

    for values in (columns, ["-" * width for width in widths], *cells):
        print("  " + line(values), flush=True)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Speed                                                                                            │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘
# Every repetition runs every contender once, in an order that rotates, in one process; a first, shorter one warms up
# and is not counted. Seconds are medians; ratios are medians of the ratios inside one repetition, so that a machine
# that is slower for a while does no harm.

FORWARD, TEXTBOOK, IN_PLACE = "2q forward passes alone", "textbook MeZO", "in place, gaussian"
SPEED_ABOUT = (
    "One step of the 20M model, batch 4 x 128, update included. Targets, over the forward passes: in place 1.6, batched\n"
    "gaussian 1.30, batched rademacher 1.15, batched low rank 1.03; batched dense over in place 0.85; low rank over MeZO 0.5."
)


def textbook_mezo_step(bench: Bench, q: int, number: int, learning_rate: float = LEARNING_RATE) -> None:
    """MeZO as published (Malladi et al. 2023, Algorithms 1 and 2 with n = q), z materialised a parameter at a time.

    theta += eps z, loss, theta -= 2 eps z, loss, theta += eps z; then theta -= (lr / q) c_i z_i, z drawn again each time.
    """
    epsilon, generator = 1e-3, torch.Generator(bench.objective.device)
    parameters = [tensor.parameter.detach() for tensor in bench.tensors]

    def perturb(seed: int, scale: float) -> None:
        generator.manual_seed(seed)
        for theta in parameters:
            z = torch.normal(0.0, 1.0, theta.shape, generator=generator, device=theta.device)
            theta.add_(z, alpha=scale)

    scalars = []
    for query in range(q):
        seed = number * q + query
        perturb(seed, epsilon)
        plus = bench.loss()
        perturb(seed, -2 * epsilon)
        minus = bench.loss()
        perturb(seed, epsilon)
        scalars.append((seed, (plus - minus) / (2 * epsilon)))
    for seed, projected_grad in scalars:
        perturb(seed, -learning_rate / q * projected_grad)


def contenders(bench: Bench) -> dict[str, tuple[int, Callable[[int, int], None]]]:
    """What is timed: name -> (queries in one forward pass, or 0; a step of q queries with that number)."""
    optimizer = bench.optimizer()

    def forwards(q: int, number: int) -> None:
        for _ in range(2 * q):
            bench.loss()

    def estimator(family: str, group: int) -> Callable[[int, int], None]:
        return lambda q, number: bench.step(FAMILIES[family], group, q, number, optimizer)

    steps = {FORWARD: (0, forwards), TEXTBOOK: (0, functools.partial(textbook_mezo_step, bench))}
    steps[IN_PLACE] = (0, estimator("gaussian", 0))
    for family, group in itertools.product(("gaussian", "rademacher", "lowrank r=1"), (4, 8)):
        steps[f"batched by {group}, {family}"] = (group, estimator(family, group))
    return steps


def speed_targets(name: str, over_forward: float, over_mezo: float, over_in_place: float) -> dict[str, str]:
    """The targets of one contender."""
    if name == IN_PLACE:
        return judged(over_forward, 1.60, "1.60 fwd")
    if "lowrank" in name:
        return joined_targets(judged(over_forward, 1.03, "1.03 fwd"), judged(over_mezo, 0.5, "0.50 MeZO"))
    if "batched" in name:
        bound = 1.30 if "gaussian" in name else 1.15
        return joined_targets(judged(over_forward, bound, f"{bound:.2f} fwd"), judged(over_in_place, 0.85, "0.85 in place"))
    return {"target": "", "result": ""}


def bfloat16_hardware() -> bool:
    """Whether products in bfloat16 run on this CPU's own instructions."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def speed_table(size: str, q: int, repetitions: int, dtype: torch.dtype, rows: int = 4, tokens: int = 128) -> list[dict]:
    """Seconds of a step of every contender at one q and compute dtype."""
    seconds = collections.defaultdict(list)
    with bench(sized_model(size), rows, tokens, dtype) as b:
        steps = contenders(b)
        for group, step in steps.values():
            step(group or 1, 0)
        names = list(steps)
        for repetition in range(repetitions):
            turn = repetition % len(names)
            for name in names[turn:] + names[:turn]:
                began = time.perf_counter()
                steps[name][1](q, repetition + 1)
                seconds[name].append(time.perf_counter() - began)

    def over(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[base]))

    table = []
    for name in names:
        ratios = [over(name, base) for base in (FORWARD, TEXTBOOK, IN_PLACE)]
        row = {"q": q, "dtype": str(dtype)[6:], "step": name, "seconds": statistics.median(seconds[name])}
        row |= dict(zip(("/ forward", "/ MeZO", "/ in place"), ratios))
        table.append(row | speed_targets(name, *ratios))
    return table


def profile_table(size: str, repetitions: int, q: int = 8, group: int = 4, rows: int = 4, tokens: int = 128) -> list[dict]:
    """Where the milliseconds of a step go: each piece timed alone (median), times how often a step runs it."""
    with bench(sized_model(size), rows, tokens) as b:
        objective, tensors, workers = b.objective, b.tensors, b.workers
        queries = {family: b.queries(FAMILIES[family], group) for family in ("gaussian", "rademacher", "lowrank r=1")}
        grid, positions = b.grid(queries["gaussian"]), itertools.cycle((1, 0))
        blocks = [(tensor, block) for tensor in tensors for block in tensor.blocks]
        hidden = {count: torch.randn(count, rows * (tokens - 1), b.model.config.hidden_size) for count in (1, 2 * group)}
        targets = {count: torch.zeros(count, rows * (tokens - 1), dtype=torch.int64) for count in hidden}

        def draws(family: str) -> None:
            directions = queries[family].directions(0, tensors)
            workers.each(lambda item: zo.draw(directions[item[0].index], *item, workers), blocks)

        def perturb() -> None:
            grid.move(queries["gaussian"].directions(0, tensors), next(positions))

        def head(tiles: zo.HeadTiles, count: int) -> None:
            zo.token_losses(hidden[count], targets[count], tiles, workers)

        def body(family: str) -> None:
            batched = zo.Batched(objective, tensors, queries[family], range(group), rows, tokens)
            with batched.installed():
                objective.hidden(b.ids.repeat(2 * group, 1))

        def batched_head(family: str) -> None:
            batched = zo.Batched(objective, tensors, queries[family], range(group), rows, tokens)
            head(batched.tiles(hidden[2 * group]), 2 * group)

        def update(family: str) -> None:
            outs = [tensor.matrix for tensor in tensors]
            zo.add_directions(outs, tensors, queries[family], np.full(group, 1e-12), workers)

        groups = q // group
        pieces = {
            "forward passes": [
                ("body", 2 * q, lambda: objective.hidden(b.ids)),
                ("head and loss", 2 * q, lambda: head(zo.HeadTiles(objective.head, 1, 1), 1)),
            ],
            IN_PLACE: [
                ("settle", 1, lambda: b.grid(queries["gaussian"])),
                ("perturb", 3 * q, perturb),
                ("of that: draws", 3 * q, lambda: draws("gaussian")),
                ("update", groups, lambda: update("gaussian")),
            ],
        }
        for family in queries:
            pieces[f"batched by {group}, {family}"] = [
                ("body", groups, functools.partial(body, family)),
                ("head and loss", groups, functools.partial(batched_head, family)),
                ("update", groups, functools.partial(update, family)),
            ]
            if "lowrank" not in family:
                pieces[f"batched by {group}, {family}"].append(("draws (in these)", 2 * q, functools.partial(draws, family)))
        table = []
        with torch.no_grad():
            for step, parts in pieces.items():
                for piece, times, call in parts:
                    each = median_seconds(call, repetitions) * 1e3
                    table.append({"step": step, "piece": piece, "ms": each, "times": times, "ms a step": each * times})
    return table


def median_seconds(call: Callable[[], object], repetitions: int) -> float:
    """Median time of a call; a first one is not counted."""
    call()
    taken = []
    for _ in range(repetitions):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Ranks                                                                                            │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘
# Whole commands, one after the other: the run of one process, then that of two, and again. A step's seconds are those of
# metrics.csv from the second step to the last but one; a ratio is the median of those of neighbouring runs.

RANKS_ABOUT = (
    "Two processes with a thread each, over one process with one thread; {size}, q = {q}, batch {rows} x {tokens}, the same weights\n"
    "bit for bit. Bytes are what rank 0 tells the other in a step. Target: 0.55."
)
RANK_CASES = {
    "in place, gaussian": "--direction gaussian",
    "batched by 4, low rank": "--direction lowrank --parallel_q_computation",
    "batched by 4, feedback": "--direction feedback --parallel_q_computation",
}
RANK_STEPS = 4


def rank_run(processes: int, flags: str, folder: Path, name: str) -> tuple[float, int, str]:
    """Seconds of a step, bytes that rank 0 told in one, and the SHA-256 of the weights that a run ends with."""
    script = str(Path(zo.__file__).resolve())
    start = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    words = [*flags.split(), "--num_threads", "1", "--run_name", name, "--log_dir", str(folder), "--max_steps", str(RANK_STEPS)]
    done = subprocess.run([sys.executable, *start, script, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
    (run,) = folder.glob(f"{name}_2*")
    with open(run / "metrics.csv") as file:
        at = {int(row["step"]): float(row["seconds"]) for row in csv.DictReader(file)}
    sent = re.search(r"told the others (\d+) bytes a step", (run / "train.log").read_text())
    seconds = (at[RANK_STEPS - 1] - at[1]) / (RANK_STEPS - 2)
    return seconds, int(sent[1]) if sent else 0, zo.file_digest(next(run.glob("checkpoints/*/model.safetensors")))


def ranks_table(
    size: str, q: int, repetitions: int, rows: int, tokens: int, cases: Sequence[str] = tuple(RANK_CASES)
) -> list[dict]:
    """What two processes gain."""
    table = []
    with tempfile.TemporaryDirectory() as home:
        for case in cases:
            flags = f"{RANK_CASES[case]} --model_size {size} --query_budget_q {q} --batch_size {rows} --block_size {tokens} "
            flags += "--max_samples 100 --eval_samples 1 --eval_interval 1000 --log_interval 1 --save_interval 1000"
            found = [
                [rank_run(processes, flags, Path(home), f"{len(table)}_{number}_{processes}") for processes in (1, 2)]
                for number in range(repetitions)
            ]
            ratio = statistics.median(two[0] / one[0] for one, two in found)
            row = {"step": case, "one process, s": statistics.median(one[0] for one, _ in found)}
            row |= {"two, s": statistics.median(two[0] for _, two in found), "ratio": ratio, "bytes": found[0][1][1]}
            row["weights"] = "equal" if len({each[2] for pair in found for each in pair}) == 1 else "DIFFERENT"
            table.append(row | judged(ratio, 0.55))
    return table


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Memory                                                                                           │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘
# Each size in a process of its own, two figures an operation, both beyond what is there when it begins.
#   allocator   peak of the running sum of the bytes that torch's allocator gives and takes, from torch.profiler's
#               [memory] events. These show the calling thread alone, so the figure is taken with one torch thread, where
#               workers run inline, and the scratch of one worker is added for each thread that is missing.
#   resident    the process's peak (VmHWM, reset through /proc/self/clear_refs) less its resident size before, with all
#               threads. Freed memory goes back to the system at once there, else old pages would hide new ones.
# The allocator's figure is the claim; the resident one, which also has libraries' buffers, is its check.

MIB = 2**20
MEMORY_ABOUT = (
    "MiB beyond the parameters, {tokens} tokens a batch, {threads} threads. Targets, by the allocator: in place, forward + 8; batched by\n"
    "g, 2g times the forward pass + 16; the sgd update 8 (scratch). The step of the classical estimator and of adam is for comparison."
)


def classical_losses(bench: Bench, epsilon: float = 1e-3) -> None:
    """One query of the estimator as often written: parameters cloned, z and the gradient kept whole."""
    parameters = [tensor.parameter.detach() for tensor in bench.tensors]
    kept = [theta.clone() for theta in parameters]
    z = [torch.randn_like(theta) for theta in parameters]
    losses = []
    for sign in (1, -1):
        for theta, original, direction in zip(parameters, kept, z):
            torch.add(original, direction, alpha=sign * epsilon, out=theta)
        losses.append(bench.loss())
    for theta, original in zip(parameters, kept):
        theta.copy_(original)
    projected_grad = (losses[0] - losses[1]) / (2 * epsilon)
    gradients = [direction * projected_grad for direction in z]
    del gradients


def feedback_losses(bench: Bench, rank: int = 16) -> None:
    """A step's pass, its guess, and one query along it, in place."""
    objective, head = bench.objective, bench.objective.head.weight
    guessed = {id(head)} | {id(module.weight) for module in objective.residual_writers()}
    tensors = zo.trainable_tensors((tensor.name, tensor.parameter) for tensor in bench.tensors if id(tensor.parameter) in guessed)
    (index,) = [tensor.index for tensor in tensors if tensor.parameter is head]
    seen = objective.see(bench.ids, tensors, rank, 0)
    error = objective.output_error(seen, bench.ids, seen.h[0].float() @ seen.bases[index], back=True)
    queries = bench.queries(zo.Feedback(seen.guess(error, index)), 1)
    zo.projected_gradients(objective, tensors, bench.batch, queries)


MEMORY_GROUP = 4
MEMORY_OPERATIONS = (
    "forward",
    "in place",
    "feedback",
    "batched by 4",
    "low rank by 4",
    "sgd",
    "sgd, low rank",
    "classical",
    "adam",
    "mudamw",
)


def memory_names(size: str) -> list[str]:
    """What is measured at a size: torch's Muon takes minutes a matrix where bfloat16 is emulated."""
    slow = size not in ("tiny", "20M") and not bfloat16_hardware()
    return [name for name in MEMORY_OPERATIONS if not (slow and name == "mudamw")]


def memory_operation(name: str, bench: Bench) -> Callable[[], None]:
    """What is measured under that name; all that it needs beforehand exists when this returns."""
    gaussian, low = (bench.queries(FAMILIES[family], MEMORY_GROUP) for family in ("gaussian", "lowrank r=1"))
    scalars = np.full(MEMORY_GROUP, 1e-6)
    if name == "forward":
        return lambda: bench.loss()
    if name == "classical":
        return lambda: classical_losses(bench)
    if name == "feedback":
        return lambda: feedback_losses(bench)
    if name == "in place":
        return lambda: bench.estimate(bench.queries(FAMILIES["gaussian"], 1))
    if name in ("batched by 4", "low rank by 4"):
        queries = gaussian if name == "batched by 4" else low
        return lambda: bench.estimate(queries, MEMORY_GROUP)
    rule, _, family = name.partition(", ")
    optimizer = bench.optimizer(rule)
    for each in optimizer.each.values():  # of Muon's five iterations, which need the same memory, one
        each.param_groups[0].update({"ns_steps": 1} if "ns_steps" in each.param_groups[0] else {})
    return lambda: optimizer.apply_estimate(low if family else gaussian, scalars, 1e-9)


def allocator_peak(operation: Callable[[], None], workers: zo.Workers, threads: int) -> int:
    """Bytes at the peak by the allocator, on one thread, with the scratch of the workers that are missing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        operation()
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    ordered = sorted(events, key=lambda event: event.start_ns())
    peak = max(itertools.accumulate((event.nbytes() for event in ordered), initial=0))
    scratch = sum(buffer.numel() * buffer.element_size() for buffer in workers._scratch.__dict__.values())
    return peak + (threads - 1) * scratch


def trim() -> None:
    """Gives freed memory back to the system."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def status_bytes(field: str) -> int:
    """A size in /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def resident_peak(operation: Callable[[], None]) -> int | None:
    """Bytes at the process's peak; None where the system does not show it."""
    trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("VmRSS")
        operation()
        return status_bytes("VmHWM") - before
    except (OSError, KeyError):
        return None


def memory_child(size: str, rows: int, tokens: int, threads: int, names: Sequence[str]) -> dict:
    """In a fresh process: both figures of each operation, {name: [allocator, resident]}, in bytes.

    A tiny model goes first, so that what libraries load at their first use is charged to nobody. The resident figures
    are all taken before the first allocator's, since the profiler leaves holes in the heap that would be used again.
    """
    tiny, model = sized_model("tiny"), sized_model(size)

    def measured(name: str, measure: Callable, count: int) -> int | None:
        torch.set_num_threads(count)
        with bench(tiny, rows, tokens) as b:
            memory_operation(name, b)()
        with bench(model, rows, tokens) as b:
            return measure(memory_operation(name, b), b.workers)

    resident = [measured(name, lambda operation, workers: resident_peak(operation), threads) for name in names]
    allocator = [measured(name, functools.partial(allocator_peak, threads=threads), 1) for name in names]
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"parameters": parameters, "figures": dict(zip(names, zip(allocator, resident)))}


def memory_figures(size: str, rows: int, tokens: int, threads: int, names: Sequence[str] = MEMORY_OPERATIONS) -> dict:
    """What `memory_child` finds, in a process of its own, whose glibc returns freed memory to the system at once."""
    asked = json.dumps([size, rows, tokens, threads, list(names)])
    settings = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TOP_PAD_": "0"}
    command = [sys.executable, __file__, MEMORY_CHILD, asked]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    if done.returncode:
        raise RuntimeError(f"the memory of {size} could not be measured: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_bounds(forward: int) -> dict[str, tuple[float, str]]:
    """The most that an operation may take by the allocator, in MiB, and how that is said."""
    forward /= MIB
    group = 2 * MEMORY_GROUP
    batched = (group * forward + 16, f"{group} x forward + 16 = {group * forward + 16:.1f}")
    return {
        "in place": (forward + 8, f"forward + 8 = {forward + 8:.1f}"),
        "batched by 4": batched,
        "low rank by 4": batched,
        "sgd": (8, "8"),
        "sgd, low rank": (8, "8"),
    }


def memory_table(size: str, rows: int, tokens: int, threads: int, names: Sequence[str] = MEMORY_OPERATIONS) -> list[dict]:
    """Both figures of every operation at one size, in MiB."""
    found = memory_figures(size, rows, tokens, threads, names)
    bounds = memory_bounds(found["figures"]["forward"][0])
    table = []
    for name, (allocator, resident) in found["figures"].items():
        row = {"model": size, "parameters": found["parameters"] / MIB, "operation": name, "allocator": allocator / MIB}
        row["resident"] = None if resident is None else resident / MIB
        row |= judged(row["allocator"], *bounds[name]) if name in bounds else {"target": "", "result": ""}
        table.append(row)
    return table


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Equivalence                                                                                      │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘
# The weights are settled first, so that both paths start from the same ones. Differences of c are relative to the
# root mean square of c. Small blocks and tiles: every tensor and the head have several.

EQUIVALENCE_ABOUT = (
    "In place against batched on small models of transformers: largest difference of a loss over the loss, of a projected\n"
    "gradient c over the root mean square of c, over all groupings of 7 queries (1, 2, 3, 7 at a time). The rounding of a loss\n"
    "reaches c amplified by 1/(2 epsilon): 500 at epsilon 1e-3. grouping: largest difference of a loss between two groupings."
)
EQUIVALENCE_DTYPES = {
    "float64": (torch.float64, None, 1e-4),
    "float32": (torch.float32, None, 1e-3),
    "bfloat16": (torch.float32, torch.bfloat16, 1e-3),
}
GROUPINGS = (1, 2, 3, 7)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@contextlib.contextmanager
def no_fallback() -> Iterator[None]:
    """Where the batched path falls back to the sequential one, it would be compared with itself: an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="queries are evaluated one after the other")
        yield


def equivalence(name: str, family: str, dtype: str, q: int = 7) -> dict:
    """Both paths on one small model: differences of losses and projected gradients, and what became of the weights."""
    stored, compute, epsilon = EQUIVALENCE_DTYPES[dtype]
    with small_blocks(), no_fallback(), bench(small_model(name, stored), 3, 13, compute) as b:
        queries = b.queries(FAMILIES[family], q, epsilon)
        grid = b.grid(queries)
        weights = [tensor.matrix.clone() for tensor in b.tensors]
        one = b.estimate(queries, 0, grid)
        restored = all(torch.equal(a, tensor.matrix) for a, tensor in zip(weights, b.tensors))
        batched = [b.estimate(queries, group) for group in GROUPINGS]
        untouched = all(torch.equal(a, tensor.matrix) for a, tensor in zip(weights, b.tensors))
    losses = np.stack([estimate.losses for estimate in batched])
    c = np.stack([estimate.projected_grads for estimate in batched])
    return {
        "loss": float(np.max(np.abs(losses - one.losses) / one.losses)),
        "c": float(np.max(np.abs(c - one.projected_grads)) / rms(one.projected_grads)),
        "grouping": float(np.max(np.ptp(losses, axis=0) / one.losses)),
        "weights": ("restored" if restored else "MOVED") + ", " + ("untouched" if untouched else "TOUCHED"),
        "queries": (one, batched),
    }


def equivalence_table(names: Sequence[str] = tuple(SMALL_MODELS)) -> list[dict]:
    """Both paths of every family and dtype; the largest differences over the models."""
    table = []
    for dtype, family in itertools.product(EQUIVALENCE_DTYPES, FAMILIES):
        few = ("Llama", "GPT-2") if dtype == "bfloat16" else names  # where it is emulated, it takes its time
        found = [equivalence(name, family, dtype) for name in names if name in few]
        row = {"dtype": dtype, "family": family, "epsilon": EQUIVALENCE_DTYPES[dtype][2]}
        row |= {key: max(figures[key] for figures in found) for key in ("loss", "c", "grouping")}
        row["weights"] = "; ".join(sorted({figures["weights"] for figures in found}))
        if dtype == "float64":
            row |= judged(row["c"], 1e-9, "1e-9 (c)")
        elif dtype == "float32":
            row |= judged(row["loss"], 1e-6, "1e-6 (loss)")
        else:
            row |= {"target": "stated", "result": ""}
        table.append(row)
    return table


DRIFT_ABOUT = (
    "Largest change of a weight after {count:,} queries in place (three perturbations each), over the spread of all weights, no update\n"
    "made. The weights are on their grid; textbook MeZO perturbs them as they are."
)


def largest_change(before: list[torch.Tensor], tensors: list[zo.Tensor]) -> float:
    """Largest change of a weight, over the root mean square of the weights."""
    moved = max((a - tensor.matrix).abs().max().item() for a, tensor in zip(before, tensors))
    return moved / rms(np.concatenate([a.flatten().numpy() for a in before]))


def drift_table(count: int) -> list[dict]:
    """What queries that are measured and undone leave behind in the weights."""
    with bench(small_model("Llama"), 1, 4) as b:
        before = [tensor.matrix.clone() for tensor in b.tensors]
        queries = b.queries(FAMILIES["gaussian"], count)
        grid = b.grid(queries)
        settled = largest_change(before, b.tensors)
        before = [tensor.matrix.clone() for tensor in b.tensors]
        b.estimate(queries, 0, grid)
        in_place = largest_change(before, b.tensors)
        textbook_mezo_step(b, count, 0, learning_rate=0.0)
        mezo = largest_change(before, b.tensors)
    return [
        {"path": "in place, on the grid", "queries": count, "drift": in_place, **judged(in_place, 0.0, "0 exactly")},
        {"path": "putting them on the grid, once", "queries": 0, "drift": settled, "target": "", "result": ""},
        {"path": "textbook MeZO", "queries": count, "drift": mezo, "target": "", "result": ""},
    ]


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Signal to noise of c over epsilon                                                                │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘

EPSILONS = (1e-1, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)
NOISE_ABOUT = (
    "Error of the projected gradient of {q} fixed directions, {size} model: median |c(epsilon) - c| over the deviation of c, where c is\n"
    "in float64 at epsilon 1e-5. To the left of the best epsilon bias (epsilon^2), to the right rounding (1/epsilon). new: initial\n"
    "weights; trained: after 30 steps of backpropagation on the batch. in place / batched in float32; computing in bfloat16."
)


def train_a_little(model: torch.nn.Module, rows: int, tokens: int, steps: int = 30) -> None:
    """Backpropagation on the batch, so that the loss has the curvature of a trained model's."""
    with bench(model, rows, tokens) as b:
        optimizer = b.optimizer("adam")
        for _ in range(steps):
            optimizer.apply_gradient(b.objective.gradient(b.ids, b.ids, b.tensors)[1], 3e-3)


def reference_c(model: torch.nn.Module, q: int, rows: int, tokens: int) -> np.ndarray:
    """The projected gradients in float64 at a small epsilon; leaves the model in float32 as it was."""
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with bench(model.double(), rows, tokens) as b:
        c = b.estimate(b.queries(FAMILIES["gaussian"], q, 1e-5), min(q, 4)).projected_grads
    model.float()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept):
            parameter.copy_(value)
    return c


def noise_rows(model: torch.nn.Module, state: str, q: int, rows: int, tokens: int, epsilons: Sequence[float]) -> list[dict]:
    """The error of c for both paths in float32 and both in bfloat16, one row an epsilon."""
    reference = reference_c(model, q, rows, tokens)
    found = {epsilon: {"weights": state, "epsilon": epsilon} for epsilon in epsilons}
    for dtype, compute in (("float32", None), ("bfloat16", torch.bfloat16)):
        with bench(model, rows, tokens, compute) as b:
            for epsilon, (path, group) in itertools.product(epsilons, (("in place", 0), ("batched", 4))):
                c = b.estimate(b.queries(FAMILIES["gaussian"], q, epsilon), group).projected_grads
                found[epsilon][f"{dtype}, {path}"] = float(np.median(np.abs(c - reference)) / np.std(reference))
    return list(found.values())


def noise_table(size: str, q: int, rows: int = 2, tokens: int = 32, epsilons: Sequence[float] = EPSILONS) -> list[dict]:
    """The error of c at initial weights and at trained ones."""
    model = sized_model(size)
    table = noise_rows(model, "new", q, rows, tokens, epsilons)
    train_a_little(model, rows, tokens)
    return table + noise_rows(model, "trained", q, rows, tokens, epsilons)


def best_epsilons(table: list[dict]) -> list[dict]:
    """For each column of the table above, the epsilon with the least error."""
    best = []
    for state, column in itertools.product(("new", "trained"), [key for key in table[0] if "," in key]):
        row = min((row for row in table if row["weights"] == state), key=lambda row: row[column])
        best.append({"weights": state, "path": column, "best epsilon": row["epsilon"], "error": row[column]})
    return best


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Compatibility                                                                                    │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘

COMPATIBILITY_ABOUT = (
    "Calls of zo_gradient_estimator without the new arguments, commands without the new flags, models whose logits are not\n"
    "the output layer of their last hidden states. Each line is a check that stops with an error where it fails."
)
OLD_COMMANDS = {
    "ZO": "--mode ZO --query_budget_q 2 --batch_size 2 --learning_rate 1e-3 --log_interval 1",
    "ZO, schedule": "--mode ZO --scope full --query_budget_q 1 --epochs 1 --optimizer mudamw --use_lr_scheduler --warmup_steps 2",
    "Instruct": "--mode Instruct --scope reduced --query_budget_q 2 --bp_interval 5 --learning_rate 1e-4 --optimizer adam",
    "FO": "--mode FO --learning_rate 1e-3",
}


def old_call(name: str) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """The library function with the arguments it always had: (parameters, gradients, loss)."""
    model = small_model(name)
    ids = random_ids(211, 2, 12)
    loss_fn = torch.nn.CrossEntropyLoss()
    parameters = list(model.parameters())
    grads, loss = zo.zo_gradient_estimator(model, parameters, loss_fn, ids, ids, 3, 1e-3, CPU)
    return parameters, grads, loss


def check_old_call(name: str) -> str:
    """Shapes, dtypes and the loss of a call without the new arguments, and the same by the new ones' defaults."""
    parameters, grads, loss = old_call(name)
    assert [g.shape for g in grads] == [p.shape for p in parameters]
    assert all(g.dtype == p.dtype and not g.requires_grad for g, p in zip(grads, parameters))
    assert loss.ndim == 0
    own = small_model(name)
    ids = random_ids(211, 2, 12)
    assert abs(loss.item() - own(input_ids=ids, labels=ids).loss.item()) < 1e-2
    again, _ = zo.zo_gradient_estimator(
        own, own.parameters(), None, ids, ids, 3, 1e-3, "cpu", parallel_q_computation=False, parallel_batch_size=4, seed=0, step=0
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, again))
    return f"{len(grads)} gradients, loss {loss.item():.3f}"


@contextlib.contextmanager
def scripts_home(folder: Path) -> Iterator[None]:
    """Runs go to folder/logs, tokens to folder/reproduce_zo_paper."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder)}):
            yield
    finally:
        os.chdir(before)


def run_main(flags: str, folder: Path) -> Path:
    """A run through main(), quiet, that must succeed; its run directory."""
    before = set((folder / "logs").glob("*"))
    with scripts_home(folder), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        assert zo.main(flags.split()) == 0
    (run,) = set((folder / "logs").glob("*")) - before
    return run


def check_old_command(name: str, folder: Path) -> str:
    """A command of old, tiny: it trains, in place, and writes what it should."""
    run = run_main(
        f"{OLD_COMMANDS[name]} --model_size tiny --max_samples 30 --max_steps 3 --block_size 32 --eval_samples 4", folder
    )
    config = json.loads((run / "config.json").read_text())
    flags = config.get("flags", config)
    assert flags["parallel_q_computation"] is False
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert math.isfinite(float(rows[-1]["val_loss"]))
    assert list((run / "checkpoints").glob("step_*/model.safetensors"))
    return f"{len(rows)} rows, validation loss {float(rows[-1]['val_loss']):.3f}"


# Models whose logits are soft-capped or scaled: Objective must use the model's own.
UNUSUAL_HEADS = {
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0, "tie_word_embeddings": True},
}


def check_unusual_head(name: str) -> str:
    """The loss is the model's own, and both paths agree on it."""
    with no_fallback(), bench(small_model(name, torch.float64, **UNUSUAL_HEADS[name]), 2, 13) as b:
        assert not b.objective.sliced
        assert abs(b.loss() - b.model(input_ids=b.ids, labels=b.ids).loss.item()) < 1e-6
        queries = b.queries(FAMILIES["gaussian"], 4)
        in_place = b.estimate(queries)
        batched = b.estimate(queries, 3)
    apart = np.abs(batched.projected_grads - in_place.projected_grads).max() / rms(in_place.projected_grads)
    assert apart < 1e-9
    return f"own logits; paths differ by {apart:.0e}"


def compatibility_table() -> list[dict]:
    """Each check and what it found."""
    table = [{"check": f"old call, {name}", "found": check_old_call(name), "result": "met"} for name in SMALL_MODELS]
    with tempfile.TemporaryDirectory() as folder:
        commands = {name: check_old_command(name, Path(folder)) for name in OLD_COMMANDS}
    table += [{"check": f"old command, {name}", "found": found, "result": "met"} for name, found in commands.items()]
    table += [{"check": f"logits of {name}", "found": check_unusual_head(name), "result": "met"} for name in UNUSUAL_HEADS]
    return table


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Program                                                                                          │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘

GROUPS = ("speed", "ranks", "memory", "equivalence", "compatibility")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", metavar="FILE", help="write the same figures there")
    parser.add_argument("--full", action="store_true", help="q = 8, 16, 32 and all sizes up to 1B")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="some of the groups")
    parser.add_argument("--profile", action="store_true", help="also show where the milliseconds of a step go")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="of the speed table (default: 5)")
    parser.add_argument("--rank_repetitions", type=int, default=1, metavar="N", help="of the ranks table (default: 1)")
    parser.add_argument("--queries", type=int, nargs="+", metavar="Q", help="of the speed table (default: 8)")
    parser.add_argument(
        "--speed_size", default="20M", choices=zo.MODEL_SIZES, help="of the speed and ranks tables (default: 20M)"
    )
    parser.add_argument("--sizes", nargs="+", choices=zo.MODEL_SIZES, help="of the memory table (default: 20M 200M)")
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="sequences in the batch (default: 4)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="tokens in a sequence (default: 128)")
    parser.add_argument("--memory_tokens", type=int, default=64, metavar="N", help="the same, memory table (default: 64)")
    parser.add_argument(MEMORY_CHILD, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    asked.queries = asked.queries or ([8, 16, 32] if asked.full else [8])
    asked.sizes = asked.sizes or (["20M", "200M", "500M", "1B"] if asked.full else ["20M", "200M"])
    return asked


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict:
    """What the figures depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    system = {"threads": torch.get_num_threads(), "cpu": cpu_name(), "bfloat16 hardware": bfloat16_hardware()}
    return versions | system | {"date": time.strftime("%Y-%m-%d %H:%M:%S")}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes what was asked for; 0, or 1 where a figure falls short."""
    asked = parse_arguments(argv)
    zo.quiet_libraries()
    if asked.memory_child:
        print(json.dumps(memory_child(*json.loads(asked.memory_child))))
        return 0
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    tables: dict[str, list[dict]] = {}

    def show(name: str, title: str, text: str, rows: list[dict]) -> None:
        tables.setdefault(name, []).extend(rows)
        print_table(title, text, rows)

    if "speed" in asked.only:
        dtypes = [torch.float32] + [torch.bfloat16] * bfloat16_hardware()
        for dtype, q in itertools.product(dtypes, asked.queries):
            rows = speed_table(asked.speed_size, q, asked.repetitions, dtype, asked.rows, asked.tokens)
            show("speed", f"Speed, q = {q}, {str(dtype)[6:]}, {asked.repetitions} repetitions", SPEED_ABOUT, rows)
        if not bfloat16_hardware():
            print("\n  bfloat16 is skipped: this CPU has no instructions for it, and emulation says nothing")
        if asked.profile:
            rows = profile_table(asked.speed_size, asked.repetitions, 8, 4, asked.rows, asked.tokens)
            show("profile", "Profile, q = 8", "Milliseconds of the pieces, each timed alone; float32.", rows)
    if "ranks" in asked.only:
        about_ranks = RANKS_ABOUT.format(size=asked.speed_size, q=16, rows=asked.rows, tokens=asked.tokens)
        table = ranks_table(asked.speed_size, 16, asked.rank_repetitions, asked.rows, asked.tokens)
        show("ranks", f"Ranks, {asked.rank_repetitions} repetitions", about_ranks, table)
    if "memory" in asked.only:
        threads = torch.get_num_threads()
        text = MEMORY_ABOUT.format(tokens=asked.rows * asked.memory_tokens, threads=threads)
        for size in asked.sizes:
            show(
                "memory",
                f"Memory, {size}",
                text,
                memory_table(size, asked.rows, asked.memory_tokens, threads, memory_names(size)),
            )
    if "equivalence" in asked.only:
        show("equivalence", "Equivalence", EQUIVALENCE_ABOUT, equivalence_table())
        show("drift", "Drift", DRIFT_ABOUT.format(count=1000), drift_table(1000))
        size, q = ("20M", 8) if asked.full else ("tiny", 12)
        noise = noise_table(size, q)
        show("signal to noise", "Error of c over epsilon", NOISE_ABOUT.format(q=q, size=size), noise)
        show("best epsilon", "Best epsilon", "The least error of each column above.", best_epsilons(noise))
    if "compatibility" in asked.only:
        show("compatibility", "Compatibility", COMPATIBILITY_ABOUT, compatibility_table())
    if asked.json:
        Path(asked.json).write_text(json.dumps({"machine": about, **tables}, indent=1) + "\n", "utf-8")
    short = sum("short" in row.get("result", "") for rows in tables.values() for row in rows)
    print(f"\n{short} figures fall short of their targets" if short else "\nevery target is met")
    return 0


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Tests                                                                                            │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder for runs and tokens, shared so that the data is tokenized once."""
    return tmp_path_factory.mktemp("home")


# ---- equivalence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_paths_agree_in_float64(name, family):
    found = equivalence(name, family, "float64")
    assert found["c"] <= 1e-9
    assert found["weights"] == "restored, untouched"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT"])
def test_paths_agree_in_float32(name, family):
    found = equivalence(name, family, "float32")
    assert found["loss"] <= 1e-6
    assert found["grouping"] <= 1e-6
    assert found["weights"] == "restored, untouched"


@pytest.mark.parametrize("family", ["gaussian", "lowrank r=1"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_paths_are_close_in_bfloat16(name, family):
    found = equivalence(name, family, "bfloat16")
    assert found["loss"] <= 1e-2  # bfloat16 has eight bits
    assert found["grouping"] <= 1e-2
    assert found["weights"] == "restored, untouched"


def test_bfloat16_measures_the_same_gradient_at_its_epsilon():
    model = small_model("Llama")
    reference = reference_c(model, 24, 2, 12)
    with bench(model, 2, 12, torch.bfloat16) as b:
        for group in (0, 4):
            c = b.estimate(b.queries(FAMILIES["gaussian"], 24, 1e-2), group).projected_grads
            assert np.corrcoef(c, reference)[0, 1] > 0.9


def test_float32_measures_the_float64_gradient():
    model = small_model("Llama")
    reference = reference_c(model, 8, 2, 12)
    for group in (0, 3):
        with bench(model, 2, 12) as b:
            c = b.estimate(b.queries(FAMILIES["gaussian"], 8, 1e-3), group).projected_grads
        assert np.abs(c - reference).max() < 0.05 * np.std(reference)


def test_perturbations_leave_the_weights_bit_for_bit():
    in_place, _, mezo = drift_table(100)
    assert in_place["drift"] == 0.0
    assert mezo["drift"] > 0.0  # else this measures nothing


def test_results_do_not_depend_on_the_number_of_threads():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(equivalence("Llama", "gaussian", "float64")["queries"])
    finally:
        torch.set_num_threads(threads)
    for one, batched in found[1:]:
        np.testing.assert_allclose(one.losses, found[0][0].losses, rtol=1e-13)
        np.testing.assert_allclose(batched[0].losses, found[0][1][0].losses, rtol=1e-13)


@pytest.mark.parametrize("parallel", [False, True])
def test_global_generators_are_untouched(parallel):
    model, ids = small_model("Llama"), random_ids(211, 2, 12)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    zo.zo_gradient_estimator(model, model.parameters(), None, ids, ids, 2, 1e-3, CPU, parallel_q_computation=parallel)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


# ---- the estimate ----------------------------------------------------------------------------------

# Small enough that a thousand queries take seconds, with every kind of tensor.
MINIATURE = {
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def direction_matrix(tensor: zo.Tensor, queries: zo.Queries, workers: zo.Workers) -> np.ndarray:
    """z of every query on one tensor, [q, entries]."""
    rows = []
    for query in range(queries.q):
        direction = queries.family.direction(tensor, queries.at(query))
        blocks = [zo.draw(direction, tensor, block, workers).double().flatten().numpy().copy() for block in tensor.blocks]
        rows.append(np.concatenate(blocks))
    return np.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_estimate_is_the_true_gradient(family):
    """Per entry, t = (mean of c z - gradient) over its standard error: t^2 has mean 1 on every tensor, not above."""
    q = 600
    with bench(small_model("Llama", torch.float64, **MINIATURE), 2, 6) as b:
        queries = b.queries(FAMILIES[family], q, 1e-4)
        c = b.estimate(queries, 50).projected_grads
        gradients = b.objective.gradient(b.ids, b.ids, b.tensors)[1]
        directions = [direction_matrix(tensor, queries, b.workers) for tensor in b.tensors]
        total = [torch.zeros_like(tensor.matrix) for tensor in b.tensors]
        zo.add_directions(total, b.tensors, queries, c / q, b.workers)
    squares, against_zero = [], []
    for tensor, z, gradient, sum_ in zip(b.tensors, directions, gradients, total):
        each = c[:, None] * z
        mean, error = each.mean(0), each.std(0) / math.sqrt(q)
        np.testing.assert_allclose(sum_.flatten().numpy(), mean, atol=1e-6 * np.abs(mean).max())
        squares.append(np.square((mean - gradient.flatten().numpy()) / error))
        against_zero.append(np.square(mean / error))
        assert squares[-1].mean() < 1 + 6 * math.sqrt(2 / len(squares[-1])), tensor.name
    squares, against_zero = np.concatenate(squares), np.concatenate(against_zero)
    assert abs(squares.mean() - 1) < 0.25
    assert squares.max() < 5.5**2
    assert against_zero.mean() > 1.5  # the test can tell this gradient from none


def test_bias_is_of_second_order_in_epsilon():
    c = {}
    with bench(small_model("Llama", torch.float64), 2, 12) as b:
        for epsilon in (1e-5, 2e-3, 4e-3):
            c[epsilon] = b.estimate(b.queries(FAMILIES["gaussian"], 6, epsilon), 3).projected_grads
    ratio = np.abs(c[4e-3] - c[1e-5]) / np.abs(c[2e-3] - c[1e-5])
    assert 3.5 < np.median(ratio) < 4.5


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_are_independent_and_of_unit_variance(family):
    """Over tensors, queries, steps and seeds the correlation is that of chance; no two streams are the same."""
    with small_blocks(), zo.Workers(CPU) as workers:
        model = small_model("Llama", vocab_size=256)
        tensors = [tensor for tensor in all_tensors(model) if tensor.parameter.ndim == 2 and min(tensor.parameter.shape) >= 32]
        vectors = []
        for seed, step, tensor in itertools.product((0, 1), (0, 1), tensors):
            z = direction_matrix(tensor, zo.Queries(FAMILIES[family], seed, step, 2, 1e-3), workers)
            vectors += list(z[:, :1024])
    vectors = np.stack(vectors)
    products = vectors @ vectors.T / 1024
    variance, correlation = np.diag(products), products[~np.eye(len(products), dtype=bool)]
    spread = 1.0 if "lowrank" in family else 0.05  # the norm of A B^T varies with those of its few factors
    assert abs(variance.mean() - 1) < spread / 2
    assert np.abs(correlation).max() < (0.6 if "lowrank" in family else 6 / 32)


def test_the_two_paths_see_the_same_directions_and_the_update_applies_them():
    """(theta after an sgd step - before) = -lr g for the g of the library function, on either path."""
    ids, rate = random_ids(211, 2, 12), 0.5
    for family, rank in (("gaussian", 1), ("rademacher", 1), ("lowrank", 2)):
        with small_blocks(), no_fallback(), zo.Workers(CPU) as workers:
            found = []
            for parallel in (False, True):
                model = small_model("GPT-2", torch.float64)
                arguments = {"parallel_q_computation": parallel, "parallel_batch_size": 2, "seed": 3, "step": 7}
                found.append(
                    zo.zo_gradient_estimator(
                        model, model.parameters(), None, ids, ids, 3, 1e-4, CPU, **arguments, direction=family, rank=rank
                    )
                )
            for a, b in zip(found[0][0], found[1][0]):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * a.abs().max().item())
            tensors = all_tensors(model)
            before = [tensor.matrix.clone() for tensor in tensors]
            queries = zo.Queries(zo.Isotropic(family, rank), 3, 7, 3, 1e-4)
            objective = zo.Objective(model, workers)
            estimate = zo.projected_gradients(objective, tensors, lambda query: (ids, ids), queries, 2)
            zo.Optimizer("sgd", tensors, 0.0, set(), workers).apply_estimate(queries, estimate.projected_grads, rate)
            for tensor, old, grad in zip(tensors, before, found[1][0]):
                expected = old - rate * grad.view_as(old)
                torch.testing.assert_close(tensor.matrix, expected, rtol=0, atol=1e-6 * rate * grad.abs().max().item() + 1e-12)


@pytest.mark.parametrize("family", ["gaussian", "lowrank"])
def test_distinct_equals_a_loop_of_one_query_calls(family):
    """Query i on its own rows: the same losses as one query at a time, on both paths, and the sum of their gradients."""
    q, ids = 3, random_ids(211, 6, 12)
    with no_fallback(), zo.Workers(CPU) as workers:
        model = small_model("Llama", torch.float64)
        tensors, objective = all_tensors(model), zo.Objective(model, workers)
        queries = zo.Queries(zo.Isotropic(family), 0, 4, q, 1e-4)
        expected = [torch.zeros_like(tensor.matrix) for tensor in tensors]
        losses = []
        for query in range(q):
            rows = ids[2 * query : 2 * query + 2]
            losses.append(zo.batched_losses(objective, tensors, lambda _, rows=rows: (rows, rows), queries, [query], 1)[0])
            c = np.zeros(q)
            c[query] = (losses[-1][0] - losses[-1][1]) / (2 * queries.epsilon) / q
            zo.add_directions(expected, tensors, queries, c, workers)
        for parallel in (False, True):
            grads, loss = zo.zo_gradient_estimator(
                model,
                model.parameters(),
                None,
                ids,
                ids,
                q,
                1e-4,
                CPU,
                parallel_q_computation=parallel,
                parallel_batch_size=2,
                step=4,
                direction=family,
                query_data="distinct",
            )
            assert abs(loss.item() - np.mean(losses)) < 1e-12
            for grad, tensor, other in zip(grads, tensors, expected):
                torch.testing.assert_close(grad.view_as(tensor.matrix), other, rtol=0, atol=1e-8 * other.abs().max().item())


def test_ignored_labels_are_not_predicted():
    model, ids = small_model("Llama", torch.float64), random_ids(211, 3, 12)
    labels = ids.clone()
    labels[:, :5] = zo.IGNORE_INDEX
    expected = model(input_ids=ids, labels=labels).loss.item()
    with zo.Workers(CPU) as workers:
        assert abs(zo.Objective(model, workers).losses(ids, labels).item() - expected) < 1e-6


def test_a_failing_forward_pass_leaves_the_weights_bit_for_bit():
    with bench(small_model("Llama"), 2, 12) as b:
        queries = b.queries(FAMILIES["gaussian"], 4)
        grid = b.grid(queries)
        before = [tensor.matrix.clone() for tensor in b.tensors]
        calls, whole = itertools.count(), b.objective.losses

        def fails(*arguments):
            if next(calls) == 3:
                raise KeyboardInterrupt
            return whole(*arguments)

        b.objective.losses = fails
        with pytest.raises(KeyboardInterrupt):
            b.estimate(queries, 0, grid)
        assert all(torch.equal(a, tensor.matrix) for a, tensor in zip(before, b.tensors))


def test_frozen_modules_are_untouched_and_tied_weights_are_one_tensor():
    model = small_model("Llama", torch.float64)
    names = [tensor.name for tensor in all_tensors(model)]
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    ids = random_ids(211, 2, 12)
    both = []
    with no_fallback():
        for parallel in (False, True):
            arguments = (model, trained, None, ids, ids, 3, 1e-4, CPU, parallel)
            both.append(zo.zo_gradient_estimator(*arguments)[0])
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * a.abs().max().item())
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    original = small_model("Llama", torch.float64)
    assert all(torch.equal(p, dict(original.named_parameters())[n]) for n, p in model.named_parameters() if not p.requires_grad)
    assert len(frozen) == 9


@pytest.mark.parametrize(
    "wrong",
    [{"q": 0}, {"epsilon": 0.0}, {"epsilon": math.nan}, {"parallel_batch_size": 0}, {"query_data": "distinct", "q": 4}],
)
def test_bad_arguments_are_refused(wrong):
    model, ids = small_model("Llama"), random_ids(211, 3, 12)
    arguments = {"q": 2, "epsilon": 1e-3, "device": CPU, **wrong}
    with pytest.raises(ValueError, match=r"must be|shared out"):
        zo.zo_gradient_estimator(model, model.parameters(), None, ids, ids, **arguments)


def test_half_precision_parameters_are_refused():
    model, ids = small_model("Llama", torch.bfloat16), random_ids(211, 3, 12)
    with pytest.raises(ValueError, match="masters"):
        zo.zo_gradient_estimator(model, model.parameters(), None, ids, ids, 2, 1e-3, CPU)


# ---- modules that the batched path does not know -----------------------------------------------------


class OwnMatrix(torch.nn.Module):
    """A module of one's own that owns a matrix, a vector and a scalar."""

    def __init__(self, width: int, inner: torch.nn.Module | None = None):
        super().__init__()
        self.inner = inner or torch.nn.Identity()
        generator = torch.Generator().manual_seed(1)
        self.matrix = torch.nn.Parameter(torch.randn(width, width, generator=generator, dtype=torch.float64) / width)
        self.shift = torch.nn.Parameter(torch.randn(width, generator=generator, dtype=torch.float64))
        self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.scale * torch.tanh(x @ self.matrix + self.shift)


class UsesAnothersWeight(torch.nn.Module):
    """Takes a linear layer's weight without calling the layer; `also_calls` calls it besides."""

    def __init__(self, inner: torch.nn.Module, also_calls: bool):
        super().__init__()
        self.inner, self.also_calls = inner, also_calls
        self.proj = torch.nn.Linear(32, 32, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x) + torch.nn.functional.linear(x, self.proj.weight)
        return y + self.proj(x) if self.also_calls else y


class SwapsRowsAndTokens(torch.nn.Module):
    """Gives its layers [tokens, rows, n], as some models do."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def both_paths(model: torch.nn.Module, rows: int = 2, tokens: int = 11, group: int = 3) -> tuple[float, bool]:
    """Largest difference of c over its root mean square, and whether the batched path fell back to the other."""
    with bench(model, rows, tokens) as b, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        queries = b.queries(FAMILIES["gaussian"], 3, 1e-4)
        one = b.estimate(queries).projected_grads
        other = b.estimate(queries, group).projected_grads
    fell_back = any("one after the other" in str(warning.message) for warning in caught)
    return float(np.abs(one - other).max() / rms(one)), fell_back


def test_a_module_of_ones_own_is_batched_by_functional_call():
    model = small_model("Llama", torch.float64)
    model.model.layers[0].mlp = OwnMatrix(32)
    apart, fell_back = both_paths(model)
    assert apart <= 1e-9
    assert not fell_back


def test_a_module_of_ones_own_around_others_is_never_wrong():
    model = small_model("Llama", torch.float64)
    model.model.layers[0].mlp = OwnMatrix(32, model.model.layers[0].mlp)
    assert both_paths(model)[0] <= 1e-9


def test_a_parameter_used_without_its_module_falls_back_with_a_warning():
    model = small_model("Llama", torch.float64)
    model.model.layers[0].mlp = UsesAnothersWeight(model.model.layers[0].mlp, also_calls=False)
    apart, fell_back = both_paths(model)
    assert fell_back
    assert apart == 0.0


def test_a_parameter_used_both_ways_is_never_wrong():
    model = small_model("Llama", torch.float64)
    model.model.layers[0].mlp = UsesAnothersWeight(model.model.layers[0].mlp, also_calls=True)
    assert both_paths(model)[0] <= 1e-9


@pytest.mark.parametrize("tokens", [11, 12])
def test_rows_and_tokens_swapped_is_never_wrong(tokens):
    """With 12 tokens, [tokens, rows, n] has as many rows as [3 queries, 2 signs, 2 rows]."""
    model = small_model("Llama", torch.float64)
    model.model.layers[0].mlp = SwapsRowsAndTokens(model.model.layers[0].mlp)
    assert both_paths(model, 2, tokens)[0] <= 1e-9


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}),
        ("Qwen3", {"head_dim": 8}),
        ("Gemma", {"head_dim": 8}),
        ("GPTNeoX", {}),
        ("Bloom", {}),
        ("Falcon", {}),
        ("Mistral", {}),
        ("StableLm", {}),
        ("Cohere", {}),
        ("Mamba", {"state_size": 4, "time_step_rank": 2}),
    ],
)
def test_other_architectures_are_never_wrong(name, changes):
    assert both_paths(small_model(name, torch.float64, **changes))[0] <= 1e-9


def test_the_model_is_left_as_it_was_when_it_can_not_be_batched():
    model = small_model("Llama", torch.float64).train()
    model.model.layers[0].mlp = UsesAnothersWeight(model.model.layers[0].mlp, also_calls=False)
    both_paths(model)  # settles the weights
    before = {name: value.clone() for name, value in model.state_dict().items()}
    both_paths(model)
    assert model.training
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_function_of_ones_own_is_used_on_both_paths():
    def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)

    model, ids = small_model("Llama", torch.float64), random_ids(211, 2, 12)
    found = [
        zo.zo_gradient_estimator(model, model.parameters(), smoothed, ids, ids, 3, 1e-4, CPU, parallel)
        for parallel in (False, True)
    ]
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    assert abs(found[0][1].item() - smoothed(logits, ids[:, 1:].flatten()).item()) < 1e-3
    for a, b in zip(found[0][0], found[1][0]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * a.abs().max().item())


# ---- compatibility ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_calls_without_the_new_arguments(name):
    check_old_call(name)


@pytest.mark.parametrize("name", OLD_COMMANDS)
def test_commands_without_the_new_flags(name, home):
    check_old_command(name, home)


@pytest.mark.parametrize("name", UNUSUAL_HEADS)
def test_models_whose_logits_are_not_their_heads(name):
    check_unusual_head(name)


TINY_RUN = (
    "--mode ZO --query_budget_q 4 --parallel_q_computation --model_size tiny --max_samples 30 --max_steps 3 --block_size 32 "
)
TINY_RUN += "--eval_samples 4 --batch_size 2 --log_interval 1 --learning_rate 1e-3 "


def metrics(run: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the machine."""
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not any(word in k for word in ("second", "memory", "time"))} for row in rows]


def test_out_of_memory_halves_the_group(home, monkeypatch):
    """One failure at 4 queries: a line in the log, then the run goes on as if it had been started with 2."""
    whole, failures = zo.projected_gradients, []

    def short_of_memory(objective, tensors, batch, queries, group=0, grid=None, chosen=None):
        if group == 4:
            failures.append(group)
            assert len(failures) == 1, "4 queries are tried again"
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory")
        return whole(objective, tensors, batch, queries, group, grid, chosen)

    monkeypatch.setattr(zo, "projected_gradients", short_of_memory)
    halved = run_main(TINY_RUN + "--parallel_batch_size 4 --run_name halved", home)
    monkeypatch.undo()
    expected = run_main(TINY_RUN + "--parallel_batch_size 2 --run_name two", home)
    assert len(failures) == 1
    assert "out of memory at step 0: now 2 queries in one forward pass" in (halved / "train.log").read_text()
    assert metrics(halved) == metrics(expected)


def test_out_of_memory_at_one_query_says_what_to_lower(home, monkeypatch, capsys):
    def never(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(zo, "projected_gradients", never)
    with scripts_home(home):
        code = zo.main((TINY_RUN + "--run_name never").split())
    said = capsys.readouterr()
    assert code == 2
    assert "now one query after the other" in said.out
    assert "--batch_size" in said.err


def test_other_errors_are_not_taken_for_a_lack_of_memory(home, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(zo, "projected_gradients", broken)
    with scripts_home(home), pytest.raises(RuntimeError, match="shape mismatch"):
        zo.main((TINY_RUN + "--run_name broken").split())


def test_parallel_and_sequential_runs_agree(home):
    """The same run on either path: the same losses to rounding, amplified by 1/(2 epsilon) and three updates."""
    batched = metrics(run_main(TINY_RUN + "--run_name batched", home))
    in_place = metrics(run_main(TINY_RUN.replace("--parallel_q_computation", "") + "--run_name in_place", home))
    assert len(batched) == len(in_place) == 4
    for a, b in zip(batched, in_place):
        assert a["val_loss"] == b["val_loss"] == "" or abs(float(a["val_loss"]) - float(b["val_loss"])) < 1e-3


# ---- the benchmark itself --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_memory_table() -> dict[str, dict]:
    names = [name for name in MEMORY_OPERATIONS if name not in ("adam", "mudamw")]
    return {row["operation"]: row for row in memory_table("20M", 1, 32, 2, names)}


@pytest.mark.parametrize("name", ["in place", "batched by 4", "low rank by 4", "sgd", "sgd, low rank"])
def test_memory_targets_at_20m(small_memory_table, name):
    assert small_memory_table[name]["result"] == "met", small_memory_table[name]


def test_memory_of_the_classical_estimator_shows(small_memory_table):
    """A method that keeps three copies is seen to: the measurement works."""
    row = small_memory_table["classical"]
    assert row["allocator"] > 3 * row["parameters"]
    assert row["resident"] is None or row["resident"] > 3 * row["parameters"]


def test_resident_peak_confirms_the_allocators(small_memory_table):
    for row in small_memory_table.values():
        assert row["resident"] is None or row["resident"] < row["allocator"] + 24, row


def test_speed_and_profile_tables_have_every_row():
    rows = speed_table("tiny", 2, 1, torch.float32, 1, 16)
    assert [row["step"] for row in rows][:3] == [FORWARD, TEXTBOOK, IN_PLACE]
    assert len(rows) == 9
    assert all(row["seconds"] > 0 for row in rows)
    assert {row["step"] for row in profile_table("tiny", 1, 4, 2, 1, 16)} > {IN_PLACE}


def test_the_ranks_table_is_of_equal_runs(home):
    (row,) = ranks_table("tiny", 4, 1, 2, 16, ["batched by 4, low rank"])
    assert row["weights"] == "equal"
    assert row["bytes"] == 8 * (1 + 2 * 2)
    assert row["ratio"] > 0


def test_signal_to_noise_has_a_best_epsilon_inside():
    table = noise_table("tiny", 4, 1, 8, (1e-1, 1e-3, 1e-6))
    best = {(row["weights"], row["path"]): row["best epsilon"] for row in best_epsilons(table)}
    assert best["trained", "float32, in place"] == best["trained", "float32, batched"] == 1e-3


def test_the_program_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SMALL_MODELS", {"Llama": SMALL_MODELS["Llama"]})
    flags = "--only speed --speed_size tiny --queries 1 --repetitions 1 --rows 1 --tokens 8"
    assert main([*flags.split(), "--json", str(tmp_path / "tables.json")]) == 0
    written = json.loads((tmp_path / "tables.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert all(row["step"] in said for row in written["speed"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_paths_agree_on_cuda(family):
    with no_fallback(), bench(small_model("Llama", torch.float64), 3, 12, None, torch.device("cuda")) as b:
        queries = b.queries(FAMILIES[family], 5, 1e-4)
        grid = b.grid(queries)
        before = [tensor.matrix.clone() for tensor in b.tensors]
        one = b.estimate(queries, 0, grid).projected_grads
        other = b.estimate(queries, 2).projected_grads
        assert all(torch.equal(a, tensor.matrix) for a, tensor in zip(before, b.tensors))
    assert np.abs(one - other).max() <= 1e-9 * rms(one)


if __name__ == "__main__":
    sys.exit(main())
