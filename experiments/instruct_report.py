"""The tables and the picture of RESULTS.md's section on Instruct, from the runs that experiments/instruct.sh made.

python experiments/instruct_report.py logs/instruct docs/instruct.png
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import report

MARKS = {"tiny": (50, 100, 200, 300), "20M": (10, 20, 30, 40, 50, 60)}
KINDS = {  # name of the runs, without their seed: (words, colour)
    "control_3e-3": ("backpropagations alone, 3e-3", "tab:gray"),
    "control_1e-2": ("backpropagations alone, 1e-2", "tab:brown"),
    "head_only": ("and the head in closed form between", "tab:olive"),
    "instruct": ("Instruct (default, q 1)", "tab:green"),
    "instruct_q8": ("Instruct, q 8", "tab:blue"),
    "backpropagation_3e-3": ("backpropagation in every step", "tab:red"),
}


class Run(report.Run):
    """One run's validation losses, against what they cost in steps and backpropagations, too."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.kind = re.sub(r"_\d$", "", self.name)
        interval = 1 if self.kind.startswith("backprop") else int((re.findall(r"interval_(\d+)", self.name) or [5])[0])
        self.backpropagations = -(-self.steps // interval)

    def after(self, step: int) -> float:
        """The validation loss after so many steps."""
        return float(self.losses[self.steps == step][0])


def tables(runs: list[Run], size: str) -> list[str]:
    """A row a run, and for several seeds their mean and range."""
    marks = MARKS[size]
    lines = ["| run | " + " | ".join(f"step {mark}" for mark in marks) + " | backpropagations | forward tokens | seconds |"]
    lines.append("|---" * (len(marks) + 4) + "|")
    for kind in dict.fromkeys(run.kind for run in runs):
        same = [run for run in runs if run.kind == kind]
        cells = []
        for mark in marks:
            values = [run.after(mark) for run in same]
            spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        cost = (same[0].backpropagations[-1], f"{same[0].tokens[-1] / 1e6:.2f}M", f"{np.mean([run.seconds for run in same]):.0f}")
        lines.append(f"| {kind} | " + " | ".join(cells) + " | " + " | ".join(map(str, cost)) + " |")
    return lines


def draw(runs: list[Run], path: Path) -> None:
    """Validation loss against steps, forward tokens and backpropagations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, axis in zip(panels, ("steps", "tokens", "backpropagations")):
        for run in runs:
            if run.kind in KINDS:
                words, colour = KINDS[run.kind]
                x = getattr(run, axis) / (1e6 if axis == "tokens" else 1)
                panel.plot(x, run.losses, color=colour, lw=1.3, alpha=0.8, label=words)
        panel.grid(alpha=0.3)
    for panel, label in zip(
        panels, ("steps", "million tokens through forward passes (backpropagation counts 3)", "backpropagations")
    ):
        panel.set_xlabel(label)
    panels[0].set_ylabel("validation loss (nats per token)")
    labels = dict(zip(*reversed(panels[0].get_legend_handles_labels())))
    panels[0].legend(labels.values(), labels.keys(), fontsize=8)
    figure.suptitle("tiny, batch 4 x 128, a backpropagation every 5th step, three seeds")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    root, picture = Path(sys.argv[1]), Path(sys.argv[2])
    for size in MARKS:
        found = sorted(folder.parent for folder in (root / size).glob("*/finished.json"))
        runs = [Run(folder) for folder in found]
        if runs:
            print(f"\n{size}\n")
            print("\n".join(tables(runs, size)))
        if size == "tiny":
            draw(runs, picture)
