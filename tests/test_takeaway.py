"""What a run gives away and how it is looked at: export, trackers, dry run, picture; scopes and a second corpus."""

import json
import re
import sys
import types

import harness
import pytest
import torch
import transformers
from safetensors.torch import load_file

import reproduce_zo_paper as zo


def moved(*folders) -> set[str]:
    """The tensors that differ between two models' folders."""
    return harness.moved(*(load_file(folder / "model.safetensors") for folder in folders))


def test_an_exported_model_gives_the_same_logits_and_tells_its_run(runs, errors, tmp_path):
    """Also where a finished run is exported by a resume; never over a folder."""
    folder = tmp_path / "model"
    run = runs.train(export_dir=folder, max_steps=3, direction="lowrank", rank=2, seed=3)
    ids = torch.arange(20)[None]
    own = transformers.AutoModelForCausalLM.from_pretrained(harness.last_checkpoint(run))(input_ids=ids).logits
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits, own)
    assert transformers.AutoTokenizer.from_pretrained(folder).encode("We the people")
    assert not (folder / "optimizer.safetensors").exists()
    assert zo.folder_fault(folder) is None
    card, last = (folder / "README.md").read_text(), harness.metrics(run)[-1]
    facts = ("library_name: transformers", run.name, "embedded", "sgd, learning rate 0.0001")
    assert all(fact in card for fact in (*facts, f"{float(last['val_loss']):.4f}", f"{int(last['forward_tokens']):,}"))
    assert runs.resume(run, export_dir=tmp_path / "later") == 0
    assert moved(folder, tmp_path / "later") == set()
    code, (line,) = errors(harness.argv(**runs.flags(export_dir=folder)))
    assert (code, "is there already" in line) == (2, True)


DEFAULTS = {
    "mode": {"mode": "FO", "optimizer": "adam"},
    "direction query_budget_q": {"direction": "feedback", "query_budget_q": 1, "optimizer": "adam", "epsilon": 0.1},
    "mode bp_interval": {"mode": "Calibrate", "bp_interval": 2, "query_budget_q": 8, "optimizer": "mudamw"},
    "rank seed direction query_budget_q": {"direction": "lowrank", "rank": 2, "seed": 3},
}


@pytest.mark.parametrize("names", DEFAULTS)
def test_the_card_names_the_flags_that_are_not_defaults(runs, tmp_path, names):
    runs.train(export_dir=tmp_path / "model", max_steps=1, **DEFAULTS[names])
    words = (tmp_path / "model" / "README.md").read_text().splitlines()[-1].split()
    given = "learning_rate max_steps max_samples batch_size block_size tokenizer eval_samples device"  # by the harness
    assert {word[2:] for word in words if word.startswith("--")} == {*given.split(), *names.split()}


@pytest.mark.parametrize(("best", "step", "loss"), [(True, 2, 3), (False, 4, 5)])
def test_the_best_checkpoint_is_exported_where_that_is_asked_for(runs, tmp_path, monkeypatch, best, step, loss):
    """It is kept beside the newest ones."""
    losses = iter([6.0, 5, 3, 4, 5])
    monkeypatch.setattr(zo, "validation_loss", lambda *args: next(losses))
    flags = {"eval_interval": 1, "save_interval": 1, "keep_checkpoints": 2, "learning_rate": 1e-2}
    folder = tmp_path / "model"
    kept = runs.train(export_dir=folder, export_best=best, **flags) / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["best", "step_00000003", "step_00000004"]
    same = [path.name for path in kept.iterdir() if moved(folder, path) == set()]
    assert same == ["best" if best else "step_00000004"]
    assert f"| steps | {step} |" in (folder / "README.md").read_text()
    assert f"6.0000 to {loss}.0000" in (folder / "README.md").read_text()


class Tracker(types.ModuleType):
    """Stands for wandb or trackio: keeps what it is given, or fails."""

    def __init__(self, name: str, fails: str = ""):
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)
        self.calls, self.fails = [], fails
        self.init = lambda **given: self.call("init", given)
        self.log = lambda values, step: self.call("log", (step, values))
        self.finish = lambda: self.call("finish", None)

    def call(self, what: str, given) -> None:
        self.calls.append((what, given))
        if what == self.fails:
            raise ConnectionError("no such server")


TRACKERS = [("wandb", ""), ("trackio", ""), ("wandb", "init"), ("wandb", "log"), ("wandb", "finish")]


@pytest.mark.parametrize(("name", "fails"), TRACKERS)
def test_a_tracker_gets_flags_and_rows_and_one_that_fails_is_left_out(runs, monkeypatch, name, fails):
    """It is named once and stops nothing."""
    tracker = Tracker(name, fails)
    monkeypatch.setitem(sys.modules, name, tracker)
    run = runs.train(track=name)
    said = [line for line in (run / "train.log").read_text().splitlines() if "left out" in line]
    assert len(said) == bool(fails)
    assert all(line.endswith("wandb failed and is left out from here on: no such server") for line in said)
    if fails:
        assert [what for what, _ in tracker.calls].count(fails) == 1
        return
    (what, begun), *logged, (end, _) = tracker.calls
    assert (what, begun["name"], begun["config"]["query_budget_q"], end) == ("init", run.name, 2, "finish")
    rows = [{name: float(value) for name, value in row.items() if value} for row in harness.metrics(run)]
    assert [given for _, given in logged] == [(row.pop("step"), row) for row in rows]


@pytest.mark.parametrize("more", [{}, {"mode": "Instruct", "bp_interval": 2}, {"direction": "feedback"}], ids=str)
def test_a_dry_run_tells_what_a_run_takes_and_keeps_nothing(runs, capsys, more):
    assert runs.code(dry_run=True, max_steps=50, **more) == 0
    assert re.search(r"two steps[\s\S]*50 steps in about", capsys.readouterr().out)
    assert not list((runs.folder / "logs").iterdir())


SCOPES = {"full": "", "head": "embed_tokens", "embedding": "embed_tokens|model.norm", "norms": "norm"}
SCOPES |= {"blocks:1-1": r"layers\.1\.", "blocks:0-1": r"layers\."}
SCOPES["reduced"] = r"layers\.1\.(mlp|post_attention_layernorm)|model\.norm|embed_tokens"
WRITERS = r"(o_proj|down_proj|embed_tokens|model\.norm)\.weight"  # what carry stream can move


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("carry", [None, "stream", "branch"])
def test_a_scope_moves_what_it_names_and_nothing_else(runs, scope, carry):
    flags = {"direction": "feedback", "carry": carry, "optimizer": "adam"} if carry else {"learning_rate": 1e-2}
    run = runs.train(scope=scope, max_steps=3, save_interval=1, **flags)
    one, last = harness.weights(run, 1), harness.weights(run, 3)
    names = {name for name in last if re.search(SCOPES[scope], name)}
    assert harness.moved(one, last) == {name for name in names if carry != "stream" or re.search(WRITERS, name)}


def test_a_scope_that_the_model_lacks_is_refused(errors, runs, miniature):
    more = {"scope": "norms", "head": "closed_form"}, {"scope": "blocks:1-7"}
    for flags, words in zip(more, ("does not train the head", "--scope blocks:1-7: the model has blocks 0 to 1")):
        code, (line,) = errors(harness.argv(**runs.flags(**flags)))
        assert (code, words in line) == (2, True)


def test_backpropagations_see_their_own_text(runs, errors, tmp_path, miniature):
    """Which is nothing like the embedded set here, and in a column of its own."""
    other, flags = tmp_path / "other.jsonl", {"mode": "Calibrate", "bp_interval": 2, "learning_rate": 1e-2}
    other.write_text("".join(json.dumps({"body": f"{'zebra ' * 9}{number}"}) + "\n" for number in range(200)), "utf-8")
    own = flags | {"bp_dataset": other, "text_column": "body", "optimizer": "adam"}
    run = runs.train(**own, bp_max_samples=150)
    about = json.loads((run / "corpus.json").read_text())
    assert (about["dataset"], about["bp_tokens_folder"] != about["tokens_folder"]) == ("embedded", True)
    losses = [line["loss"] for line in harness.journal(run)]
    assert losses[2] < losses[0] - 0.05  # the zebras, seen twice
    assert harness.journal(runs.train("alone", **flags, optimizer="adam"))[0]["loss"] != losses[0]
    assert runs.replay(run) == 0
    cases = [({"bp_max_samples": 1, "batch_size": 16}, "raise --bp_max_samples")]
    cases += [({"bp_dataset": tmp_path / "gone.txt"}, "neither a file"), ({"text_column": "text"}, "--text_column")]
    for more, words in cases:
        code, (line, *_) = errors(harness.argv(**runs.flags(**own | more)))
        assert (code, "--bp_dataset" in line, words in line) == (2, True, True)


def test_offline_never_asks_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(zo, "hub_is_reachable", lambda *args: not asked.append(args))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    zo.go_offline_if_needed(zo.Config(dataset="tinystories"))
    assert (len(asked), zo.os.environ.get("HF_HUB_OFFLINE")) == (1, None)
    zo.go_offline_if_needed(zo.Config(dataset="tinystories", offline=True))
    assert (len(asked), zo.os.environ.pop("HF_HUB_OFFLINE")) == (1, "1")
