"""Attacks on a run, as lists: kills, corrupted files, bad input, full disks, code that must never be executed.

`python tests/test_attacks.py` tries all, also the slow ones, and says how many were survived.
"""

import collections
import functools
import gzip
import itertools
import json
import os
import pickle
import random
import re
import shutil
import sys
import time
from pathlib import Path

import harness
import pytest
from harness import STEPS, steps_of

import reproduce_zo_paper as zo

# ---- kills: kinds of run x moments -----------------------------------------------------------------------------------

FEEDBACK = {"direction": "feedback", "optimizer": "adam"}
INSTRUCT = {"mode": "Instruct", "bp_interval": 3}
KINDS = {
    "sgd": {"use_lr_scheduler": True, "warmup_steps": 3},
    "adam": {"optimizer": "adam", "direction": "lowrank", "parallel_q_computation": True},
    "mudamw": {"optimizer": "mudamw", "direction": "rademacher", "weight_decay": 0.1},
    "block": {"query_budget_q": 0, "use_lr_scheduler": True, **FEEDBACK},
    "stream": {"carry": "stream", **FEEDBACK},
    "closed form": {"head": "closed_form", "direction": "aligned"},
    "Instruct": {"direction": "feedback", "optimizer": "mudamw", **INSTRUCT},
    "Instruct, bent": {"query_data": "distinct", "guide_cosine": 0.7, **INSTRUCT},
    "FO": {"mode": "FO", "optimizer": "mudamw"},
    "Instruct, alone": {"query_budget_q": 0, "head": "closed_form", **INSTRUCT},
    "Calibrate": {"mode": "Calibrate", "bp_interval": 3, "optimizer": "adam"},
    "Instruct, unmeasured": {"query_budget_q": 0, "carry": "stream", **FEEDBACK, **INSTRUCT},
    "layerwise": {"scope": "layerwise", "stage_steps": "3,2,3", "max_steps": None},
}
MOMENTS = {"before the first step": 0, "early": 2, "at a checkpoint": 3, "late": 7}  # lines of the journal
QUICK = {*zip(KINDS, itertools.cycle(MOMENTS))}


def attacks(pairs, quick) -> list:
    """All pairs, those that are not quick marked long."""
    return [pytest.param(*pair, marks=[] if quick(*pair) else pytest.mark.long) for pair in pairs]


@pytest.fixture(scope="module")
def undisturbed(module_runs):
    return functools.cache(lambda kind: module_runs.train(f"undisturbed_{kind}", **STEPS | KINDS[kind]))


def kill(child: harness.Child, logs: Path, records: int, moments: random.Random) -> None:
    """Kills the process after so many lines of its journal, and a random while."""
    child.until(lambda: any(logs.glob("*/config.json")) and harness.records(logs) >= records)
    time.sleep(moments.uniform(0, 0.03))
    child.kill()


KILLS = attacks(itertools.product(KINDS, MOMENTS), lambda *pair: pair in QUICK)


@pytest.mark.parametrize(("kind", "moment"), KILLS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs, undisturbed, kind, moment):
    """Killed twice: the second time a step after it was resumed. Then it is replayed."""
    logs, moments, records = runs.folder / "killed", random.Random(kind + moment), MOMENTS[moment]
    kill(runs.start("killed", ("slow_steps", 0.01), **STEPS | KINDS[kind]), logs, records, moments)
    run = harness.only_run(logs)
    kill(runs.start_resume(run, ("slow_steps", 0.01)), logs, min(8, harness.records(logs) + 1), moments)
    runs.complete(run, undisturbed(kind))
    assert steps_of(run) == [str(step) for step in range(9)]
    assert runs.replay(run) == 0


EVERY = [pytest.param(*saved, 1, marks=pytest.mark.long) for saved in (("step_00000006", 1), ("best", 2))]


@pytest.mark.parametrize(("name", "number", "every"), [("step_00000006", 1, 6), ("best", 2, 9), *EVERY])
def test_a_kill_between_two_storage_calls_of_a_checkpoint_loses_nothing(runs, name, number, every, record_property):
    """Before each mkdir, write, flush, rename and removal of a checkpoint, or of the best one that replaces another."""
    flags, copies = STEPS | {"mode": "FO", "learning_rate": 0.01}, []

    def copy() -> None:
        run = harness.only_run(runs.folder / "whole")
        copies.append(Path(shutil.copytree(run, runs.folder / f"at{len(copies)}" / run.name)))

    with pytest.MonkeyPatch.context() as patch:
        harness.at_storage_calls(patch, name, number, copy)
        whole = runs.train("whole", **flags)
    record_property("attacks", len(copies[::every]))
    assert len(copies) >= 10
    for at, run in [*enumerate(copies)][::every]:
        assert all(zo.folder_fault(folder) is None for folder in (run / "checkpoints").glob("step_*"))
        faults = {zo.folder_fault(folder) for folder in (run / "checkpoints").glob("*best")}
        assert faults & {None, "it was written as best"}, f"storage call {at}"  # whole, if under another name
        runs.complete(run, whole)
        best = [(each / "checkpoints" / "best" / "model.safetensors").read_bytes() for each in (whole, run)]
        assert best[0] == best[1]
        assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


# ---- corruptions: file x damage --------------------------------------------------------------------------------------


class Trap:
    """Leaves a mark if it is ever unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def trap(mark: Path) -> bytes:
    return pickle.dumps(Trap(mark))


def vouched_pickle(path: Path) -> None:
    """With a manifest that fits."""
    path.write_bytes(trap(path.with_name("mark")))
    (path.parent / "manifest.json").unlink()
    files = {each.name: zo.file_digest(each) for each in path.parent.iterdir()}
    (path.parent / "manifest.json").write_text(json.dumps({"name": path.parent.name, "sha256": files}), "utf-8")


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


DAMAGES = {how: lambda path, how=how: harness.damage(path, how) for how in ("truncated", "emptied", "flipped")} | {
    "missing": lambda path: path.unlink(),
    "a pickle": lambda path: path.write_bytes(trap(path.with_name("mark"))),
    "a vouched pickle": vouched_pickle,
    "a link": link,
    "no number": lambda path: path.write_bytes(path.read_bytes().rpartition(b",")[0] + b",1.2.3\n"),
}
MODEL_FILES = (
    *("model.safetensors", "optimizer.safetensors", "manifest.json", "state.json"),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
)
LAST = "checkpoints/step_00000006/"
# What must come of it: the checkpoint is passed over and named; the file is refused by its name; or all goes on.
RUN_FILES = {
    **{LAST + name: "passed over" for name in MODEL_FILES},
    **{"checkpoints/best/" + name: "goes on" for name in MODEL_FILES},
    **{"config.json": "refused", "corpus.json": "refused or goes on", "metrics.csv": "refused or goes on"},
    **dict.fromkeys(["journal.jsonl", "finished.json", "train.log", "loss.png"], "goes on"),
}
IN_LAST = ("a vouched pickle", "a link", "missing")
MORE = [(LAST + name, "a vouched pickle") for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin")]
CORRUPTIONS = [
    *((name, how) for name, how in itertools.product(RUN_FILES, DAMAGES) if "/step" in name or how not in IN_LAST[:2]),
    *MORE,
]
CORRUPTIONS = [(name, how) for name, how in CORRUPTIONS if how != "no number" or name == "metrics.csv"]
CORRUPTIONS = [(name, how) for name, how in CORRUPTIONS if how not in IN_LAST[:2] or "manifest" not in name]
OFTEN = ("config.json", "corpus.json", "metrics.csv", "journal.jsonl", "finished.json", LAST + "model.safetensors")


def quick(name: str, how: str) -> bool:
    return name in OFTEN or (LAST in name and how in ("flipped", "a vouched pickle"))


@pytest.mark.parametrize(("name", "how"), attacks(CORRUPTIONS, quick))
def test_a_corrupted_file_is_named_or_does_no_harm(runs, stopped, whole, capsys, name, how):
    """It is never trained on, never executed, and never a traceback."""
    path, outcome = stopped / name, RUN_FILES.get(name, "")
    DAMAGES[how](path)
    if name == "metrics.csv":
        assert runs.resume(stopped) in (0, 2)  # a finished run that has nothing to do
    capsys.readouterr()
    code = runs.resume(stopped, max_steps=8)
    said = capsys.readouterr()
    assert not path.with_name("mark").exists()
    assert code in (0, 2)
    if code == 2:
        assert "refused" in outcome or how == "a vouched pickle", said.err
        (line,) = said.err.splitlines()
        assert str(path if how not in IN_LAST else path.parent) in line
        assert runs.replay(stopped) == 2 or LAST in name
        return
    assert outcome != "refused"
    assert harness.same_weights(whole, stopped)
    assert name == "metrics.csv" or harness.timeless(whole) == harness.timeless(stopped)
    assert steps_of(stopped) == sorted(set(steps_of(stopped)), key=int)
    if outcome == "passed over" and how != "a vouched pickle":
        (line,) = [line for line in said.out.splitlines() if "passed over" in line]
        assert "step_00000006" in line
        assert path.name in line or path.name == "manifest.json"  # which may vouch wrongly for another file


def test_the_trap_works_and_every_file_of_a_run_is_attacked(stopped, tmp_path):
    pickle.loads(trap(tmp_path / "mark"))
    assert (tmp_path / "mark").exists()
    files = {str(path.relative_to(stopped)) for path in stopped.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {name for name in files if "step_00000003" not in name} == set(RUN_FILES)


@pytest.mark.parametrize("how", ["truncated", "emptied", "flipped", "missing"])
def test_a_damaged_journal_without_checkpoints_is_measured_again(runs, stopped, whole, how):
    DAMAGES[how](stopped / "journal.jsonl")
    shutil.rmtree(stopped / "checkpoints")
    runs.complete(stopped, whole, max_steps=8)


def of_another_run(runs, run: Path, name: str) -> None:
    other = runs.train("other", optimizer="adam", seed=5, **STEPS | {"max_steps": 6})
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    if name == "journal.jsonl":
        shutil.rmtree(run / "checkpoints")
        shutil.copy(other / name, run / name)
    else:
        shutil.copytree(other / name, run / name)


def earlier_as_last(runs, run: Path) -> None:
    shutil.rmtree(run / LAST)
    (run / "checkpoints" / "step_00000003").rename(run / LAST)


def older_metrics(runs, run: Path) -> None:
    path = run / "metrics.csv"
    path.write_text(path.read_text("utf-8").replace("val_bits_per_byte,", "", 1), "utf-8")


TAMPERINGS = {
    "a checkpoint of another seed": lambda runs, run: of_another_run(runs, run, LAST),
    "a journal of another seed": lambda runs, run: of_another_run(runs, run, "journal.jsonl"),
    "a file more": lambda runs, run: (run / LAST / "pytorch_model.bin").write_bytes(b"x"),
    "another checkpoint's name": earlier_as_last,
    "metrics without a column": older_metrics,
}


@pytest.mark.parametrize("tamper", TAMPERINGS.values(), ids=TAMPERINGS)
def test_what_was_tampered_with_is_not_taken(runs, stopped, whole, tamper):
    tamper(runs, stopped)
    code = runs.resume(stopped, max_steps=8)
    assert code == 2 or harness.same_weights(whole, stopped)


HAND_MADE = [
    *({"mode": "Magic"}, {"epsilon": -1.0}, {"epsilon": "x"}, {"seed": [1]}, {"query_budget_q": 0}, {"rank": True}),
    *({"scope": "blocks:9-1"}, {"run_name": "../../x"}, {"seed": None}, {"scope": "layerwise", "stage_steps": "x"}),
]


@pytest.mark.parametrize("flags", HAND_MADE, ids=str)
def test_a_config_made_by_hand_is_refused(runs, stopped, capsys, flags):
    """With a digest that fits, but values that no flag accepts."""
    harness.rewrite_config(stopped, **flags)
    assert runs.resume(stopped) == 2
    assert capsys.readouterr().err.startswith(f"error: {stopped}/config.json")


@pytest.fixture(scope="module")
def first_run(module_runs):
    """A run that built a cache of its own: (the run, its cache)."""
    cache = module_runs.folder / "cache"
    return module_runs.train("whole", cache_dir=cache, max_steps=2), cache


CACHE_FILES = {"train.bin", "validation.bin", "frequencies.bin", "corpus.json", "tokenizer.json"}
CACHE_FILES |= {"tokenizer_config.json", "manifest.json"}
CACHE = itertools.product(sorted(CACHE_FILES), [how for how in DAMAGES if how not in ("a link", "no number")])


@pytest.mark.parametrize(("name", "how"), attacks(CACHE, lambda name, how: how in ("flipped", "a vouched pickle")))
def test_a_damaged_cache_is_built_again(runs, first_run, tmp_path, name, how):
    """Or refused, where the manifest vouches for what is in it."""
    whole, cache = first_run
    (folder,) = Path(shutil.copytree(cache, tmp_path / "cache")).glob("tokens-*")
    own = {path.name for path in folder.iterdir() if path.suffix not in (".index", ".options")}  # those are of examples
    assert own == CACHE_FILES
    DAMAGES[how](folder / name)
    code = runs.code("again", cache_dir=tmp_path / "cache", max_steps=2)
    assert code == 0 or (code == 2 and how == "a vouched pickle")
    assert how == "a vouched pickle" or harness.differences(whole, harness.only_run(tmp_path / "again")) == []
    assert not list((tmp_path / "cache").rglob("mark"))


REMOTE = {"AutoTokenizer": [None, "trap.Trap"], "AutoModelForCausalLM": "trap.Trap", "AutoConfig": "trap.Trap"}
CODE = {
    "code beside a tokenizer": ("tokenizer", "tokenizer_config.json", {"auto_map": REMOTE}, ""),
    "code beside a model": ("init_from", "config.json", {"auto_map": REMOTE, "model_type": "trap"}, ""),
    "a model that is a pickle": ("init_from", "config.json", {}, "model.safetensors"),
}


@pytest.mark.parametrize(("flag", "name", "change", "without"), CODE.values(), ids=CODE)
def test_code_beside_a_model_is_never_executed(runs, first_six, tmp_path, capsys, flag, name, change, without):
    folder, mark = Path(shutil.copytree(first_six / LAST, tmp_path / "model")), tmp_path / "mark"
    (folder / "trap.py").write_text(f"open({str(mark)!r}, 'w')\nclass Trap: pass\n", "utf-8")
    (folder / "pytorch_model.bin").write_bytes(trap(mark))
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text("utf-8")) | change), "utf-8")
    (folder / (without or "trap.json")).unlink(missing_ok=True)
    own = {"model_size": None, "tokenizer": None} if flag == "init_from" else {}
    capsys.readouterr()
    code = runs.code(**own | {flag: folder}, max_steps=1)
    assert code == 2 or (code == 0 and flag == "tokenizer")
    assert all(str(folder) in line for line in capsys.readouterr().err.splitlines())
    assert not mark.exists()


# ---- input -----------------------------------------------------------------------------------------------------------

ROWS = "".join(json.dumps({"text": f"document {n} " + "and some words " * 9}) + "\n" for n in range(60))
BINARY = b"\xff\xfe\x00binary\x81" * 20
TORN = gzip.compress(ROWS.encode() + os.urandom(5000).hex().encode())[:-2000]
INPUTS = {  # name: (file, content, what the one line must say)
    **{
        f"binary {end}": (f"a{end}", BINARY, "can't be read")
        for end in (".txt", ".jsonl", ".csv", ".parquet", ".json.gz")
    },
    "no gzip": ("a.jsonl.gz", b"\x1f\x8b\x08 no gzip" * 20, "can't be read"),
    "a torn gzip": ("a.jsonl.gz", TORN, "can't be read"),
    "a number": ("a.jsonl", ROWS + '{"text": 17}\n', r"row 61|can't be read"),
    "numbers": ("a.jsonl", '{"text": 17}\n' * 60, r"row 1 holds 17"),
    "a list": ("a.jsonl", '{"text": ["a", "b"]}\n' * 60, r'row 1 holds \["a", "b"\]'),
    "an object": ("a.jsonl", '{"text": {"a": 1}}\n' * 60, "row 1 holds"),
    "no such column": ("a.jsonl", ROWS.replace('"text"', '"body"'), "no column 'text'; its columns are body"),
    "not JSON": ("a.jsonl", ROWS[:-20], "can't be read"),
    "nothing": ("a.jsonl", "", "must be a non-empty file"),
    "blanks alone": ("a.txt", "\n \n" * 50, "0 training tokens|can't be read"),
    "one document": ("a.txt", "some words\n" * 500, "blank lines separate documents"),
    "too little": ("a.txt", "some words\n\n" * 3, "fewer than one batch|less than one sequence"),
    "a name that is no format": ("a.exe", "some words", "must be a non-empty file"),
}


@pytest.mark.parametrize(("name", "content", "words"), INPUTS.values(), ids=INPUTS)
def test_bad_input_is_one_line_that_says_what_is_wrong(runs, tmp_path, failure, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    line = failure(tmp_path / name, runs.code, dataset=tmp_path / name, max_samples=None, block_size=64)
    assert re.search(words, line)
    assert not list((runs.folder / "logs").glob("*"))


# ---- limits ----------------------------------------------------------------------------------------------------------

FULL = {"journal": ("full_disk_in_journal", 4), "checkpoint": ("full_disk_after", 50_000, 4)}


@pytest.mark.parametrize("fault", FULL.values(), ids=FULL)
def test_a_full_disk_ends_with_4_and_loses_nothing(runs, whole, fault):
    child = runs.start("logs", fault, optimizer="adam", **STEPS)
    assert child.wait() == 4, child.output()
    (line,) = harness.errors_of(child)
    run = harness.only_run(runs.folder / "logs")
    assert str(run) in line
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    assert checkpoint.name == "step_00000003"
    assert zo.folder_fault(checkpoint) is None
    runs.complete(run, whole)


@pytest.mark.parametrize("size", [4_000, 20_000], ids=["tokens", "tokenizer"])
def test_no_space_for_the_cache_ends_with_4(runs, tmp_path, size):
    small = {"cache_dir": tmp_path / "cache", "max_samples": 3, "tokenizer": "bpe:1000"}
    child = runs.start(fault=("limit_file_size", size), **small)
    assert child.wait() == 4, child.output()
    (line,) = harness.errors_of(child)
    assert str(tmp_path / "cache") in line
    assert not list((tmp_path / "cache").glob("[!.]*"))


VANISHING = {"the run": ".", "checkpoints": "checkpoints", "a file in its place": "checkpoints"}


@pytest.mark.parametrize("what", VANISHING)
def test_a_folder_that_vanishes_ends_with_4(runs, monkeypatch, failure, what):
    apply = zo.Trainer.apply

    def vanishing(self, record):
        if record.step == 2:
            folder = self.job.run.path / VANISHING[what]
            shutil.rmtree(folder)
            if what.startswith("a file"):
                folder.write_text("x")
        return apply(self, record)

    monkeypatch.setattr(zo.Trainer, "apply", vanishing)
    failure(runs.folder / "logs", runs.code, code=4)


@pytest.mark.parametrize("flag", ["log_dir", "cache_dir"])
def test_a_folder_that_can_not_be_written_to_is_refused_at_once(runs, tmp_path, failure, flag):
    if os.geteuid():
        tmp_path.joinpath("closed").mkdir(mode=0o500)
    place = tmp_path / "closed" if os.geteuid() else Path("/proc/closed")
    failure(f"error: --{flag} {place}: can't be written to (", runs.code, **{flag: place})


def test_space_is_checked_at_the_start(runs, monkeypatch, failure):
    monkeypatch.setattr(zo.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    failure("--keep_checkpoints", runs.code, code=4)
    assert not list((runs.folder / "logs").glob("*/checkpoints/step_*"))


@pytest.mark.parametrize("what", ["model", "tokenizer", "optimizer"])
def test_a_save_that_fails_is_never_silent(runs, stopped, monkeypatch, failure, what):
    """Whatever kind of error the library that writes it raises."""

    def failing(*args, **kwargs):
        raise (Exception if what == "tokenizer" else OSError)("No space left on device (os error 28)")

    import safetensors.torch
    import transformers

    places = {"model": transformers.PreTrainedModel, "tokenizer": transformers.PreTrainedTokenizerFast}
    place, name = (places[what], "save_pretrained") if what in places else (safetensors.torch, "save_file")
    monkeypatch.setattr(place, name, failing)
    failure("No space left", runs.resume, stopped, max_steps=8, code=4)
    assert all(zo.folder_fault(folder) is None for folder in (stopped / "checkpoints").glob("step_*"))


class Tally:
    """Counts the attacks of each test, and those that the run survived."""

    def __init__(self):
        self.tried, self.survived = collections.Counter(), collections.Counter()

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call":
            name = report.nodeid.split("::")[-1].split("[")[0].removeprefix("test_").replace("_", " ")
            attacks = dict(report.user_properties).get("attacks", 1)
            self.tried[name] += attacks
            self.survived[name] += attacks * report.passed


if __name__ == "__main__":
    tally = Tally()
    code = pytest.main(
        [__file__, "-q", "-m", "long or not long", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[tally]
    )
    for name, tried in tally.tried.items():
        print(f"{tally.survived[name]:4} of {tried:4}  {name}")
    print(f"{tally.survived.total()} of {tally.tried.total()} attacks survived")
    sys.exit(code)
