"""The table and the picture of the paper's experiment in RESULTS.md, from the runs that experiments/paper.sh made.

python experiments/paper_report.py logs/paper/tiny docs/paper.png
"""

from __future__ import annotations

import csv
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

KINDS = {  # name of the runs, without their seed: (words, colour)
    "fo": ("first order (backpropagation)", "tab:red"),
    "zo": ("zeroth order, gaussian", "tab:gray"),
    "lowrank": ("zeroth order, low rank, batched", "tab:orange"),
    "feedback": ("zeroth order, feedback (default)", "tab:blue"),
}
PANELS = {"The paper's four": ("fo", "zo"), "With this script's other directions": ("fo", "zo", "lowrank", "feedback")}


class Run:
    """One run's validation losses against epochs, and the epochs at which its stages end."""

    def __init__(self, folder: Path):
        self.kind, self.scope, self.seed = re.match(r"([a-z]+)_(layerwise|full)_(\d+)_\d{8}_\d{6}$", folder.name).groups()
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        validated = [row for row in rows if row["val_loss"]]
        self.epochs = np.array([float(row["epoch"]) for row in validated])
        self.losses = np.array([float(row["val_loss"]) for row in validated])
        stages = {int(row["stage"]): row for row in rows if row["stage"]}  # the last row of each
        self.ends = [float(row["epoch"]) for row in stages.values()]
        self.minutes = float(rows[-1]["seconds"]) / 60
        self.tokens = float(rows[-1]["forward_tokens"])
        log = (folder / "train.log").read_text()
        self.unigram = float(re.search(r"unigram: .* loss (\d+\.\d+)", log)[1])

    def at(self, epoch: float) -> float:
        """The last validation loss until then."""
        return self.losses[self.epochs <= epoch + 1e-6][-1]


def spread(values: list[float]) -> str:
    """Mean, and least to largest where there are several."""
    return f"{np.mean(values):.3f}" + (f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else "")


def table(groups: dict[tuple[str, str], list[Run]], ends: list[float]) -> list[str]:
    """Validation loss at the ends of the layer-wise stages, forward tokens and minutes; mean of the seeds."""
    stages = ["embedding", *(f"block {i}" for i in range(len(ends) - 1))]
    heads = [f"epoch {end:.0f} ({stage})" for end, stage in zip(ends, stages)]
    lines = ["| run | " + " | ".join(heads) + " | forward tokens | minutes |", "|---" * (len(heads) + 3) + "|"]
    for (kind, scope), runs in groups.items():
        cells = [f"{kind}_{scope}", *(spread([run.at(end) for run in runs]) for end in ends)]
        cells += [f"{runs[0].tokens / 1e6:.1f}M", f"{np.mean([run.minutes for run in runs]):.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(groups: dict[tuple[str, str], list[Run]], ends: list[float], path: Path) -> None:
    """Validation loss against epochs: a line a seed, solid layer by layer, dashed the whole model; borders of stages dotted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, kinds) in zip(figure.subplots(1, 2, sharey=True), PANELS.items()):
        for (kind, scope), runs in groups.items():
            words, colour = KINDS[kind]
            for run in runs if kind in kinds else []:
                style = {"linestyle": "-" if scope == "layerwise" else "--", "linewidth": 1.3, "alpha": 0.85}
                label = f"{words}, {'layer by layer' if scope == 'layerwise' else 'whole model'}" if run is runs[0] else None
                axis.plot(run.epochs, run.losses, color=colour, label=label, **style)
        for end in ends[:-1]:
            axis.axvline(end, color="black", linestyle=":", linewidth=0.8)
        axis.axhline(
            next(iter(groups.values()))[0].unigram, color="black", linewidth=0.8, alpha=0.5, label="single-token frequencies"
        )
        axis.set(title=title, xlabel="epochs (dotted: a stage ends, the next block begins)")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss, nats")
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def main(folder: str, picture: str) -> None:
    """Prints the table and draws the picture."""
    groups = defaultdict(list)
    for path in sorted(Path(folder).glob("*/finished.json")):
        run = Run(path.parent)
        groups[run.kind, run.scope].append(run)
    order = list(KINDS)
    groups = dict(sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1] != "layerwise")))
    ends = next(runs[0].ends for (_, scope), runs in groups.items() if scope == "layerwise")
    print(
        ", ".join(f"seed {run.seed}: {run.unigram:.3f}" for run in next(iter(groups.values()))), "by single-token frequencies\n"
    )
    print("\n".join(table(groups, ends)))
    draw(groups, ends, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
