"""The tables and pictures of RESULTS.md and docs/benchmarks.md.

    python experiments/report.py runs logs/tiny docs/results.png     groups of runs that differ in their seed alone
    python experiments/report.py runs logs/paper docs/paper.png 'layer_(q8|control|sgd_0.3)'    whose names match
    python experiments/report.py tasks logs/tasks                    what runs with --eval_metric reached
    python experiments/report.py ranks 20M                           two processes, a thread each, over one with one
    python experiments/report.py machines 1B                         a step on 64 machines, from pieces measured here
    python experiments/report.py versions other.py                   steps of another version, and of this one

A run's name without its date and seed is its group; the tables give the mean over seeds (least to largest).
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Run:
    """One run's validations."""

    def __init__(self, folder: Path):
        self.name = re.sub(r"_\d{8}_\d{6}(_\d+)?$", "", folder.name)
        self.group = re.sub(r"_\d$", "", self.name)
        with open(folder / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["val_loss"]]
        self.at = {
            name: np.array([float(row[name]) for row in rows]) for name in ("step", "forward_tokens", "val_loss")
        }
        self.seconds = float(rows[-1]["seconds"])
        self.memory = max(float(row["peak_memory_mib"]) for row in rows)
        self.unigram = json.loads((folder / "corpus.json").read_text()).get("unigram_loss")

    def loss(self, axis: str, most: float) -> float | None:
        """The last validation loss up to a step or number of tokens; None behind the run's end."""
        inside = self.at[axis] <= most * 1.005
        return None if most > self.at[axis][-1] * 1.05 else float(self.at["val_loss"][inside][-1])


def spread(values: list[float | None], digits: int = 3) -> str:
    """The mean (least to largest) of the values that are there."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    mean = f"{statistics.mean(there):.{digits}f}"
    return mean if len(there) == 1 else f"{mean} ({min(there):.{digits}f} to {max(there):.{digits}f})"


def marks_of(runs: list[Run], axis: str) -> list[float]:
    """Round marks along an axis, five at most."""
    longest = max(run.at[axis][-1] for run in runs)
    size = 10 ** int(np.log10(longest))
    return [m for m in (size * k / 20 for k in (1, 2, 3, 6, 10, 20, 40, 60, 100, 200)) if m <= longest * 1.01][-6:]


def table(groups: dict[str, list[Run]], axis: str, unit: float, suffix: str) -> list[str]:
    """Validation loss of every group at marks along an axis."""
    marks = marks_of([run for runs in groups.values() for run in runs], axis)
    heads = [f"{mark / unit:g}{suffix}" for mark in marks]
    lines = [
        f"| run | seeds | {' | '.join(heads)} | last | lowest | minutes | peak MiB |",
        "|---" * (len(marks) + 6) + "|",
    ]
    for name, runs in groups.items():
        cells = [spread([run.loss(axis, mark) for run in runs]) for mark in marks]
        cells += [
            spread([float(run.at["val_loss"][pick(run)]) for run in runs])
            for pick in (lambda r: -1, lambda r: np.argmin(r.at["val_loss"]))
        ]
        cells += [spread([run.seconds / 60 for run in runs], 1), f"{max(run.memory for run in runs):.0f}"]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return lines


def draw(groups: dict[str, list[Run]], path: Path) -> None:
    """Validation loss against steps and forward tokens, a colour a group, a line a run."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for panel, axis in zip(figure.subplots(1, 2, sharey=True), ("step", "forward_tokens")):
        for colour, (name, runs) in zip(colormaps["tab10"].colors * 3, groups.items()):
            for number, run in enumerate(runs):
                later = run.at[axis] > 0
                label = None if number else name
                panel.plot(
                    run.at[axis][later], run.at["val_loss"][later], color=colour, lw=1.1, alpha=0.85, label=label
                )
        panel.set(xlabel=axis.replace("_", " "), xscale="log" if axis == "forward_tokens" else "linear")
        panel.grid(alpha=0.3)
        for level in {run.unigram for runs in groups.values() for run in runs if run.unigram}:
            panel.axhline(level, color="black", ls=":", lw=1)
    panel.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=EngFormatter(sep=""))
    panel.xaxis.set(minor_formatter=NullFormatter())
    figure.axes[0].set_ylabel("validation loss, nats a token")
    figure.axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def report(folder: str, picture: str | None = None, pattern: str = "") -> None:
    """Prints the tables of a folder's runs, or of those whose names match, and draws the picture."""
    groups = defaultdict(list)
    for path in sorted(Path(folder).glob("*/finished.json")):
        run = Run(path.parent)
        if re.search(pattern, run.name):
            groups[run.group].append(run)
    groups = dict(sorted(groups.items(), key=lambda item: statistics.mean(r.at["val_loss"][-1] for r in item[1])))
    for axis, unit, suffix in (("step", 1, ""), ("forward_tokens", 1e6, "M")):
        print(f"\nby {axis.replace('_', ' ')}\n")
        print("\n".join(table(groups, axis, unit, suffix)))
    if picture:
        draw(groups, Path(picture))


def tasks(folder: str) -> None:
    """Prints, of every run, the steps and forward tokens it took, its score and loss at the start and end, the best
    score, and the peak of the process's memory.
    """
    print("| run | steps | forward tokens | score: start, best, last | loss: start, last | MiB |")
    print("|---|---|---|---|---|---|")
    for path in sorted(Path(folder).glob("*/finished.json")):
        with open(path.parent / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["val_score"]]
        first, last, best = rows[0], rows[-1], max(float(row["val_score"]) for row in rows)
        scores = f"{float(first['val_score']):.3f}, {best:.3f}, {float(last['val_score']):.3f}"
        losses = f"{float(first['val_loss']):.2f}, {float(last['val_loss']):.2f}"
        tokens, memory = f"{int(last['forward_tokens']) / 1e3:.0f}k", max(float(row["peak_memory_mib"]) for row in rows)
        print(f"| {Run(path.parent).name} | {last['step']} | {tokens} | {scores} | {losses} | {memory:.0f} |")


def ranks(size: str, q: int = 16, repetitions: int = 1) -> None:
    """Prints the seconds of a step of two processes with a thread each over those of one, whole commands in turn, the
    bytes that rank 0 sends in a step, and whether the weights are equal at the end.
    """

    def step(processes: int, flags: str) -> tuple[float, str, str]:
        start = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        with tempfile.TemporaryDirectory() as folder:
            words = f"{ROOT / 'reproduce_zo_paper.py'} {flags} --log_dir {folder}".split()
            subprocess.run([sys.executable, *start, *words], stdout=subprocess.DEVNULL, check=True)
            (run,) = Path(folder).iterdir()
            with open(run / "metrics.csv", newline="") as file:
                at = [float(row["seconds"]) for row in csv.DictReader(file)]
            sent = re.search(r"sent the others (\d+) bytes a step|$", (run / "train.log").read_text())[1]
            (weights,) = run.glob("checkpoints/step*/model.safetensors")
            return (at[3] - at[1]) / 2, sent or "0", hashlib.sha256(weights.read_bytes()).hexdigest()

    every = f"--model_size {size} --max_samples 100 --eval_samples 1 --max_steps 4 --log_interval 1 --num_threads 1"
    print("| directions | q | one process, s | two, s | ratio | bytes | weights |\n|---|---|---|---|---|---|---|")
    low = "lowrank --parallel_q_computation"
    for case in (f"{low} --query_budget_q {q}", *(f"gaussian --query_budget_q {count}" for count in (q, 2 * q))):
        runs = [step(count, f"--direction {case} {every}") for count in (1, 2) * repetitions]
        (one, _, digests), (two, sent, others) = zip(*runs[::2]), zip(*runs[1::2])
        ratio = statistics.median(b / a for a, b in zip(one, two))
        equal = "equal" if len({*digests, *others}) == 1 else "DIFFERENT"
        times = f"{statistics.median(one):.2f} | {statistics.median(two):.2f}"
        print(f"| {case.split()[0]} | {case.split()[-1]} | {times} | {ratio:.2f} | {sent[0]} | {equal} |", flush=True)


def machines(size: str, count: int = 64, q: int = 4096) -> None:
    """Prints what a step of q queries takes on `count` machines: q/count queries on each, and the update. A low-rank
    one is made on each; of a dense one each makes a part and sends it, log2(count) times over, at 1 Gbit/s.
    """
    import reproduce_zo_paper as zo

    zo.tune_process()
    import test_zo_optimization as benchmark

    zo.fast_products()

    def seconds(call) -> float:
        call()
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    with benchmark.Bench(benchmark.sized_model(size), 4, 128) as b:
        outs = [tensor.matrix for tensor in b.tensors]

        def measuring(queries: zo.Queries, group: int) -> float:
            one = functools.partial(
                zo.query_losses, b.objective, b.tensors, lambda query: (b.ids, b.ids, None), queries, group
            )
            return seconds(one) / queries.q

        def updating(queries: zo.Queries) -> float:
            c = np.full(queries.q, 1e-12)
            return seconds(functools.partial(zo.add_directions, outs, b.tensors, queries, c, b.workers)) / queries.q

        print(f"{size}: a forward pass of 4 x 128 tokens {seconds(b.loss):.3f} s\n")
        print(
            "| directions | a query, s | its update, s | step of one, s | of all, s | gain |\n|---|---|---|---|---|---|"
        )
        for name, family, group in (
            ("gaussian, in place", zo.Gaussian(), 0),
            ("rademacher, batched by 4", zo.Rademacher(), 4),
            ("low rank, batched by 4", zo.LowRank(), 4),
        ):
            query = measuring(zo.Queries(family, 0, 0, group or 1, 1e-3), group)
            update = updating(zo.Queries(family, 0, 0, zo.FACTORS_AT_ONCE if group and "low" in name else 2, 1e-3))
            low = "low" in name
            sent = 0 if low else math.log2(count) * sum(out.nbytes for out in outs) / 1.25e8
            one, all_ = q * (query + update), q / count * query + q * update / (1 if low else count) + sent
            print(f"| {name} | {query:.3f} | {update:.4f} | {one:.0f} | {all_:.0f} | {one / all_:.1f} |", flush=True)
    print(f"\n{16 * q / count:.0f} bytes of losses leave a machine in a step")


def seconds(script: str, fast: str, size: str, q: int = 8, count: int = 3) -> None:
    """Prints, as JSON, the median seconds of steps as a version of the script makes them; `fast`: its fast_products."""
    spec = importlib.util.spec_from_file_location("zo", script)
    zo = sys.modules["zo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zo)
    zo.tune_process()
    import torch

    if fast == "fast":
        zo.fast_products()
    tokenizer = mock.MagicMock(bos_token_id=0, eos_token_id=0)
    tokenizer.__len__.return_value = 50257
    model, workers = zo.build_model(zo.Config(model_size=size), tokenizer), zo.Workers(torch.device("cpu"))
    tensors, objective = zo.trainable_tensors(model.named_parameters()), zo.Objective(model, workers)
    ids = torch.randint(50257, (4, 128), generator=torch.Generator().manual_seed(0))
    sgd, adam = (zo.Optimizer(name, tensors, workers) for name in ("sgd", "adam"))
    config = zo.Config(direction="feedback", carry="block", optimizer="adam")
    made = objective, objective, tensors, None, adam, zo.Ranks(), *[lambda step: (ids, ids)] * 3, lambda step: 1.0
    rule, number, found = zo.Feedback(zo.Setting(config, *made), 0), itertools.count(), {}

    def step(family: str, group: int) -> None:
        queries = zo.Queries(zo.DIRECTIONS[family](1), 0, 0, q, 1e-3)
        losses = zo.query_losses(objective, tensors, zo.query_batch(ids, ids, q, "shared"), queries, group)
        sgd.apply_estimate(tensors, queries, zo.projected_gradients(losses, 1e-3), 1e-7)

    def passes() -> None:
        with torch.no_grad():
            for _ in range(2 * q):
                objective.losses(ids, ids)

    acts = {f"{2 * q} forward passes": passes}
    for family, group in itertools.product(("gaussian", "rademacher", "kronecker", "lowrank"), (0, 4, 8)):
        if group or family in ("gaussian", "rademacher"):
            where = f"batched by {group}" if group else "in place"
            acts[f"{where}, {family}"] = functools.partial(step, family, group)
    acts["backpropagation, no update"] = lambda: objective.gradient(ids, ids, tensors)
    acts["feedback, block, with adam"] = lambda: rule.finish(rule.measure(next(number), 1e-7))
    for name, act in acts.items():
        act()
        began = [time.perf_counter()]
        for _ in range(count):
            act()
            began.append(time.perf_counter())
        found[name] = statistics.median(b - a for a, b in itertools.pairwise(began))
    print(json.dumps(found))


def versions(other: str, size: str = "20M", repetitions: int = 3) -> None:
    """Prints the seconds of steps by another version of the script, by this one with torch's own products and by this
    one, whole processes in turn, and the median ratio of neighbours to the first (least to most).
    """
    sides, ours = [], str(ROOT / "reproduce_zo_paper.py")
    for _ in range(int(repetitions)):
        turn = []
        for script, fast in ((other, "own"), (ours, "own"), (ours, "fast")):
            words = [sys.executable, "-W", "ignore", __file__, "seconds", script, fast, size]
            turn.append(json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout))
        sides.append(turn)
    print("| step | before, s | torch's products, s | ratio | now, s | ratio |\n|---|---|---|---|---|---|")
    for name in sides[0][0]:
        before, own, now = (statistics.median(turn[side][name] for turn in sides) for side in range(3))
        found = [sorted(turn[side][name] / turn[0][name] for turn in sides) for side in (1, 2)]
        own_ratio, ratio = (f"{statistics.median(r):.2f} ({r[0]:.2f} to {r[-1]:.2f})" for r in found)
        print(f"| {name} | {before:.2f} | {own:.2f} | {own_ratio} | {now:.2f} | {ratio} |")


if __name__ == "__main__":
    {"runs": report, "tasks": tasks, "ranks": ranks, "machines": machines, "versions": versions, "seconds": seconds}[
        sys.argv[1]
    ](*sys.argv[2:])
