"""--scope layerwise: what each stage trains and from which weights, its length and rate, and that it is resumed and replayed."""

import dataclasses

import harness
import pytest
import torch
from safetensors.torch import load_file

import reproduce_zo_paper as zo

LAYERS = {"scope": "layerwise", "stage_steps": "3,2", "max_steps": None, "save_interval": 1, "eval_interval": 50}
STAGES = {0: range(3), 1: range(3, 5), 2: range(5, 7)}  # of the miniature, which has two blocks: its steps
LINES = [
    "stage 0 of 2: embedding, steps 0 to 2",
    "stage 1 of 2: blocks:0-0, steps 3 to 4",
    "stage 2 of 2: blocks:1-1, steps 5 to 6",
]


def weights(run, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def state(run, step: int) -> set[str]:
    """The tensors that an optimizer has a state of."""
    found = load_file(run / "checkpoints" / f"step_{step:08d}" / "optimizer.safetensors")
    return {name.removeprefix("optimizer/").rpartition("/")[0] for name in found if name.startswith("optimizer/")}


def in_stage(name: str) -> int:
    """The stage that trains a tensor: that of its block, or the first."""
    return int(name.split(".")[2]) + 1 if ".layers." in name else 0


@pytest.fixture(scope="module", params=["ZO", "FO"])
def layers(request, module_runs):
    return module_runs.train(request.param, mode=request.param, learning_rate=1e-3, **LAYERS)


def test_a_stage_trains_its_layer_and_nothing_else(layers):
    for stage, steps in STAGES.items():
        for step in steps[stage == 0 :]:
            one, other = weights(layers, step), weights(layers, step + 1)
            assert {n for n in one if not torch.equal(one[n], other[n])} == {n for n in one if in_stage(n) == stage}


def test_a_block_begins_from_new_weights(module_runs, layers):
    """With a rate of next to nothing, what a stage leaves are its initial weights: other ones than the run began with."""
    mode = zo.read_config(layers).mode
    still = module_runs.train(f"still_{mode}", mode=mode, **LAYERS | {"stage_learning_rates": "1e-12"})
    before, after = weights(still, 3), weights(still, 7)
    for name, value in after.items():
        if in_stage(name) and value.ndim > 1:
            correlation = torch.corrcoef(torch.stack([value.flatten(), before[name].flatten()]))[0, 1].item()
            assert abs(correlation) < 0.2
            assert value.std().item() == pytest.approx(zo.INITIAL_DEVIATION, rel=0.1)
        elif in_stage(name):
            assert value.sub(1).abs().max().item() < 1e-6
        else:
            assert torch.equal(value, before[name])


def test_stages_are_told_in_metrics_and_log(layers):
    rows, log, mode = harness.metrics(layers), (layers / "train.log").read_text(), zo.read_config(layers).mode
    assert [row["stage"] for row in rows] == ["0", "0", "0", "0", "1", "1", "2", "2"]
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [0, 3, 5, 7]  # the end of every stage
    how = {"ZO": "queries", "FO": "backpropagation"}[mode]
    for line, way in zip(LINES, ["backpropagation", how, how]):
        assert f"{line}, {way}, sgd 0.001" in log
    forward, batch, each = [int(row["forward_tokens"]) for row in rows], 2 * 16, {"FO": 3, "ZO": 2 * 2}[mode]
    assert forward == [0, *(3 * batch * n for n in (1, 2, 3)), *(9 * batch + each * batch * n for n in (1, 2, 3, 4))]


@pytest.mark.parametrize(("first", "then"), [(None, "sgd"), (None, "adam"), ("sgd", "adam"), ("adam", "sgd")])
def test_the_first_stage_has_an_optimizer_of_its_own_or_the_runs(runs, first, then):
    """A vanilla first stage is SGD: it moves along the clipped gradient, and keeps no state."""
    flags = {"learning_rate": 1e-2, "clip_grad_norm": 0.5, "optimizer": then, "embedding_optimizer": first}
    run, first = runs.train(**LAYERS | {"max_steps": 4}, **flags), first or then
    log = (run / "train.log").read_text()
    assert f"{LINES[0]}, backpropagation, {first} 0.01" in log
    assert f"{LINES[1]}, queries, {then} 0.01" in log
    assert bool(state(run, 2)) == (first == "adam")
    assert bool(state(run, 4)) == (then == "adam")
    one, other = weights(run, 1), weights(run, 2)
    length = sum((one[name].double() - other[name].double()).square().sum() for name in one).sqrt().item()
    assert (length == pytest.approx(1e-2 * 0.5, rel=1e-3)) == (first == "sgd")


def test_epochs_and_rates_are_given_stage_by_stage(runs):
    config = zo.Config(
        scope="layerwise", stage_epochs="3,1,2", stage_learning_rates="0.5,0.25", embedding_optimizer="adam"
    )
    found = zo.plan(config, blocks=4, epoch=50)
    assert [(phase.end - phase.first) / 50 for phase in found] == [3, 1, 2, 2, 2]
    assert [phase.learning_rate for phase in found] == [0.5, 0.25, 0.25, 0.25, 0.25]
    assert [phase.optimizer for phase in found] == ["adam", "sgd", "sgd", "sgd", "sgd"]
    assert [phase.first for phase in found] == [0, *(phase.end for phase in found[:-1])]
    plain = zo.plan(dataclasses.replace(config, stage_learning_rates=None), blocks=4, epoch=50)
    assert {phase.learning_rate for phase in plain} == {config.learning_rate}


def test_the_schedule_begins_anew_in_each_stage_and_ends_each_at_its_least(runs):
    run = runs.train(**LAYERS, use_lr_scheduler=True, learning_rate=1e-3, min_lr=1e-4, stage_learning_rates="1,0.5")
    rates = [line["learning_rate"] for line in harness.journal(run)]
    assert rates == pytest.approx([1, 0.55, 0.1, 0.5, 0.05, 0.5, 0.05], rel=1e-9)


@pytest.mark.parametrize("flags", [{"optimizer": "adam"}, {"direction": "feedback", "optimizer": "adam"}], ids=str)
def test_a_layerwise_run_resumes_at_any_step_and_is_replayed(runs, flags):
    whole = runs.train("whole", **LAYERS, **flags)
    for done in range(2, 7):
        part = runs.train(f"part{done}", **LAYERS | flags | {"max_steps": done})
        if done % 2:  # the checkpoint before it, and a step of the journal
            harness.damage(harness.last_checkpoint(part) / "model.safetensors", "flipped")
        assert runs.resume(part, max_steps=7) == 0
        assert set(harness.differences(whole, part)) <= {"metrics.csv"}  # a validation where the part ended
    for step in (2, 3, 4, 7):
        assert runs.replay(whole, replay_step=step) == 0


def test_a_run_that_fails_in_a_stages_first_step_goes_on_from_there(runs):
    flags = LAYERS | {"optimizer": "adam", "num_threads": 1}
    whole = runs.train("whole", **flags)
    child = runs.start("logs", ("nan_losses", 5), **flags)
    assert child.wait() == 3
    assert "the weights before this step are kept in" in child.output()
    run = harness.only_run(runs.folder / "logs")
    assert harness.last_checkpoint(run).name == "step_00000005"
    assert runs.resume(run) == 0
    assert harness.differences(whole, run) == []


def test_the_dry_run_times_a_step_of_each_kind(runs, capsys, monkeypatch):
    made = []
    measure = zo.Trainer.measure
    monkeypatch.setattr(
        zo.Trainer, "measure", lambda self, step: made.append((self.phase.number, step)) or measure(self, step)
    )
    assert runs.code(dry_run=True, **LAYERS) == 0
    assert made == [(0, 0), (1, 3)]
    assert "7 steps in about" in capsys.readouterr().out


def test_a_layerwise_run_is_not_made_longer_by_epochs(runs, errors):
    run = runs.train(**LAYERS | {"max_steps": 1})
    code, lines = errors(harness.argv(resume=run, epochs=9))
    assert code == 2
    assert "--epochs 9: the run has 1" in lines[-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_steps": 17}, "--max_steps 17: the stages have 11 steps in all"),
        ({"use_lr_scheduler": True, "warmup_steps": 2}, "--warmup_steps 2: as long as a stage"),
        ({"stage_steps": "1,1,1,1,1,1"}, "--stage_steps 1,1,1,1,1,1: 6 numbers, and there are 5 stages"),
    ],
)
def test_what_makes_no_stages_is_refused(errors, runs, flags, words):
    code, lines = errors(harness.argv(**runs.flags(**LAYERS | flags)))
    assert code == 2
    assert any(line.startswith(f"error: {words}") for line in lines), lines
