"""Instruct: what moves when, with which step size, and what is said of the guide."""

import math

import harness
import numpy as np
import pytest
import torch
import transformers

import reproduce_zo_paper as zo

INTERVAL, WRITERS = 3, ("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "model.norm.weight")
FLAGS = {"mode": "Instruct", "bp_interval": INTERVAL, "direction": "feedback", "optimizer": "adam", "query_budget_q": 1}
FLAGS |= {"learning_rate": 1e-3, "save_interval": 1, "max_steps": 8}


def moved(run, first: int) -> dict[str, float]:
    """The largest change of one step by the tensor's name."""
    one, other = harness.weights(run, first), harness.weights(run, first + 1)
    return {name: change for name in one if (change := (one[name] - other[name]).abs().max().item())}


def at_checkpoint(run, step: int) -> tuple[float, torch.Tensor]:
    """The loss and the true gradient of a step's batch by plain autograd, at the checkpoint before that step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step_{step:08d}")
    ids = harness.corpus(zo.read_config(run)).batch(step)[0]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])


def column(run, name: str) -> list[float]:
    return [float(row[name] or math.nan) for row in harness.metrics(run)]


@pytest.mark.parametrize("carry", ["stream", "branch"])
def test_backpropagations_move_all_and_guided_steps_what_feedback_knows_at_their_own_rate(runs, carry):
    run = runs.train(**FLAGS | {"carry": carry, "guided_learning_rate": 1e-5})
    names = set(harness.weights(run))
    known = {name for name in names if (carry == "branch" or name.endswith(WRITERS)) and "norm" not in name}
    for step, line in enumerate(harness.journal(run)):
        assert line["learning_rate"] == (1e-5 if step % INTERVAL else 1e-3)
        if step and step % INTERVAL:  # a norm's weights are near 1, where so small a step is lost in rounding
            assert {name for name in moved(run, step) if "norm" not in name} == known
            assert max(moved(run, step).values()) < 2e-4
        elif step:
            assert set(moved(run, step)) == names
            assert max(moved(run, step).values()) > 2e-4


def test_with_no_queries_and_nothing_known_backpropagations_are_alone(runs):
    run = runs.train(**FLAGS | {"direction": "gaussian", "query_budget_q": 0})
    assert [bool(moved(run, step)) for step in range(1, 8)] == [step % INTERVAL == 0 for step in range(1, 8)]
    assert column(run, "loss")[3] == pytest.approx(at_checkpoint(run, 2)[0], abs=1e-5)


def test_the_metrics_have_the_guides_cosine_to_the_new_gradient(runs):
    run = runs.train(**FLAGS | {"direction": "gaussian", "optimizer": "sgd"})
    old, new = (at_checkpoint(run, step)[1] for step in (INTERVAL, 2 * INTERVAL))
    said = column(run, "guide_to_gradient")
    assert np.isnan(said[: INTERVAL + 1]).all()
    assert len(set(said[INTERVAL + 1 : 2 * INTERVAL + 1])) == 1
    assert said[2 * INTERVAL + 1] == pytest.approx((old @ new / (old.norm() * new.norm())).item(), abs=2e-4)


def test_the_metrics_have_feedbacks_cosine_to_the_new_gradient(runs):
    """A guess that says something, from the first backpropagation on."""
    said = column(runs.train(**FLAGS | {"batch_size": 16, "block_size": 32}), "guide_to_gradient")
    assert np.isnan(said[0])
    assert all(0.1 < value <= 1 for value in said[1:])
    assert said[1] == said[INTERVAL] != said[INTERVAL + 1]
