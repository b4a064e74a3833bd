"""What a run gives away and how it is looked at: export, trackers, the dry run, the picture; scopes and a second corpus."""

import json
import sys
import types

import harness
import pytest
import torch
import transformers
from safetensors.torch import load_file

import reproduce_zo_paper as zo

# ---- export ----------------------------------------------------------------------------------------------------------


def test_an_exported_model_gives_the_same_logits_and_tells_its_run(runs, tmp_path):
    folder = tmp_path / "model"
    run = runs.train(export_dir=folder, max_steps=3)
    ids = torch.arange(20)[None]
    own = transformers.AutoModelForCausalLM.from_pretrained(harness.last_checkpoint(run))(input_ids=ids).logits
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits, own)
    assert transformers.AutoTokenizer.from_pretrained(folder).encode("We the people")
    assert not (folder / "optimizer.safetensors").exists()
    assert zo.folder_fault(folder) is None
    card = (folder / "README.md").read_text()
    last = harness.metrics(run)[-1]
    for fact in ("library_name: transformers", run.name, "--direction gaussian", "embedded", f"{float(last['val_loss']):.4f}"):
        assert fact in card
    assert f"{int(last['forward_tokens']):,}" in card


def test_an_export_never_writes_over_a_folder(errors, runs, tmp_path):
    (tmp_path / "there").mkdir()
    code, lines = errors(harness.argv(**runs.flags(export_dir=tmp_path / "there")))
    assert code == 2
    assert len(lines) == 1
    assert "is there already" in lines[0]


def test_a_finished_run_is_exported_by_a_resume(runs, tmp_path):
    run = runs.train()
    assert runs.resume(run, export_dir=tmp_path / "later") == 0
    weights = load_file(tmp_path / "later" / "model.safetensors")
    assert all(
        torch.equal(value, weights[name]) for name, value in load_file(harness.last_checkpoint(run) / "model.safetensors").items()
    )


# ---- trackers --------------------------------------------------------------------------------------------------------


class Tracker(types.ModuleType):
    """Stands for wandb or trackio: keeps what it is given, or fails."""

    def __init__(self, name: str, fails: str = ""):
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)
        self.calls, self.fails = [], fails

    def _call(self, what: str, **given) -> None:
        self.calls.append((what, given))
        if what == self.fails:
            raise ConnectionError("no such server")

    def init(self, **given) -> None:
        self._call("init", **given)

    def log(self, values: dict, step: int) -> None:
        self._call("log", values=values, step=step)

    def finish(self) -> None:
        self._call("finish")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_flags_and_every_row(runs, monkeypatch, name):
    tracker = Tracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    run = runs.train(track=name)
    (what, begun), *logged, (end, _) = tracker.calls
    assert (what, end) == ("init", "finish")
    assert begun["config"]["query_budget_q"] == 2
    assert begun["name"] == run.name
    rows = harness.metrics(run)
    assert [given["step"] for _, given in logged] == [int(row["step"]) for row in rows]
    for row, (_, given) in zip(rows, logged):
        assert given["values"] == {name: float(value) for name, value in row.items() if value and name != "step"}


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_stops_nothing(runs, monkeypatch, fails):
    tracker = Tracker("wandb", fails)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    run = runs.train(track="wandb")
    assert [what for what, _ in tracker.calls].count(fails) == 1
    assert [line for line in (run / "train.log").read_text().splitlines() if "wandb" in line] == [
        "wandb failed and is left out from here on: no such server"
    ]


def test_a_tracker_that_is_not_installed_is_said_before_anything_runs(errors, runs, monkeypatch):
    find = zo.importlib.util.find_spec
    missing = ("tensorboard", "trackio")
    monkeypatch.setattr(zo.importlib.util, "find_spec", lambda name, *more: None if name in missing else find(name, *more))
    code, lines = errors(harness.argv(**runs.flags(tensorboard=True, track="trackio")))
    assert code == 2
    assert [line.split(";")[1] for line in lines] == [f" run: pip install {name}" for name in missing]


def test_tensorboard_has_the_rows(runs):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = runs.train(tensorboard=True)
    events = EventAccumulator(str(run))
    events.Reload()
    wanted = [(int(row["step"]), float(row["loss"])) for row in harness.metrics(run) if row["loss"]]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(loss)) for step, loss in wanted
    ]


# ---- the dry run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{}, {"mode": "Instruct", "bp_interval": 2}, {"direction": "feedback", "optimizer": "adam", "rank": 2}]
)
def test_a_dry_run_tells_what_a_run_takes_and_keeps_nothing(runs, capsys, more):
    assert runs.code(dry_run=True, max_steps=50, **more) == 0
    out = capsys.readouterr().out
    assert "two steps" in out
    assert "50 steps in about" in out
    assert not list((runs.folder / "logs").iterdir())


def test_a_dry_run_finds_a_checkpoint_that_is_not_what_was_written(errors, runs, monkeypatch, miniature):
    fault = zo.folder_fault
    monkeypatch.setattr(zo, "folder_fault", lambda folder: "torn" if folder.name.startswith("step_") else fault(folder))
    code, lines = errors(harness.argv(**runs.flags(dry_run=True)))
    assert code == 4
    assert "torn" in lines[0]


# ---- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_is_drawn_while_the_run_goes_on(runs, monkeypatch):
    monkeypatch.setattr(zo, "DRAW_SECONDS", -1)
    drawn = []
    draw = zo.draw_loss
    monkeypatch.setattr(zo, "draw_loss", lambda run, unigram: drawn.append(len(run.rows)) or draw(run, unigram))
    run = runs.train(max_steps=4, eval_interval=2)
    assert drawn[0] < drawn[-1]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


# ---- scopes ----------------------------------------------------------------------------------------------------------


def moved(run, first: int = 1, last: int = 3) -> set[str]:
    before, after = (load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors") for step in (first, last))
    return {name for name in before if not torch.equal(before[name], after[name])}


SCOPES = {
    "head": lambda name: "embed_tokens" in name,
    "norms": lambda name: "norm" in name,
    "blocks:1-1": lambda name: "layers.1." in name,
    "blocks:0-1": lambda name: "layers." in name,
}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_moves_what_it_names_and_nothing_else(runs, scope):
    run = runs.train(scope=scope, max_steps=3, save_interval=1, learning_rate=1e-2, max_decrease=0)
    names = set(load_file(harness.last_checkpoint(run) / "model.safetensors"))
    assert moved(run) == {name for name in names if SCOPES[scope](name)}


@pytest.mark.parametrize("scope", ["blocks:1-1", "head"])
def test_a_guess_is_followed_within_the_scope(runs, scope):
    run = runs.train(scope=scope, direction="feedback", optimizer="adam", rank=2, max_steps=3, save_interval=1)
    names = set(load_file(harness.last_checkpoint(run) / "model.safetensors"))
    guessed = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight")
    assert moved(run) == {name for name in names if SCOPES[scope](name) and name.endswith(guessed)}


@pytest.mark.parametrize("scope", ["blocks:1-0", "blocks:1", "blocks:a-b", "layers"])
def test_a_scope_that_is_none_is_refused(errors, runs, scope):
    code, lines = errors(harness.argv(**runs.flags(scope=scope)))
    assert code == 2
    assert f"--scope {scope}: must be" in lines[0]


def test_a_scope_that_the_model_lacks_is_refused(errors, runs, miniature):
    code, lines = errors(harness.argv(**runs.flags(scope="blocks:1-7")))
    assert (code, lines) == (2, ["error: --scope blocks:1-7: the model has blocks 0 to 1"])
    code, lines = errors(harness.argv(**runs.flags(scope="norms", direction="feedback")))
    assert code == 2
    assert "--direction gaussian" in lines[0]
    code, lines = errors(harness.argv(**runs.flags(scope="norms", head="closed_form")))
    assert code == 2
    assert "does not train the head" in lines[0]


# ---- a second corpus -------------------------------------------------------------------------------------------------


@pytest.fixture
def other_text(tmp_path):
    """Text that is nothing like the embedded set."""
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({"text": f"{'zebra ' * 9}{number}"}) + "\n" for number in range(200)), "utf-8")
    return path


def test_backpropagations_see_their_own_text(runs, other_text):
    flags = {"mode": "Calibrate", "bp_interval": 2, "max_steps": 4, "optimizer": "adam", "learning_rate": 1e-2}
    run = runs.train(**flags, bp_dataset=other_text, bp_max_samples=150)
    assert json.loads((run / "bp_corpus.json").read_text())["documents"]["train"] < 150
    assert json.loads((run / "corpus.json").read_text())["dataset"] == "embedded"
    losses = [float(row["loss"]) for row in harness.metrics(run) if row["loss"]]
    assert losses[2] < losses[0] - 0.05  # the zebras, seen twice
    alone = runs.train("alone", **flags)
    assert [row["loss"] for row in harness.metrics(alone)][1] != [row["loss"] for row in harness.metrics(run)][1]
    assert runs.replay(run) == 0


def test_a_second_corpus_has_the_column_asked_for(runs, tmp_path):
    path = tmp_path / "columns.jsonl"
    path.write_text("".join(json.dumps({"body": f"{'zebra ' * 9}{number}"}) + "\n" for number in range(200)), "utf-8")
    flags = {"mode": "Calibrate", "bp_interval": 2, "bp_dataset": path}
    assert runs.code(**flags, text_column="body") == 0
    assert runs.code(**flags) == 2


def test_a_second_corpus_needs_backpropagations_and_text(errors, runs, other_text, tmp_path, miniature):
    code, lines = errors(harness.argv(**runs.flags(bp_dataset=other_text)))
    assert code == 2
    assert "--bp_dataset: --mode ZO has no use for it" in lines[0]
    flags = runs.flags(mode="Calibrate", bp_interval=2, bp_dataset=other_text, bp_max_samples=1, batch_size=16)
    code, lines = errors(harness.argv(**flags))
    assert code == 2
    assert "--bp_dataset" in lines[0]
    assert "raise --bp_max_samples" in lines[0]
    code, lines = errors(harness.argv(**(flags | {"bp_dataset": tmp_path / "gone.txt"})))
    assert code == 2
    assert "--bp_dataset" in lines[0]


# ---- before the first step -------------------------------------------------------------------------------------------


def test_offline_never_asks_the_hub(monkeypatch):
    def asked(seconds: float = 5.0) -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(zo, "hub_is_reachable", asked)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    zo.go_offline_if_needed(zo.Config(dataset="tinystories", offline=True))
    assert zo.os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(AssertionError, match="was asked"):
        zo.go_offline_if_needed(zo.Config(dataset="tinystories"))


@pytest.mark.parametrize(("number", "code"), [(zo.signal.SIGINT, 130), (zo.signal.SIGTERM, 143)])
def test_a_signal_while_a_run_is_prepared_ends_it_at_once_and_leaves_nothing(runs, monkeypatch, number, code):
    def interrupted(*arguments):
        zo.os.kill(zo.os.getpid(), number)
        zo.time.sleep(60)

    before = zo.signal.signal(zo.signal.SIGINT, zo.signal.default_int_handler)  # a shell's background job ignores it
    try:
        monkeypatch.setattr(zo, "prepare_corpus", interrupted)
        assert runs.code() == code
    finally:
        zo.signal.signal(zo.signal.SIGINT, before)
    assert not list((runs.folder / "logs").iterdir())
