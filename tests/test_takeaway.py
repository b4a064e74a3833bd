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


def same_weights(one, other) -> bool:
    weights = load_file(other / "model.safetensors")
    return all(torch.equal(value, weights[name]) for name, value in load_file(one / "model.safetensors").items())


def test_an_exported_model_gives_the_same_logits_and_tells_its_run(runs, tmp_path):
    folder = tmp_path / "model"
    run = runs.train(export_dir=folder, max_steps=3, direction="lowrank", rank=2, seed=3)
    ids = torch.arange(20)[None]
    own = transformers.AutoModelForCausalLM.from_pretrained(harness.last_checkpoint(run))(input_ids=ids).logits
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits, own)
    assert transformers.AutoTokenizer.from_pretrained(folder).encode("We the people")
    assert not (folder / "optimizer.safetensors").exists()
    assert zo.folder_fault(folder) is None
    card = (folder / "README.md").read_text()
    last = harness.metrics(run)[-1]
    for fact in (
        "library_name: transformers",
        run.name,
        "embedded",
        f"{float(last['val_loss']):.4f}",
        "sgd, learning rate 0.0001",
    ):
        assert fact in card
    assert f"{int(last['forward_tokens']):,}" in card
    words = card.splitlines()[-1].split()
    given = {
        "direction",
        "rank",
        "seed",
        "query_budget_q",
        "learning_rate",
        "max_steps",
        "max_samples",
        "batch_size",
        "block_size",
    }
    assert {word[2:] for word in words if word.startswith("--")} == given | {"tokenizer", "eval_samples", "device"}


DEFAULTS = {
    "FO": {"mode": "FO", "optimizer": "adam"},
    "feedback": {"direction": "feedback", "query_budget_q": 1, "optimizer": "adam", "epsilon": 0.1},
    "Calibrate": {"mode": "Calibrate", "bp_interval": 2, "query_budget_q": 8, "optimizer": "mudamw"},
}


@pytest.mark.parametrize("case", DEFAULTS)
def test_the_card_has_no_default_among_the_flags_that_are_none(runs, tmp_path, case):
    runs.train(export_dir=tmp_path / "model", max_steps=1, **DEFAULTS[case])
    words = (tmp_path / "model" / "README.md").read_text().splitlines()[-1].split()
    derived = ("optimizer", "query_budget_q", "epsilon", "direction", "guided_learning_rate", "max_decrease")
    shaped = {name for name in ("mode", "bp_interval", *derived) if f"--{name}" in words}
    assert shaped == {"FO": {"mode"}, "feedback": {"direction"}, "Calibrate": {"mode", "bp_interval"}}[case]


def test_the_best_checkpoint_is_exported_where_that_is_asked_for(runs, tmp_path, monkeypatch):
    for best in (True, False):
        losses = iter([6.0, 5, 3, 4, 5])
        monkeypatch.setattr(zo, "validation_loss", lambda *args, losses=losses: next(losses))
        folder = tmp_path / f"model{best}"
        run = runs.train(
            f"{best}", export_dir=folder, export_best=best, eval_interval=1, save_interval=1, learning_rate=1e-2
        )
        step = 2 if best else 4
        assert same_weights(folder, run / "checkpoints" / f"step_0000000{step}")
        assert not same_weights(folder, run / "checkpoints" / f"step_0000000{6 - step}")
        card = (folder / "README.md").read_text()
        assert f"| steps | {step} |" in card
        assert f"6.0000 to {3 if best else 5}.0000" in card


def test_an_export_never_writes_over_a_folder(errors, runs, tmp_path):
    (tmp_path / "there").mkdir()
    code, (line,) = errors(harness.argv(**runs.flags(export_dir=tmp_path / "there")))
    assert code == 2
    assert "is there already" in line


def test_a_finished_run_is_exported_by_a_resume(runs, tmp_path):
    run = runs.train()
    assert runs.resume(run, export_dir=tmp_path / "later") == 0
    assert same_weights(harness.last_checkpoint(run), tmp_path / "later")


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
    (line,) = [line for line in (run / "train.log").read_text().splitlines() if "wandb" in line]
    assert line.endswith("wandb failed and is left out from here on: no such server")


def test_a_tracker_that_is_not_installed_is_said_before_anything_runs(errors, runs, monkeypatch):
    find = zo.importlib.util.find_spec
    missing = ("tensorboard", "trackio")
    monkeypatch.setattr(
        zo.importlib.util, "find_spec", lambda name, *more: None if name in missing else find(name, *more)
    )
    code, lines = errors(harness.argv(**runs.flags(tensorboard=True, track="trackio")))
    assert code == 2
    assert [line.split(";")[1] for line in lines] == [f" run: pip install {name}" for name in missing]


def test_tensorboard_has_the_rows(runs):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = runs.train(tensorboard=True)
    events = EventAccumulator(str(run))
    events.Reload()
    wanted = [(int(row["step"]), pytest.approx(float(row["loss"]))) for row in harness.metrics(run) if row["loss"]]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == wanted


# ---- the dry run and the picture -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{}, {"mode": "Instruct", "bp_interval": 2}, {"direction": "feedback", "optimizer": "adam"}], ids=str
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
    before, after = (
        load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors") for step in (first, last)
    )
    return {name for name in before if not torch.equal(before[name], after[name])}


REDUCED = ("layers.1.mlp", "layers.1.post_attention_layernorm", "model.norm", "embed_tokens")
SCOPES = {
    "full": lambda name: True,
    "head": lambda name: "embed_tokens" in name,
    "embedding": lambda name: ".layers." not in name,
    "norms": lambda name: "norm" in name,
    "blocks:1-1": lambda name: "layers.1." in name,
    "blocks:0-1": lambda name: "layers." in name,
    "reduced": lambda name: any(part in name for part in REDUCED),
}
STREAM = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "model.norm.weight")  # what carry stream can move


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_moves_what_it_names_and_nothing_else(runs, scope):
    run = runs.train(scope=scope, max_steps=3, save_interval=1, learning_rate=1e-2)
    names = set(load_file(harness.last_checkpoint(run) / "model.safetensors"))
    assert moved(run) == {name for name in names if SCOPES[scope](name)}


@pytest.mark.parametrize("scope", ["blocks:1-1", "head", "norms"])
@pytest.mark.parametrize("carry", ["stream", None])
def test_feedback_stays_within_the_scope(runs, scope, carry):
    run = runs.train(scope=scope, direction="feedback", carry=carry, optimizer="adam", max_steps=3, save_interval=1)
    names = set(load_file(harness.last_checkpoint(run) / "model.safetensors"))
    assert moved(run) == {name for name in names if SCOPES[scope](name) and (not carry or name.endswith(STREAM))}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"scope": "blocks:1-7"}, "--scope blocks:1-7: the model has blocks 0 to 1"),
        ({"scope": "norms", "head": "closed_form"}, "does not train the head"),
    ],
)
def test_a_scope_that_the_model_lacks_is_refused(errors, runs, miniature, flags, words):
    code, (line,) = errors(harness.argv(**runs.flags(**flags)))
    assert code == 2
    assert words in line


# ---- a second corpus -------------------------------------------------------------------------------------------------


@pytest.fixture
def other_text(tmp_path):
    """Text that is nothing like the embedded set, in a column of its own."""
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({"body": f"{'zebra ' * 9}{number}"}) + "\n" for number in range(200)), "utf-8")
    return path


SECOND = {"mode": "Calibrate", "bp_interval": 2, "max_steps": 4, "optimizer": "adam", "learning_rate": 1e-2}


def test_backpropagations_see_their_own_text(runs, other_text):
    run = runs.train(**SECOND, bp_dataset=other_text, bp_max_samples=150, text_column="body")
    about = json.loads((run / "corpus.json").read_text())
    assert about["dataset"] == "embedded"
    assert about["bp_tokens_folder"] != about["tokens_folder"]
    losses = [float(row["loss"]) for row in harness.metrics(run) if row["loss"]]
    assert losses[2] < losses[0] - 0.05  # the zebras, seen twice
    alone = runs.train("alone", **SECOND)
    assert [row["loss"] for row in harness.metrics(alone)][1] != [row["loss"] for row in harness.metrics(run)][1]
    assert runs.replay(run) == 0


def test_a_second_corpus_needs_text(errors, runs, other_text, tmp_path, miniature):
    flags = runs.flags(**SECOND, bp_dataset=other_text)
    few = {"text_column": "body", "bp_max_samples": 1, "batch_size": 16}
    for more, words in (
        ({}, "--text_column"),
        (few, "raise --bp_max_samples"),
        ({"bp_dataset": tmp_path / "gone.txt"}, "neither a file"),
    ):
        code, lines = errors(harness.argv(**(flags | more)))
        assert code == 2
        assert "--bp_dataset" in lines[0]
        assert words in lines[0]


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
