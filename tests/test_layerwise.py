"""--scope layerwise: what each stage trains and from which weights, its length and rate; resumed and replayed."""

import harness
import pytest
import torch
from harness import weights

import reproduce_zo_paper as zo

LAYERS = {"scope": "layerwise", "stage_steps": "3,2", "max_steps": None, "save_interval": 1, "eval_interval": 50}
STAGES = "embedding, steps 0 to 2", "blocks:0-0, steps 3 to 4", "blocks:1-1, steps 5 to 6"  # of the miniature


def in_stage(name: str) -> int:
    """The stage that trains a tensor: that of its block, or the first."""
    return int(name.split(".")[2]) + 1 if ".layers." in name else 0


@pytest.fixture(scope="module", params=["ZO", "FO"])
def layers(request, module_runs):
    return module_runs.train(request.param, mode=request.param, learning_rate=1e-3, **LAYERS)


def test_a_stage_trains_its_layer_and_nothing_else(layers):
    for step, stage in ((1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)):
        one, other = weights(layers, step), weights(layers, step + 1)
        assert harness.moved(one, other) == {name for name in one if in_stage(name) == stage}


def test_a_block_begins_from_new_weights(runs):
    """With a rate of next to nothing a stage leaves its initial weights: other ones than the run began with."""
    still = runs.train(**LAYERS | {"stage_learning_rates": "1e-12"})
    before, after = weights(still, 3), weights(still, 7)
    for name, value in after.items():
        if in_stage(name) and value.ndim > 1:
            correlation = torch.corrcoef(torch.stack([value.flatten(), before[name].flatten()]))[0, 1].item()
            assert abs(correlation) < 0.2
            assert value.std().item() == pytest.approx(zo.INITIAL_DEVIATION, rel=0.1)
        else:
            assert (value - before[name]).abs().max().item() < 1e-6


def test_stages_are_told_in_metrics_and_log(layers):
    rows, log = harness.metrics(layers), (layers / "train.log").read_text()
    assert [row["stage"] for row in rows] == ["0", "0", "0", "0", "1", "1", "2", "2"]
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [0, 3, 5, 7]  # the end of every stage
    how, each = {"ZO": ("queries", 2 * 2), "FO": ("backpropagation", 3)}[zo.read_config(layers).mode]
    for number, (stage, way) in enumerate(zip(STAGES, ["backpropagation", how, how])):
        assert f"stage {number} of 2: {stage}, {way}, sgd 0.001" in log
    passes = [int(row["forward_tokens"]) // 32 for row in rows]
    assert passes == [0, 3, 6, 9, *(9 + each * n for n in (1, 2, 3, 4))]


@pytest.mark.parametrize(("first", "then"), [(None, "sgd"), (None, "adam"), ("sgd", "adam"), ("adam", "sgd")])
def test_the_first_stage_has_an_optimizer_of_its_own_or_the_runs(runs, first, then):
    """A vanilla first stage is SGD: it moves along the clipped gradient, and keeps no state."""
    flags = {"learning_rate": 1e-2, "clip_grad_norm": 0.5}
    flags |= {"stage_optimizers": f"{first}, {then}"} if first else {"optimizer": then}
    run, first = runs.train(**LAYERS | {"max_steps": 4}, **flags), first or then
    log = (run / "train.log").read_text()
    assert f"{STAGES[0]}, backpropagation, {first} 0.01" in log
    assert f"{STAGES[1]}, queries, {then} 0.01" in log
    kept = [any("optimizer/" in name for name in weights(run, step, "optimizer")) for step in (2, 4)]
    assert kept == [first == "adam", then == "adam"]
    one, other = weights(run, 1), weights(run, 2)
    length = sum((one[name].double() - other[name].double()).square().sum() for name in one).sqrt().item()
    assert (length == pytest.approx(1e-2 * 0.5, rel=1e-3)) == (first == "sgd")


def test_epochs_and_rates_are_given_stage_by_stage():
    config = zo.Config(scope="layerwise", stage_epochs="3,1,2", stage_learning_rates="0.5,0.25")
    config = zo.dataclasses.replace(config, stage_optimizers="sgd,adam,mudamw")
    found = zo.plan(config, blocks=4, epoch=50)
    assert [phase.optimizer for phase in found] == ["sgd", "adam", "mudamw", "mudamw", "mudamw"]
    assert [(phase.first, phase.end) for phase in found] == [(0, 150), (150, 200), (200, 300), (300, 400), (400, 500)]
    assert [phase.learning_rate for phase in found] == [0.5, 0.25, 0.25, 0.25, 0.25]


def test_the_schedule_begins_anew_in_each_stage_and_ends_each_at_its_least(runs):
    run = runs.train(**LAYERS, use_lr_scheduler=True, learning_rate=1e-3, min_lr=1e-4, stage_learning_rates="1,0.5")
    rates = [line["learning_rate"] for line in harness.journal(run)]
    assert rates == pytest.approx([1, 0.55, 0.1, 0.5, 0.05, 0.5, 0.05], rel=1e-9)


@pytest.mark.parametrize("flags", [{"optimizer": "adam"}, {"direction": "feedback", "optimizer": "adam"}], ids=str)
def test_a_layerwise_run_resumes_at_any_step_and_is_replayed(runs, flags):
    whole = runs.train("whole", **LAYERS, **flags)
    for done in (2, 3, 4, 5):
        part = runs.train(f"part{done}", **LAYERS | flags | {"max_steps": done})
        if done != 3:  # the checkpoint before it, and a step of the journal
            harness.damage(harness.last_checkpoint(part) / "model.safetensors", "flipped")
        assert runs.resume(part, max_steps=7) == 0
        assert set(harness.differences(whole, part)) <= {"metrics.csv"}  # a validation where the part ended
    assert [runs.replay(whole, replay_step=step) for step in (2, 3, 4, 7)] == [0] * 4


def test_what_makes_no_stages_is_refused(errors, runs, miniature):
    cases = [({"stage_steps": "1,1,1,1"}, "--stage_steps 1,1,1,1: 4 values, and there are 3 stages")]
    cases += [({"use_lr_scheduler": True, "warmup_steps": 2}, "--warmup_steps 2: as long as a stage")]
    cases += [({"max_steps": 17}, "--max_steps 17: the stages have 7 steps in all")]
    for flags, line in cases:
        code, lines = errors(harness.argv(**runs.flags(**LAYERS | flags)))
        assert (code, f"error: {line}" in lines[-1]) == (2, True)
    run = runs.train("begun", **LAYERS | {"max_steps": 1})  # which can't be made longer by epochs
    assert "--epochs 9: the run has 1" in errors(harness.argv(resume=run, epochs=9))[1][-1]
