"""Benchmarks and tests of the zeroth-order estimator of reproduce_zo_paper.py.

    python test_zo_optimization.py                              all groups, about a quarter of an hour on two cores
    python test_zo_optimization.py --full --json tables.json    q = 8, 16, 32 and models up to 1B (24 GiB of memory)
    python test_zo_optimization.py --only speed --queries 8 --repetitions 9 --profile
    pytest test_zo_optimization.py                              a minute; nothing depends on the time

    speed           seconds of one step, update included, over those of its forward passes alone; of layerwise's stages
    memory          peak beyond the parameters, by allocator statistics and by the process's resident size
    equivalence     in place against batched, drift of the weights, and the signal-to-noise of c over epsilon
    compatibility   calls without the new arguments, commands without the new flags, models of other kinds

Each figure is printed beside its target; above a table stands the docstring of the function that makes it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import reproduce_zo_paper as zo

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines
if "torch" not in sys.modules and __name__ != "__mp_main__":
    zo.tune_process()  # before torch is imported, as the script does; not where memory is measured

import numpy as np
import pytest
import torch
import transformers

GROUPS = ("speed", "memory", "equivalence", "compatibility")
LEARNING_RATE = 1e-7  # an update costs the same at any rate; this one leaves the model where it is
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # by this CPU's own instructions; emulated, it says nothing

# ---- Material ------------------------------------------------------------------------------------------------------

COMMON = {"vocab_size": 211, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "attn_implementation": "eager"}
DEEP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA_LIKE = {**COMMON, **DEEP, "intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": False}
SMALL_MODELS = {
    "Llama": ("Llama", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "GPT-2": ("GPT2", {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "Qwen2": ("Qwen2", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "OPT": ("OPT", {**COMMON, **DEEP, "ffn_dim": 48, "word_embed_proj_dim": 24}),
    "Llama, biases, untied head": ("Llama", {**LLAMA_LIKE, "attention_bias": True, "mlp_bias": True}),
    "Phi, head with bias": ("Phi", LLAMA_LIKE),
}
SMALL_BLOCKS = {"BLOCK_ELEMENTS": {"cpu": 1 << 10}, "BLOCK_ELEMENTS_ACCELERATOR": 1 << 10}  # several in a small tensor
SMALL_BLOCKS |= {"TILE_TOKENS": 16, "TILE_VOCABULARY": 64, "SLAB_VOCABULARY": 64}


def sized_model(size: str, weights: str = "float32") -> torch.nn.Module:
    """The script's own model of that size."""
    tokenizer = mock.MagicMock(bos_token_id=0, eos_token_id=0)  # benchmarks use random token ids and need no data
    tokenizer.__len__.return_value = 4096 if size == "tiny" else 50257
    return zo.build_model(zo.Config(model_size=size, weights=weights), tokenizer)


def small_model(name: str = "Llama", dtype: torch.dtype = torch.float64, **changes) -> torch.nn.Module:
    kind, settings = SMALL_MODELS.get(name, (name, LLAMA_LIKE))
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.to(dtype).eval()


class Bench(contextlib.ExitStack):
    """A model, its tensors, a batch of random tokens that every query sees, and workers: what a step needs."""

    device = "cpu"  # of the tables

    def __init__(self, model: torch.nn.Module, rows: int, tokens: int, compute_dtype=None, device: str | None = None):
        super().__init__()
        device = device or self.device
        self.model, self.workers = model.to(device), self.enter_context(zo.Workers(torch.device(device)))
        generator, vocabulary = torch.Generator().manual_seed(0), model.config.vocab_size
        self.ids = torch.randint(vocabulary, (rows, tokens), generator=generator).to(device)
        self.tensors = zo.trainable_tensors(model.named_parameters(), half=True)
        self.objective, self.fixed = zo.Objective(model, self.workers, compute_dtype), 0

    def queries(self, family: str, q: int, epsilon: float = 1e-3, step: int = 0) -> zo.Queries:
        return zo.Queries(FAMILIES[family](self), 0, step, q, epsilon)

    def grid(self, queries: zo.Queries) -> zo.Grid | None:  # settles the weights, as a step does before it measures
        half = any(tensor.parameter.dtype == torch.bfloat16 for tensor in self.tensors)
        return None if half else zo.Grid(self.tensors, queries.epsilon, queries.family.largest, self.workers)

    def losses(self, queries: zo.Queries, group: int = 0, grid: zo.Grid | None = None) -> np.ndarray:
        known = self.objective.below(self.ids, self.fixed)
        batch = zo.query_batch(self.ids, self.ids, queries.q, "shared", lambda ids: known)
        return zo.query_losses(self.objective, self.tensors, batch, queries, group, grid)

    def c(self, queries: zo.Queries, group: int = 0, grid: zo.Grid | None = None) -> np.ndarray:
        return zo.projected_gradients(self.losses(queries, group, grid), queries.epsilon)

    def weights(self) -> list[torch.Tensor]:
        return [tensor.matrix.clone() for tensor in self.tensors]

    def loss(self) -> float:
        return self.objective.losses(self.ids, self.ids).item()

    def gradient(self) -> dict[int, torch.Tensor]:
        found = self.objective.gradient(self.ids, self.ids, self.tensors)[1]
        return {tensor.index: g.view(tensor.rows, tensor.columns) for tensor, g in zip(self.tensors, found)}

    def optimizer(self, name: str = "sgd") -> zo.Optimizer:
        return zo.Optimizer(name, self.tensors, self.workers, outer=zo.outer_parameters(self.model))

    def feedback(self, carry: str, optimizer: str) -> tuple[zo.Feedback, Callable[[int], None]]:
        """The rule of --direction feedback, and a step of it: measure and apply."""
        config = zo.Config(direction="feedback", carry=carry, optimizer=optimizer)
        made = (self.objective, self.objective, self.tensors, None, self.optimizer(optimizer), zo.Ranks())
        batches = (lambda step: (self.ids, self.ids),) * 3
        rule = zo.Feedback(zo.Setting(config, *made, *batches, lambda step: 1.0), 0)
        return rule, lambda number: rule.finish(rule.measure(number, LEARNING_RATE))


ISOTROPIC = {"gaussian": lambda b: zo.Gaussian(), "rademacher": lambda b: zo.Rademacher()}
ISOTROPIC |= {"kronecker": lambda b: zo.Kronecker()}
ISOTROPIC |= {f"lowrank r={rank}": lambda b, rank=rank: zo.LowRank(rank) for rank in (1, 2)}
FAMILIES = {**ISOTROPIC, "aligned r=2": lambda b: zo.Aligned(2).look(b.objective, b.tensors, b.ids, 0)}
FAMILIES |= {"guided": lambda b: zo.Guided(zo.Gaussian(), b.tensors, b.gradient(), 0.5)}


def judged(row: dict, bounds: dict[str, float]) -> dict:
    target = "; ".join(f"{name} <= {bound:.4g}" for name, bound in bounds.items())
    return row | {"target": target, "result": "; ".join("met" if row[n] <= b else "short" for n, b in bounds.items())}


def print_table(title: str, about: str, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    cells = [[row.get(column, "") for column in columns] for row in rows]
    lines = [columns, *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in line] for line in cells)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}\n    {about}\n")
    for line in (lines[0], ["-" * width for width in widths], *lines[1:]):
        print("  " + "  ".join(value.ljust(width) for value, width in zip(line, widths)).rstrip(), flush=True)


def timed(calls: dict[str, Callable[[int], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each call(number), numbers from 1, one after the other in an order that rotates; call(0) warms up."""
    names, seconds = list(calls), {name: [] for name in calls}
    for number in range(repetitions + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            calls[name](number)
            torch.cuda.synchronize() if torch.cuda.is_available() else None
            seconds[name] += [time.perf_counter() - began] * (number > 0)
    return seconds


def over(one: Sequence[float], other: Sequence[float]) -> float:
    """The median of the ratios inside one repetition: a machine that is slower for a while does no harm."""
    return float(np.median(np.divide(one, other)))


# ---- Speed ---------------------------------------------------------------------------------------------------------

FORWARD, TEXTBOOK, IN_PLACE = "2q forward passes alone", "textbook MeZO", "in place, gaussian"
TARGETS = {  # of the steps that have it in their names
    "in place": {"/ forward": 1.30},
    "gaussian": {"/ forward": 1.15},
    "rademacher": {"/ forward": 1.05},
    "kronecker": {"/ forward": 1.10},
    "lowrank r=1": {"/ forward": 0.92, "/ MeZO": 0.5},
}


def mezo_step(b: Bench, q: int, number: int, rate: float = LEARNING_RATE, epsilon: float = 1e-3) -> None:
    """MeZO as published (Malladi et al. 2023, Algorithms 1 and 2 with n = q), z materialised a parameter at a time."""
    generator, c = torch.Generator(b.objective.device), {}

    def perturb(seed: int, scale: float) -> None:
        generator.manual_seed(seed)
        for theta in (tensor.parameter.detach() for tensor in b.tensors):
            theta.add_(torch.normal(0.0, 1.0, theta.shape, generator=generator, device=theta.device), alpha=scale)

    for seed in range(number * q, number * q + q):
        losses = [perturb(seed, scale) or b.loss() for scale in (epsilon, -2 * epsilon)]
        c[seed] = (losses[0] - losses[1]) / (2 * epsilon)
        perturb(seed, epsilon)
    for seed, projected_grad in c.items():
        perturb(seed, -rate / q * projected_grad)


def contenders(b: Bench, q: int) -> dict[str, Callable[[int], object]]:
    """Steps by name, as the trainer makes them: settle, measure, update; number 0 warms up, with fewer queries."""

    def step(family: str, group: int, number: int) -> None:
        queries = b.queries(family, q if number else max(1, group), step=number)
        sgd.apply_estimate(b.tensors, queries, b.c(queries, group, b.grid(queries)), LEARNING_RATE)

    sgd, pairs = b.optimizer(), itertools.product(list(TARGETS)[1:], (4, 8))
    steps = {FORWARD: lambda number: [b.loss() for _ in range(2 * q)]}
    steps |= {TEXTBOOK: lambda number: mezo_step(b, q if number else 1, number)}
    steps |= {IN_PLACE: functools.partial(step, "gaussian", 0)}
    return steps | {f"batched by {group}, {family}": functools.partial(step, family, group) for family, group in pairs}


def speed_table(size: str, q: int, repetitions: int, dtype: torch.dtype, rows: int, tokens: int) -> list[dict]:
    """One step, update included, over its 2q forward passes alone, textbook MeZO, and itself in place. passes: in those
    of its batch, beside what the script counts. feedback: a step of its own, q = 1; what adam costs is in no pass.
    """
    with Bench(sized_model(size), rows, tokens, dtype) as b:
        pairs = itertools.product(("branch", "stream"), ("adam", "sgd"))
        rules = {f"feedback {carry}, {optimizer}": b.feedback(carry, optimizer) for carry, optimizer in pairs}
        seconds = timed(contenders(b, q) | {name: step for name, (_, step) in rules.items()}, repetitions)
    table, counted = [], {name: rule.passes for name, (rule, _) in rules.items()}
    for name, taken in seconds.items():
        row = {"q": q, "dtype": str(dtype)[6:], "step": name, "seconds": float(np.median(taken))}
        bases = {"/ forward": FORWARD, "/ MeZO": TEXTBOOK, "/ in place": IN_PLACE} if name not in rules else {}
        row |= {column: over(taken, seconds[base]) for column, base in bases.items()}
        row |= {"passes": over(taken, seconds[FORWARD]) * 2 * q, "counted": counted.get(name, 2.0 * q)}
        table.append(judged(row, next((TARGETS[key] for key in TARGETS if key in name), {})))
    return table


def weights_table(size: str, q: int, repetitions: int, rows: int, tokens: int) -> list[dict]:
    """A low-rank step, batched by 4, by the dtypes of weights and computation, over the first."""
    steps, table, half = {}, [], torch.bfloat16
    with contextlib.ExitStack() as stack:
        for weights, dtype in (("float32", torch.float32), ("float32", half), ("bfloat16", half)):
            b = stack.enter_context(Bench(sized_model(size, weights), rows, tokens, dtype))
            steps[weights, str(dtype)[6:]] = contenders(b, q)["batched by 4, lowrank r=1"]
        seconds = timed(steps, repetitions)
    for (weights, dtype), taken in seconds.items():
        row = {"weights": weights, "computing": dtype, "seconds": float(np.median(taken))}
        row["/ float32"] = over(taken, seconds["float32", "float32"])
        table.append(judged(row, {"/ float32": 0.6} if weights == "bfloat16" and BFLOAT16 else {}))
    return table


def stages_table(size: str, q: int, repetitions: int, rows: int, tokens: int) -> list[dict]:
    """A step of each stage of --scope layerwise, what fixed blocks make of it computed once, over whole passes."""
    table, names = [], (IN_PLACE, "batched by 4, lowrank r=1")
    with Bench(sized_model(size), rows, tokens) as b:

        def step(name: str, reuse: bool, number: int) -> None:
            b.fixed = fixed if reuse else 0
            steps[name](number)

        for stage in range(len(b.objective.blocks)):
            b.tensors = zo.choose_scope(b.model, f"blocks:{stage}-{stage}")
            fixed, steps, row = b.objective.fixed_blocks(), contenders(b, q), {"block": stage}
            for name in names:
                both = {reuse: functools.partial(step, name, reuse) for reuse in (True, False)}
                row[name] = over(*timed(both, repetitions).values())
            table.append(row)
    mean = {"block": "mean"} | {name: float(np.mean([row[name] for row in table])) for name in names}
    return [*table[:-1], judged(table[-1], dict.fromkeys(names, 0.35)), judged(mean, dict.fromkeys(names, 0.6))]


def profile_table(size: str, q: int, rows: int, tokens: int) -> list[dict]:
    """Where the milliseconds of a step go: operators, over all threads, and on a GPU its kernels."""
    settings, table = torch._C._profiler._ExperimentalConfig(profile_all_threads=True), []
    with Bench(sized_model(size), rows, tokens) as b:
        for name, step in contenders(b, q).items():
            step(0)
            with torch.profiler.profile(experimental_config=settings) as profile:
                step(1)
            for times in ("self_cpu_time_total", "self_device_time_total"):
                found = sorted(profile.key_averages(), key=lambda each: -getattr(each, times))[:6]
                for each in (each for each in found if getattr(each, times)):
                    row = {"step": name, "on": times.split("_")[1], "operator": each.key[:60], "calls": each.count}
                    table.append(row | {"ms": getattr(each, times) / 1e3})
    return table


# ---- Memory --------------------------------------------------------------------------------------------------------
# Each size in a process of its own, two figures an operation, both beyond what is there when it begins. The allocator's
# is the claim: the peak of the running sum of torch.profiler's [memory] events. These show the calling thread alone: it
# is taken with one thread, and a worker's scratch is added for each that is missing. The resident one, with all threads
# and libraries' buffers, is its check: the process's peak (VmHWM, reset by /proc/self/clear_refs).

MEMORY_GROUP = 4
MEMORY_OPERATIONS = ("forward", "in place", "batched by 4", "low rank by 4", "sgd", "sgd, low rank", "feedback branch")
MEMORY_OPERATIONS += ("feedback stream", "classical", "adam", "mudamw")


def classical_losses(b: Bench, epsilon: float = 1e-3) -> None:
    """One query of the estimator as often written: parameters cloned, z and the gradient kept whole."""
    kept, z, losses = b.weights(), [torch.randn_like(tensor.matrix) for tensor in b.tensors], []
    for scale in (epsilon, -epsilon, 0.0):
        for tensor, original, direction in zip(b.tensors, kept, z):
            torch.add(original, direction, alpha=scale, out=tensor.matrix)
        losses.append(b.loss() if scale else 0.0)
    _ = [direction * ((losses[0] - losses[1]) / (2 * epsilon)) for direction in z]


def memory_operation(name: str, b: Bench) -> Callable[[], object]:
    """What is measured under that name; all that it needs beforehand exists when this returns."""
    group = MEMORY_GROUP if name.endswith("by 4") else 0
    queries = b.queries("lowrank r=1" if "low rank" in name else "gaussian", 1 if name == "in place" else MEMORY_GROUP)
    if name in ("forward", "classical"):
        return b.loss if name == "forward" else functools.partial(classical_losses, b)
    if name == "in place" or group:
        return functools.partial(b.losses, queries, group)
    if name.startswith("feedback"):  # with sgd: without an optimizer's state
        return functools.partial(b.feedback(name.split()[1], "sgd")[1], 0)
    optimizer = b.optimizer(name.partition(",")[0])
    for each in optimizer.each.values():  # of Muon's five iterations, which need the same memory, one
        each.param_groups[0].update({"ns_steps": 1} if "ns_steps" in each.param_groups[0] else {})
    return lambda: optimizer.apply_estimate(b.tensors, queries, np.full(MEMORY_GROUP, 1e-6), 1e-9)


def allocator_peak(operation: Callable[[], object], workers: zo.Workers, threads: int) -> int:
    if workers.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, _ = torch.cuda.memory_allocated(), operation()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        operation()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    missing = (threads - 1) * sum(buffer.nbytes for buffer in workers._scratch.__dict__.values())
    return max(itertools.accumulate(sizes, initial=0)) + missing


def resident_peak(operation: Callable[[], object], *_) -> int | float:
    def status(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    with contextlib.suppress(OSError, TypeError):
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        operation()
        return status("VmHWM") - before
    return math.nan  # where the system does not show it


def memory_child(size: str, rows: int, tokens: int, threads: int, names: Sequence[str], device: str) -> list[tuple]:
    """(name, allocator, resident) of each operation, in MiB, in a fresh process. A tiny model goes first, so that what
    libraries load at first use is charged to nobody; and resident figures, as the profiler leaves holes in the heap.
    """
    tiny, model, Bench.device = sized_model("tiny"), sized_model(size), device
    zo.fast_products()

    def measured(name: str, measure: Callable, count: int) -> float:
        torch.set_num_threads(count)
        with Bench(tiny, rows, tokens) as b:
            memory_operation(name, b)()
        with Bench(model, rows, tokens) as b:
            return measure(memory_operation(name, b), b.workers, threads) / 2**20

    resident, sizes = [measured(name, resident_peak, threads) for name in names], [p.nbytes for p in model.parameters()]
    known = [("parameters", sum(sizes) / 2**20, math.nan), ("largest parameter", max(sizes) / 2**20, math.nan)]
    return known + [(name, measured(name, allocator_peak, 1), peak) for name, peak in zip(names, resident)]


def memory_table(size: str, rows: int, tokens: int, threads: int, names: Sequence[str]) -> list[dict]:
    """MiB beyond the parameters. Targets, by the allocator: in place, forward + 8; batched by g, 2g times the forward
    pass + 16; the sgd update 8 (scratch). feedback: a whole step, which holds gradients: a block's at a time, and the
    embedding's, whose size, that of the largest parameter, is unavoidable. Others are for comparison.
    """
    settings = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TOP_PAD_": "0"}
    with mock.patch.dict(os.environ, settings), multiprocessing.get_context("spawn").Pool(1) as pool:
        # it gives freed memory back at once
        found = pool.apply(memory_child, (size, rows, tokens, threads, names, Bench.device))
    forward = found[2][1]
    bounds = {"in place": forward + 8, "sgd": 8, "sgd, low rank": 8}
    bounds |= dict.fromkeys(("batched by 4", "low rank by 4"), 2 * MEMORY_GROUP * forward + 16)
    table = [dict(zip(("model", "operation", "allocator", "resident"), (size, *row))) for row in found]
    return [judged(row, {"allocator": bounds[n]} if (n := row["operation"]) in bounds else {}) for row in table]


# ---- Equivalence ---------------------------------------------------------------------------------------------------

DTYPES = {  # of the weights, of computation; epsilon; targets: bfloat16 has eight bits
    "float64": (torch.float64, None, 1e-4, {"c": 1e-9}),
    "float32": (torch.float32, None, 1e-3, {"loss": 1e-6, "grouping": 1e-6}),
    "bfloat16": (torch.float32, torch.bfloat16, 1e-3, {"loss": 1e-2, "grouping": 1e-2}),
}
EPSILONS = (1e-1, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)


def compared(model, family="gaussian", dtype="float64", q: int = 4, tokens: int = 13, device: str = "cpu") -> dict:
    """Both paths on one small model, settled first: differences, what became of the weights, whether one fell back."""
    stored, compute, epsilon, _ = DTYPES[dtype]
    patched, caught = mock.patch.multiple(zo, **SMALL_BLOCKS), warnings.catch_warnings(record=True)
    with patched, caught as said, Bench(model.to(stored), 3, tokens, compute, device) as b:
        warnings.simplefilter("always")
        queries = b.queries(family, q, epsilon)
        grid, before = b.grid(queries), b.weights()
        one, restored = b.losses(queries, 0, grid), all(map(torch.equal, before, b.weights()))
        losses = np.stack([b.losses(queries, group) for group in (1, 3, q)])
        untouched = all(map(torch.equal, before, b.weights()))
    apart, scale = losses - one, np.sqrt(np.mean(zo.projected_gradients(one, epsilon) ** 2))
    return {
        "loss": float(np.max(np.abs(apart) / one)),
        "c": float(np.max(np.abs(apart[..., 0] - apart[..., 1])) / (2 * epsilon) / scale),
        "grouping": float(np.max(np.ptp(losses, axis=0) / one)),
        "weights": ("restored" if restored else "MOVED") + ", " + ("untouched" if untouched else "TOUCHED"),
        "fell back": any("one after the other" in str(each.message) for each in said),
        "losses": [one, *losses],
    }


def equivalence_table() -> list[dict]:
    """In place against batched on small models, small blocks and tiles: largest difference of a loss over the loss,
    of a projected gradient c over the root mean square of c, over groupings of 7 queries (1, 3, 7 at a time). The
    rounding of a loss reaches c amplified by 1/(2 epsilon). grouping: of a loss between two groupings.
    """
    table = []
    for dtype, family in itertools.product(DTYPES, FAMILIES):
        names = ("Llama", "GPT-2") if dtype == "bfloat16" else SMALL_MODELS  # where it is emulated, it takes its time
        found = [compared(small_model(name), family, dtype, 7) for name in names]
        row = {"dtype": dtype, "family": family, "weights": "; ".join({each["weights"] for each in found})}
        row |= {key: max(each[key] for each in found) for key in ("loss", "c", "grouping", "fell back")}
        table.append(judged(row, DTYPES[dtype][3]))
    return table


def drift_table(count: int) -> list[dict]:
    """Largest change of a weight after queries (three perturbations each), over the spread of all weights, no update.
    The weights are on their grid; textbook MeZO perturbs them as they are.
    """
    with Bench(small_model("Llama", torch.float32), 1, 4) as b:
        queries, table = b.queries("gaussian", count), []
        for path, act in (
            ("putting on the grid, once", lambda: b.grid(queries)),
            ("in place, on the grid", lambda: b.losses(queries)),
            (TEXTBOOK, lambda: mezo_step(b, count, 0, rate=0.0)),
        ):
            before, _ = b.weights(), act()
            moved = max((old - new).abs().max() for old, new in zip(before, b.weights()))
            row = {"path": path, "drift": (moved / torch.cat([*map(torch.ravel, before)]).std()).item()}
            table.append(judged(row, {"drift": 0} if path.startswith("in place") else {}))
    return table


def noise_table(size: str, q: int, rows: int = 2, tokens: int = 32, epsilons: Sequence[float] = EPSILONS) -> list[dict]:
    """Error of the projected gradient of fixed directions: median |c(epsilon) - c| over the deviation of c, which is in
    float64 at epsilon 1e-5. Large epsilons have bias (epsilon^2), small ones rounding (1/epsilon). new: initial
    weights; trained: after 30 steps of backpropagation on the batch. best: the epsilon of the least error.
    """
    model, table = sized_model(size), []
    for state in ("new", "trained"):
        with Bench(copy.deepcopy(model).double(), rows, tokens) as b:
            reference = b.c(b.queries("gaussian", q, 1e-5), min(q, 4))
        found = {epsilon: {"weights": state, "epsilon": epsilon} for epsilon in (*epsilons, "best")}
        for dtype, (path, group) in itertools.product(("float32", "bfloat16"), (("in place", 0), ("batched", 4))):
            with Bench(model, rows, tokens, getattr(torch, dtype)) as b:
                errors = {e: np.abs(b.c(b.queries("gaussian", q, e), group) - reference) for e in epsilons}
            errors = {e: float(np.median(error) / np.std(reference)) for e, error in errors.items()}
            for epsilon, error in (errors | {"best": min(errors, key=errors.get)}).items():
                found[epsilon][f"{dtype}, {path}"] = error
        table += found.values()
        with Bench(model, rows, tokens) as b:  # so that the loss has the curvature of a trained model's
            adam = b.optimizer("adam")
            for _ in range(30 if state == "new" else 0):
                adam.apply_gradients(b.gradient(), 3e-3, 0)
    return table


def compatibility_table() -> list[dict]:
    """Each line is a test, which stops with an error where it fails."""
    with tempfile.TemporaryDirectory() as home:
        checks = [(test, name) for test, names in COMPATIBILITY.items() for name in names]
        return [{"check": t.__doc__, "of": n, "result": "met"} for t, n in checks if t(n, Path(home)) is None]


# ---- Program -------------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    form, number = argparse.RawDescriptionHelpFormatter, {"type": int, "metavar": "N"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add, sizes = parser.add_argument, {"choices": tuple(zo.MODEL_SIZES)}
    add("--json", metavar="FILE", help="write the same figures there")
    add("--full", action="store_true", help="q = 8, 16, 32 and all sizes up to 1B")
    add("--only", nargs="+", choices=GROUPS, default=GROUPS, help="some of the groups")
    add("--profile", action="store_true", help="also show where the milliseconds of a step go")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of the speed and memory tables (default: cpu)")
    add("--repetitions", **number, default=5, help="of the speed table (default: 5)")
    add("--queries", **number, nargs="+", help="q of the speed table (default: 8)")
    add("--speed_size", **sizes, default="20M", help="of the speed table (default: 20M)")
    add("--sizes", **sizes, nargs="+", help="of the memory table (default: 20M 200M)")
    add("--rows", **number, default=4, help="sequences in the batch (default: 4)")
    add("--tokens", **number, default=128, help="tokens in a sequence (default: 128)")
    add("--memory_tokens", **number, default=64, help="the same, memory table (default: 64)")
    asked = parser.parse_args(argv)
    asked.queries = asked.queries or [8, 16, 32][: 3 if asked.full else 1]
    asked.sizes = asked.sizes or ["20M", "200M", "500M", "1B"][: 4 if asked.full else 2]
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    asked, tables, info, threads = parse_arguments(argv), {}, Path("/proc/cpuinfo"), torch.get_num_threads()
    zo.quiet_libraries()
    Bench.device = asked.device
    cpu = re.search(r"model name\s*: *(.*)", info.read_text() if info.exists() else "")
    machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": threads}
    machine |= {"transformers": transformers.__version__, "cpu": cpu[1] if cpu else platform.machine()}
    machine |= {"bfloat16 hardware": BFLOAT16, "device": asked.device, "oneDNN": zo.fast_products()}
    machine |= {"gpu": torch.cuda.get_device_name()} if asked.device == "cuda" else {}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), time.strftime("%Y-%m-%d %H:%M:%S"))

    def show(table: Callable[..., list[dict]], title: str, *given) -> None:
        rows = table(*given)
        tables.setdefault(table.__name__.removesuffix("_table"), []).extend(rows)
        print_table(title, table.__doc__.rstrip(), rows)

    size, n, batch = asked.speed_size, asked.repetitions, (asked.rows, asked.tokens)
    shape = f"{size}, batch {asked.rows} x {asked.tokens}"
    if "speed" in asked.only:
        for dtype, q in itertools.product([torch.float32, torch.bfloat16][: 1 + BFLOAT16], asked.queries):
            show(speed_table, f"Speed, {shape}, q = {q}, {str(dtype)[6:]}, {n} times", size, q, n, dtype, *batch)
        show(weights_table, f"Weights, {shape}, q = {asked.queries[0]}, {n} times", size, asked.queries[0], n, *batch)
        show(stages_table, f"Stages, {shape}, q = {asked.queries[0]}, {n} times", size, asked.queries[0], n, *batch)
        if asked.profile:
            show(profile_table, f"Profile, {shape}, q = {asked.queries[0]}", size, asked.queries[0], *batch)
    for size in asked.sizes if "memory" in asked.only else ():  # Muon takes minutes a matrix where bfloat16 is emulated
        names = [name for name in MEMORY_OPERATIONS if name != "mudamw" or size in ("tiny", "20M") or BFLOAT16]
        title = f"Memory, {size}, batch {asked.rows} x {asked.memory_tokens}, {threads} threads"
        show(memory_table, title, size, asked.rows, asked.memory_tokens, threads, names)
    if "equivalence" in asked.only:
        show(equivalence_table, "Equivalence")
        show(drift_table, "Drift, 1000 queries", 1000)
        size, q = ("20M", 8) if asked.full else ("tiny", 12)
        show(noise_table, f"Error of c over epsilon, {size}, q = {q}", size, q)
    if "compatibility" in asked.only:
        show(compatibility_table, "Compatibility")
    if asked.json:
        Path(asked.json).write_text(json.dumps({"machine": machine, **tables}, indent=1) + "\n", "utf-8")
    short = sum(row.get("result", "").count("short") for rows in tables.values() for row in rows)
    print(f"\n{short} figures fall short of their targets" if short else "\nevery target is met")
    return 0


# ---- Tests ---------------------------------------------------------------------------------------------------------

PATHS = [  # every family on two models, and on the others one of each kind: dense, of low rank, by a layer's inputs
    *itertools.product(["float64"], list(SMALL_MODELS)[:2], FAMILIES),
    *itertools.product(["float64"], list(SMALL_MODELS)[2:], ["gaussian", "lowrank r=2", "aligned r=2"]),
    *itertools.product(["float32"], ["GPT-2"], ISOTROPIC),
    *itertools.product(["float32"], ["Llama", "OPT"], ["gaussian", "lowrank r=1"]),
    *itertools.product(["bfloat16"], ["Llama", "GPT-2"], ["gaussian", "lowrank r=1"]),
]
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("dtype", "name", "family"), PATHS)
def test_paths_agree(dtype, name, family, device):
    found = compared(small_model(name), family, dtype, device=device)
    assert "short" not in judged(found, DTYPES[dtype][3])["result"], found
    assert (found["weights"], found["fell back"]) == ("restored, untouched", False)


def test_results_do_not_depend_on_the_number_of_threads():
    counts = (1, 2, 3, torch.get_num_threads())
    found = [torch.set_num_threads(count) or compared(small_model())["losses"] for count in counts]
    np.testing.assert_allclose(found, found[:1] * len(counts), rtol=1e-13)


def test_perturbations_leave_the_weights_bit_for_bit():
    _, in_place, mezo = drift_table(100)
    assert in_place["drift"] == 0.0 < mezo["drift"]  # else this measures nothing


ODD_MODULES = {  # modules of one's own around an MLP, `inner`, that own what is named in them
    "own parameters": lambda m, x: m.scale * torch.tanh(x @ m.matrix + m.shift),
    "own parameters around others": lambda m, x: m.inner(x) + m.scale * torch.tanh(x @ m.matrix + m.shift),
    "a weight without its module": lambda m, x: m.inner(x) + x @ m.linear.weight.T,
    "a weight with and without its module": lambda m, x: m.inner(x) + x @ m.linear.weight.T + m.linear(x),
    "rows and tokens swapped": lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1),
}
ARCHITECTURES = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    "Mamba": {"state_size": 4, "time_step_rank": 2},
    **{name: {"head_dim": 8} for name in ("Qwen3", "Gemma")},
    **{name: {} for name in ("GPTNeoX", "Bloom", "Falcon", "Mistral", "StableLm")},
    # logits that are soft-capped or scaled: Objective must use the model's own
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
}
FALLS_BACK = {"own parameters": False, "a weight without its module": True, "Gemma2": False, "Cohere": False}


def other_model(name: str) -> torch.nn.Module:
    if name in ARCHITECTURES:
        return small_model(name, **ARCHITECTURES[name])
    model, module = small_model(), type("Odd", (torch.nn.Module,), {"forward": ODD_MODULES[name]})()
    layer, shapes = model.model.layers[0], {"matrix": (32, 32), "shift": (32,), "scale": ()}
    parts = {part: torch.nn.Parameter(torch.full(shape, 0.1)) for part, shape in shapes.items()}
    parts |= {"inner": layer.mlp, "linear": torch.nn.Linear(32, 32, bias=False)}
    for part in parts.keys() & set(ODD_MODULES[name].__code__.co_names):
        setattr(module, part, parts[part])
    layer.mlp = module.double()
    return model


@pytest.mark.parametrize("name", OTHER_MODELS := [*ODD_MODULES, *ARCHITECTURES])
def test_other_models(name, home):
    """other models are never wrong"""
    model = other_model(name)
    with Bench(model, 2, 12) as b:
        assert abs(b.loss() - model(input_ids=b.ids, labels=b.ids).loss.item()) < 1e-6
    for tokens in (12, 13):  # of 12, [tokens, rows, n] has as many rows as [2 queries, 2 signs, 3 rows]
        found = compared(model.train(), tokens=tokens)
        assert found["c"] <= 1e-9
        assert found["weights"] == "restored, untouched"
        assert FALLS_BACK.get(name) in (None, found["fell back"])
    assert model.training
    assert not any("forward" in module.__dict__ for module in model.modules())


MINIATURE = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
MINIATURE |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def directions(b: Bench, queries: zo.Queries) -> list[np.ndarray]:
    """z of every query on every tensor, [q, entries]."""
    zs = [torch.empty(queries.q, *tensor.matrix.shape, dtype=torch.float64) for tensor in b.tensors]
    for tensor, query in itertools.product(b.tensors, range(queries.q)):
        direction = queries.family.direction(tensor, queries.at(query))
        for block in tensor.blocks:
            direction(block, zs[tensor.index][query, tensor.span(block)])
    return [z.flatten(1).numpy() for z in zs]


def library(b: Bench, parallel: bool, family: str = "gaussian", loss_fn=None, **given) -> tuple:
    direction, _, rank = family.partition(" r=")
    given |= {"parallel_q_computation": parallel, "parallel_batch_size": 2, "direction": direction}
    trained = [(name, parameter) for name, parameter in b.model.named_parameters() if parameter.requires_grad]
    return zo.zo_gradient_estimator(
        b.model, trained, loss_fn, b.ids, b.ids, 3, 1e-4, "cpu", rank=int(rank or 1), **given
    )


def assert_close(found: Sequence[torch.Tensor], expected: Sequence) -> None:
    for one, other in zip(found, map(np.ravel, expected)):
        np.testing.assert_allclose(one.flatten(), other, atol=1e-6 * np.abs(other).max())


@pytest.mark.parametrize("family", ISOTROPIC)
def test_expected_estimate_is_the_true_gradient(family):
    """Per entry, t = (mean of c z - gradient) over its standard error: t^2 has mean 1 on every tensor, not above."""
    squares = []
    with Bench(small_model(**MINIATURE), 2, 6) as b:
        queries = b.queries(family, 600, 1e-4)
        c = b.c(queries, 50)
        for z, gradient in zip(directions(b, queries), b.gradient().values()):
            each = c[:, None] * z
            mean, error = each.mean(0), each.std(0) / math.sqrt(len(c))
            squares.append(np.square([mean - gradient.flatten().numpy(), mean] / error))
            assert squares[-1][0].mean() < 1 + 6 * math.sqrt(2 / len(mean))
    squares, against_zero = np.concatenate(squares, 1)
    assert abs(squares.mean() - 1) < 0.25
    assert squares.max() < 5.5**2
    assert against_zero.mean() > 1.5  # the test can tell this gradient from none


@pytest.mark.parametrize("query_data", ["shared", "distinct"])
@pytest.mark.parametrize("family", ISOTROPIC)
def test_what_is_measured_is_what_is_applied(family, query_data):
    """Of each query alone: losses at theta +- epsilon z. The library's gradient on either path, sgd's step: c z."""
    with mock.patch.multiple(zo, **SMALL_BLOCKS), Bench(small_model("GPT-2"), 6, 11) as b:
        queries, before, data = b.queries(family, 3, 1e-4, step=7), b.weights(), [b.ids] * 3
        z, data = directions(b, queries), data if query_data == "shared" else b.ids.split(2)
        one = (b.objective, b.tensors, lambda query: (data[query], data[query], None), queries, 1, None)
        losses = np.concatenate([zo.query_losses(*one, [query]) for query in range(3)])
        c = zo.projected_gradients(losses, queries.epsilon)
        expected = [c @ each / 3 for each in z]
        for parallel in (False, True):
            grads, loss = library(b, parallel, family, step=7, query_data=query_data)
            assert_close([loss, *grads], [losses.mean(), *expected])
        for tensor, old, each in zip(b.tensors, before, z):
            tensor.matrix.copy_(old + queries.epsilon * torch.from_numpy(each[1]).view_as(old))
        assert abs(b.objective.losses(data[1], data[1]).item() - losses[1, 0]) < 1e-12
        for tensor, old in zip(b.tensors, before):
            tensor.matrix.copy_(old)
        b.optimizer().apply_estimate(b.tensors, queries, c, 0.5)
        assert_close([2 * (old - tensor.matrix) for old, tensor in zip(before, b.tensors)], expected)


def test_a_loss_function_of_ones_own_and_a_frozen_layer():
    smoothed = functools.partial(torch.nn.functional.cross_entropy, label_smoothing=0.3)
    with Bench(small_model(), 2, 12) as b:
        frozen = b.model.model.layers[0].requires_grad_(False)
        kept, state = copy.deepcopy(frozen), torch.get_rng_state()
        (one, loss), (other, _) = (library(b, parallel, loss_fn=smoothed) for parallel in (False, True))
        assert_close(one, other)
        logits = b.model(input_ids=b.ids).logits[:, :-1].flatten(0, 1)
        assert abs(loss.item() - smoothed(logits, b.ids[:, 1:].flatten()).item()) < 1e-3
    assert all(map(torch.equal, (*kept.parameters(), state), (*frozen.parameters(), torch.get_rng_state())))


OLD_COMMANDS = (
    "ZO --query_budget_q 2 --batch_size 2 --learning_rate 1e-3 --log_interval 1",
    "ZO --query_budget_q 4 --parallel_q_computation --parallel_batch_size 2 --learning_rate 1e-3",
    "ZO --scope full --query_budget_q 1 --epochs 1 --optimizer mudamw --use_lr_scheduler --warmup_steps 2",
    "Instruct --scope reduced --query_budget_q 2 --bp_interval 5 --learning_rate 1e-4 --optimizer adam",
    "FO --learning_rate 1e-3",
)
SMALL_RUN = " --model_size tiny --max_samples 30 --max_steps 3 --block_size 32 --eval_samples 4"


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:  # for runs and tokens, shared so that the data is tokenized once
    return tmp_path_factory.mktemp("home")


def run_main(flags: str, home: Path) -> Path:
    logs = tempfile.mkdtemp(dir=home)
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(home)}), contextlib.redirect_stdout(io.StringIO()):
        assert zo.main(f"--mode {flags}{SMALL_RUN} --log_dir {logs}".split()) == 0
    return next(Path(logs).iterdir())


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_old_calls(name, home):
    """a call without the new arguments"""
    model, again = (small_model(name, torch.float32) for _ in range(2))
    loss_fn, parameters, ids = torch.nn.CrossEntropyLoss(), list(model.parameters()), torch.arange(24).view(2, 12)
    grads, loss = zo.zo_gradient_estimator(model, parameters, loss_fn, ids, ids, 3, 1e-3, torch.device("cpu"))
    assert [(g.shape, g.dtype, g.requires_grad) for g in grads] == [(p.shape, p.dtype, False) for p in parameters]
    assert abs(loss.item() - again(input_ids=ids, labels=ids).loss.item()) < 1e-2
    new = {"parallel_q_computation": False, "parallel_batch_size": 4, "seed": 0, "step": 0}
    same, _ = zo.zo_gradient_estimator(again, again.parameters(), None, ids, ids, 3, 1e-3, "cpu", **new)
    assert all(map(torch.equal, grads, same))


@pytest.mark.parametrize("command", OLD_COMMANDS)
def test_old_commands(command, home):
    """a command without the new flags"""
    run = run_main(command, home)
    flags, rows = json.loads((run / "config.json").read_text())["flags"], zo.read_metrics(run / "metrics.csv")
    assert flags["parallel_q_computation"] == ("--parallel_q_computation" in command)
    assert math.isfinite(float(rows[-1]["val_loss"]))
    assert list(run.glob("checkpoints/step_*/model.safetensors"))


COMPATIBILITY = {test_old_calls: SMALL_MODELS, test_old_commands: OLD_COMMANDS, test_other_models: OTHER_MODELS}


memory = functools.cache(lambda: {r["operation"]: r for r in memory_table("20M", 1, 32, 2, MEMORY_OPERATIONS[:-2])})


@pytest.mark.parametrize("name", MEMORY_OPERATIONS[:-2])
def test_memory_targets_at_20m(name):
    row, whole, largest = (memory()[of] for of in (name, "parameters", "largest parameter"))
    assert row["result"] != "short", row
    assert not row["resident"] > row["allocator"] + 24, row
    assert (row["allocator"] > 2.9 * whole["allocator"]) == (name == "classical")
    assert not name.startswith("feedback") or row["allocator"] < 2.3 * largest["allocator"]


def test_the_program_writes_what_it_prints(tmp_path, capsys):
    flags = "--only speed --speed_size tiny --queries 2 --repetitions 1 --rows 1 --tokens 8 --profile --json"
    with mock.patch.dict(zo.MODEL_SIZES, tiny=zo.Size(32, 2, 2, 64)):
        assert main([*flags.split(), str(tmp_path / "tables.json")]) == 0
    written, said = json.loads((tmp_path / "tables.json").read_text()), capsys.readouterr().out
    assert written["machine"]["torch"] == torch.__version__
    rows = [row for row in written["speed"] if row["dtype"] == "float32"]
    assert [row["step"] for row in rows[:3]] == [FORWARD, TEXTBOOK, IN_PLACE]
    assert len(rows) == 15
    assert [row["block"] for row in written["stages"]] == [0, 1, "mean"]
    assert [row["weights"] for row in written["weights"]] == ["float32", "float32", "bfloat16"]
    assert all(row["seconds"] > 0 and row["passes"] > 0 and row["step"] in said for row in rows)
    assert {row["step"] for row in written["profile"]} == {row["step"] for row in rows if "feedback" not in row["step"]}


def test_projected_gradients_are_those_of_float64_and_have_a_best_epsilon():
    with mock.patch.dict(zo.MODEL_SIZES, tiny=zo.Size(32, 2, 2, 64)):
        coarse, fine, _, best = noise_table("tiny", 8, 1, 8, (1e-2, 1e-3, 1e-6))[4:]
    assert best["float32, in place"] == best["float32, batched"] == 1e-3
    assert max(fine["float32, in place"], fine["float32, batched"]) < 0.05
    assert max(coarse["bfloat16, in place"], coarse["bfloat16, batched"]) < 0.5


if __name__ == "__main__":
    sys.exit(main())
