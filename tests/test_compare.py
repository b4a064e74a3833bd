"""--compare: a table and a picture of runs, finished or not."""

import harness
import pytest
from PIL import Image

import reproduce_zo_paper as zo


@pytest.fixture(scope="module")
def pair(module_runs):
    """Two runs that differ in rate and seed, the first to be the better one; the other is not finished."""
    flags = {"mode": "FO", "optimizer": "adam", "max_steps": 4}
    good = module_runs.train("good", run_name="good", learning_rate=1e-2, seed=0, **flags)
    bad = module_runs.train("bad", run_name="bad", learning_rate=1e-5, seed=7, **flags)
    (bad / "finished.json").unlink()
    return good, bad


@pytest.fixture
def compared(runs, capsys):
    """The output of --compare and the rows of its table; a column of it is the text below its heading."""

    def call(*paths) -> tuple[str, list[dict[str, str]]]:
        capsys.readouterr()
        runs.pictures = True
        assert runs.main(["--log_dir", str(runs.folder / "pictures"), "--compare", *map(str, paths)]) == 0
        output = capsys.readouterr().out
        heading, *lines = output.split("\n\n")[0].splitlines()
        names = [name.strip() for name in heading.split("  ") if name.strip()]
        at = [heading.index(name) for name in names]
        return output, [{name: line[a:b].strip() for name, a, b in zip(names, at, [*at[1:], None])} for line in lines]

    return call


def test_the_best_run_is_first_and_it_is_said_where_they_differ(runs, pair, compared, monkeypatch):
    """The picture is labelled by what differs; the runs are not changed."""
    before = {path: path.stat().st_mtime_ns for run in pair for path in run.rglob("*")}
    drawn, draw = [], zo.draw_comparison
    record = lambda found, path: drawn.extend(label for _, label in found) or draw(found, path)  # noqa: E731
    monkeypatch.setattr(zo, "draw_comparison", record)
    output, rows = compared(*reversed(pair))
    assert [row["run"] for row in rows] == [run.name for run in pair]
    assert {*list(rows[0])[-3:]} == {"peak MiB", "learning_rate", "seed"}
    assert [(row["learning_rate"], row["seed"]) for row in rows] == [("0.01", "0"), ("1e-05", "7")]
    assert [row["state"] for row in rows] == ["finished", "unfinished"]
    for run, row in zip(pair, rows):
        validated = [each for each in harness.metrics(run) if each["val_loss"]]
        best = min(validated, key=lambda each: float(each["val_loss"]))
        assert row["best val_loss"] == f"{float(best['val_loss']):.4f} at {best['step']}"
        assert row["bits/byte"] == f"{float(best['val_bits_per_byte']):.4f}"
    labels = [sorted(label.split(", ")) for label in drawn]
    assert labels == [["learning_rate 0.01", "seed 0"], ["learning_rate 1e-05", "seed 7"]]
    assert str(runs.folder / "pictures" / "compare.png") in output
    assert Image.open(runs.folder / "pictures" / "compare.png").size[0] > 1000
    assert before == {path: path.stat().st_mtime_ns for run in pair for path in run.rglob("*")}


def test_a_folder_stands_for_its_runs_one_without_rows_is_last_and_other_tokens_are_warned_of(runs, pair, compared):
    empty = runs.folder / "logs" / "begun_20260101_000000"
    empty.mkdir(parents=True)
    (empty / "config.json").write_text((pair[0] / "config.json").read_text())
    output, rows = compared(empty.parent, pair[1].parent)
    assert [row["run"] for row in rows] == [pair[1].name, empty.name]
    warning = "these runs have other tokens: compare bits/byte, not losses"
    assert warning not in output
    assert warning in compared(pair[0], runs.train("other", tokenizer="bpe:320", max_steps=1))[0]
