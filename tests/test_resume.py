"""Nothing is lost: journal, exact resume, replay, signals, and failures of every kind."""

import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import time
from pathlib import Path

import harness
import numpy as np
import pytest

import reproduce_zo_paper as zo

# Checkpoints after steps 3, 6 and 8; every second step is validated, so that a run of 6 steps is the start of one of 8.
STEPS = {"max_steps": 8, "save_interval": 3, "eval_interval": 2}
RECORD = 40 + 8 * harness.FLAGS["query_budget_q"]  # bytes of a journal's record


def steps_of(run: Path) -> list[str]:
    return [row["step"] for row in harness.metrics(run)]


def weights_differ(one: Path, other: Path) -> bool:
    names = ("model.safetensors", "optimizer.safetensors")
    return any(
        (harness.last_checkpoint(one) / name).read_bytes() != (harness.last_checkpoint(other) / name).read_bytes()
        for name in names
    )


@pytest.fixture(scope="module")
def whole(module_runs):
    """A run of 8 steps that nothing disturbed."""
    return module_runs.train("whole", optimizer="adam", **STEPS)


@pytest.fixture(scope="module")
def first_six(module_runs):
    """The same run, stopped after 6 steps; tests work on copies."""
    return module_runs.train("first_six", optimizer="adam", **STEPS | {"max_steps": 6})


@pytest.fixture
def stopped(first_six, tmp_path) -> Path:
    """A copy of the run that was stopped after 6 steps, with checkpoints of steps 3 and 6."""
    return Path(shutil.copytree(first_six, tmp_path / "logs" / first_six.name))


def error_lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.strip()]


# ---- the comparison itself -------------------------------------------------------------------------------------------


def test_the_comparison_sees_every_difference(whole, tmp_path):
    """One changed bit in any of the things that must be equal is found."""
    assert harness.differences(whole, whole) == []
    last = f"checkpoints/{harness.last_checkpoint(whole).name}"
    for name in ("journal.bin", f"{last}/model.safetensors", f"{last}/optimizer.safetensors"):
        other = Path(shutil.copytree(whole, tmp_path / name.replace("/", "-")))
        harness.damage(other / name, "flipped")
        assert harness.differences(whole, other) == [Path(name).name]
    other = Path(shutil.copytree(whole, tmp_path / "metrics"))
    text = (other / "metrics.csv").read_text("utf-8")
    (other / "metrics.csv").write_text(text.replace("\n8,", "\n9,"), "utf-8")
    assert harness.differences(whole, other) == ["metrics.csv"]


# ---- journal ---------------------------------------------------------------------------------------------------------


def record(step: int, q: int = 3) -> zo.Record:
    return zo.Record(step, 0.1 * step, 5.0 - step, 2.5, step % 2 == 0, np.arange(q) / 7 - step)


@pytest.fixture
def journal(tmp_path):
    """A journal of five steps with three queries: its path, and the size of a record."""
    journal = zo.Journal(tmp_path / "journal.bin", 3, "a run")
    for step in range(5):
        journal.append(record(step))
    journal.close()
    return journal.path, journal.dtype.itemsize


def read(path: Path, identity: str = "a run") -> zo.Journal:
    journal = zo.Journal(path, 3, identity)
    journal.close()
    return journal


def test_a_journal_gives_back_what_was_written(journal):
    path, size = journal
    assert path.stat().st_size == 5 * size == 5 * (40 + 3 * 8)
    for step, found in read(path).records.items():
        wanted = record(step)
        assert found.projected_grads.tolist() == wanted.projected_grads.tolist()
        assert (found.step, found.learning_rate, found.loss, found.grad_norm, found.backpropagated) == (
            *(wanted.step, wanted.learning_rate, wanted.loss),
            *(wanted.grad_norm, wanted.backpropagated),
        )


@pytest.mark.parametrize("cut", [1, 20, 63])
def test_a_torn_record_is_cut(journal, cut):
    path, size = journal
    path.write_bytes(path.read_bytes()[:-cut])
    torn = zo.Journal(path, 3, "a run")
    assert sorted(torn.records) == [0, 1, 2, 3]
    assert torn.reach(0) == 4
    torn.close()
    assert path.stat().st_size == 4 * size


def test_any_flipped_bit_costs_its_record_alone(journal):
    path, size = journal
    content = path.read_bytes()
    for place in range(2 * size, 3 * size):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        damaged = read(path)
        assert sorted(damaged.records) == [0, 1, 3, 4], f"byte {place - 2 * size} of the record"
        assert damaged.damaged == 1


def test_records_that_changed_places_are_not_believed(journal):
    path, size = journal
    content = path.read_bytes()
    path.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])
    assert sorted(read(path).records) == [2, 3, 4]


def test_records_of_another_run_are_not_believed(journal):
    path, _ = journal
    other = read(path, "another run")
    assert not other.records
    assert other.damaged == 5


# ---- kills -----------------------------------------------------------------------------------------------------------

KINDS = {
    "default": {"mode": "ZO", "direction": "feedback", "rank": 16, "optimizer": "adam", "use_lr_scheduler": True},
    "sgd": {"mode": "ZO", "optimizer": "sgd", "direction": "gaussian", "use_lr_scheduler": True, "warmup_steps": 3},
    "adam": {"mode": "ZO", "optimizer": "adam", "direction": "lowrank", "parallel_q_computation": True},
    "mudamw": {"mode": "ZO", "optimizer": "mudamw", "direction": "rademacher", "weight_decay": 0.1},
    "Instruct": {"mode": "Instruct", "bp_interval": 3, "optimizer": "adam", "query_data": "distinct"},
    "FO": {"mode": "FO", "optimizer": "mudamw"},
}
ALL_KINDS = {
    f"{mode}-{optimizer}": {"mode": mode, "optimizer": optimizer, "bp_interval": 3 if mode == "Instruct" else None}
    for mode in ("ZO", "Instruct", "FO")
    for optimizer in ("sgd", "adam", "mudamw")
} | {"default": KINDS["default"]}


def killed_at_random(runs, child: harness.Child, logs: Path, moments: random.Random) -> bool:
    """Kills the process after a random number of steps and a random while; whether it was still running."""
    child.until(lambda: any(logs.glob("*/metrics.csv")))
    begun = harness.records(logs, RECORD)
    steps = moments.randrange(STEPS["max_steps"])
    child.until(lambda: harness.records(logs, RECORD) >= min(begun + steps, STEPS["max_steps"]))
    time.sleep(moments.uniform(0, 0.05))
    running = child.process.is_alive()
    child.kill()
    return running


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs, kind):
    flags = STEPS | KINDS[kind]
    undisturbed = runs.train("undisturbed", **flags)
    child = runs.start("killed", ("slow_steps", 0.01), **flags)
    killed_at_random(runs, child, runs.folder / "killed", random.Random(kind))
    run = harness.only_run(runs.folder / "killed")
    assert runs.resume(run) == 0
    assert harness.differences(undisturbed, run) == []
    assert steps_of(run) == [str(step) for step in range(9)]


@pytest.mark.long
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_run_killed_many_times_goes_on(runs, kind):
    """At least five kills of each of nine kinds of run, each resumed, the last to its end."""
    flags, moments, kills = STEPS | ALL_KINDS[kind], random.Random(kind), 0
    undisturbed = runs.train("undisturbed", **flags)
    for attempt in itertools.count():
        if kills >= 5:
            break
        name = f"killed{attempt}"
        child = runs.start(name, ("slow_steps", 0.02), **flags)
        kills += killed_at_random(runs, child, runs.folder / name, moments)
        run = harness.only_run(runs.folder / name)
        again = runs.start_resume(run, ("slow_steps", 0.02))
        kills += killed_at_random(runs, again, runs.folder / name, moments)
        assert runs.resume(run) == 0
        assert harness.differences(undisturbed, run) == []


STORAGE_CALLS = 24


def test_a_kill_between_any_two_storage_calls_of_a_checkpoint_loses_nothing(runs, whole):
    """Before each mkdir, write, flush and rename of the second checkpoint in turn."""
    ended = {}
    for first in range(0, STORAGE_CALLS, 4):
        children = {
            number: runs.start(f"at{number}", ("exit_at_storage_call", number, 6), optimizer="adam", **STEPS)
            for number in range(first, first + 4)
        }
        ended |= {number: child.wait() for number, child in children.items()}
        if any(code == 0 for code in ended.values()):
            break
    killed = [number for number, code in ended.items() if code == 9]
    assert len(killed) >= 10
    assert set(ended.values()) == {0, 9}, "STORAGE_CALLS is too small, or a run failed of itself"
    for number in killed:
        run = harness.only_run(runs.folder / f"at{number}")
        assert all(zo.folder_fault(folder) is None for folder in (run / "checkpoints").glob("step_*"))
        assert runs.resume(run) == 0
        assert harness.differences(whole, run) == [], f"storage call {number}"


def test_what_a_power_cut_could_take_is_on_the_disk_before_a_checkpoint_has_its_name(runs, monkeypatch):
    """Every file as it is, then the folder, then the name, then the folder that holds the name."""
    flushed, named, flush, rename = [], [], zo.flush, Path.rename

    def seen(path: Path) -> None:
        flush(path)
        flushed.append((path, path.read_bytes() if path.is_file() else sorted(path.iterdir())))

    def renaming(path: Path, target: Path) -> Path:
        if path.is_dir():
            held = {entry: entry.read_bytes() for entry in path.iterdir()}
            on_disk = dict(flushed)
            assert {entry: on_disk.get(entry) for entry in held} == held
            assert flushed[-1] == (path, sorted(held))
            named.append((target, len(flushed)))
        return rename(path, target)

    monkeypatch.setattr(zo, "flush", seen)
    monkeypatch.setattr(Path, "rename", renaming)
    runs.train(max_steps=4, save_interval=2)
    checkpoints = [(target, after) for target, after in named if target.name.startswith("step_")]
    assert len(checkpoints) == 2
    assert all(flushed[after][0] == target.parent for target, after in checkpoints)


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(runs, whole, number, code):
    child = runs.start("logs", ("slow_steps", 0.03), optimizer="adam", **STEPS)
    child.until(lambda: harness.records(runs.folder / "logs", RECORD) >= 2)
    child.send(number)
    assert child.wait() == code, child.output()
    run = harness.only_run(runs.folder / "logs")
    assert f"--resume {run}" in child.output()
    assert "Traceback" not in child.output()
    last = harness.last_checkpoint(run)
    assert zo.folder_fault(last) is None
    assert int(last.name[5:]) == harness.records(runs.folder / "logs", RECORD)
    assert runs.resume(run) == 0
    assert harness.differences(whole, run) == []


def test_a_second_signal_quits_at_once_and_loses_only_the_step(runs, whole):
    child = runs.start("logs", ("slow_steps", 0.3), optimizer="adam", **STEPS)
    child.until(lambda: harness.records(runs.folder / "logs", RECORD) >= 2)
    child.send(signal.SIGINT)
    time.sleep(0.1)
    child.send(signal.SIGTERM)
    assert child.wait() == 143, child.output()
    run = harness.only_run(runs.folder / "logs")
    assert not list((run / "checkpoints").glob("step_*"))
    assert runs.resume(run) == 0
    assert harness.differences(whole, run) == []


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_for_more_steps(runs, stopped, whole):
    assert runs.resume(stopped, max_steps=8) == 0
    assert harness.differences(whole, stopped) == []


def test_auto_takes_the_newest_unfinished_run(runs, stopped, whole, capsys):
    """Finished runs and strange folders are left alone."""
    older = Path(shutil.copytree(stopped, stopped.with_name("zz_older")))
    for run in (older, stopped):
        (run / "finished.json").unlink()
    os.utime(older / "config.json", (1, 1))
    Path(shutil.copytree(whole, stopped.with_name("finished")))
    (stopped.parent / "no_run").mkdir()
    assert runs.main(harness.argv(resume="auto", log_dir=stopped.parent, max_steps=8)) == 0
    assert harness.differences(whole, stopped) == []
    assert steps_of(older)[-1] == "6"


def test_auto_without_an_unfinished_run_says_so(runs, stopped, capsys):
    assert runs.main(harness.argv(resume="auto", log_dir=stopped.parent)) == 2
    assert error_lines(capsys) == [f"error: --resume auto: no unfinished run in {stopped.parent}"]


def test_a_finished_run_that_is_resumed_stays_as_it_is(runs, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "copy"))
    assert runs.resume(run) == 0
    assert harness.differences(whole, run) == []
    assert (run / "finished.json").exists()


def test_flags_that_shape_the_result_are_refused_with_the_list(runs, stopped, capsys):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    changed = {"learning_rate": 0.5, "seed": 9, "query_budget_q": 3, "direction": "lowrank", "mode": "FO", "max_steps": 8}
    capsys.readouterr()
    assert runs.resume(stopped, **changed) == 2
    text = "\n".join(error_lines(capsys))
    for name in ("learning_rate", "seed", "query_budget_q", "direction", "mode"):
        assert f"--{name} {changed[name]}" in text
    assert "max_steps" not in text
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_flags_of_the_same_value_are_no_change(runs, stopped):
    assert runs.resume(stopped, learning_rate=harness.FLAGS["learning_rate"], seed=0, mode="ZO") == 0


@pytest.mark.parametrize(
    "free",
    [{"log_interval": 5}, {"save_interval": 1}, {"num_threads": 1}, {"keep_checkpoints": 1}, {"eval_interval": 4}, {"epochs": 2}],
    ids=str,
)
def test_flags_that_do_not_shape_the_result_are_free(runs, stopped, free):
    assert runs.resume(stopped, max_steps=8, **free) == 0
    assert steps_of(stopped)[-1] == "8"
    assert zo.read_config(stopped).max_steps == 8


@pytest.mark.parametrize("direction", ["gaussian", "lowrank"])
def test_the_grouping_of_queries_is_free(runs, direction):
    flags = {"direction": direction, "parallel_q_computation": True, "parallel_batch_size": 2}
    whole = runs.train("whole", **flags, max_steps=6)
    run = runs.train(**flags, max_steps=4)
    assert runs.resume(run, parallel_batch_size=1, max_steps=6) == 0
    assert set(harness.differences(whole, run)) <= {"metrics.csv"}  # which has a validation after step 4, too


def test_a_schedule_fixes_the_number_of_steps(runs, capsys):
    run = runs.train(use_lr_scheduler=True)
    capsys.readouterr()
    assert runs.resume(run, max_steps=8) == 2
    assert "--max_steps 8: the run has 4" in "\n".join(error_lines(capsys))


def test_metrics_after_a_resume_have_each_step_once_in_order(runs, stopped, whole):
    """Also where rows were lost, torn, or written twice."""
    lines = (stopped / "metrics.csv").read_text("utf-8").splitlines(keepends=True)
    lines = [*lines[:4], *lines[5:], lines[4], lines[6], lines[-1][:9]]
    (stopped / "metrics.csv").write_text("".join(lines), "utf-8")
    assert runs.resume(stopped, max_steps=8) == 0
    assert harness.timeless(stopped) == harness.timeless(whole)


def test_metrics_that_lost_a_row_stay_in_order(runs, stopped):
    shutil.rmtree(stopped / "checkpoints")  # all steps are applied again
    lines = (stopped / "metrics.csv").read_text("utf-8").splitlines(keepends=True)
    (stopped / "metrics.csv").write_text("".join(lines[:3] + lines[4:]), "utf-8")
    assert runs.resume(stopped, max_steps=8) == 0
    assert steps_of(stopped) == sorted(set(steps_of(stopped)), key=int)


def test_a_run_without_any_checkpoint_is_rebuilt_from_its_journal(runs, stopped, whole, monkeypatch):
    """ZO loses nothing: the steps in the journal are not measured again."""
    shutil.rmtree(stopped / "checkpoints")
    measured = []
    sequential_losses = zo.sequential_losses

    def watching(objective, tensors, batch, queries, *rest):
        measured.append(queries.step)
        return sequential_losses(objective, tensors, batch, queries, *rest)

    monkeypatch.setattr(zo, "sequential_losses", watching)
    assert runs.resume(stopped, max_steps=8) == 0
    assert measured == [6, 7]
    assert harness.differences(whole, stopped) == []


def test_a_second_process_on_the_same_run_is_refused(runs, whole, capsys):
    child = runs.start("logs", ("slow_steps", 0.05), optimizer="adam", **STEPS)
    child.until(lambda: harness.records(runs.folder / "logs", RECORD) >= 1)
    run = harness.only_run(runs.folder / "logs")
    assert runs.resume(run) == 2
    assert runs.replay(run) == 2
    for line in error_lines(capsys):
        assert str(run) in line
        assert "another process" in line
    assert child.wait() == 0, child.output()
    assert harness.differences(whole, run) == []


# ---- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "adam", "mudamw", "Instruct"])
def test_replay_rebuilds_a_run_bit_for_bit(runs, kind, capsys):
    run = runs.train(**STEPS | KINDS[kind])
    assert runs.replay(run) == 0
    said = capsys.readouterr().out
    assert "bitwise equal" in said
    assert re.search(r"journal has \d+ bytes a step", said)
    for name in ("model.safetensors", "optimizer.safetensors"):
        replayed = (run / "replay" / "step_00000008" / name).read_bytes()
        assert replayed == (harness.last_checkpoint(run) / name).read_bytes()


def test_replay_of_a_middle_step(runs, stopped):
    assert runs.replay(stopped, replay_step=3) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        replayed, own = (stopped / folder / "step_00000003" / name for folder in ("replay", "checkpoints"))
        assert replayed.read_bytes() == own.read_bytes()


def test_replay_measures_nothing(runs, stopped, monkeypatch):
    monkeypatch.setattr(zo, "sequential_losses", None)
    assert runs.replay(stopped) == 0


def change_scalars(run: Path) -> None:
    """Doubles the scalars of step 1 in a journal, with a checksum that fits."""
    journal = zo.Journal(run / "journal.bin", harness.FLAGS["query_budget_q"], zo.read_config(run).identity)
    known = journal.records.pop(1)
    journal.append(zo.dataclasses.replace(known, projected_grads=2 * known.projected_grads))
    journal.close()


def test_replay_tells_when_the_model_is_another(runs, stopped, capsys):
    change_scalars(stopped)
    assert runs.replay(stopped) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_a_second_replay_is_a_replay(runs, stopped, capsys):
    """What an earlier one wrote is not taken for its result."""
    assert runs.replay(stopped) == 0
    change_scalars(stopped)
    assert runs.replay(stopped) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_replay_beyond_the_journal_says_how_far_it_goes(runs, stopped, capsys):
    assert runs.replay(stopped, replay_step=7) == 2
    (line,) = error_lines(capsys)
    assert "no whole record of step 6" in line


def test_replay_beside_a_damaged_checkpoint_is_no_traceback(runs, stopped):
    (harness.last_checkpoint(stopped) / "model.safetensors").unlink()
    assert runs.replay(stopped) in (0, 1)
    assert zo.folder_fault(stopped / "replay" / "step_00000006") is None


# ---- damaged files ---------------------------------------------------------------------------------------------------

CHECKPOINT_FILES = (
    *("model.safetensors", "optimizer.safetensors", "manifest.json", "state.json"),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
)
every_damage = pytest.mark.parametrize("how", ["truncated", "emptied", "flipped"])


@pytest.mark.parametrize("how", ["truncated", pytest.param("emptied", marks=pytest.mark.long), "flipped"])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_checkpoint_is_named_and_passed_over(runs, stopped, whole, capsys, name, how):
    harness.damage(stopped / "checkpoints" / "step_00000006" / name, how)
    capsys.readouterr()
    assert runs.resume(stopped, max_steps=8) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "passed over" in line]
    assert "step_00000006" in line
    assert name in line or name == "manifest.json"  # which may vouch wrongly for another file
    assert harness.differences(whole, stopped) == []


def test_every_file_of_a_checkpoint_was_tried(stopped):
    assert {path.name for path in (stopped / "checkpoints" / "step_00000006").iterdir()} == set(CHECKPOINT_FILES)


@pytest.mark.parametrize("change", ["missing", "more", "link", "renamed"])
def test_a_checkpoint_that_was_tampered_with_is_passed_over(runs, stopped, whole, capsys, change):
    folder = stopped / "checkpoints" / "step_00000006"
    if change == "missing":
        (folder / "tokenizer.json").unlink()
    elif change == "more":
        (folder / "pytorch_model.bin").write_bytes(b"x")
    elif change == "link":
        (folder / "model.safetensors").rename(stopped / "elsewhere")
        (folder / "model.safetensors").symlink_to(stopped / "elsewhere")
    else:
        shutil.rmtree(folder)
        (stopped / "checkpoints" / "step_00000003").rename(folder)
    capsys.readouterr()
    assert runs.resume(stopped, max_steps=8) == 0
    assert "passed over" in capsys.readouterr().out
    assert not weights_differ(whole, stopped)


@every_damage
def test_a_damaged_config_is_refused_by_name(runs, stopped, capsys, how):
    harness.damage(stopped / "config.json", how)
    capsys.readouterr()
    for call in (runs.resume, runs.replay):
        assert call(stopped) == 2
        (line,) = error_lines(capsys)
        assert str(stopped / "config.json") in line


@pytest.mark.parametrize(
    "flags",
    [{"mode": "Magic"}, {"epsilon": -1.0}, {"epsilon": "x"}, {"seed": [1]}, {"query_budget_q": 0}, {"rank": True}],
    ids=str,
)
def test_a_config_made_by_hand_is_refused_by_name(runs, stopped, capsys, flags):
    """With a digest that fits, but values that no flag accepts."""
    about = json.loads((stopped / "config.json").read_text("utf-8"))
    about["flags"] |= flags
    about["flags_sha256"] = zo.flags_digest(about["flags"])
    (stopped / "config.json").write_text(json.dumps(about), "utf-8")
    capsys.readouterr()
    assert runs.resume(stopped) == 2
    assert str(stopped / "config.json") in error_lines(capsys)[0]


@every_damage
def test_a_damaged_journal_costs_at_most_measuring_again(runs, stopped, whole, how):
    harness.damage(stopped / "journal.bin", how)
    assert runs.resume(stopped, max_steps=8) == 0
    assert not weights_differ(whole, stopped)
    assert harness.timeless(stopped) == harness.timeless(whole)


@every_damage
def test_a_damaged_journal_without_checkpoints_is_measured_again(runs, stopped, whole, how):
    harness.damage(stopped / "journal.bin", how)
    shutil.rmtree(stopped / "checkpoints")
    assert runs.resume(stopped, max_steps=8) == 0
    assert harness.differences(whole, stopped) == []


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("how", ["truncated", "emptied", "flipped", "no number"])
def test_damaged_metrics_are_refused_by_name_or_mended(runs, stopped, whole, capsys, how, finished):
    path = stopped / "metrics.csv"
    if how == "no number":
        rows = path.read_text("utf-8").splitlines()
        cells = rows[-1].split(",")
        cells[-2] = "1.2.3"
        path.write_text("\n".join([*rows[:-1], ",".join(cells)]) + "\n", "utf-8")
    else:
        harness.damage(path, how)
    capsys.readouterr()
    code = runs.resume(stopped, max_steps=6 if finished else 8)
    if code == 2:
        assert str(path) in error_lines(capsys)[0]
        return
    assert code == 0
    assert path.read_text("utf-8").startswith("step,epoch,stage,loss")
    assert steps_of(stopped) == sorted(set(steps_of(stopped)), key=int)
    if not finished:
        assert not weights_differ(whole, stopped)


def test_metrics_are_read_with_a_damaged_header_and_of_an_older_version(stopped):
    path = stopped / "metrics.csv"
    rows = zo.read_metrics(path)
    path.write_text(path.read_text("utf-8").replace("val_loss", "val_lozs", 1), "utf-8")
    assert zo.read_metrics(path) == rows
    names = [name for name in zo.METRICS if name != "stage"]
    lines = [names, *([row[name] for name in names] for row in rows)]
    path.write_text("".join(",".join(line) + "\n" for line in lines), "utf-8")
    assert zo.read_metrics(path) == rows


def test_a_checkpoint_of_another_run_is_not_taken(runs, stopped, whole, capsys):
    """Whole in itself, but of another seed."""
    other = runs.train("other", optimizer="adam", seed=5, **STEPS | {"max_steps": 6})
    shutil.rmtree(stopped / "checkpoints" / "step_00000006")
    shutil.copytree(other / "checkpoints" / "step_00000006", stopped / "checkpoints" / "step_00000006")
    code = runs.resume(stopped, max_steps=8)
    assert code == 2 or not weights_differ(whole, stopped)
    assert "step_00000006" in "".join(capsys.readouterr())


def test_a_journal_of_another_run_is_not_taken(runs, stopped, whole):
    """Whole in itself, but of another seed."""
    other = runs.train("other", optimizer="adam", seed=5, **STEPS | {"max_steps": 6})
    shutil.rmtree(stopped / "checkpoints")
    shutil.copy(other / "journal.bin", stopped / "journal.bin")
    code = runs.resume(stopped, max_steps=8)
    assert code == 2 or not weights_differ(whole, stopped)


def test_a_checkpoint_written_beside_a_damaged_newer_one_stays(runs, stopped, capsys):
    """Pruning keeps what is whole."""
    harness.damage(stopped / "checkpoints" / "step_00000006" / "model.safetensors", "flipped")
    assert runs.resume(stopped, max_steps=5, keep_checkpoints=1) == 0
    assert zo.folder_fault(stopped / "checkpoints" / "step_00000005") is None


class Trap:
    """Leaves a mark if it is ever unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_a_pickle_under_any_name_is_never_executed(runs, first_six, tmp_path, capsys):
    """In the run or its checkpoint, where the manifest vouches for it."""
    mark, payload = tmp_path / "mark", pickle.dumps(Trap(tmp_path / "mark"))
    of_run = [path.relative_to(first_six) for path in first_six.rglob("*") if path.is_file() and path.suffix != ".png"]
    of_run = [name for name in of_run if "step_00000003" not in str(name)]
    checkpoint = Path("checkpoints/step_00000006")
    more = [checkpoint / name for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "trainer_state.json")]
    for number, name in enumerate([*of_run, *more]):
        run = Path(shutil.copytree(first_six, tmp_path / f"run{number}"))
        (run / name).write_bytes(payload)
        if checkpoint in name.parents and name.name != "manifest.json":
            manifest = json.loads((run / checkpoint / "manifest.json").read_text("utf-8"))
            manifest["files"][name.name] = {"bytes": len(payload), "sha256": zo.file_digest(run / name)}
            (run / checkpoint / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        assert runs.resume(run, max_steps=7) in (0, 2), name
        assert not mark.exists(), name


@pytest.mark.parametrize(
    "name",
    [
        "corpus.json",
        "train.bin",
        "tokenizer.json",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("validation.bin", "tokenizer_config.json")),
    ],
)
def test_a_pickle_in_the_token_cache_is_never_executed(runs, tmp_path, capsys, name):
    assert runs.code("first", cache_dir=tmp_path / "cache", max_steps=1) == 0
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    assert runs.code("second", cache_dir=tmp_path / "cache", max_steps=1) in (0, 2)
    assert not (tmp_path / "mark").exists()


def test_code_beside_a_tokenizer_is_never_executed(runs, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    zo.wrapped_tokenizer(zo.trained_tokenizer(["some words"] * 3, 300)).save_pretrained(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    about |= {"auto_map": {"AutoTokenizer": [None, "trap.Trap"]}, "tokenizer_class": "Trap"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), "utf-8")
    mark = tmp_path / "mark"
    (folder / "trap.py").write_text(f"open({str(mark)!r}, 'w')\nclass Trap: pass\n", "utf-8")
    assert runs.code(tokenizer=folder, max_steps=1) in (0, 2)
    assert not mark.exists()


# ---- storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [("full_disk_in_journal", 4), ("full_disk_after", 50_000, 4)], ids=["in the journal", "in a checkpoint"]
)
def test_a_full_disk_ends_with_4_and_loses_nothing(runs, whole, fault):
    child = runs.start("logs", fault, optimizer="adam", **STEPS)
    assert child.wait() == 4, child.output()
    errors = [line for line in child.output().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in child.output()
    run = harness.only_run(runs.folder / "logs")
    assert str(run) in errors[0]
    checkpoints = list((run / "checkpoints").glob("step_*"))
    assert [folder.name for folder in checkpoints] == ["step_00000003"]
    assert zo.folder_fault(checkpoints[0]) is None
    assert runs.resume(run) == 0
    assert harness.differences(whole, run) == []


def test_a_folder_that_vanishes_ends_with_4(runs, monkeypatch, capsys):
    step = zo.Trainer.step

    def vanishing(self, number, *args):
        if number == 2:
            shutil.rmtree(self.run.path)
        return step(self, number, *args)

    monkeypatch.setattr(zo.Trainer, "step", vanishing)
    capsys.readouterr()
    assert runs.code() == 4
    assert len(error_lines(capsys)) == 1


def test_space_is_checked_at_the_start(runs, monkeypatch, capsys):
    monkeypatch.setattr(zo.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    assert runs.code() == 4
    (line,) = error_lines(capsys)
    assert "--keep_checkpoints" in line
    assert not list((runs.folder / "logs").glob("*/checkpoints/step_*"))


@pytest.mark.parametrize("what", ["model", "tokenizer", "optimizer"])
def test_a_save_that_fails_is_never_silent(runs, stopped, monkeypatch, capsys, what):
    """Whatever kind of error the library that writes it raises."""

    def failing(*args, **kwargs):
        raise (Exception if what == "tokenizer" else OSError)("No space left on device (os error 28)")

    if what == "optimizer":
        import safetensors.torch

        monkeypatch.setattr(safetensors.torch, "save_file", failing)
    else:
        import transformers

        base = transformers.PreTrainedModel if what == "model" else transformers.PreTrainedTokenizerFast
        monkeypatch.setattr(base, "save_pretrained", failing)
    capsys.readouterr()
    assert runs.resume(stopped, max_steps=8) == 4
    (line,) = error_lines(capsys)
    assert "No space left" in line
    for folder in (stopped / "checkpoints").glob("step_*"):
        assert zo.folder_fault(folder) is None


# ---- not finite ------------------------------------------------------------------------------------------------------


ORIGINAL = {"sequential_losses": zo.sequential_losses, "batched_losses": zo.batched_losses}


def spoil(monkeypatch, step: int, places: list[tuple[int, int]], value: float = math.nan) -> None:
    """Makes losses of a step, given by (query, 0 for plus or 1 for minus), not finite on both paths."""
    for name in ORIGINAL:

        def spoiled(objective, tensors, batch, queries, *rest, original=ORIGINAL[name]):
            losses = original(objective, tensors, batch, queries, *rest)
            if queries.step == step:
                for place in places:
                    losses[place] = value
            return losses

        monkeypatch.setattr(zo, name, spoiled)


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "batched"])
@pytest.mark.parametrize(
    ("signs", "value"),
    [
        ([0], math.nan),
        ([1], math.inf),
        ([0, 1], math.inf),
        pytest.param([0], math.inf, marks=pytest.mark.long),
        pytest.param([1], math.nan, marks=pytest.mark.long),
        pytest.param([0, 1], math.nan, marks=pytest.mark.long),
    ],
    ids=["plus-nan", "minus-inf", "both-inf", "plus-inf", "minus-nan", "both-nan"],
)
def test_a_loss_that_is_not_finite_stops_before_the_update(runs, capsys, parallel, value, signs):
    """Step and query are named, the last good step is kept, and the run can go on from there."""
    flags = STEPS | {"max_steps": 5, "parallel_q_computation": parallel}
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 4, [(1, sign) for sign in signs], value)
        capsys.readouterr()
        assert runs.code(**flags) == 3
    (line,) = error_lines(capsys)
    assert line.startswith("error: step 4, query 1:")
    run = harness.only_run(runs.folder / "logs")
    assert harness.last_checkpoint(run).name == "step_00000004"
    assert zo.folder_fault(harness.last_checkpoint(run)) is None
    assert harness.records(runs.folder / "logs", RECORD) == 4
    # The weights are those of four whole steps, to the rounding that in-place queries need.
    good = runs.train("good", **flags | {"max_steps": 4})
    import safetensors.numpy

    kept, wanted = (safetensors.numpy.load_file(harness.last_checkpoint(r) / "model.safetensors") for r in (run, good))
    for name, array in wanted.items():
        np.testing.assert_allclose(kept[name], array, atol=1e-7, rtol=0)


def test_replay_agrees_with_the_checkpoint_of_a_run_that_stopped(runs, capsys):
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 4, [(1, 0)])
        assert runs.code(**STEPS) == 3
    assert runs.replay(harness.only_run(runs.folder / "logs")) == 0, capsys.readouterr().out


def test_a_run_that_stopped_can_go_on(runs, whole):
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 4, [(0, 0)])
        assert runs.code(optimizer="adam", **STEPS) == 3
    run = harness.only_run(runs.folder / "logs")
    assert runs.resume(run) == 0
    assert harness.differences(whole, run) == []


@pytest.mark.parametrize("spoiled", ["loss", "gradient"])
def test_a_backpropagation_that_is_not_finite_stops_before_the_update(runs, monkeypatch, capsys, spoiled):
    gradient, calls = zo.Objective.gradient, []

    def broken(self, *args):
        loss, gradients = gradient(self, *args)
        calls.append(loss)
        if len(calls) == 3 and spoiled == "gradient":
            gradients[1].view(-1)[0] = math.inf
        return (math.nan if len(calls) == 3 and spoiled == "loss" else loss), gradients

    monkeypatch.setattr(zo.Objective, "gradient", broken)
    capsys.readouterr()
    assert runs.code(mode="FO", **STEPS) == 3
    (line,) = error_lines(capsys)
    assert line.startswith(f"error: step 2: the {spoiled}")
    assert harness.last_checkpoint(harness.only_run(runs.folder / "logs")).name == "step_00000002"


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "batched"])
def test_skip_drops_a_query_and_says_so(runs, capsys, parallel):
    """The update is that of the other queries, also when it is replayed."""
    flags = STEPS | {"query_budget_q": 4, "on_nonfinite": "skip", "parallel_q_computation": parallel}
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 2, [(1, 0), (3, 1)])
        run = runs.train(**flags)
    log = (run / "train.log").read_text("utf-8")
    assert re.search(r"step 2, query 1: .*2 of 4 queries dropped", log)
    journal = zo.Journal(run / "journal.bin", 4, zo.read_config(run).identity)
    journal.close()
    assert np.isnan(journal.records[2].projected_grads).tolist() == [False, True, False, True]
    assert math.isfinite(journal.records[2].loss)
    assert all(math.isfinite(float(row["loss"])) for row in harness.metrics(run)[1:])
    assert runs.replay(run) == 0


def test_skip_stops_when_most_queries_are_gone(runs, capsys):
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 2, [(0, 0), (1, 0), (3, 1)])
        capsys.readouterr()
        assert runs.code(query_budget_q=4, on_nonfinite="skip", **STEPS) == 3
    (line,) = error_lines(capsys)
    assert "3 of 4 queries" in line
    assert harness.last_checkpoint(harness.only_run(runs.folder / "logs")).name == "step_00000002"


def test_a_scalar_that_overflows_the_update_stops_before_it(runs, capsys):
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 2, [(0, 0)], 1e30)
        capsys.readouterr()
        assert runs.code(**STEPS) == 3
    (line,) = error_lines(capsys)
    assert line.startswith("error: step 2")
    assert harness.last_checkpoint(harness.only_run(runs.folder / "logs")).name == "step_00000002"
