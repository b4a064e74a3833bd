"""Instruct: what moves when, with which step size, and what is said of the guide."""

import math

import harness
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import reproduce_zo_paper as zo

INTERVAL = 3
FLAGS = {
    "mode": "Instruct",
    "bp_interval": INTERVAL,
    "direction": "feedback",
    "rank": 4,
    "optimizer": "adam",
    "head": "estimated",
}
FLAGS |= {"learning_rate": 1e-3, "save_interval": 1, "keep_checkpoints": 99, "max_steps": 8}
GUESSED = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight")


def moved(run, first: int) -> dict[str, torch.Tensor]:
    """What one step changed."""
    before, after = (load_file(run / "checkpoints" / f"step_{at:08d}" / "model.safetensors") for at in (first, first + 1))
    return {name: after[name].double() - before[name].double() for name in before if not torch.equal(before[name], after[name])}


def gradient_at(run, step: int) -> tuple[dict[str, torch.Tensor], transformers.PreTrainedModel, torch.Tensor]:
    """The true gradient of a step's batch by plain autograd, at the checkpoint before that step; the model and the batch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step_{step:08d}")
    ids = harness.corpus(zo.read_config(run)).batch(step)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}, model, ids


def column(run, name: str) -> list[float]:
    return [float(row[name] or math.nan) for row in harness.metrics(run)]


@pytest.mark.parametrize("head", ["estimated", "closed_form"])
def test_backpropagations_move_all_and_guided_steps_what_the_guess_knows(runs, head):
    run = runs.train(**FLAGS | {"head": head, "query_budget_q": 1, "max_steps": 4})
    names = set(load_file(harness.last_checkpoint(run) / "model.safetensors"))
    assert set(moved(run, INTERVAL)) == names
    assert set(moved(run, 1)) == set(moved(run, 2)) == {name for name in names if name.endswith(GUESSED)}


def test_guided_steps_have_a_step_size_and_moments_of_their_own(runs):
    run = runs.train(**FLAGS | {"guided_learning_rate": 1e-5, "query_budget_q": 0})
    name = "model.layers.0.mlp.down_proj.weight"
    assert moved(run, 1)[name].abs().max().item() == pytest.approx(1e-5, rel=2e-2)  # an AdamW's first step is its rate
    assert moved(run, INTERVAL)[name].abs().max().item() > 3e-4
    rates = column(run, "learning_rate")[1:]
    assert rates == [1e-3 if step % INTERVAL == 0 else 1e-5 for step in range(8)]


def test_with_no_queries_and_no_guess_backpropagations_are_alone(runs):
    run = runs.train(**FLAGS | {"direction": "gaussian", "query_budget_q": 0, "rank": None})
    assert [bool(moved(run, step)) for step in range(1, 8)] == [step % INTERVAL == 0 for step in range(1, 8)]
    batch = 2 * 16
    assert column(run, "forward_tokens")[:5] == [0, 3 * batch, 4 * batch, 5 * batch, 8 * batch]
    losses = column(run, "loss")
    _, model, ids = gradient_at(run, 2)
    assert losses[3] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)
    assert runs.replay(run) == 0


CASES = {
    "feedback": {"query_budget_q": 2},
    "feedback, closed form": {"query_budget_q": 2, "head": "closed_form"},
    "unmeasured": {"query_budget_q": 0, "head": "closed_form"},
    "mudamw": {"query_budget_q": 1, "optimizer": "mudamw"},
    "alone": {"query_budget_q": 0, "direction": "gaussian", "rank": None, "head": "closed_form"},
    "gaussian": {"query_budget_q": 2, "direction": "gaussian", "rank": None, "optimizer": "sgd"},
}


@pytest.mark.parametrize("case", CASES)
def test_its_run_is_resumed_and_replayed_bit_for_bit(runs, case):
    flags = FLAGS | CASES[case] | {"keep_checkpoints": 100}
    flags = {name: value for name, value in flags.items() if name not in ("save_interval", "max_steps")}
    whole, run = runs.whole_and_resumed(8, **flags)
    assert set(harness.differences(whole, run)) == set()
    assert runs.replay(whole) == 0


def cosine(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    one, other = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    return (one @ other / (one.norm() * other.norm())).item()


def test_the_metrics_have_the_guides_cosine_to_the_new_gradient(runs):
    flags = FLAGS | {"direction": "gaussian", "rank": None, "optimizer": "sgd"}
    run = runs.train(**flags)
    old, new = (gradient_at(run, step)[0] for step in (INTERVAL, 2 * INTERVAL))
    said = column(run, "guide_to_gradient")
    assert np.isnan(said[: INTERVAL + 1]).all()
    assert len(set(said[INTERVAL + 1 : 2 * INTERVAL + 1])) == 1
    assert said[2 * INTERVAL + 1] == pytest.approx(cosine([(old[name], new[name]) for name in old]), abs=2e-4)


def test_the_metrics_have_the_guesss_cosine_to_the_new_gradient(runs):
    run = runs.train(**FLAGS | {"query_budget_q": 0, "batch_size": 16, "block_size": 32})
    new = gradient_at(run, INTERVAL)[0]
    last = INTERVAL - 1
    config = zo.read_config(run)
    _, model, ids = gradient_at(run, last)
    with zo.Workers(torch.device("cpu")) as workers:
        objective = zo.Objective(model, workers)
        named = {name: p for name, p in model.named_parameters() if name.endswith(GUESSED)}
        every = zo.trainable_tensors(model.named_parameters())
        tensors = [tensor for tensor in every if tensor.name in named]  # numbered among all, as in the run
        seen = objective.see(ids, tensors, config.rank, config.seed)
        (head,) = [tensor.index for tensor in tensors if tensor.parameter is model.lm_head.weight]
        error = objective.output_error(seen, ids, seen.h[0].float() @ seen.bases[head], back=True)
        guess = seen.guess(error, head)
    pairs = [((guess[t.index][0] @ guess[t.index][1].T).double(), new[t.name]) for t in tensors]
    assert column(run, "guide_to_gradient")[INTERVAL + 1] == pytest.approx(cosine(pairs), abs=2e-4)
    assert cosine(pairs) > 0.1  # a guess that says something


def test_sgds_bound_is_not_put_on_guided_steps(runs):
    run = runs.train(**FLAGS | {"optimizer": "sgd", "max_decrease": 1e-9, "guided_learning_rate": 1e-5})
    assert column(run, "learning_rate")[2:4] == [1e-5, 1e-5]
