"""Blocks below all that is trained are computed once a step: every loss is the same, in place bit for bit."""

import harness
import numpy as np
import pytest

import reproduce_zo_paper as zo
from test_zo_optimization import ARCHITECTURES, Bench, small_model

pytestmark = pytest.mark.filterwarnings("error:queries are evaluated one after the other")

# (model, changes, scope) and how many of the model's blocks come before anything that is trained
OLD_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
FIXED = [
    *[(name, {}, "blocks:1-1", 1) for name in ("Llama", "GPT-2", "Qwen2", "OPT", "Phi, head with bias", "GPTNeoX")],
    *[(name, ARCHITECTURES[name], "blocks:1-1", 1) for name in ("Bloom", "Falcon", "Mistral", "Gemma", "Cohere")],
    ("OpenAIGPT", OLD_GPT, "blocks:1-1", 1),  # its blocks return a list
    ("Llama", UNTIED, "head", 2),
    ("Llama", UNTIED, "reduced", 1),
    ("Llama", {**UNTIED, "num_hidden_layers": 4}, "blocks:2-3", 2),
    ("Llama", TIED, "head", 0),  # the embedding is trained with it
    ("Llama", TIED, "reduced", 0),
    *[("Llama", UNTIED, scope, 0) for scope in ("full", "norms", "embedding", "blocks:0-0")],
]


@pytest.fixture
def scoped():
    def make(name: str, changes: dict, scope: str, rows: int = 3, tokens: int = 13) -> Bench:
        bench = Bench(small_model(name, **changes), rows, tokens)
        bench.tensors = zo.choose_scope(bench.model, scope)
        return bench

    return make


@pytest.mark.parametrize(("name", "changes", "scope", "count"), FIXED)
def test_losses_from_the_fixed_blocks_on_are_those_of_whole_passes(name, changes, scope, count, scoped, small_blocks):
    with scoped(name, changes, scope) as b:
        assert b.objective.fixed_blocks() == count
        assert (b.objective.below(b.ids, count) is None) == (count == 0)
        pairs = (("gaussian", "shared"), ("kronecker", "distinct"), ("lowrank r=2", "shared"))
        for family, data in pairs if count else ():
            queries = b.queries(family, 3, 1e-2)
            grid, below = b.grid(queries), lambda ids: b.objective.below(ids, count)
            batches = [zo.query_batch(b.ids, b.ids, 3, data), zo.query_batch(b.ids, b.ids, 3, data, below)]
            fixed = b.objective, b.tensors
            plain, reused = (zo.query_losses(*fixed, batch, queries, 0, grid) for batch in batches)
            assert np.array_equal(plain, reused)
            assert len(np.unique(plain)) == 6  # else nothing is perturbed
            np.testing.assert_allclose(zo.query_losses(*fixed, batches[1], queries, 2), plain, rtol=1e-10)
    assert not any("forward" in module.__dict__ for module in b.model.modules())


def test_a_model_that_can_not_start_there_is_evaluated_whole(scoped):
    """A block that sees more than the one before it gives: a pass that leaves blocks out is another one."""
    with scoped("Llama", UNTIED, "blocks:1-1") as b:
        layers, seen = b.model.model.layers, []
        layers[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        layers[1].register_forward_hook(lambda module, given, out: out + len(seen))
        assert b.objective.fixed_blocks() == 0


def test_blocks_that_run_several_times_are_computed_each_time(scoped):
    with scoped("Llama", UNTIED, "blocks:1-1") as b:
        whole = b.model.model.layers
        b.model.model.__dict__["layers"] = [whole[0], whole[0], whole[1]]
        b.model.config.num_hidden_layers = 3
        assert b.objective.fixed_blocks() == 0


FLAGS = {"scope": "blocks:1-1", "max_steps": 4, "query_budget_q": 4}
KINDS = {
    "in place": {},
    "distinct": {"query_data": "distinct", "batch_size": 4},
    "batched": {"parallel_q_computation": True, "direction": "lowrank"},
    "aligned": {"direction": "aligned"},
    "bfloat16": {"dtype": "bfloat16"},
    "Instruct": {"mode": "Instruct", "bp_interval": 2, "optimizer": "adam"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_computes_them_once(kind, runs, monkeypatch):
    """With them computed anew for each query it is the same run: in place, where all see the batch, bit for bit."""
    below, calls = zo.Objective.below, []
    monkeypatch.setattr(zo.Objective, "below", lambda self, ids, n: calls.append(n) or below(self, ids, n))
    reused = runs.train("reused", **FLAGS | KINDS[kind])
    shares = 4 if kind == "distinct" else 1
    steps = 2 if kind == "Instruct" else 4  # that have queries
    assert calls == [1] * (1 + steps * shares)  # each step's, and that which looks whether it is exact
    monkeypatch.setattr(zo.Objective, "fixed_blocks", lambda self: 0)
    whole = runs.train("whole", **FLAGS | KINDS[kind])
    if kind != "batched":
        assert harness.differences(whole, reused) == []
    found = [[line["projected_grads"] for line in harness.journal(run)] for run in (whole, reused)]
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-2)
    log = (reused / "train.log").read_text()
    assert "the first 1 blocks are fixed" in log


def test_a_batch_that_comes_again_is_known(runs, monkeypatch):
    """One batch is all of the data: its rows come in another order in every epoch, or, batch of one, in the same."""
    below, calls = zo.Objective.below, []
    monkeypatch.setattr(zo.Objective, "below", lambda self, ids, n: calls.append(n) or below(self, ids, n))
    monkeypatch.setattr(zo.Corpus, "rows", lambda self, step: np.array([0, 1]))
    runs.train(**FLAGS)
    assert calls == [1, 1]


@pytest.mark.parametrize("kind", ["in place", "batched", "distinct"])
def test_processes_and_sittings_agree(kind, runs):
    flags = FLAGS | KINDS[kind] | {"num_threads": 1}
    assert harness.differences(runs.goes_on(**flags), runs.train_ranks(2, "two", **flags)) == []
