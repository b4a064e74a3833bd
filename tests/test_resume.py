"""Nothing is lost: the journal, exact resume, signals, replay, the best checkpoint, and losses that are not finite."""

import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import harness
import numpy as np
import pytest
from harness import STEPS, error_lines, steps_of

import reproduce_zo_paper as zo


def contents(run: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in ("train.log", ".lock")
    }


def number_of_records(runs, name: str = "logs") -> int:
    return harness.records(runs.folder / name)


def test_the_comparison_sees_every_difference(whole, tmp_path):
    """One changed bit in any of the things that must be equal is found."""
    assert harness.differences(whole, whole) == []
    last = f"checkpoints/{harness.last_checkpoint(whole).name}"
    for name in ("journal.jsonl", f"{last}/model.safetensors", f"{last}/optimizer.safetensors"):
        other = Path(shutil.copytree(whole, tmp_path / name.replace("/", "-")))
        harness.damage(other / name, "flipped")
        assert harness.differences(whole, other) == [Path(name).name]
    other = Path(shutil.copytree(whole, tmp_path / "metrics"))
    text = (other / "metrics.csv").read_text("utf-8")
    (other / "metrics.csv").write_text(text.replace("\n8,", "\n9,"), "utf-8")
    assert harness.differences(whole, other) == ["metrics.csv"]


# ---- journal ---------------------------------------------------------------------------------------------------------

ODD = [5e-324, -0.0, 1 / 3, 1.2e308, math.nan, 0.1 + 0.2]


def record(step: int) -> zo.Record:
    return zo.Record(step, 0.1 * step, 5.0 - step / 7, 2.5e-17, np.array(ODD) * (1 - step / 9))


def opened(path: Path, identity: str = "a run") -> zo.Journal:
    journal = zo.Journal(path, identity)
    journal.close()
    return journal


@pytest.fixture
def journal(tmp_path) -> Path:
    """A journal of five steps with six queries."""
    journal = zo.Journal(tmp_path / "journal.jsonl", "a run")
    for step in range(5):
        journal.append(record(step))
    journal.close()
    return journal.path


def test_the_journal_is_text_and_gives_back_exact_floats(journal):
    """A dropped query is null."""
    lines = [json.loads(line) for line in journal.read_text("ascii").splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[0]["projected_grads"] == [5e-324, 0.0, 1 / 3, 1.2e308, None, 0.1 + 0.2]
    for step in range(5):
        found, wanted = opened(journal).get(step), record(step)
        assert found.projected_grads.tobytes() == wanted.projected_grads.tobytes()
        assert [*vars(found).values()][:4] == [*vars(wanted).values()][:4]


def test_a_torn_line_is_cut(journal):
    content = journal.read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    for cut in (1, 20, last - 1):
        journal.write_bytes(content[:-cut])
        torn = zo.Journal(journal, "a run")
        assert [torn.get(step) is not None for step in range(5)] == [True] * 4 + [False]
        assert torn.reach(0) == 4
        torn.append(record(4))
        torn.close()
        assert journal.read_bytes() == content


def test_any_flipped_bit_costs_its_line_alone(journal):
    content = journal.read_bytes()
    lines = content.splitlines(keepends=True)
    first, end = len(lines[0] + lines[1]), len(lines[0] + lines[1] + lines[2])
    for place in range(first, end):
        for bit in range(8):
            journal.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            there = [step for step in range(5) if opened(journal).get(step)]
            assert [0, 1, 3, 4] == [step for step in there if step != 2], f"byte {place - first} of the line, bit {bit}"
            if 2 in there:  # a line end that is damaged leaves the line readable
                assert place == end - 1


def test_lines_that_changed_places_are_still_their_own_steps(journal):
    journal.write_bytes(b"".join(reversed(journal.read_bytes().splitlines(keepends=True))))
    for step in range(5):
        assert opened(journal).get(step).projected_grads.tobytes() == record(step).projected_grads.tobytes()


def test_records_of_another_run_are_not_believed(journal):
    other = opened(journal, "another run")
    assert not any(other.get(step) for step in range(5))
    assert other.damaged == 5


def test_the_journal_keeps_no_record_in_memory(tmp_path):
    journal = zo.Journal(tmp_path / "journal.jsonl", "a run")
    for step in range(1000):
        journal.append(record(step))
    journal.close()
    held = [value for value in vars(journal).values() if hasattr(value, "__len__")]
    assert sum(map(len, held)) < 100
    assert len(journal.path.read_bytes().splitlines()) == 1000


def test_what_a_power_cut_could_take_is_on_the_disk_before_a_checkpoint_has_its_name(runs, monkeypatch):
    """Every file as it is, then the folder, then the name, then the folder that holds the name."""
    flushed, named, flush, rename = [], [], zo.flush, Path.rename

    def seen(path: Path) -> None:
        flush(path)
        flushed.append((path, path.read_bytes() if path.is_file() else sorted(path.iterdir())))

    def renaming(path: Path, target: Path) -> Path:
        if path.name.startswith(".partial_step_"):
            held = {entry: entry.read_bytes() for entry in path.iterdir()}
            on_disk = dict(flushed)
            assert {entry: on_disk.get(entry) for entry in held} == held
            assert flushed[-1] == (path, sorted(held))
            named.append((target, len(flushed)))
        return rename(path, target)

    monkeypatch.setattr(zo, "flush", seen)
    monkeypatch.setattr(Path, "rename", renaming)
    runs.train(max_steps=4, save_interval=2)
    assert [target.name for target, _ in named] == ["step_00000002", "step_00000004"]
    assert all(flushed[after][0] == target.parent for target, after in named)


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_and_says_how_to_go_on(runs, whole, number, code):
    child = runs.start("logs", ("slow_steps", 0.03), optimizer="adam", **STEPS)
    child.until(lambda: number_of_records(runs) >= 2)
    child.send(number)
    assert child.wait() == code, child.output()
    run = harness.only_run(runs.folder / "logs")
    assert f"--resume {run}" in child.output()
    assert "Traceback" not in child.output()
    last = harness.last_checkpoint(run)
    assert zo.folder_fault(last) is None
    assert int(last.name[5:]) == number_of_records(runs)
    assert not (run / "finished.json").exists()
    assert runs.resume(run) == 0
    assert harness.differences(whole, run) == []


MANY_QUERIES = {
    "in place": {},
    "batched": {"parallel_q_computation": True, "parallel_batch_size": 2},
    "feedback": {"direction": "feedback", "optimizer": "adam"},
}


@pytest.mark.parametrize("flags", MANY_QUERIES.values(), ids=MANY_QUERIES)
def test_an_interrupt_stops_at_the_next_query(runs, flags):
    """Not after the whole step; the step is measured again, bit for bit the same."""
    flags = {"query_budget_q": 16, "max_steps": 3, "save_interval": 100} | flags
    undisturbed = runs.train("undisturbed", **flags)
    count = runs.folder / "count"
    child = runs.start("logs", ("slow_steps", 0.03, str(count)), **flags)
    child.until(lambda: number_of_records(runs) >= 1)
    begun = count.stat().st_size
    child.until(lambda: count.stat().st_size >= begun + 3)
    child.send(signal.SIGINT)
    passes = count.stat().st_size
    assert child.wait() == 130, child.output()
    assert count.stat().st_size - passes <= 3
    assert number_of_records(runs) == 1
    run = harness.only_run(runs.folder / "logs")
    assert runs.resume(run) == 0
    assert harness.differences(undisturbed, run) == []


def test_a_second_signal_quits_at_once_and_loses_only_the_step(runs, whole):
    child = runs.start("logs", ("slow_steps", 0.4), optimizer="adam", **STEPS)
    child.until(lambda: number_of_records(runs) >= 2)
    child.send(signal.SIGINT)
    child.until(lambda: "once more: at once" in child.output())
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
    """Finished runs and strange folders are left alone; where there is no other, it says so."""
    older = Path(shutil.copytree(stopped, stopped.with_name("zz_older")))
    for run in (older, stopped):
        (run / "finished.json").unlink()
    os.utime(older / "config.json", (1, 1))
    shutil.copytree(whole, stopped.with_name("finished"))
    (stopped.parent / "no_run").mkdir()
    assert runs.main(harness.argv(resume="auto", log_dir=stopped.parent, max_steps=8)) == 0
    assert harness.differences(whole, stopped) == []
    assert steps_of(older)[-1] == "6"
    shutil.rmtree(older)
    capsys.readouterr()
    assert runs.main(harness.argv(resume="auto", log_dir=stopped.parent)) == 2
    assert error_lines(capsys) == [f"error: --resume auto: no unfinished run in {stopped.parent}"]


def test_a_finished_run_that_is_resumed_stays_as_it_is(runs, stopped):
    before = contents(stopped)
    assert runs.resume(stopped) == 0
    after = contents(stopped)
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"loss.png"}


def test_flags_that_shape_the_result_are_refused_with_the_list(runs, stopped, capsys):
    before = contents(stopped)
    changed = {"learning_rate": 0.5, "seed": 9, "query_budget_q": 3, "direction": "lowrank", "mode": "FO"}
    capsys.readouterr()
    assert runs.resume(stopped, **changed, max_steps=8) == 2
    text = "\n".join(error_lines(capsys))
    assert all(f"--{name} {value}" in text for name, value in changed.items())
    assert "max_steps" not in text
    assert before == contents(stopped)


FREE = [
    *({"log_interval": 5}, {"save_interval": 1}, {"num_threads": 1}, {"keep_checkpoints": 1}, {"eval_interval": 4}),
    *({"epochs": 2}, {"learning_rate": harness.FLAGS["learning_rate"], "seed": 0, "mode": "ZO"}),
]


@pytest.mark.parametrize("free", FREE, ids=str)
def test_flags_that_do_not_shape_the_result_are_free(runs, stopped, whole, free):
    assert runs.resume(stopped, max_steps=8, **free) == 0
    assert steps_of(stopped)[-1] == "8"
    assert harness.same_weights(whole, stopped)
    assert zo.read_config(stopped).max_steps == 8


@pytest.mark.parametrize("direction", ["gaussian", "lowrank"])
def test_the_grouping_of_queries_is_free(runs, direction):
    flags = {"direction": direction, "parallel_q_computation": True, "parallel_batch_size": 2}
    one = runs.train("one", **flags, max_steps=6)
    run = runs.train(**flags, max_steps=4)
    assert runs.resume(run, parallel_batch_size=1, max_steps=6) == 0
    assert set(harness.differences(one, run)) <= {"metrics.csv"}  # which has a validation after step 4, too


def test_a_schedule_fixes_the_number_of_steps(runs, capsys):
    run = runs.train(use_lr_scheduler=True)
    capsys.readouterr()
    assert runs.resume(run, max_steps=8) == 2
    assert "--max_steps 8: the run has 4" in "\n".join(error_lines(capsys))


def speaks_of(run: Path, step: int) -> None:
    """Every file of a finished run is of that step."""
    finished, last = json.loads((run / "finished.json").read_text("utf-8")), harness.metrics(run)[-1]
    assert finished["step"] == step
    assert finished["val_loss"] == float(last["val_loss"])
    assert steps_of(run) == [str(each) for each in range(step + 1)]
    assert harness.last_checkpoint(run).name == f"step_{step:08d}"
    assert zo.read_config(run).max_steps == step


@pytest.mark.parametrize("finished", [True, False])
def test_fewer_steps_than_were_made_are_refused(runs, stopped, capsys, finished):
    """Of a run that is finished, or was killed after step 6."""
    if not finished:
        (stopped / "finished.json").unlink()
    before = contents(stopped)
    capsys.readouterr()
    assert runs.resume(stopped, max_steps=4) == 2
    (line,) = error_lines(capsys)
    assert "--max_steps 4" in line
    assert "6" in line
    assert contents(stopped) == before


def test_fewer_steps_than_are_in_the_journal_are_refused_or_all_there_is(runs, stopped, whole):
    """A run killed at step 6 whose last checkpoint is of step 3; rows beyond what was reached go."""
    shutil.rmtree(stopped / "checkpoints" / "step_00000006")
    (stopped / "finished.json").unlink()
    with open(stopped / "metrics.csv", "a", encoding="utf-8") as file:
        file.write((stopped / "metrics.csv").read_text("utf-8").splitlines()[-1].replace("6,", "7,", 1) + "\n")
    if (code := runs.resume(stopped, max_steps=4, export_dir=runs.folder / "model")) == 0:
        speaks_of(stopped, 4)
        card = (runs.folder / "model" / "README.md").read_text("utf-8")
        assert harness.metrics(stopped)[-1]["val_loss"][:6] in card
    else:
        assert code == 2
    assert runs.resume(stopped, max_steps=8) == 0
    speaks_of(stopped, 8)
    assert harness.differences(whole, stopped) == []


def test_metrics_after_a_resume_have_each_step_once_in_order(runs, stopped, whole):
    """Also where rows were lost, torn, or written twice."""
    lines = (stopped / "metrics.csv").read_text("utf-8").splitlines(keepends=True)
    lines = [*lines[:4], *lines[5:], lines[4], lines[6], lines[-1][:9]]
    (stopped / "metrics.csv").write_text("".join(lines), "utf-8")
    assert runs.resume(stopped, max_steps=8) == 0
    assert harness.timeless(stopped) == harness.timeless(whole)


def test_a_run_without_any_checkpoint_is_rebuilt_from_its_journal(runs, stopped, whole, monkeypatch):
    """The steps in the journal are not measured again; a row that metrics.csv had lost is in its place."""
    shutil.rmtree(stopped / "checkpoints")
    lines = (stopped / "metrics.csv").read_text("utf-8").splitlines(keepends=True)
    (stopped / "metrics.csv").write_text("".join(lines[:3] + lines[4:]), "utf-8")
    measured, measure = [], zo.Trainer.measure
    monkeypatch.setattr(zo.Trainer, "measure", lambda self, step: measured.append(step) or measure(self, step))
    assert runs.resume(stopped, max_steps=8) == 0
    assert measured == [6, 7]
    assert harness.differences(whole, stopped) == []


def test_a_second_process_on_the_same_run_is_refused(runs, whole, capsys):
    child = runs.start("logs", ("slow_steps", 0.05), optimizer="adam", **STEPS)
    child.until(lambda: number_of_records(runs) >= 1)
    run = harness.only_run(runs.folder / "logs")
    capsys.readouterr()
    assert [runs.resume(run), runs.replay(run)] == [2, 2]
    assert all(str(run) in line and "another process" in line for line in error_lines(capsys))
    assert child.wait() == 0, child.output()
    assert harness.differences(whole, run) == []


# ---- versions --------------------------------------------------------------------------------------------------------


def test_a_flag_that_the_runs_version_did_not_have_is_at_its_default(runs, stopped, whole, capsys):
    """With the same identity: its journal and checkpoints are valid."""
    stored = zo.read_config(stopped)
    about = (stopped / "config.json").read_text("utf-8")
    at_default = []
    for name in json.loads(about)["flags"]:
        harness.rewrite_config(stopped, leave_out=(name,))
        if zo.read_config(stopped) == stored:
            at_default.append(name)
            assert zo.read_config(stopped).identity == stored.identity
        (stopped / "config.json").write_text(about, "utf-8")
    assert {"carry", "clip_grad_norm", "export_best", "rank", "head"} <= set(at_default)
    harness.rewrite_config(stopped, leave_out=tuple(at_default))
    assert runs.resume(stopped, max_steps=8) == 0
    assert "resuming from step 6" in capsys.readouterr().out
    assert harness.differences(whole, stopped) == []


def test_a_flag_of_another_version_is_named(runs, stopped, capsys):
    harness.rewrite_config(stopped, warp_speed=9)
    capsys.readouterr()
    assert runs.resume(stopped) == 2
    (line,) = error_lines(capsys)
    assert "--warp_speed" in line
    assert str(stopped / "config.json") in line


# ---- the best checkpoint ---------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(runs, monkeypatch):
    """It is whole, has no optimizer state, and a resume keeps it until a lower loss comes."""
    losses = iter([9.0, 4.0, 3.0, 3.5, 3.2, 3.1, 2.9])  # after steps 0, 2, 4, 6, 8, 10, 12
    monkeypatch.setattr(zo, "validation_loss", lambda objective, corpus: next(losses))
    run = runs.train(max_steps=8, eval_interval=2, save_interval=2)
    best = run / "checkpoints" / "best"
    for max_steps, step in ((8, 4), (10, 4), (12, 12)):
        assert max_steps == 8 or runs.resume(run, max_steps=max_steps) == 0
        assert zo.folder_fault(best) is None
        assert json.loads((best / "state.json").read_text("utf-8"))["step"] == step
        own = run / "checkpoints" / f"step_{step:08d}"
        assert (best / "model.safetensors").read_bytes() == (own / "model.safetensors").read_bytes()
    assert (best / "optimizer.safetensors").stat().st_size < 100


# ---- replay ----------------------------------------------------------------------------------------------------------

REPLAYED = {
    "sgd": {"use_lr_scheduler": True, "warmup_steps": 3, "parallel_q_computation": True},
    "adam": {"optimizer": "adam", "direction": "lowrank"},
    "mudamw": {"optimizer": "mudamw", "direction": "rademacher", "weight_decay": 0.1},
    "Instruct": {"mode": "Instruct", "bp_interval": 3, "direction": "gaussian", "optimizer": "adam"},
    "feedback": {"direction": "feedback", "optimizer": "adam", "query_budget_q": 1},
}


@pytest.mark.parametrize("kind", REPLAYED)
def test_replay_rebuilds_a_run_bit_for_bit(runs, kind, capsys):
    run = runs.train(**STEPS | REPLAYED[kind])
    assert runs.replay(run) == 0
    said = capsys.readouterr().out
    assert "bitwise equal" in said
    assert re.search(r"journal has \d+ bytes a step", said)
    for name in ("model.safetensors", "optimizer.safetensors"):
        replayed = (run / "replay" / "step_00000008" / name).read_bytes()
        assert replayed == (harness.last_checkpoint(run) / name).read_bytes()


def test_replay_of_a_middle_step_measures_nothing(runs, stopped, monkeypatch, capsys):
    monkeypatch.setattr(zo.Trainer, "measure", None)
    assert runs.replay(stopped, replay_step=3) == 0
    assert "bitwise equal" in capsys.readouterr().out
    assert runs.replay(stopped, replay_step=7) == 2
    (line,) = error_lines(capsys)
    assert "no whole record of step 6" in line


def test_replay_tells_when_the_model_is_another(runs, stopped, capsys):
    """What an earlier replay wrote is not taken for its result."""
    assert runs.replay(stopped) == 0
    journal = zo.Journal(stopped / "journal.jsonl", zo.read_config(stopped).identity)
    known = [journal.get(step) for step in range(6)]
    journal.close()
    journal.path.unlink()
    changed = zo.Journal(journal.path, zo.read_config(stopped).identity)
    for each in known:
        changed.append(
            zo.dataclasses.replace(each, projected_grads=each.projected_grads * (2 if each.step == 1 else 1))
        )
    changed.close()
    capsys.readouterr()
    assert runs.replay(stopped) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_replay_beside_a_damaged_checkpoint_is_no_traceback(runs, stopped):
    (harness.last_checkpoint(stopped) / "model.safetensors").unlink()
    assert runs.replay(stopped) in (0, 1)
    assert zo.folder_fault(stopped / "replay" / "step_00000006") is None


# ---- not finite ------------------------------------------------------------------------------------------------------


def spoil(patch, step: int, places: list[tuple[int, int]], value: float = math.nan) -> None:
    """Makes losses of a step, given by (query, 0 for plus or 1 for minus), not finite."""
    own_losses = zo.QueryRule.own_losses

    def spoiled(self, queries):
        losses = own_losses(self, queries)
        for place in places if queries.step == step else []:
            losses[place] = value
        return losses

    patch.setattr(zo.QueryRule, "own_losses", spoiled)


@pytest.mark.parametrize("parallel", [None, True], ids=["in place", "batched"])
@pytest.mark.parametrize(("signs", "value"), [([0], math.nan), ([1], math.inf), ([0, 1], -math.inf)], ids=str)
def test_a_loss_that_is_not_finite_stops_before_the_update(runs, capsys, parallel, value, signs):
    """Step and query are named, the last good step is kept, can be replayed, and the run can go on from there."""
    flags = STEPS | {"max_steps": 5, "parallel_q_computation": parallel, "optimizer": "adam"}
    good = runs.train("good", **flags)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 4, [(1, sign) for sign in signs], value)
        capsys.readouterr()
        assert runs.code(**flags) == 3
    (line,) = error_lines(capsys)
    assert line.startswith("error: step 4, query 1:")
    run = harness.only_run(runs.folder / "logs")
    assert harness.last_checkpoint(run).name == "step_00000004"
    assert zo.folder_fault(harness.last_checkpoint(run)) is None
    assert number_of_records(runs) == 4
    assert runs.replay(run) == 0
    assert "bitwise equal" in capsys.readouterr().out
    assert runs.resume(run) == 0
    assert harness.differences(good, run) == []


@pytest.mark.parametrize("spoiled", ["loss", "gradient", "error"])
def test_a_gradient_that_is_not_finite_stops_before_the_update(runs, monkeypatch, capsys, spoiled):
    """Of a backpropagation, and of what feedback knows at the output."""
    gradient, error, calls = zo.Objective.gradient, zo.Objective.error, []

    def broken(self, *args):
        loss, gradients = gradient(self, *args)
        calls.append(loss)
        if len(calls) == 3 and spoiled == "gradient":
            gradients[1].view(-1)[0] = math.inf
        return (math.nan if len(calls) == 3 and spoiled == "loss" else loss), gradients

    def broken_error(self, *args, **kwargs):
        found = error(self, *args, **kwargs)
        calls.append(found.loss)
        return found._replace(loss=math.nan) if len(calls) == 3 else found

    monkeypatch.setattr(zo.Objective, "gradient", broken)
    monkeypatch.setattr(zo.Objective, "error", broken_error)
    capsys.readouterr()
    flags = {"direction": "feedback", "optimizer": "adam"} if spoiled == "error" else {"mode": "FO"}
    assert runs.code(**STEPS | flags) == 3
    (line,) = error_lines(capsys)
    assert line.startswith(f"error: step 2: the {spoiled.replace('error', 'loss')}")
    assert harness.last_checkpoint(harness.only_run(runs.folder / "logs")).name == "step_00000002"


@pytest.mark.parametrize("parallel", [None, True], ids=["in place", "batched"])
def test_skip_drops_a_query_and_says_so(runs, capsys, parallel):
    """The update is that of the other queries, also when it is replayed; when most are gone, the run stops."""
    flags = STEPS | {"query_budget_q": 4, "on_nonfinite": "skip", "parallel_q_computation": parallel}
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 2, [(1, 0), (3, 1)])
        run = runs.train(**flags)
        spoil(patch, 2, [(0, 0), (1, 0), (3, 1)])
        capsys.readouterr()
        assert runs.code("most", **flags) == 3
    (line,) = error_lines(capsys)
    assert "3 of 4 queries" in line
    assert re.search(r"step 2, query 1: .*2 of 4 queries dropped", (run / "train.log").read_text("utf-8"))
    line = harness.journal(run)[2]
    assert [c is None for c in line["projected_grads"]] == [False, True, False, True]
    assert all(math.isfinite(float(row["loss"])) for row in harness.metrics(run)[1:])
    assert runs.replay(run) == 0


def test_a_scalar_that_overflows_the_update_stops_before_it(runs, capsys):
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 2, [(0, 0)], 1e30)
        capsys.readouterr()
        assert runs.code(**STEPS) == 3
    (line,) = error_lines(capsys)
    assert line.startswith("error: step 2")
    assert harness.last_checkpoint(harness.only_run(runs.folder / "logs")).name == "step_00000002"
