"""Nothing is lost: the journal, exact resume, signals, replay, the best checkpoint, and losses that are not finite."""

import itertools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import harness
import numpy as np
import pytest
from harness import STEPS, steps_of

import reproduce_zo_paper as zo


def contents(run: Path) -> dict[Path, bytes]:
    passing = ("train.log", "loss.png", ".lock")
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in passing}


def test_the_comparison_sees_every_difference(whole, tmp_path):
    """One changed bit in any of the things that must be equal is found."""
    assert harness.differences(whole, whole) == []
    last = f"checkpoints/{harness.last_checkpoint(whole).name}"
    for name in ("journal.jsonl", f"{last}/model.safetensors", f"{last}/optimizer.safetensors"):
        other = Path(shutil.copytree(whole, tmp_path / name.replace("/", "-")))
        harness.damage(other / name, "flipped")
        assert harness.differences(whole, other) == [Path(name).name]
    other = Path(shutil.copytree(whole, tmp_path / "metrics"))
    (other / "metrics.csv").write_text((other / "metrics.csv").read_text("utf-8").replace("\n8,", "\n9,"), "utf-8")
    assert harness.differences(whole, other) == ["metrics.csv"]


# ---- journal ---------------------------------------------------------------------------------------------------------

ODD = [5e-324, -0.0, 1 / 3, 1.2e308, math.nan, 0.1 + 0.2]


def record(step: int) -> zo.Record:
    return zo.Record(step, 0.1 * step, 5.0 - step / 7, 2.5e-17, np.array(ODD) / (1 + step))


def found_in(path: Path, identity: str = "a run") -> list[int]:
    """The steps of a journal; each must be exactly what was written."""
    journal = zo.Journal(path, identity)
    found = {step: journal.get(step) for step in range(10)}
    journal.close()
    for step, known in found.items():
        assert known is None or known.projected_grads.tobytes() == record(step).projected_grads.tobytes()
        assert known is None or [*vars(known).values()][:4] == [*vars(record(step)).values()][:4]
    return [step for step, known in found.items() if known is not None]


def write_journal(path: Path, steps: int) -> zo.Journal:
    journal = zo.Journal(path, "a run")
    for step in range(steps):
        journal.append(record(step))
    journal.close()
    return journal


@pytest.fixture
def journal(tmp_path) -> Path:
    """A journal of five steps with six queries."""
    return write_journal(tmp_path / "journal.jsonl", 5).path


def test_the_journal_is_text_and_gives_back_exact_floats(journal):
    """A dropped query is null; lines may change places; those of another run are not believed."""
    lines = [json.loads(line) for line in journal.read_text("ascii").splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[0]["projected_grads"] == [5e-324, 0.0, 1 / 3, 1.2e308, None, 0.1 + 0.2]
    assert found_in(journal) == [0, 1, 2, 3, 4]
    assert found_in(journal, "another run") == []
    journal.write_bytes(b"".join(reversed(journal.read_bytes().splitlines(keepends=True))))
    assert found_in(journal) == [0, 1, 2, 3, 4]


def test_a_torn_line_is_cut(journal):
    content = journal.read_bytes()
    last = len(content.splitlines()[-1])
    for cut in (1, 2, 20, last):
        journal.write_bytes(content[:-cut])
        torn = zo.Journal(journal, "a run")
        for step in range(torn.reach(0), 7):
            torn.append(record(step))
        torn.close()
        assert found_in(journal) == [0, 1, 2, 3, 4, 5, 6]
        assert journal.read_bytes().startswith(content)


def test_any_flipped_bit_costs_its_line_alone(journal):
    content = journal.read_bytes()
    lines = content.splitlines(keepends=True)
    first, end = len(lines[0] + lines[1]), len(lines[0] + lines[1] + lines[2])
    for place in range(first, end):
        for bit in range(8):
            journal.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            readable = place == end - 1  # a line whose end is damaged may be
            assert [step for step in found_in(journal) if not (step == 2 and readable)] == [0, 1, 3, 4], (place, bit)


def test_the_journal_keeps_no_record_in_memory(tmp_path):
    journal = write_journal(tmp_path / "journal.jsonl", 1000)
    assert sum(len(value) for value in vars(journal).values() if hasattr(value, "__len__")) < 100
    assert len(journal.path.read_bytes().splitlines()) == 1000


def test_what_a_power_cut_could_take_is_on_the_disk_before_a_checkpoint_has_its_name(runs, monkeypatch):
    """Every file as it is, then the folder, then the name, then the folder that holds the name."""
    flushed, named, flush, rename = [], [], zo.flush, Path.rename

    def seen(path: Path) -> None:
        flush(path)
        flushed.append((path, path.read_bytes() if path.is_file() else sorted(path.iterdir())))

    def renaming(path: Path, target: Path) -> Path:
        if path.name.startswith(".partial_step_"):
            held, on_disk = {entry: entry.read_bytes() for entry in path.iterdir()}, dict(flushed)
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


@pytest.mark.parametrize(("number", "code", "twice"), [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 0), (2, 130, 1)])
def test_a_signal_stops_the_run_and_says_how_to_go_on(runs, whole, number, code, twice):
    """A second one quits at once, and loses only the step."""
    child = runs.start("logs", ("slow_steps", 0.4 if twice else 0.03), optimizer="adam", **STEPS)
    child.until(lambda: harness.records(runs.folder / "logs") >= 2)
    child.send(number)
    if twice:
        child.until(lambda: "once more: at once" in child.output())
        child.send(number)
    assert child.wait() == code, child.output()
    run = harness.only_run(runs.folder / "logs")
    assert "Traceback" not in child.output()
    assert not (run / "finished.json").exists()
    if twice:
        assert not list((run / "checkpoints").glob("step_*"))
    else:
        assert f"--resume {run}" in child.output()
        last = harness.last_checkpoint(run)
        assert zo.folder_fault(last) is None
        assert int(last.name[5:]) == len(harness.journal(run))
    runs.complete(run, whole)


MANY_QUERIES = {
    "in place": {},
    "batched": {"parallel_q_computation": True, "parallel_batch_size": 2},
    "feedback": {"direction": "feedback", "optimizer": "adam"},
}


@pytest.mark.parametrize("flags", MANY_QUERIES.values(), ids=MANY_QUERIES)
def test_an_interrupt_stops_at_the_next_query(runs, flags):
    """Not after the whole step; the step is measured again, bit for bit the same."""
    flags, count = {"query_budget_q": 16, "max_steps": 3, "save_interval": 100} | flags, runs.folder / "count"
    undisturbed = runs.train("undisturbed", **flags)
    child = runs.start("logs", ("slow_steps", 0.03, str(count)), **flags)
    child.until(lambda: harness.records(runs.folder / "logs") >= 1)
    begun = count.stat().st_size
    child.until(lambda: count.stat().st_size >= begun + 3)
    child.send(signal.SIGINT)
    passes = count.stat().st_size
    assert child.wait() == 130, child.output()
    assert count.stat().st_size - passes <= 3
    run = harness.only_run(runs.folder / "logs")
    assert len(harness.journal(run)) == 1
    runs.complete(run, undisturbed)


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_auto_takes_the_newest_unfinished_run(runs, stopped, whole, failure):
    """Finished runs and strange folders are left alone; where there is no other, it says so."""
    older = Path(shutil.copytree(stopped, stopped.with_name("zz_older")))
    for run in (older, stopped):
        (run / "finished.json").unlink()
    os.utime(older / "config.json", (1, 1))
    shutil.copytree(whole, stopped.with_name("finished"))
    (stopped.parent / "no_run").mkdir()
    auto = harness.argv(resume="auto", log_dir=stopped.parent)
    assert runs.main([*auto, "--max_steps", "8"]) == 0
    assert harness.differences(whole, stopped) == []
    assert steps_of(older)[-1] == "6"
    shutil.rmtree(older)
    assert failure("", runs.main, auto) == f"error: --resume auto: no unfinished run in {stopped.parent}"


def test_flags_that_shape_the_result_are_refused_with_the_list(runs, stopped, capsys):
    """And a finished run that is resumed stays as it is."""
    before = contents(stopped)
    assert runs.resume(stopped) == 0
    changed = {"learning_rate": 0.5, "seed": 9, "query_budget_q": 3, "direction": "lowrank", "mode": "FO"}
    capsys.readouterr()
    assert runs.resume(stopped, **changed, max_steps=8) == 2
    text = capsys.readouterr().err
    assert all(f"--{name} {value}" in text for name, value in changed.items())
    assert "max_steps" not in text
    assert before == contents(stopped)


SAME = {"learning_rate": harness.FLAGS["learning_rate"], "seed": 0, "mode": "ZO"}
FREE = [{}, {"log_interval": 5}, {"save_interval": 1}, {"num_threads": 1}, {"keep_checkpoints": 1}, {"epochs": 2}, SAME]


@pytest.mark.parametrize("free", [*FREE, {"eval_interval": 4}], ids=str)
def test_a_run_goes_on_for_more_steps_with_flags_that_do_not_shape_the_result(runs, stopped, whole, free):
    assert runs.resume(stopped, max_steps=8, **free) == 0
    assert zo.read_config(stopped).max_steps == int(steps_of(stopped)[-1]) == 8
    assert set(harness.differences(whole, stopped)) <= ({"metrics.csv"} if free else set())


@pytest.mark.parametrize("direction", ["gaussian", "lowrank"])
def test_the_grouping_of_queries_is_free(runs, direction):
    flags = {"direction": direction, "parallel_q_computation": True, "parallel_batch_size": 2, "eval_interval": 2}
    run = runs.train(**flags, max_steps=4)
    runs.complete(run, runs.train("one", **flags, max_steps=6), parallel_batch_size=1, max_steps=6)


def test_a_schedule_fixes_the_number_of_steps(runs, capsys):
    run = runs.train(use_lr_scheduler=True)
    assert runs.resume(run, max_steps=8) == 2
    assert "--max_steps 8: the run has 4" in capsys.readouterr().err


@pytest.mark.parametrize("killed", [False, True])
def test_fewer_steps_than_were_made_are_refused(runs, stopped, whole, failure, killed):
    """Of a finished run, or one killed after step 6 with a checkpoint of step 3; then its files speak of step 8."""
    if killed:
        shutil.rmtree(stopped / "checkpoints" / "step_00000006")
        (stopped / "finished.json").unlink()
        with open(stopped / "metrics.csv", "a", encoding="utf-8") as file:  # a step that nothing else knows
            file.write("9" + (stopped / "metrics.csv").read_text("utf-8").splitlines()[-1][1:] + "\n")
    before = contents(stopped)
    assert re.search(r"--max_steps 2\b.*\b6\b", failure("", runs.resume, stopped, max_steps=2))
    assert contents(stopped) == before
    runs.complete(stopped, whole, max_steps=8, export_dir=runs.folder / "model")
    finished, last = json.loads((stopped / "finished.json").read_text("utf-8")), harness.metrics(stopped)[-1]
    assert (finished["step"], finished["val_loss"]) == (8, float(last["val_loss"]))
    assert f"{finished['val_loss']:.4f}" in (runs.folder / "model" / "README.md").read_text("utf-8")


def test_a_run_without_any_checkpoint_is_rebuilt_from_its_journal(runs, stopped, whole, monkeypatch):
    """Its steps are not measured again; rows of metrics.csv that were lost, torn or doubled are in their places."""
    shutil.rmtree(stopped / "checkpoints")
    lines = (stopped / "metrics.csv").read_text("utf-8").splitlines(keepends=True)
    lines = [*lines[:3], *lines[5:], lines[4], lines[6], lines[-1][:9]]
    (stopped / "metrics.csv").write_text("".join(lines), "utf-8")
    measured, measure = [], zo.Trainer.measure
    monkeypatch.setattr(zo.Trainer, "measure", lambda self, step: measured.append(step) or measure(self, step))
    runs.complete(stopped, whole, max_steps=8)
    assert measured == [6, 7]


def test_a_run_that_was_cut_short_is_validated_where_it_is_told_to_end(runs):
    flags = {"log_interval": 1, "eval_interval": 100, "save_interval": 100}
    whole, run = runs.train(**flags, max_steps=4), runs.train("cut", **flags, max_steps=6)
    for name, count in (("journal.jsonl", 4), ("metrics.csv", 6)):  # up to step 4; the head, and step 0
        lines = (run / name).read_text("utf-8").splitlines(keepends=True)
        (run / name).write_text("".join(lines[:count]), "utf-8")
    shutil.rmtree(run / "checkpoints")
    assert harness.metrics(run)[-1]["val_loss"] == ""
    runs.complete(run, whole, max_steps=4)


def test_a_second_process_on_the_same_run_is_refused(runs, whole, failure):
    child = runs.start("logs", ("slow_steps", 0.05), optimizer="adam", **STEPS)
    child.until(lambda: harness.records(runs.folder / "logs") >= 1)
    run = harness.only_run(runs.folder / "logs")
    for call in (runs.resume, runs.replay):
        assert failure("", call, run) == f"error: {run}: another process is running it"
    assert child.wait() == 0, child.output()
    assert harness.differences(whole, run) == []


def test_a_flag_that_the_runs_version_did_not_have_is_at_its_default(runs, stopped, whole, capsys):
    """With the same identity: its journal and checkpoints are valid. A flag of another version is named."""
    stored, about, at_default = zo.read_config(stopped), (stopped / "config.json").read_text("utf-8"), []
    for name in json.loads(about)["flags"]:
        harness.rewrite_config(stopped, leave_out=(name,))
        if zo.read_config(stopped) == stored:
            at_default.append(name)
            assert zo.read_config(stopped).identity == stored.identity
        (stopped / "config.json").write_text(about, "utf-8")
    assert {"carry", "clip_grad_norm", "export_best", "rank", "head"} <= set(at_default)
    harness.rewrite_config(stopped, leave_out=("stage_optimizers",), embedding_optimizer=None)  # of the version before
    assert zo.read_config(stopped) == stored
    harness.rewrite_config(stopped, scope="layerwise")
    with pytest.raises(zo.UsageError, match="layerwise runs had other defaults"):
        zo.read_config(stopped)
    (stopped / "config.json").write_text(about, "utf-8")
    harness.rewrite_config(stopped, leave_out=tuple(at_default), warp_speed=9)
    assert runs.resume(stopped, max_steps=8) == 2
    assert re.search(rf"error: {stopped}/config.json: .*--warp_speed", capsys.readouterr().err)
    harness.rewrite_config(stopped, leave_out=("warp_speed",))
    runs.complete(stopped, whole, max_steps=8)
    assert "resuming from step 6" in capsys.readouterr().out


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


def test_replay_rebuilds_the_last_checkpoint_bit_for_bit(runs, stopped, capsys):
    """Of each kind of run: test_attacks.py."""
    assert runs.replay(stopped) == 0
    assert "bitwise equal" in capsys.readouterr().out
    for name in ("model.safetensors", "optimizer.safetensors"):
        replayed = (stopped / "replay" / "step_00000006" / name).read_bytes()
        assert replayed == (harness.last_checkpoint(stopped) / name).read_bytes()


def test_replay_of_a_middle_step_measures_nothing(runs, stopped, monkeypatch, capsys, failure):
    monkeypatch.setattr(zo.Trainer, "measure", None)
    assert runs.replay(stopped, replay_step=3) == 0
    assert "bitwise equal" in capsys.readouterr().out
    failure("no whole record of step 6", runs.replay, stopped, replay_step=7)


def test_replay_tells_when_the_model_is_another(runs, stopped, capsys):
    """What an earlier replay wrote is not taken for its result; a damaged checkpoint is not compared with."""
    assert runs.replay(stopped) == 0
    identity = zo.read_config(stopped).identity
    journal = zo.Journal(stopped / "journal.jsonl", identity)
    known = [journal.get(step) for step in range(6)]
    journal.close()
    journal.path.unlink()
    changed = zo.Journal(journal.path, identity)
    for each in known:
        c = each.projected_grads * (2 if each.step == 1 else 1)
        changed.append(zo.dataclasses.replace(each, projected_grads=c))
    changed.close()
    capsys.readouterr()
    assert runs.replay(stopped) == 1
    assert "DIFFERENT" in capsys.readouterr().out
    (harness.last_checkpoint(stopped) / "model.safetensors").unlink()
    assert runs.replay(stopped) == 1
    assert "can't be compared" in capsys.readouterr().out


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


SPOILED = [([0], math.nan, None), ([1], math.inf, True), ([0, 1], -math.inf, None), ([0], 1e30, True)]


@pytest.mark.parametrize(("signs", "value", "parallel"), SPOILED, ids=str)
def test_a_loss_that_is_not_finite_stops_before_the_update(runs, failure, capsys, signs, value, parallel):
    """Nor is one too large; the last good step is kept, can be replayed, and the run can go on from there."""
    flags = STEPS | {"max_steps": 5, "parallel_q_computation": parallel, "optimizer": "adam"}
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 4, [(1, sign) for sign in signs], value)
        failure(f"error: step 4{': the update' if value == 1e30 else ', query 1:'}", runs.code, **flags, code=3)
    run = harness.only_run(runs.folder / "logs")
    assert harness.last_checkpoint(run).name == "step_00000004"
    assert len(harness.journal(run)) == 4
    assert runs.replay(run) == 0
    assert "bitwise equal" in capsys.readouterr().out
    runs.complete(run, runs.train("good", **flags))


@pytest.mark.parametrize("index", [0, 1], ids=["loss", "gradient"])
def test_a_backpropagation_that_is_not_finite_stops_before_the_update(runs, monkeypatch, failure, index):
    """What is not finite at the output alone: test_head.py."""
    gradient, calls = zo.Objective.gradient, itertools.count()

    def broken(self, *args, **kwargs):
        found = gradient(self, *args, **kwargs)
        if next(calls) == 2:
            found[1][1].view(-1)[0] *= math.inf if index else 1.0
            return found if index else (math.nan, found[1])
        return found

    monkeypatch.setattr(zo.Objective, "gradient", broken)
    failure(f"error: step 2: the {'gradient' if index else 'loss'}", runs.code, **STEPS, mode="FO", code=3)
    assert harness.last_checkpoint(harness.only_run(runs.folder / "logs")).name == "step_00000002"


def test_skip_drops_a_query_and_says_so(runs, failure):
    """The update is that of the other queries, also when it is replayed; when most are gone, the run stops."""
    flags = STEPS | {"query_budget_q": 4, "on_nonfinite": "skip"}
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 2, [(1, 0), (3, 1)])
        run = runs.train(**flags)
        spoil(patch, 2, [(0, 0), (1, 0), (3, 1)])
        failure("3 of 4 queries", runs.code, "most", **flags, code=3)
    assert re.search(r"step 2, query 1: .*2 of 4 queries dropped", (run / "train.log").read_text("utf-8"))
    dropped = [c is None for c in harness.journal(run)[2]["projected_grads"]]
    assert dropped == [False, True, False, True]
    assert all(math.isfinite(float(row["loss"])) for row in harness.metrics(run)[1:])
    assert runs.replay(run) == 0


def test_a_run_of_another_direction_format_is_refused_where_queries_are_drawn(runs, stopped, whole, failure):
    """Its journal's scalars belong to other directions. config.json of version 1 does not say."""
    path = stopped / "config.json"
    about = json.loads(path.read_text())
    for other in ({**about, "direction_format": 1}, {k: v for k, v in about.items() if k != "direction_format"}):
        path.write_text(json.dumps(other))
        for act in (lambda: runs.resume(stopped, max_steps=8), lambda: runs.replay(stopped)):
            failure("of a version that draws other directions", act)
    path.write_text(json.dumps(about))
    runs.complete(stopped, whole, max_steps=8)
    other = runs.train("without queries", direction="feedback", query_budget_q=0, max_steps=2)
    path = other / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "direction_format"}))
    assert runs.resume(other, max_steps=3) == 0


def test_a_run_of_an_earlier_token_format_goes_on_and_other_tokens_are_refused(runs, stopped, whole, failure):
    """Their folder has another name there, and nothing is known of a digest."""
    path = stopped / "corpus.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"tokens_sha256": "0" * 64}))
    began = "corpus.json: not what the run began with (tokens_sha256 was 0000"
    failure(began, runs.resume, stopped, max_steps=8)
    about.pop("tokens_sha256")
    path.write_text(json.dumps(about | {"tokens_folder": "tokens-of-another-format"}))
    runs.complete(stopped, whole, max_steps=8)
