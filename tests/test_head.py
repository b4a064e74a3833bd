"""--head closed_form: the output layer's gradient from the logits of one forward pass."""

import re

import harness
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import reproduce_zo_paper as zo

IDS = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(1))
FLAGS = {"head": "closed_form", "direction": "aligned", "optimizer": "sgd", "learning_rate": 1.0}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ignored", [0, 5])
def test_it_is_the_gradient_through_the_output_layer_alone(small_blocks, tied, ignored):
    model = harness.llama("float64", tied)
    labels = IDS.clone()
    labels[1, 3 : 3 + ignored] = zo.IGNORE_INDEX
    with zo.Workers(torch.device("cpu")) as workers:
        objective = zo.Objective(model, workers)
        seen = objective.see(IDS, [], 1, 0)
        gradient = objective.output_error(seen, labels, seen.h[0], back=False).inside
    weight = model.lm_head.weight.detach().clone().requires_grad_()
    with torch.no_grad():
        states = model.model(IDS).last_hidden_state
    loss = torch.nn.functional.cross_entropy((states @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (wanted,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_computing_in_bfloat16_comes_near_it(small_blocks):
    gradients = []
    for dtype in (None, torch.bfloat16):
        with zo.Workers(torch.device("cpu")) as workers:
            objective = zo.Objective(harness.llama(), workers, dtype)
            seen = objective.see(IDS, [], 1, 0)
            gradients.append(objective.output_error(seen, IDS, seen.h[0], back=False).inside)
    exact, near = gradients
    assert near.dtype == torch.float32
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()


def weights(run, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def test_the_head_learns_alone_where_the_rate_of_the_queries_is_nothing(runs):
    run = runs.train(**FLAGS | {"learning_rate": 1e-30, "max_steps": 4, "save_interval": 1, "keep_checkpoints": 9})
    first, last = weights(run, 1), weights(run, 4)
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert moved == ["model.embed_tokens.weight"]
    rows = harness.metrics(run)
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"]) - 0.01


def test_the_body_learns_beside_it(runs):
    run = runs.train(**FLAGS | {"max_steps": 2, "save_interval": 1})
    first, last = weights(run, 1), weights(run, 2)
    assert [name for name in first if torch.equal(first[name], last[name])] == []


@pytest.mark.parametrize("direction", ["aligned", "gaussian"])
def test_its_run_is_resumed_and_replayed_bit_for_bit(runs, direction):
    flags = FLAGS | {"direction": direction, "learning_rate": 1e-3, "use_lr_scheduler": True, "eval_interval": 100}
    whole, run = runs.whole_and_resumed(6, **flags)
    assert set(harness.differences(whole, run)) == set()
    assert runs.replay(whole) == 0


def test_tokens_of_the_pass_and_of_its_products_are_counted(runs):
    counted = {}
    for head in ("estimated", "closed_form"):
        run = runs.train(head, head=head, max_steps=2)
        counted[head] = int(harness.metrics(run)[-1]["forward_tokens"])
    config = zo.read_config(run)
    batch = config.batch_size * config.block_size
    assert counted["closed_form"] - counted["estimated"] == 2 * 2 * batch


def test_its_state_is_part_of_a_checkpoint(runs):
    run = runs.train(**FLAGS, max_steps=2)
    state = load_file(harness.last_checkpoint(run) / "optimizer.safetensors")
    assert set(state) == {f"model.embed_tokens.weight/{key}" for key in ("exp_avg", "exp_avg_sq", "step")}


def test_the_unigram_loss_is_that_of_token_frequencies(runs):
    run = runs.train(max_steps=2)
    (line,) = [line for line in (run / "train.log").read_text().splitlines() if "unigram" in line and "frequent" in line]
    config = zo.read_config(run)
    corpus = harness.corpus(config)
    counts = np.ones(len(corpus.tokenizer))
    for token in corpus.train:
        counts[token] += 1
    size = config.block_size
    seen = [corpus.validation[row * size + 1 : (row + 1) * size] for row in corpus.validation_rows]
    wanted = np.mean([-np.log(counts[token] / counts.sum()) for token in np.concatenate(seen)])
    assert float(re.search(r"loss (\d+\.\d+)", line)[1]) == pytest.approx(wanted, abs=1e-4)


def test_the_first_validation_below_the_unigram_loss_is_marked_once(runs, monkeypatch):
    monkeypatch.setattr(zo.Corpus, "unigram_loss", lambda self: 99.0)
    run = runs.train(max_steps=4, eval_interval=1)
    marks = [line for line in (run / "train.log").read_text().splitlines() if "below the unigram loss" in line]
    assert len(marks) == 1
    assert "step 0:" in marks[0]


def test_a_gradient_that_is_not_finite_stops_before_the_update(runs, monkeypatch, capsys):
    whole = zo.Objective.output_error

    def spoiled(*arguments, **options):
        error = whole(*arguments, **options)
        error.inside.fill_(float("nan"))
        return error

    monkeypatch.setattr(zo.Objective, "output_error", spoiled)
    assert runs.code(**FLAGS, max_steps=3) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: step 0: the output layer's gradient is nan; lower --head_learning_rate", line)


def test_a_model_whose_logits_are_something_else_is_refused(runs, monkeypatch, capsys):
    monkeypatch.setattr(zo.Objective, "_head_is_plain", lambda self: False)
    assert runs.code(**FLAGS) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --head closed_form, --direction feedback: this model's logits")
