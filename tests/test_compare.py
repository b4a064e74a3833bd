"""--compare: a table and a picture of runs, finished or not."""

import pytest
from PIL import Image


def table(output: str) -> dict[str, list[str]]:
    """The lines of the table by the run they begin with."""
    lines = output.split("\n\n")[0].splitlines()
    return {line.split()[0]: line.split() for line in lines}


@pytest.fixture
def compared(runs, capsys):
    def call(*paths) -> str:
        capsys.readouterr()
        words = ["--log_dir", str(runs.folder / "pictures"), "--compare", *(str(path) for path in paths)]
        assert runs.main(words) == 0
        return capsys.readouterr().out

    return call


def test_a_table_says_what_runs_came_to_and_where_they_differ(runs, compared):
    first = runs.train("a", run_name="first")
    second = runs.train("b", run_name="second", learning_rate=1e-3, seed=7)
    (second / "finished.json").unlink()
    lines = table(compared(first, second))
    assert lines["run"][-2:] == ["learning_rate", "seed"]
    assert lines[first.name][1] == "finished"
    assert lines[first.name][-2:] == ["0.0001", "0"]
    assert lines[second.name][1] == "unfinished"
    assert lines[second.name][-2:] == ["0.001", "7"]


def test_a_folder_stands_for_the_runs_in_it_and_a_run_without_rows_is_listed(runs, compared):
    first, second = runs.train("logs", seed=1), runs.folder / "logs"
    empty = second / "begun_20260101_000000"
    empty.mkdir()
    (empty / "config.json").write_text((first / "config.json").read_text())
    lines = table(compared(second))
    assert {first.name, empty.name} < set(lines)


def test_the_picture_is_drawn(runs, compared):
    run = runs.train()
    output = compared(run)
    picture = runs.folder / "pictures" / "compare.png"
    assert str(picture) in output
    assert Image.open(picture).size[0] > 1000


def test_runs_are_not_changed(runs, compared):
    run = runs.train()
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    compared(run)
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))} == before


@pytest.mark.parametrize(
    ("words", "line"),
    [(["--compare"], "--compare: needs a value"), (["--compare", "nowhere"], "--compare nowhere: neither a run directory")],
)
def test_what_is_no_run_is_refused(errors, words, line):
    code, lines = errors(words)
    assert code == 2
    assert any(line in each for each in lines)
