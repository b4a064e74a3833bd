"""The tables and the picture of RESULTS.md, from the runs that experiments/results.sh made.

python experiments/report.py logs/results docs/results.png
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import numpy as np

TITLES = {"tiny": "tiny (1.9M parameters, BPE of 4,096 tokens)", "20M": "20M (GPT-2's 50,257 tokens)"}
KINDS = {  # name of the runs, without their seed or rate: (words, colour)
    "gaussian": ("gaussian directions (MeZO's), sgd", "tab:gray"),
    "head_alone": ("head in closed form, body frozen", "tab:olive"),
    "feedback": ("feedback directions (default)", "tab:blue"),
    "feedback_head": ("feedback directions, head in closed form", "tab:green"),
    "unmeasured_head": ("the guess taken unmeasured, head in closed form", "tab:purple"),
    "backpropagation": ("backpropagation, adam", "tab:red"),
}
MARKS = {"tiny": (0.1e6, 0.3e6, 1e6, 2e6, 2.5e6, 3e6, 4e6, 6e6), "20M": (0.05e6, 0.1e6, 0.2e6, 0.5e6, 1e6, 2e6)}


class Run:
    """One run's validation losses against its forward tokens."""

    def __init__(self, folder: Path):
        self.name = re.sub(r"_\d{8}_\d{6}$", "", folder.name)
        self.kind = re.sub(r"(_short|_long)?(_\d|_\de-\d)?$", "", self.name)
        with open(folder / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["val_loss"]]
        self.steps = np.array([int(row["step"]) for row in rows])
        self.tokens = np.array([float(row["forward_tokens"]) for row in rows])
        self.losses = np.array([float(row["val_loss"]) for row in rows])
        self.seconds = float(rows[-1]["seconds"])
        self.memory = max(float(row["peak_memory_mib"]) for row in rows)
        log = (folder / "train.log").read_text()
        self.unigram = float(re.search(r"unigram: .* loss (\d+\.\d+)", log)[1])
        self.size = re.search(r"model: Llama (\w+)", log)[1]

    def at(self, tokens: float) -> str:
        """The last validation loss within so many tokens; empty behind the run's end."""
        if tokens > self.tokens[-1] * 1.01:
            return ""
        return f"{self.losses[self.tokens <= tokens * 1.01][-1]:.3f}"

    def first_below(self, level: float) -> str:
        """Tokens of the first validation below a level."""
        below = np.flatnonzero(self.losses < level)
        return f"{self.tokens[below[0]] / 1e6:.2f}M" if len(below) else "never"


def table(runs: list[Run], size: str) -> list[str]:
    """Validation loss at the marks, best and last, tokens to the unigram loss."""
    marks = MARKS[size]
    lines = ["| run | " + " | ".join(f"{mark / 1e6:g}M" for mark in marks) + " | last | below unigram at | minutes | peak MiB |"]
    lines.append("|---" * (len(marks) + 5) + "|")
    for run in runs:
        cells = [run.name, *(run.at(mark) for mark in marks), f"{run.losses[-1]:.3f}", run.first_below(run.unigram)]
        lines.append("| " + " | ".join([*cells, f"{run.seconds / 60:.1f}", f"{run.memory:.0f}"]) + " |")
    return lines


def draw(runs: list[Run], path: Path) -> None:
    """Validation loss against forward tokens, a panel a size, a line a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = [size for size in TITLES if any(run.size == size for run in runs)]
    figure = Figure(figsize=(6.4 * len(sizes), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, size in zip(np.atleast_1d(figure.subplots(1, len(sizes))), sizes):
        seen = set()
        for run in (run for run in runs if run.size == size):
            words, colour = KINDS[run.kind]
            later = run.tokens > 0
            label = None if run.kind in seen else words
            axis.plot(run.tokens[later] / 1e6, run.losses[later], color=colour, label=label, linewidth=1.2, alpha=0.9)
            seen.add(run.kind)
            unigram = run.unigram
        axis.axhline(unigram, color="black", linestyle=":", linewidth=1, label="single-token frequencies")
        axis.set(title=TITLES[size], xscale="log", xlabel="million tokens through forward passes", ylabel="validation loss, nats")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(folder: str, picture: str) -> None:
    """Prints the tables and draws the picture."""
    finished = sorted(path.parent for path in Path(folder).glob("*/*/finished.json"))
    order = list(KINDS)
    runs = sorted((Run(path) for path in finished), key=lambda run: (order.index(run.kind), run.name))
    for size, title in TITLES.items():
        chosen = [run for run in runs if run.size == size]
        if chosen:
            print(f"\n{title}; single-token frequencies give {chosen[0].unigram:.3f}\n")
            print("\n".join(table(chosen, size)))
    draw(runs, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
