"""--scope layerwise: what each stage trains and from which weights, its length and rate, and that it is resumed and replayed."""

import harness
import pytest
import torch
from safetensors.torch import load_file

import reproduce_zo_paper as zo

LAYERS = {"scope": "layerwise", "stage_steps": "3,2", "max_steps": None, "save_interval": 1, "eval_interval": 50}
STAGES = {0: range(3), 1: range(3, 5), 2: range(5, 7)}  # of the miniature, which has two blocks: its steps


def weights(run, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def moved(run, before: int, after: int) -> set[str]:
    one, other = weights(run, before), weights(run, after)
    return {name for name in one if not torch.equal(one[name], other[name])}


def in_stage(name: str) -> int:
    """The stage that trains a tensor: that of its block, or the first."""
    return int(name.split(".")[2]) + 1 if ".layers." in name else 0


@pytest.fixture(scope="module", params=["ZO", "FO"])
def layers(request, module_runs):
    return module_runs.train(request.param, mode=request.param, learning_rate=1e-3, **LAYERS)


def test_a_stage_trains_its_layer_and_nothing_else(layers):
    names = set(weights(layers, 1))
    for stage, steps in STAGES.items():
        expected = {name for name in names if in_stage(name) == stage}
        for step in steps:
            if step > 0:
                assert moved(layers, step, step + 1) == expected


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
    rows = harness.metrics(layers)
    assert [(int(row["step"]), row["stage"]) for row in rows] == [
        *((step, "0") for step in range(4)),
        *((4, "1"), (5, "1"), (6, "2"), (7, "2")),
    ]
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [0, 3, 5, 7]  # the end of every stage
    log = (layers / "train.log").read_text()
    for stage, scope in enumerate(["embedding", "blocks:0-0", "blocks:1-1"]):
        assert f"stage {stage} of 2: {scope}, steps {STAGES[stage][0]} to {STAGES[stage][-1]}" in log
    forward = [int(row["forward_tokens"]) for row in rows]
    batch = 2 * 16
    each = {"FO": 3, "ZO": 2 * 2}[zo.read_config(layers).mode]
    assert forward == [0, *(3 * batch * n for n in (1, 2, 3)), *(9 * batch + each * batch * n for n in (1, 2, 3, 4))]


def test_epochs_and_rates_are_given_stage_by_stage(runs):
    config = zo.Config(**harness.FLAGS | {"scope": "layerwise", "stage_epochs": "3,1,2", "stage_learning_rates": "0.5,0.25"})
    config = zo.dataclasses.replace(config, cache_dir=str(runs.cache), max_steps=None)
    corpus = harness.corpus(config)
    found = zo.stages(config, zo.build_model(config, corpus.tokenizer), corpus)
    epoch = corpus.blocks // 2
    assert [(stage.end - stage.first) / epoch for stage in found] == [3, 1, 2, 2, 2]  # tiny has four blocks
    assert [stage.learning_rate for stage in found] == [0.5, 0.25, 0.25, 0.25, 0.25]
    assert [stage.first for stage in found[1:]] == [stage.end for stage in found[:-1]]
    plain = zo.stages(zo.dataclasses.replace(config, stage_learning_rates=None), zo.build_model(config, corpus.tokenizer), corpus)
    assert [stage.learning_rate for stage in plain] == [zo.EMBEDDING_RATE, *[config.learning_rate] * 4]


def test_the_schedule_begins_anew_in_each_stage(runs):
    run = runs.train(**LAYERS, use_lr_scheduler=True, learning_rate=1e-3, stage_learning_rates="1,0.5", max_decrease=0)
    rates = [float(row["learning_rate"]) for row in harness.metrics(run)[1:]]
    assert rates == pytest.approx([1, 0.75, 0.25, 0.5, 0.25, 0.5, 0.25], rel=1e-4)


@pytest.mark.parametrize("flags", [{"optimizer": "adam"}, {"direction": "feedback", "rank": 4, "optimizer": "adam"}])
def test_a_layerwise_run_resumes_at_any_step_and_is_replayed(runs, flags):
    whole = runs.train("whole", **LAYERS, **flags)
    for done in range(1, 8):
        part = runs.train(f"part{done}", **LAYERS | flags | {"max_steps": done})
        if done > 1:  # the checkpoint before it, and a step of the journal
            harness.damage(harness.last_checkpoint(part) / "model.safetensors", "flipped")
        assert runs.resume(part, max_steps=7) == 0
        assert set(harness.differences(whole, part)) <= {"metrics.csv"}  # a validation where the part ended
    for step in (2, 3, 4, 7):
        assert runs.replay(whole, replay_step=step) == 0


def test_a_run_that_fails_in_a_stages_first_step_goes_on_from_there(runs):
    flags = LAYERS | {"direction": "feedback", "rank": 4, "optimizer": "adam", "num_threads": 1}
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
    step = zo.Trainer.step
    monkeypatch.setattr(zo.Trainer, "step", lambda self, number, *rest: made.append(number) or step(self, number, *rest))
    assert runs.code(dry_run=True, **LAYERS) == 0
    assert made == [0, 3]
    assert "7 steps in about" in capsys.readouterr().out


def test_a_layerwise_run_is_not_made_longer_by_epochs(runs, errors):
    run = runs.train(**LAYERS | {"max_steps": 4})
    code, lines = errors(harness.argv(resume=run, epochs=9))
    assert code == 2
    assert "--epochs 9: the run has 1" in lines[-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_steps": 17}, "--max_steps 17: the stages have 11 steps in all"),
        ({"use_lr_scheduler": True, "warmup_steps": 2}, "--warmup_steps 2: as long as a stage"),
        ({"mode": "Instruct", "bp_interval": 2}, "--scope layerwise: only --mode FO and ZO have it"),
        ({"head": "closed_form"}, "--scope layerwise: the head is trained with the embedding"),
        ({"init_from": "owner/name", "model_size": None}, "--scope layerwise: gives every block new weights"),
        ({"epochs": 2, "stage_steps": None}, "--epochs: has no effect without a --scope other than layerwise"),
        ({"stage_epochs": "2,1"}, "--stage_epochs: has no effect"),
        ({"stage_steps": "2,x"}, "--stage_steps 2,x: must be whole numbers above 0"),
        ({"stage_steps": "2,0"}, "--stage_steps 2,0: must be whole numbers above 0"),
        ({"stage_learning_rates": "1e-3,-1"}, "--stage_learning_rates 1e-3,-1: must be numbers above 0"),
        ({"stage_steps": "1,1,1,1,1,1"}, "--stage_steps 1,1,1,1,1,1: 6 numbers, and there are 5 stages"),
        ({"scope": "full"}, "--stage_steps: has no effect without --scope layerwise"),
    ],
)
def test_what_makes_no_stages_is_refused(errors, runs, flags, words):
    code, lines = errors(harness.argv(**runs.flags(**LAYERS | flags)))
    assert code == 2
    assert any(line.startswith(f"error: {words}") for line in lines), lines
