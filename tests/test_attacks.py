"""Attacks on a run, as lists: kills, corrupted files, bad input, full disks, code that must never be executed.

python tests/test_attacks.py        tries all of them, the slow ones too, and says how many there were and how many survived
"""

import collections
import gzip
import itertools
import json
import os
import pickle
import random
import shutil
import sys
import time
from pathlib import Path

import harness
import pytest
from harness import STEPS, error_lines, steps_of

import reproduce_zo_paper as zo

# ---- kills: kinds of run x moments -----------------------------------------------------------------------------------

KINDS = {
    "sgd": {"use_lr_scheduler": True, "warmup_steps": 3},
    "adam": {"optimizer": "adam", "direction": "lowrank", "parallel_q_computation": True},
    "mudamw": {"optimizer": "mudamw", "direction": "rademacher", "weight_decay": 0.1},
    "feedback": {"direction": "feedback", "optimizer": "adam", "query_budget_q": 1, "use_lr_scheduler": True},
    "stream": {"direction": "feedback", "carry": "stream", "optimizer": "adam"},
    "closed form": {"head": "closed_form", "direction": "aligned"},
    "Instruct": {"mode": "Instruct", "bp_interval": 3, "direction": "feedback", "optimizer": "mudamw"},
    "Instruct, bent": {"mode": "Instruct", "bp_interval": 3, "direction": "gaussian", "query_data": "distinct"},
    "Calibrate": {"mode": "Calibrate", "bp_interval": 3, "optimizer": "adam"},
    "FO": {"mode": "FO", "optimizer": "mudamw"},
    "layerwise": {"scope": "layerwise", "stage_steps": "3,2,3", "max_steps": None},
}
MOMENTS = {"before the first step": 0, "early": 2, "at a checkpoint": 3, "late": 7}  # lines of the journal
QUICK = {*zip(KINDS, itertools.cycle(MOMENTS))}
KILLS = [
    pytest.param(*attack, marks=[] if attack in QUICK else pytest.mark.long)
    for attack in itertools.product(KINDS, MOMENTS)
]


@pytest.fixture(scope="module")
def undisturbed(module_runs):
    made = {}
    return lambda kind: (
        made.setdefault(kind, None)
        or made.setdefault(kind + "!", module_runs.train(f"undisturbed_{kind}", **STEPS | KINDS[kind]))
    )


def kill(child: harness.Child, logs: Path, records: int, moments: random.Random) -> None:
    """Kills the process after so many lines of its journal, and a random while."""
    child.until(lambda: any(logs.glob("*/config.json")) and harness.records(logs) >= records)
    time.sleep(moments.uniform(0, 0.03))
    child.kill()


@pytest.mark.parametrize(("kind", "moment"), KILLS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs, undisturbed, kind, moment):
    """Killed twice: the second time a step after it was resumed."""
    logs, moments, records = runs.folder / "killed", random.Random(kind + moment), MOMENTS[moment]
    kill(runs.start("killed", ("slow_steps", 0.01), **STEPS | KINDS[kind]), logs, records, moments)
    run = harness.only_run(logs)
    kill(runs.start_resume(run, ("slow_steps", 0.01)), logs, min(8, harness.records(logs) + 1), moments)
    assert runs.resume(run) == 0
    assert harness.differences(undisturbed(kind), run) == []
    assert steps_of(run) == [str(step) for step in range(9)]


@pytest.mark.parametrize(("name", "number"), [("step_00000006", 1), ("best", 2)])
def test_a_kill_between_any_two_storage_calls_of_a_checkpoint_loses_nothing(runs, name, number, record_property):
    """Before each mkdir, write, flush, rename and removal of a checkpoint, or of the best one that replaces another."""
    flags, copies = STEPS | {"mode": "FO", "learning_rate": 0.01}, []

    def copy() -> None:
        run = harness.only_run(runs.folder / "whole")
        copies.append(Path(shutil.copytree(run, runs.folder / f"at{len(copies)}" / run.name)))

    with pytest.MonkeyPatch.context() as patch:
        harness.at_storage_calls(patch, name, number, copy)
        whole = runs.train("whole", **flags)
    record_property("attacks", len(copies))
    assert len(copies) >= 10
    for at, run in enumerate(copies):
        assert all(zo.folder_fault(folder) is None for folder in (run / "checkpoints").glob("step_*"))
        faults = {zo.folder_fault(folder) for folder in (run / "checkpoints").glob("*best")}
        assert faults & {None, "it was written as best"}, f"storage call {at}"  # whole, if under another name
        assert runs.resume(run) == 0
        assert harness.differences(whole, run) == [], f"storage call {at}"
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


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def no_number(path: Path) -> None:
    path.write_text(path.read_text("utf-8").rstrip().rpartition(",")[0].rpartition(",")[0] + ",1.2.3,1\n", "utf-8")


DAMAGES = {how: lambda path, how=how: harness.damage(path, how) for how in ("truncated", "emptied", "flipped")} | {
    "missing": Path.unlink,
    "a pickle": lambda path: path.write_bytes(trap(path.with_name("mark"))),
    "a link": link,
    "no number": no_number,
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
    **dict.fromkeys(["journal.jsonl", "finished.json", "train.log", "loss.png", ".lock"], "goes on"),
}
SELDOM = {*itertools.product(RUN_FILES, ["missing", "emptied"])} | {
    (name, how)
    for name, how in itertools.product(RUN_FILES, DAMAGES)
    if "best/" in name or name in ("loss.png", "train.log", ".lock")
}
SELDOM -= {
    ("corpus.json", "missing"),
    ("checkpoints/best/model.safetensors", "flipped"),
    (LAST + "tokenizer.json", "missing"),
}
CORRUPTIONS = [
    pytest.param(name, how, marks=pytest.mark.long if (name, how) in SELDOM else [])
    for name, how in itertools.product(RUN_FILES, DAMAGES)
    if (how != "a link" or name == LAST + "model.safetensors") and (how != "no number" or name == "metrics.csv")
]


@pytest.mark.parametrize(("name", "how"), CORRUPTIONS)
def test_a_corrupted_file_is_named_or_does_no_harm(runs, stopped, whole, capsys, name, how):
    """It is never trained on, never executed, and never a traceback."""
    path, outcome = stopped / name, RUN_FILES[name]
    DAMAGES[how](path)
    capsys.readouterr()
    code = runs.resume(stopped, max_steps=8)
    said = capsys.readouterr()
    assert not path.with_name("mark").exists()
    if code == 2:
        assert "refused" in outcome, said.err
        (line,) = said.err.splitlines()
        assert str(path if how != "missing" else path.parent) in line
        assert runs.replay(stopped) == 2
        return
    assert code == 0, said.err
    assert outcome != "refused"
    assert harness.same_weights(whole, stopped)
    if name != "metrics.csv":
        assert harness.timeless(whole) == harness.timeless(stopped)
    assert steps_of(stopped) == sorted(set(steps_of(stopped)), key=int)
    if outcome == "passed over":
        (line,) = [line for line in said.out.splitlines() if "passed over" in line]
        assert "step_00000006" in line
        assert path.name in line or path.name == "manifest.json"  # which may vouch wrongly for another file


def test_every_file_of_a_run_is_attacked(stopped):
    files = {str(path.relative_to(stopped)) for path in stopped.rglob("*") if path.is_file()}
    assert files - {f"checkpoints/step_00000003/{name}" for name in MODEL_FILES} == set(RUN_FILES) | {".lock"}


@pytest.mark.parametrize("how", ["truncated", "emptied", "flipped", "no number"])
def test_damaged_metrics_of_a_finished_run_are_refused_or_mended(runs, stopped, how):
    DAMAGES[how](stopped / "metrics.csv")
    if (code := runs.resume(stopped)) == 0:
        assert steps_of(stopped)[-1] == "6"
        assert (stopped / "metrics.csv").read_text("utf-8").startswith("step,epoch,stage,loss")
    assert code in (0, 2)


@pytest.mark.parametrize("how", ["truncated", "emptied", "flipped", "missing"])
def test_a_damaged_journal_without_checkpoints_is_measured_again(runs, stopped, whole, how):
    DAMAGES[how](stopped / "journal.jsonl")
    shutil.rmtree(stopped / "checkpoints")
    assert runs.resume(stopped, max_steps=8) == 0
    assert harness.differences(whole, stopped) == []


def of_another_run(runs, run: Path, name: str) -> None:
    other = runs.train("other", optimizer="adam", seed=5, **STEPS | {"max_steps": 6})
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    if name == "journal.jsonl":
        shutil.rmtree(run / "checkpoints")
        shutil.copy(other / name, run / name)
    else:
        shutil.copytree(other / name, run / name)


TAMPERINGS = {
    "a checkpoint of another seed": lambda runs, run: of_another_run(runs, run, "checkpoints/step_00000006"),
    "a journal of another seed": lambda runs, run: of_another_run(runs, run, "journal.jsonl"),
    "a file more": lambda runs, run: (run / LAST / "pytorch_model.bin").write_bytes(b"x"),
    "another checkpoint's name": lambda runs, run: [
        shutil.rmtree(run / LAST),
        (run / "checkpoints" / "step_00000003").rename(run / LAST),
    ],
    "no metrics of the version before": lambda runs, run: (run / "metrics.csv").write_text(
        (run / "metrics.csv").read_text("utf-8").replace("val_bits_per_byte,", "", 1), "utf-8"
    ),
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
    capsys.readouterr()
    assert runs.resume(stopped) == 2
    assert str(stopped / "config.json") in error_lines(capsys)[0]


@pytest.fixture(scope="module")
def first_run(module_runs):
    """A run that built a cache of its own: (the run, its cache)."""
    cache = module_runs.folder / "cache"
    return module_runs.train("whole", cache_dir=cache, max_steps=2), cache


CACHE_FILES = (
    *("train.bin", "validation.bin", "frequencies.bin", "corpus.json", "manifest.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)
CACHE_DAMAGES = [
    "flipped",
    *(pytest.param(how, marks=pytest.mark.long) for how in ("truncated", "emptied", "missing", "a pickle")),
]


@pytest.mark.parametrize("how", CACHE_DAMAGES)
@pytest.mark.parametrize("name", CACHE_FILES)
def test_a_damaged_cache_is_built_again(runs, first_run, tmp_path, name, how):
    whole, cache = first_run
    shutil.copytree(cache, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    assert {path.name for path in folder.iterdir()} == set(CACHE_FILES)
    DAMAGES[how](folder / name)
    again = runs.train("again", cache_dir=tmp_path / "cache", max_steps=2)
    assert harness.differences(whole, again) == []
    assert not list((tmp_path / "cache").rglob("mark"))


# ---- code that must never be executed --------------------------------------------------------------------------------


def vouch(folder: Path) -> None:
    """Writes a manifest that fits what is in the folder."""
    (folder / "manifest.json").unlink()
    files = {path.name: zo.file_digest(path) for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"name": folder.name, "sha256": files}), "utf-8")


def test_the_trap_works(tmp_path):
    pickle.loads(trap(tmp_path / "mark"))
    assert (tmp_path / "mark").exists()


PICKLES = [
    *(name for name in MODEL_FILES if name != "manifest.json"),
    "pytorch_model.bin",
    "optimizer.pt",
    "training_args.bin",
]


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_the_manifest_vouches_for_is_never_executed(runs, stopped, tmp_path, name):
    (stopped / LAST / name).write_bytes(trap(tmp_path / "mark"))
    vouch(stopped / LAST)
    assert runs.resume(stopped, max_steps=7) in (0, 2)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", [name for name in CACHE_FILES if name != "manifest.json"])
def test_a_pickle_in_the_cache_that_the_manifest_vouches_for_is_never_executed(runs, first_run, tmp_path, name, capsys):
    shutil.copytree(first_run[1], tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    (folder / name).write_bytes(trap(tmp_path / "mark"))
    vouch(folder)
    assert runs.code(cache_dir=tmp_path / "cache", max_steps=1) in (0, 2)
    assert not (tmp_path / "mark").exists()


CODE = {
    "code beside a tokenizer": (
        "tokenizer",
        {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "trap.Trap"]}}},
        (),
    ),
    "code beside a model": (
        "init_from",
        {"config.json": {"auto_map": {"AutoModelForCausalLM": "trap.Trap"}, "model_type": "trap"}},
        (),
    ),
    "a model that is a pickle": ("init_from", {}, ("model.safetensors",)),
}


@pytest.mark.parametrize(("flag", "changes", "without"), CODE.values(), ids=CODE)
def test_code_beside_a_model_is_never_executed(runs, first_six, tmp_path, capsys, flag, changes, without):
    folder, mark = Path(shutil.copytree(first_six / LAST, tmp_path / "model")), tmp_path / "mark"
    (folder / "trap.py").write_text(f"open({str(mark)!r}, 'w')\nclass Trap: pass\n", "utf-8")
    (folder / "pytorch_model.bin").write_bytes(trap(mark))
    for name, change in changes.items():
        about = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(about | change), "utf-8")
    for name in without:
        (folder / name).unlink()
    own = {"model_size": None, "tokenizer": None} if flag == "init_from" else {}
    capsys.readouterr()
    code = runs.code(**own | {flag: folder}, max_steps=1)
    assert code == 2 or flag == "tokenizer"
    assert all(str(folder) in line for line in error_lines(capsys))
    assert not mark.exists()


# ---- input -----------------------------------------------------------------------------------------------------------

ROWS = "".join(json.dumps({"text": f"document {n} " + "and some words " * 9}) + "\n" for n in range(60))
BINARY = b"\xff\xfe\x00binary\x81" * 20
INPUTS = {  # name: (file, content, what the one line must say)
    **{
        f"binary {name}": (name, BINARY, "can't be read")
        for name in ("a.txt", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz")
    },
    "no gzip": ("a.jsonl.gz", b"\x1f\x8b\x08 no gzip" * 20, "can't be read"),
    "a torn gzip": (
        "a.jsonl.gz",
        gzip.compress(ROWS.encode() + os.urandom(5000).hex().encode())[:-2000],
        "can't be read",
    ),
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
def test_bad_input_is_one_line_that_says_what_is_wrong(runs, tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    capsys.readouterr()
    assert runs.code(dataset=tmp_path / name, max_samples=None, block_size=64) == 2
    (line,) = error_lines(capsys)
    assert zo.re.search(words, line)
    assert str(tmp_path / name) in line
    assert not list((runs.folder / "logs").glob("*"))


# ---- limits ----------------------------------------------------------------------------------------------------------

FULL = {"journal": (("full_disk_in_journal", 4), 3), "checkpoint": (("full_disk_after", 50_000, 4), 3)}


@pytest.mark.parametrize(("fault", "kept"), FULL.values(), ids=FULL)
def test_a_full_disk_ends_with_4_and_loses_nothing(runs, whole, fault, kept):
    child = runs.start("logs", fault, optimizer="adam", **STEPS)
    assert child.wait() == 4, child.output()
    (line,) = [line for line in child.output().splitlines() if line.startswith("error: ")]
    assert "Traceback" not in child.output()
    run = harness.only_run(runs.folder / "logs")
    assert str(run) in line
    checkpoints = list((run / "checkpoints").glob("step_*"))
    assert [folder.name for folder in checkpoints] == [f"step_{kept:08d}"]
    assert zo.folder_fault(checkpoints[0]) is None
    assert runs.resume(run) == 0
    assert harness.differences(whole, run) == []


@pytest.mark.parametrize("size", [4_000, 20_000], ids=["tokens", "tokenizer"])
def test_no_space_for_the_cache_ends_with_4(runs, tmp_path, size):
    child = runs.start(
        fault=("limit_file_size", size), cache_dir=tmp_path / "cache", max_samples=3, tokenizer="bpe:1000"
    )
    assert child.wait() == 4, child.output()
    (line,) = [line for line in child.output().splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "cache") in line
    assert "Traceback" not in child.output()
    assert not list((tmp_path / "cache").glob("[!.]*"))


VANISHING = {"the run": ".", "checkpoints": "checkpoints", "a file in its place": "checkpoints"}


@pytest.mark.parametrize("what", VANISHING)
def test_a_folder_that_vanishes_ends_with_4(runs, monkeypatch, capsys, what):
    apply = zo.Trainer.apply

    def vanishing(self, record):
        if record.step == 2:
            folder = self.job.run.path / VANISHING[what]
            shutil.rmtree(folder)
            if what.startswith("a file"):
                folder.write_text("x")
        return apply(self, record)

    monkeypatch.setattr(zo.Trainer, "apply", vanishing)
    capsys.readouterr()
    assert runs.code() == 4
    (line,) = error_lines(capsys)
    assert str(runs.folder / "logs") in line


@pytest.mark.parametrize("flag", ["log_dir", "cache_dir"])
def test_a_folder_that_can_not_be_written_to_is_refused_at_once(runs, tmp_path, capsys, flag):
    if os.geteuid():
        tmp_path.joinpath("closed").mkdir(mode=0o500)
    place = tmp_path / "closed" if os.geteuid() else Path("/proc/closed")
    assert runs.code(**{flag: place}) == 2
    (line,) = error_lines(capsys)
    assert line.startswith(f"error: --{flag} {place}: can't be written to")


def test_space_is_checked_at_the_start(runs, monkeypatch, capsys):
    monkeypatch.setattr(zo.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    capsys.readouterr()
    assert runs.code() == 4
    (line,) = error_lines(capsys)
    assert "--keep_checkpoints" in line
    assert not list((runs.folder / "logs").glob("*/checkpoints/step_*"))


@pytest.mark.parametrize("what", ["model", "tokenizer", "optimizer"])
def test_a_save_that_fails_is_never_silent(runs, stopped, monkeypatch, capsys, what):
    """Whatever kind of error the library that writes it raises."""

    def failing(*args, **kwargs):
        raise (Exception if what == "tokenizer" else OSError)("No space left on device (os error 28)")

    import safetensors.torch
    import transformers

    places = {"model": transformers.PreTrainedModel, "tokenizer": transformers.PreTrainedTokenizerFast}
    place, name = (places[what], "save_pretrained") if what in places else (safetensors.torch, "save_file")
    monkeypatch.setattr(place, name, failing)
    capsys.readouterr()
    assert runs.resume(stopped, max_steps=8) == 4
    (line,) = error_lines(capsys)
    assert "No space left" in line
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
