"""Rules in runs: the output layer in closed form, what each rule counts, directions shaped by what was seen."""

import random
import re

import harness
import numpy as np
import pytest
import torch

import reproduce_zo_paper as zo

CLOSED, FEEDBACK = {"head": "closed_form"}, {"direction": "feedback"}
COUNTED = [  # forward passes of three steps
    ({"direction": "aligned"} | CLOSED, 3 * 7),
    ({"parallel_q_computation": True, "direction": "lowrank", "optimizer": "adam"}, 3 * 4),
    (FEEDBACK | {"carry": "stream", "query_budget_q": 2}, 3 * 5),
]


@pytest.fixture(autouse=True)
def global_generators_stay():
    """No run touches torch's, numpy's or Python's global generator."""
    state = lambda: (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())  # noqa: E731, NPY002
    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize(("flags", "passes"), COUNTED, ids=str)
def test_every_pass_is_counted(runs, flags, passes):
    run = runs.train(**flags, max_steps=3)
    config = zo.read_config(run)
    assert int(harness.metrics(run)[-1]["forward_tokens"]) == passes * config.batch_size * config.block_size


@pytest.mark.parametrize("q", [0, 2])
def test_the_output_layer_learns_alone_in_closed_form_and_the_rest_beside_it(runs, q):
    run = runs.train(**CLOSED, query_budget_q=q, max_steps=4, save_interval=1)
    first, last = harness.weights(run, 1), harness.weights(run)
    assert harness.moved(first, last) == (first.keys() if q else {"model.embed_tokens.weight"})
    losses = harness.column(run, "val_loss")
    assert losses[-1] < losses[0] - 0.01
    assert "optimizer/model.embed_tokens.weight/exp_avg" in harness.weights(run, file="optimizer")
    assert runs.replay(run) == 0


def test_measuring_leaves_the_weights_of_guided_aligned_directions_alone(runs, monkeypatch, capsys):
    """A guide of a small cosine, of many directions and far moves: what the grid must hold is largest."""
    measure, unmoved = zo.Trainer.measure, []

    def watched(self, step):
        before, record = zo.weights_digest(self.job.model), measure(self, step)
        unmoved.append(before == zo.weights_digest(self.job.model))
        return record

    monkeypatch.setattr(zo.Trainer, "measure", watched)
    flags = {"direction": "aligned", "query_budget_q": 4, "guide_cosine": 1e-3, "rank": 64, "epsilon": 0.02}
    run = runs.train(mode="Instruct", scope="head", bp_interval=5, optimizer="adam", max_steps=12, **flags)
    assert unmoved == [True] * 12
    assert runs.replay(run) == 0
    assert "bitwise equal to" in capsys.readouterr().out


@pytest.mark.parametrize(("fault", "flags"), [("weight", CLOSED), ("weight", FEEDBACK), ("loss", FEEDBACK)], ids=str)
def test_what_is_not_finite_at_the_output_stops_before_the_update(runs, monkeypatch, capsys, fault, flags):
    whole = zo.output_error

    def spoiled(*arguments, **options):
        error = whole(*arguments, **options)
        error.weight.mul_(np.nan if fault == "weight" else 1.0)
        return error._replace(loss=np.nan if fault == "loss" else error.loss)

    monkeypatch.setattr(zo, "output_error", spoiled)
    assert runs.code(**flags, max_steps=3) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: step 0: the .* is nan", line)
    assert harness.records(runs.folder / "logs") == 0


def test_the_unigram_loss_is_that_of_token_frequencies_and_falling_below_it_is_said_once(runs, monkeypatch):
    said, own = [], zo.Corpus.unigram_loss
    monkeypatch.setattr(zo.Corpus, "unigram_loss", lambda self: said.append(own(self)) or 99.0)
    run = runs.train(max_steps=3, eval_interval=1)
    corpus = harness.corpus(zo.read_config(run))
    size, counts = corpus.config.block_size, np.ones(len(corpus.tokenizer))
    np.add.at(counts, np.asarray(corpus.tokens["train"]), 1)
    seen = [corpus.tokens["validation"][row * size + 1 : (row + 1) * size] for row in corpus.validation_rows]
    assert said[0] == pytest.approx(-np.log(counts / counts.sum())[np.concatenate(seen)].mean(), rel=1e-9)
    assert (run / "train.log").read_text().count("below the unigram loss") == 1
