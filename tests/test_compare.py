"""--compare: a table and a picture of runs, finished or not."""

import json

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
    """The output of --compare; a column of its table is the text below its heading."""

    def call(*paths) -> str:
        capsys.readouterr()
        words = ["--log_dir", str(runs.folder / "pictures"), "--compare", *(str(path) for path in paths)]
        assert runs.main(words) == 0
        return capsys.readouterr().out

    return call


def table(output: str) -> list[dict[str, str]]:
    """The rows of the table, top to bottom."""
    heading, *lines = output.split("\n\n")[0].splitlines()
    names = [name for name in heading.split("  ") if name.strip()]
    at = [heading.index(name.strip()) for name in names]
    return [{name.strip(): line[a:b].strip() for name, a, b in zip(names, at, [*at[1:], None])} for line in lines]


def test_the_table_is_sorted_by_loss_and_says_what_runs_came_to_and_where_they_differ(pair, compared):
    good, bad = pair
    rows = table(compared(bad, good))
    assert [row["run"] for row in rows] == [good.name, bad.name]
    assert list(rows[0])[-2:] == ["learning_rate", "seed"]
    assert [(row["state"], row["learning_rate"], row["seed"]) for row in rows] == [
        ("finished", "0.01", "0"),
        ("unfinished", "1e-05", "7"),
    ]
    for run, row in zip(pair, rows):
        best = min(
            (each for each in harness.metrics(run) if each["val_loss"]), key=lambda each: float(each["val_loss"])
        )
        assert row["best val_loss"] == f"{float(best['val_loss']):.4f} at {best['step']}"
        assert row["bits/byte"] == f"{float(best['val_bits_per_byte']):.4f}"
        assert row["step"] == "4"


def test_a_folder_stands_for_the_runs_in_it_and_a_run_without_rows_is_listed_last(runs, pair, compared):
    empty = runs.folder / "logs" / "begun_20260101_000000"
    empty.mkdir(parents=True)
    (empty / "config.json").write_text((pair[0] / "config.json").read_text())
    output = compared(empty.parent, pair[1].parent)
    assert [row["run"] for row in table(output)] == [pair[1].name, empty.name]
    assert "other tokens" not in output


def test_the_picture_is_labelled_by_what_differs_and_nothing_else_is_written(runs, pair, compared, monkeypatch):
    before = {path: path.stat().st_mtime_ns for run in pair for path in sorted(run.rglob("*"))}
    drawn = []
    draw = zo.draw_comparison
    monkeypatch.setattr(
        zo, "draw_comparison", lambda found, path: drawn.extend(label for _, label in found) or draw(found, path)
    )
    output = compared(*pair)
    assert drawn == ["learning_rate 0.01, seed 0", "learning_rate 1e-05, seed 7"]
    picture = runs.folder / "pictures" / "compare.png"
    assert str(picture) in output
    assert Image.open(picture).size[0] > 1000
    assert {path: path.stat().st_mtime_ns for run in pair for path in sorted(run.rglob("*"))} == before


def test_runs_of_other_tokens_are_warned_of(runs, pair, compared):
    other = runs.train(tokenizer="bpe:320", max_steps=1)
    assert "these runs have other tokens: compare bits/byte, not losses" in compared(pair[0], other)
    assert json.loads((other / "corpus.json").read_text())["tokenizer"] == "bpe:320"
