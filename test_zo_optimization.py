"""Benchmarks and tests of the zeroth-order estimator of reproduce_zo_paper.py.

As a program it measures five groups and prints each figure beside its target; under pytest the same functions assert,
at a scale that takes a minute on two cores, and nothing depends on the time.

    python test_zo_optimization.py                              all groups, about a quarter of an hour on two cores
    python test_zo_optimization.py --full --json tables.json    q = 8, 16, 32 and models up to 1B (24 GiB of memory)
    python test_zo_optimization.py --only speed --queries 8 --repetitions 9 --profile
    pytest test_zo_optimization.py

    speed           seconds of one step, update included, over those of its forward passes alone
    ranks           seconds of a step of two processes, a thread each, over those of one; bytes that are sent
    memory          peak beyond the parameters, by allocator statistics and by the process's resident size
    equivalence     in place against batched, drift of the weights, and the signal-to-noise of c over epsilon
    compatibility   calls without the new arguments, commands without the new flags, models of other kinds

Sections: Material, Tables, Speed, Ranks, Memory, Equivalence, Compatibility, Program, Tests. What is printed above a table is
the docstring of the function that makes it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import functools
import gc
import inspect
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
LEARNING_RATE = 1e-7  # an update costs the same at any rate; this one leaves the model where it is
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # on this CPU's own instructions; emulated, it says nothing

# ---- Material: models, batches, families ---------------------------------------------------------------------------

COMMON = {"vocab_size": 211, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "attn_implementation": "eager"}
DEEP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA_LIKE = {**COMMON, **DEEP, "intermediate_size": 48, "num_key_value_heads": 2}
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
SMALL_MODELS = {
    "Llama": ("Llama", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "GPT-2": ("GPT2", {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "Qwen2": ("Qwen2", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "OPT": ("OPT", {**COMMON, **DEEP, "ffn_dim": 48, "word_embed_proj_dim": 24}),
    "Llama, biases, untied head": ("Llama", {**LLAMA_LIKE, **BIASED}),
    "Phi, head with bias": ("Phi", {**LLAMA_LIKE, "tie_word_embeddings": False}),
}


def sized_model(size: str) -> torch.nn.Module:
    """The script's own model of that size."""
    tokenizer = mock.MagicMock(bos_token_id=0, eos_token_id=0)  # benchmarks use random token ids and need no data
    tokenizer.__len__.return_value = 4096 if size == "tiny" else 50257
    return zo.build_model(zo.Config(model_size=size), tokenizer)


def small_model(name: str = "Llama", dtype: torch.dtype = torch.float64, **changes) -> torch.nn.Module:
    """A small model of transformers; its weights are a function of its shape, biases included."""
    kind, settings = SMALL_MODELS.get(name, (name, LLAMA_LIKE))
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.to(dtype).eval()


def random_ids(rows: int, tokens: int, vocabulary: int = 211) -> torch.Tensor:
    """Token ids, int64 [rows, tokens]."""
    return torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))


def small_blocks() -> contextlib.AbstractContextManager:
    """Blocks and tiles so small that small models have several of each."""
    sizes = {"TILE_TOKENS": 16, "TILE_VOCABULARY": 64, "SLAB_VOCABULARY": 64}
    return mock.patch.multiple(zo, BLOCK_ELEMENTS={"cpu": 1 << 10}, BLOCK_ELEMENTS_ACCELERATOR=1 << 10, **sizes)


class Bench:
    """A model, its tensors, one batch that every query sees, and workers: what a step needs."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, workers: zo.Workers, compute_dtype=None):
        self.model, self.ids, self.workers = model, ids, workers
        self.tensors = zo.trainable_tensors(model.named_parameters())
        self.objective = zo.Objective(model, workers, compute_dtype)

    def queries(self, family: str, q: int, epsilon: float = 1e-3, step: int = 0) -> zo.Queries:
        return zo.Queries(FAMILIES[family](self), 0, step, q, epsilon)

    def grid(self, queries: zo.Queries) -> zo.Grid:
        """Settles the weights, as a step does before it measures."""
        return zo.Grid(self.tensors, queries.epsilon, queries.family.largest, self.workers)

    def losses(self, queries: zo.Queries, group: int = 0, grid: zo.Grid | None = None) -> np.ndarray:
        """Of every query at plus and minus, in place (group 0) or batched."""
        return zo.query_losses(self.objective, self.tensors, lambda _: (self.ids, self.ids), queries, group, grid)

    def c(self, queries: zo.Queries, group: int = 0) -> np.ndarray:
        return zo.projected_gradients(self.losses(queries, group), queries.epsilon)

    def weights(self) -> list[torch.Tensor]:
        return [tensor.matrix.clone() for tensor in self.tensors]

    def loss(self) -> float:
        return self.objective.losses(self.ids, self.ids).item()

    def gradient(self) -> dict[int, torch.Tensor]:
        """The true one, a matrix by tensor index."""
        found = self.objective.gradient(self.ids, self.ids, self.tensors)[1]
        return {tensor.index: g.view(tensor.rows, tensor.columns) for tensor, g in zip(self.tensors, found)}

    def optimizer(self, name: str = "sgd") -> zo.Optimizer:
        return zo.Optimizer(name, self.tensors, self.workers, outer=zo.outer_parameters(self.model))

    def feedback(self, carry: str, optimizer: str) -> tuple[float, Callable[[int], None]]:
        """What a step of --direction feedback counts in forward passes, and the step: measure and apply."""
        config = zo.Config(direction="feedback", carry=carry, optimizer=optimizer)
        made = (self.objective, self.tensors, None, self.optimizer(optimizer), zo.Ranks())
        rule = zo.Feedback(zo.Setting(config, *made, lambda step: self.ids, lambda step: self.ids, lambda step: 1.0), 0)
        return rule.passes, lambda number: rule.finish(rule.measure(number, LEARNING_RATE))


@contextlib.contextmanager
def bench(model: torch.nn.Module, rows: int, tokens: int, compute=None, device: torch.device = CPU) -> Iterator[Bench]:
    """A Bench on random tokens, for as long as its workers live."""
    with zo.Workers(device) as workers:
        yield Bench(model.to(device), random_ids(rows, tokens, model.config.vocab_size).to(device), workers, compute)


ISOTROPIC = {
    "gaussian": lambda b: zo.Gaussian(),
    "rademacher": lambda b: zo.Rademacher(),
    "lowrank r=1": lambda b: zo.LowRank(1),
    "lowrank r=2": lambda b: zo.LowRank(2),
}
FAMILIES = ISOTROPIC | {
    "aligned r=2": lambda b: zo.Aligned(2).look(b.objective, b.tensors, b.ids, 0),
    "guided": lambda b: zo.Guided(zo.Gaussian(), b.gradient(), 0.5),
}


# ---- Tables --------------------------------------------------------------------------------------------------------
# A table is a list of rows, a row a dict from column to value; `target` and `result` are columns like others.


def judged(row: dict, bounds: dict[str, float]) -> dict:
    """The row with its two last columns: the most that some of the others may be, and whether they are."""
    target = "; ".join(f"{name} <= {bound:.4g}" for name, bound in bounds.items())
    return row | {"target": target, "result": "; ".join("met" if row[n] <= b else "short" for n, b in bounds.items())}


def cell(value) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    small = 0 < abs(value) < 1e-3 or abs(value) >= 1e5
    return "0" if value == 0 else f"{value:.1e}" if small else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def print_table(title: str, about: str, rows: list[dict]) -> None:
    """An aligned table: text to the left, numbers to the right."""
    print(f"\n{title}\n{about}\n", flush=True)
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    cells = [[cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    right = [any(isinstance(row.get(column), (int, float)) for row in rows) for column in columns]
    for values in (columns, ["-" * width for width in widths], *cells):
        line = "  ".join(v.rjust(w) if to_right else v.ljust(w) for v, w, to_right in zip(values, widths, right))
        print("  " + line.rstrip(), flush=True)


def timed(calls: dict[object, Callable[[int], object]], repetitions: int) -> dict[object, list[float]]:
    """Seconds of each call(number), numbers from 1, one after the other in an order that rotates; call(0) warms up."""
    for call in calls.values():
        call(0)
    names, seconds = list(calls), {name: [] for name in calls}
    for number in range(1, repetitions + 1):
        turn = (number - 1) % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            calls[name](number)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def over(one: Sequence[float], other: Sequence[float]) -> float:
    """The median of the ratios inside one repetition: a machine that is slower for a while does no harm."""
    return statistics.median(a / b for a, b in zip(one, other))


# ---- Speed ---------------------------------------------------------------------------------------------------------

FORWARD, TEXTBOOK, IN_PLACE = "2q forward passes alone", "textbook MeZO", "in place, gaussian"
TARGETS = {
    "gaussian": {"/ forward": 1.30, "/ in place": 0.85},
    "rademacher": {"/ forward": 1.15, "/ in place": 0.85},
    "lowrank r=1": {"/ forward": 1.03, "/ MeZO": 0.5},
}


def textbook_mezo_step(
    b: Bench, q: int, number: int, learning_rate: float = LEARNING_RATE, epsilon: float = 1e-3
) -> None:
    """MeZO as published (Malladi et al. 2023, Algorithms 1 and 2 with n = q), z materialised a parameter at a time.

    theta += eps z, loss, theta -= 2 eps z, loss, theta += eps z; then theta -= (lr / q) c_i z_i, z drawn again each time.
    """
    generator, c = torch.Generator(b.objective.device), {}

    def perturb(seed: int, scale: float) -> None:
        generator.manual_seed(seed)
        for theta in (tensor.parameter.detach() for tensor in b.tensors):
            theta.add_(torch.normal(0.0, 1.0, theta.shape, generator=generator, device=theta.device), alpha=scale)

    for seed in range(number * q, number * q + q):
        perturb(seed, epsilon)
        c[seed] = b.loss()
        perturb(seed, -2 * epsilon)
        c[seed] = (c[seed] - b.loss()) / (2 * epsilon)
        perturb(seed, epsilon)
    for seed, projected_grad in c.items():
        perturb(seed, -learning_rate / q * projected_grad)


def speed_table(
    size: str, q: int, repetitions: int, dtype: torch.dtype, rows: int = 4, tokens: int = 128
) -> list[dict]:
    """One step, update included, over its 2q forward passes alone, textbook MeZO, and itself in place. passes: the same
    in forward passes of the batch, beside those that the script counts. feedback: a step with one query of its own
    kind, whatever q; adam, its default, costs what no pass shows.
    """
    with bench(sized_model(size), rows, tokens, dtype) as b:

        def estimator(family: str, group: int) -> Callable[[int], None]:
            def step(number: int) -> None:  # as the trainer does it: settle, measure, update; few queries to warm up
                queries = b.queries(family, q if number else max(1, group), step=number)
                c = zo.projected_gradients(b.losses(queries, group, b.grid(queries)), queries.epsilon)
                sgd.apply_estimate(b.tensors, queries, c, LEARNING_RATE)

            return step

        sgd, counted, bounds = b.optimizer(), {}, {IN_PLACE: {"/ forward": 1.60}}
        steps = {FORWARD: lambda number: [b.loss() for _ in range(2 * q)]}
        steps[TEXTBOOK] = lambda number: textbook_mezo_step(b, q if number else 1, number)
        steps[IN_PLACE] = estimator("gaussian", 0)
        for family, group in itertools.product(TARGETS, (4, 8)):
            name = f"batched by {group}, {family}"
            steps[name], bounds[name] = estimator(family, group), TARGETS[family]
        for carry, optimizer in itertools.product(("branch", "stream"), ("adam", "sgd")):
            name = f"feedback {carry}, {optimizer}"
            counted[name], steps[name] = b.feedback(carry, optimizer)
        seconds, table = timed(steps, repetitions), []
    for name, taken in seconds.items():
        row = {"q": q, "dtype": str(dtype)[6:], "step": name, "seconds": statistics.median(taken)}
        bases = {} if name in counted else {"/ forward": FORWARD, "/ MeZO": TEXTBOOK, "/ in place": IN_PLACE}
        row |= {column: over(taken, seconds[base]) for column, base in bases.items()}
        row |= {"passes": over(taken, seconds[FORWARD]) * 2 * q, "counted": counted.get(name, 2.0 * q)}
        table.append(judged(row, bounds.get(name, {})))
    return table


def profile_table(
    size: str, repetitions: int, q: int = 8, group: int = 4, rows: int = 4, tokens: int = 128
) -> list[dict]:
    """Milliseconds of a step's pieces, each timed alone (median), times how often a step runs it; float32."""
    with bench(sized_model(size), rows, tokens) as b, torch.no_grad():
        hidden = torch.randn(2 * group, rows * (tokens - 1), b.model.config.hidden_size)
        targets, ids = torch.zeros(hidden.shape[:2], dtype=torch.int64), b.ids.repeat(2 * group, 1)
        blocks = [(tensor, block) for tensor in b.tensors for block in tensor.blocks]
        outs, scalars, positions, pieces = (
            [t.matrix for t in b.tensors],
            np.full(group, 1e-12),
            itertools.cycle((1, 0)),
            {},
        )
        plain = zo.HeadTiles(b.objective.head, 1, 1)

        def add(step: str, piece: str, times: int, call: Callable[[], object]) -> None:
            pieces[step, piece, times] = lambda number: call()

        def body(batched: zo.Batched) -> None:
            with batched.installed():
                b.objective.hidden(ids)

        add("forward passes", "body", 2 * q, lambda: b.objective.hidden(b.ids))
        add("forward passes", "head", 2 * q, lambda: zo.token_losses(hidden[:1], targets[:1], plain, b.workers))
        for family in TARGETS:
            queries, step = b.queries(family, group), f"batched by {group}, {family}"
            z, grid = queries.directions(0, b.tensors), b.grid(queries)
            one = zo.Batched(b.objective, b.tensors, queries, range(group), rows, tokens)
            draws = functools.partial(b.workers.each, lambda it, z=z: zo.draw(z[it[0].index], *it, b.workers), blocks)
            update = functools.partial(zo.add_directions, outs, b.tensors, queries, scalars, b.workers)
            add(step, "body", q // group, functools.partial(body, one))
            head = lambda one=one: zo.token_losses(hidden, targets, one.head_tiles(hidden), b.workers)  # noqa: E731
            add(step, "head", q // group, head)
            add(step, "update", q // group, update)
            if "lowrank" not in family:
                add(step, "draws (in these)", 2 * q, draws)
            if family == "gaussian":
                add(IN_PLACE, "settle", 1, functools.partial(b.grid, queries))
                add(IN_PLACE, "perturb", 3 * q, lambda z=z, grid=grid: grid.move(z, next(positions)))
        seconds = timed(pieces, repetitions)
    each = {key: statistics.median(taken) * 1e3 for key, taken in seconds.items()}
    return [{"step": s, "piece": p, "ms": ms, "times": n, "ms a step": ms * n} for (s, p, n), ms in each.items()]


# ---- Ranks ---------------------------------------------------------------------------------------------------------

RANK_CASES = {
    "in place, gaussian": "--direction gaussian",
    "batched by 4, low rank": "--direction lowrank --parallel_q_computation",
    "batched by 4, feedback": "--direction feedback --parallel_q_computation",
}
RANK_STEPS = 4


def rank_run(processes: int, flags: str, folder: Path, name: str) -> tuple[float, int, str]:
    """Seconds of a step, bytes that rank 0 sent in one, and the SHA-256 of the weights that a run ends with.

    A step's seconds are those of metrics.csv from the second step to the last but one.
    """
    script = str(Path(zo.__file__).resolve())
    start = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    words = f"{flags} --num_threads 1 --run_name {name} --log_dir {folder} --max_steps {RANK_STEPS}".split()
    done = subprocess.run([sys.executable, *start, script, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
    (run,) = folder.glob(f"{name}_2*")
    at = {int(row["step"]): float(row["seconds"]) for row in metrics(run)}
    sent = re.search(r"sent the others (\d+) bytes a step", (run / "train.log").read_text())
    seconds = (at[RANK_STEPS - 1] - at[1]) / (RANK_STEPS - 2)
    return seconds, int(sent[1]) if sent else 0, zo.file_digest(next(run.glob("checkpoints/step*/model.safetensors")))


def ranks_table(size: str, q: int, repetitions: int, rows: int, tokens: int, cases=tuple(RANK_CASES)) -> list[dict]:
    """Two processes with a thread each, over one process with one thread: whole commands, one after the other; the
    weights must be the same bit for bit. bytes are what rank 0 sends the other in a step.
    """
    table = []
    for case in cases:
        flags = (
            f"{RANK_CASES[case]} --model_size {size} --query_budget_q {q} --batch_size {rows} --block_size {tokens} "
        )
        flags += "--max_samples 100 --eval_samples 1 --eval_interval 1000 --log_interval 1 --save_interval 1000"
        with tempfile.TemporaryDirectory() as folder:
            pairs = itertools.product(range(repetitions), (1, 2))
            found = [rank_run(count, flags, Path(folder), f"r{number}_{count}") for number, count in pairs]
        seconds, sent, digests = zip(*found)
        row = {
            "step": case,
            "one process, s": statistics.median(seconds[::2]),
            "two, s": statistics.median(seconds[1::2]),
        }
        row |= {"ratio": over(seconds[1::2], seconds[::2]), "bytes": sent[1]}
        table.append(judged(row | {"weights": "equal" if len({*digests}) == 1 else "DIFFERENT"}, {"ratio": 0.55}))
    return table


# ---- Memory --------------------------------------------------------------------------------------------------------
# Each size in a process of its own, two figures an operation, both beyond what is there when it begins.
#   allocator   peak of the running sum of the bytes that torch's allocator gives and takes, from torch.profiler's
#               [memory] events. These show the calling thread alone, so the figure is taken with one torch thread, where
#               workers run inline, and the scratch of one worker is added for each thread that is missing.
#   resident    the process's peak (VmHWM, reset through /proc/self/clear_refs) less its resident size before, with all
#               threads. Freed memory goes back to the system at once there, else old pages would hide new ones.
# The allocator's figure is the claim; the resident one, which also has libraries' buffers, is its check.

MIB, MEMORY_GROUP = 2**20, 4
FEEDBACK_MEMORY = ("feedback branch", "feedback stream")
MEMORY_OPERATIONS = ("forward", "in place", *FEEDBACK_MEMORY, "batched by 4", "low rank by 4", "sgd", "sgd, low rank")
MEMORY_OPERATIONS += ("classical", "adam", "mudamw")


def classical_losses(b: Bench, epsilon: float = 1e-3) -> None:
    """One query of the estimator as often written: parameters cloned, z and the gradient kept whole."""
    kept, z, losses = b.weights(), [torch.randn_like(tensor.matrix) for tensor in b.tensors], []
    for scale in (epsilon, -epsilon, 0.0):
        for tensor, original, direction in zip(b.tensors, kept, z):
            torch.add(original, direction, alpha=scale, out=tensor.matrix)
        losses += [b.loss()] if scale else []
    gradients = [direction * ((losses[0] - losses[1]) / (2 * epsilon)) for direction in z]
    del gradients


def memory_operation(name: str, b: Bench) -> Callable[[], object]:
    """What is measured under that name; all that it needs beforehand exists when this returns."""
    queries = b.queries("lowrank r=1" if "low rank" in name else "gaussian", 1 if name == "in place" else MEMORY_GROUP)
    if name in FEEDBACK_MEMORY:
        return functools.partial(b.feedback(name.split()[1], "sgd")[1], 0)
    if name in ("forward", "classical"):
        return b.loss if name == "forward" else lambda: classical_losses(b)
    if name == "in place" or name.endswith("by 4"):
        return lambda: b.losses(queries, 0 if name == "in place" else MEMORY_GROUP)
    optimizer = b.optimizer(name.partition(",")[0])
    for each in optimizer.each.values():  # of Muon's five iterations, which need the same memory, one
        each.param_groups[0].update({"ns_steps": 1} if "ns_steps" in each.param_groups[0] else {})
    return lambda: optimizer.apply_estimate(b.tensors, queries, np.full(MEMORY_GROUP, 1e-6), 1e-9)


def allocator_peak(operation: Callable[[], object], workers: zo.Workers, threads: int) -> int:
    """Bytes at the peak by the allocator, on one thread, with the scratch of the workers that are missing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        operation()
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    ordered = sorted(events, key=lambda event: event.start_ns())
    peak = max(itertools.accumulate((event.nbytes() for event in ordered), initial=0))
    return peak + (threads - 1) * sum(buffer.nbytes for buffer in workers._scratch.__dict__.values())


def resident_peak(operation: Callable[[], object], *_) -> int | None:
    """Bytes at the process's peak; None where the system does not show it."""

    def status(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError, TypeError):
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        operation()
        return status("VmHWM") - before
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
            return measure(memory_operation(name, b), b.workers, threads)

    resident = [measured(name, resident_peak, threads) for name in names]
    allocator = [measured(name, allocator_peak, 1) for name in names]
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return {"parameters": sum(sizes), "largest": max(sizes), "figures": dict(zip(names, zip(allocator, resident)))}


def memory_table(
    size: str, rows: int, tokens: int, threads: int, names: Sequence[str] = MEMORY_OPERATIONS
) -> list[dict]:
    """MiB beyond the parameters. Targets, by the allocator: in place, forward + 8; batched by g, 2g times the forward pass
    + 16; the sgd update 8 (scratch); feedback, a whole step with sgd, four of the largest tensor beside the forward
    pass: it forms gradients, a block's at a time, and the embedding's is as large. Others are for comparison.
    """
    settings = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TOP_PAD_": "0"}
    command = [sys.executable, __file__, MEMORY_CHILD, json.dumps([size, rows, tokens, threads, list(names)])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, check=False)
    if done.returncode:
        raise RuntimeError(f"the memory of {size} could not be measured: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    forward, largest, table = found["figures"]["forward"][0] / MIB, found["largest"] / MIB, []
    bounds = {"in place": forward + 8, "sgd": 8, "sgd, low rank": 8}
    bounds |= dict.fromkeys(("batched by 4", "low rank by 4"), 2 * MEMORY_GROUP * forward + 16)
    for name, (allocator, resident) in found["figures"].items():
        row = {"model": size, "parameters": found["parameters"] / MIB, "largest tensor": largest, "operation": name}
        row |= {"allocator": allocator / MIB, "resident": None if resident is None else resident / MIB}
        table.append(judged(row, {"allocator": bounds[name]} if name in bounds else {}))
    return table


# ---- Equivalence ---------------------------------------------------------------------------------------------------

EQUIVALENCE_DTYPES = {  # of the weights, of computation; epsilon; targets: bfloat16 has eight bits
    "float64": (torch.float64, None, 1e-4, {"c": 1e-9}),
    "float32": (torch.float32, None, 1e-3, {"loss": 1e-6, "grouping": 1e-6}),
    "bfloat16": (torch.float32, torch.bfloat16, 1e-3, {"loss": 1e-2, "grouping": 1e-2}),
}
EPSILONS = (1e-1, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@contextlib.contextmanager
def no_fallback() -> Iterator[None]:
    """Where the batched path falls back to the sequential one, it would be compared with itself: an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="queries are evaluated one after the other")
        yield


def equivalence(name: str, family: str, dtype: str, q: int = 7, device: torch.device = CPU) -> dict:
    """Both paths on one small model, which is settled first: differences, and what became of the weights."""
    stored, compute, epsilon, _ = EQUIVALENCE_DTYPES[dtype]
    with small_blocks(), no_fallback(), bench(small_model(name, stored), 3, 13, compute, device) as b:
        queries = b.queries(family, q, epsilon)
        grid, before = b.grid(queries), b.weights()
        one, restored = b.losses(queries, 0, grid), all(map(torch.equal, before, b.weights()))
        losses = np.stack([b.losses(queries, group) for group in (1, 2, 3, q)])
        untouched = all(map(torch.equal, before, b.weights()))
    apart, scale = losses - one, rms(zo.projected_gradients(one, epsilon))
    return {
        "loss": float(np.max(np.abs(apart) / one)),
        "c": float(np.max(np.abs(apart[..., 0] - apart[..., 1])) / (2 * epsilon) / scale),
        "grouping": float(np.max(np.ptp(losses, axis=0) / one)),
        "weights": ("restored" if restored else "MOVED") + ", " + ("untouched" if untouched else "TOUCHED"),
        "losses": (one, losses),
    }


def equivalence_table() -> list[dict]:
    """In place against batched on small models of transformers, with small blocks and tiles: largest difference of a loss
    over the loss, of a projected gradient c over the root mean square of c, over all groupings of 7 queries (1, 2, 3, 7
    at a time). The rounding of a loss reaches c amplified by 1/(2 epsilon). grouping: of a loss between two groupings.
    """
    table = []
    for dtype, family in itertools.product(EQUIVALENCE_DTYPES, FAMILIES):
        names = ("Llama", "GPT-2") if dtype == "bfloat16" else SMALL_MODELS  # where it is emulated, it takes its time
        found = [equivalence(name, family, dtype) for name in names]
        row = {"dtype": dtype, "family": family, "epsilon": EQUIVALENCE_DTYPES[dtype][2]}
        row |= {key: max(figures[key] for figures in found) for key in ("loss", "c", "grouping")}
        row["weights"] = "; ".join(sorted({figures["weights"] for figures in found}))
        table.append(judged(row, EQUIVALENCE_DTYPES[dtype][3]))
    return table


def drift_table(count: int) -> list[dict]:
    """Largest change of a weight after queries in place (three perturbations each), over the spread of all weights, no update
    made. The weights are on their grid; textbook MeZO perturbs them as they are.
    """
    table = []
    with bench(small_model("Llama", torch.float32), 1, 4) as b:
        queries = b.queries("gaussian", count)
        for path, times, act in (
            ("putting them on the grid, once", 0, lambda: b.grid(queries)),
            ("in place, on the grid", count, lambda: b.losses(queries)),
            ("textbook MeZO", count, lambda: textbook_mezo_step(b, count, 0, learning_rate=0.0)),
        ):
            before = b.weights()
            act()
            moved = max((old - new).abs().max().item() for old, new in zip(before, b.weights()))
            row = {"path": path, "queries": times, "drift": moved / rms(np.concatenate([w.flatten() for w in before]))}
            table.append(judged(row, {"drift": 0} if path.startswith("in place") else {}))
    return table


def reference_c(model: torch.nn.Module, q: int, rows: int, tokens: int) -> np.ndarray:
    """The projected gradients in float64 at a small epsilon; leaves the model in float32 as it was."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with bench(model.double(), rows, tokens) as b:
        c = b.c(b.queries("gaussian", q, 1e-5), min(q, 4))
    model.float().load_state_dict(kept)
    return c


def noise_table(size: str, q: int, rows: int = 2, tokens: int = 32, epsilons: Sequence[float] = EPSILONS) -> list[dict]:
    """Error of the projected gradient of fixed directions: median |c(epsilon) - c| over the deviation of c, where c is in
    float64 at epsilon 1e-5. To the left of the best epsilon bias (epsilon^2), to the right rounding (1/epsilon).
    new: initial weights; trained: after 30 steps of backpropagation on the batch.
    """
    model, table = sized_model(size), []
    for state in ("new", "trained"):
        reference = reference_c(model, q, rows, tokens)
        found = {epsilon: {"weights": state, "epsilon": epsilon} for epsilon in epsilons}
        for dtype, (path, group) in itertools.product(("float32", "bfloat16"), (("in place", 0), ("batched", 4))):
            with bench(model, rows, tokens, getattr(torch, dtype)) as b:
                for epsilon in epsilons:
                    error = np.abs(b.c(b.queries("gaussian", q, epsilon), group) - reference)
                    found[epsilon][f"{dtype}, {path}"] = float(np.median(error) / np.std(reference))
        table += found.values()
        with bench(model, rows, tokens) as b:  # so that the loss has the curvature of a trained model's
            adam = b.optimizer("adam")
            for _ in range(30 if state == "new" else 0):
                adam.apply_gradients(b.gradient(), 3e-3)
    return table


def best_epsilons(table: list[dict]) -> list[dict]:
    """The least error of each column above."""
    best = []
    for state, column in itertools.product(("new", "trained"), [key for key in table[0] if "," in key]):
        row = min((row for row in table if row["weights"] == state), key=lambda row: row[column])
        best.append({"weights": state, "path": column, "best epsilon": row["epsilon"], "error": row[column]})
    return best


# ---- Compatibility -------------------------------------------------------------------------------------------------

OLD_COMMANDS = {
    "ZO": "--mode ZO --query_budget_q 2 --batch_size 2 --learning_rate 1e-3 --log_interval 1",
    "ZO, parallel": "--mode ZO --query_budget_q 4 --parallel_q_computation --parallel_batch_size 2 --learning_rate 1e-3",
    "ZO, schedule": "--mode ZO --scope full --query_budget_q 1 --epochs 1 --optimizer mudamw --use_lr_scheduler "
    "--warmup_steps 2",
    "Instruct": "--mode Instruct --scope reduced --query_budget_q 2 --bp_interval 5 --learning_rate 1e-4 --optimizer adam",
    "FO": "--mode FO --learning_rate 1e-3",
}
SMALL_RUN = " --model_size tiny --max_samples 30 --max_steps 3 --block_size 32 --eval_samples 4"
# Models whose logits are soft-capped or scaled: Objective must use the model's own.
UNUSUAL_HEADS = {
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0, "tie_word_embeddings": True},
}


def check_old_call(name: str, folder: Path) -> str:
    """Shapes, dtypes and the loss of a call without the new arguments, and the same by the new ones' defaults."""
    model, again, ids = small_model(name, torch.float32), small_model(name, torch.float32), random_ids(2, 12)
    loss_fn, parameters = torch.nn.CrossEntropyLoss(), list(model.parameters())
    grads, loss = zo.zo_gradient_estimator(model, parameters, loss_fn, ids, ids, 3, 1e-3, CPU)
    assert [(g.shape, g.dtype, g.requires_grad) for g in grads] == [(p.shape, p.dtype, False) for p in parameters]
    assert abs(loss.item() - again(input_ids=ids, labels=ids).loss.item()) < 1e-2
    new = {"parallel_q_computation": False, "parallel_batch_size": 4, "seed": 0, "step": 0}
    same, _ = zo.zo_gradient_estimator(again, again.parameters(), None, ids, ids, 3, 1e-3, "cpu", **new)
    assert all(map(torch.equal, grads, same))
    return f"{len(grads)} gradients, loss {loss.item():.3f}"


def run_main(flags: str, folder: Path) -> Path:
    """A run through main(), quiet, that must succeed; its run directory. Tokens are shared by the runs of a folder."""
    logs = Path(tempfile.mkdtemp(dir=folder))
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder)}), contextlib.redirect_stdout(None):
        assert zo.main([*flags.split(), "--log_dir", str(logs)]) == 0
    return next(logs.iterdir())


def metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv") as file:
        return list(csv.DictReader(file))


def check_old_command(name: str, folder: Path) -> str:
    """A command of old, tiny: it trains, on the path that it asks for, and writes what it should."""
    run = run_main(OLD_COMMANDS[name] + SMALL_RUN, folder)
    flags, rows = json.loads((run / "config.json").read_text())["flags"], metrics(run)
    assert flags["parallel_q_computation"] == ("--parallel_q_computation" in OLD_COMMANDS[name])
    assert math.isfinite(float(rows[-1]["val_loss"]))
    assert list(run.glob("checkpoints/step_*/model.safetensors"))
    return f"{len(rows)} rows, validation loss {float(rows[-1]['val_loss']):.3f}"


def both_paths(model: torch.nn.Module, rows: int = 2, tokens: int = 11, group: int = 3) -> tuple[float, bool]:
    """Largest difference of c over its root mean square, and whether the batched path fell back to the other."""
    with bench(model, rows, tokens) as b, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        queries = b.queries("gaussian", 3, 1e-4)
        one, other = b.c(queries), b.c(queries, group)
    fell_back = any("one after the other" in str(warning.message) for warning in caught)
    return float(np.abs(one - other).max() / rms(one)), fell_back


def check_unusual_head(name: str, folder: Path) -> str:
    """The loss is the model's own, and both paths agree on it."""
    model = small_model(name, **UNUSUAL_HEADS[name])
    with bench(model, 2, 13) as b:
        assert abs(b.loss() - model(input_ids=b.ids, labels=b.ids).loss.item()) < 1e-6
    apart, fell_back = both_paths(model)
    assert apart < 1e-9
    assert not fell_back
    return f"own logits; paths differ by {apart:.0e}"


CHECKS = {f"old call, {name}": (check_old_call, name) for name in SMALL_MODELS}
CHECKS |= {f"old command, {name}": (check_old_command, name) for name in OLD_COMMANDS}
CHECKS |= {f"logits of {name}": (check_unusual_head, name) for name in UNUSUAL_HEADS}


def compatibility_table() -> list[dict]:
    """Calls of zo_gradient_estimator without the new arguments, commands without the new flags, models whose logits are
    not the output layer of their last hidden states. Each line is a check that stops with an error where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        checks = CHECKS.items()
        return [{"check": n, "found": check(about, Path(folder)), "result": "met"} for n, (check, about) in checks]


# ---- Program -------------------------------------------------------------------------------------------------------

GROUPS = ("speed", "ranks", "memory", "equivalence", "compatibility")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    form, sizes = argparse.RawDescriptionHelpFormatter, tuple(zo.MODEL_SIZES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the same figures there")
    add("--full", action="store_true", help="q = 8, 16, 32 and all sizes up to 1B")
    add("--only", nargs="+", choices=GROUPS, default=GROUPS, help="some of the groups")
    add("--profile", action="store_true", help="also show where the milliseconds of a step go")
    add("--repetitions", type=int, default=5, metavar="N", help="of the speed table (default: 5)")
    add("--rank_repetitions", type=int, default=1, metavar="N", help="of the ranks table (default: 1)")
    add("--queries", type=int, nargs="+", metavar="Q", help="of the speed table (default: 8)")
    add("--speed_size", default="20M", choices=sizes, help="of the speed and ranks tables (default: 20M)")
    add("--sizes", nargs="+", choices=sizes, help="of the memory table (default: 20M 200M)")
    add("--rows", type=int, default=4, metavar="N", help="sequences in the batch (default: 4)")
    add("--tokens", type=int, default=128, metavar="N", help="tokens in a sequence (default: 128)")
    add("--memory_tokens", type=int, default=64, metavar="N", help="the same, memory table (default: 64)")
    add(MEMORY_CHILD, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    asked.queries = asked.queries or ([8, 16, 32] if asked.full else [8])
    asked.sizes = asked.sizes or (["20M", "200M", "500M", "1B"] if asked.full else ["20M", "200M"])
    return asked


def machine() -> dict:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: *(.*)", info.read_text() if info.exists() else "")
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    system = {"threads": torch.get_num_threads(), "cpu": cpu[1] if cpu else platform.machine()}
    return versions | system | {"bfloat16 hardware": BFLOAT16, "date": time.strftime("%Y-%m-%d %H:%M:%S")}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes what was asked for."""
    asked = parse_arguments(argv)
    zo.quiet_libraries()
    if asked.memory_child:
        print(json.dumps(memory_child(*json.loads(asked.memory_child))))
        return 0
    about, tables, threads = machine(), {}, torch.get_num_threads()
    print(", ".join(f"{key} {value}" for key, value in about.items()))

    def show(key: str, title: str, table: Callable[..., list[dict]], *given) -> list[dict]:
        rows = table(*given)
        tables.setdefault(key, []).extend(rows)
        print_table(title, inspect.cleandoc(table.__doc__), rows)
        return rows

    size, n, batch = asked.speed_size, asked.repetitions, (asked.rows, asked.tokens)
    shape = f"{size}, batch {asked.rows} x {asked.tokens}"
    if "speed" in asked.only:
        for dtype, q in itertools.product([torch.float32, torch.bfloat16][: 1 + BFLOAT16], asked.queries):
            title = f"Speed, {shape}, q = {q}, {str(dtype)[6:]}, {n} repetitions"
            show("speed", title, speed_table, size, q, n, dtype, *batch)
        if asked.profile:
            show("profile", f"Profile, {shape}, q = 8", profile_table, size, n, 8, 4, *batch)
    if "ranks" in asked.only:
        title = f"Ranks, {shape}, q = 16, {asked.rank_repetitions} repetitions"
        show("ranks", title, ranks_table, size, 16, asked.rank_repetitions, *batch)
    for size in asked.sizes if "memory" in asked.only else ():  # Muon takes minutes a matrix where bfloat16 is emulated
        names = [name for name in MEMORY_OPERATIONS if name != "mudamw" or size in ("tiny", "20M") or BFLOAT16]
        title = f"Memory, {size}, {asked.rows * asked.memory_tokens} tokens a batch, {threads} threads"
        show("memory", title, memory_table, size, asked.rows, asked.memory_tokens, threads, names)
    if "equivalence" in asked.only:
        show("equivalence", "Equivalence", equivalence_table)
        show("drift", "Drift", drift_table, 1000)
        size, q = ("20M", 8) if asked.full else ("tiny", 12)
        noise = show("signal to noise", f"Error of c over epsilon, {size}, q = {q}", noise_table, size, q)
        show("best epsilon", "Best epsilon", best_epsilons, noise)
    if "compatibility" in asked.only:
        show("compatibility", "Compatibility", compatibility_table)
    if asked.json:
        Path(asked.json).write_text(json.dumps({"machine": about, **tables}, indent=1) + "\n", "utf-8")
    short = sum(row.get("result", "").count("short") for rows in tables.values() for row in rows)
    print(f"\n{short} figures fall short of their targets" if short else "\nevery target is met")
    return 0


# ---- Tests ---------------------------------------------------------------------------------------------------------
