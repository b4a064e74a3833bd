"""--direction feedback: a guess of the gradient from the error at the output, its size measured by queries."""

import harness
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import reproduce_zo_paper as zo

IDS = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(1))
RANK = 16
FLAGS = {"direction": "feedback", "optimizer": "adam", "rank": RANK, "learning_rate": 1e-3}


def covered(model: torch.nn.Module) -> list:
    """The output layer, and what writes to the residual stream."""
    return [
        (n, p) for n, p in model.named_parameters() if n.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight"))
    ]


@pytest.fixture
def setting(small_blocks):
    model = harness.llama("float64")
    with zo.Workers(torch.device("cpu")) as workers:
        tensors = zo.trainable_tensors(covered(model))
        objective = zo.Objective(model, workers)
        seen = objective.see(IDS, tensors, RANK, 0)
        (head,) = [tensor.index for tensor in tensors if tensor.parameter is model.lm_head.weight]
        error = objective.output_error(seen, IDS, seen.h[0].float() @ seen.bases[head], back=True)
        yield objective, tensors, zo.Feedback(seen.guess(error, head)), error


def queries(family, q: int = 4) -> zo.Queries:
    return zo.Queries(family, 3, 4, q, 1e-5)


def test_the_error_at_the_output_is_the_gradient_in_the_hidden_states(setting):
    objective, _, _, error = setting
    with torch.no_grad():
        states = objective.model.model(IDS).last_hidden_state
    states.requires_grad_()
    logits = objective.model.lm_head(states)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    (wanted,) = torch.autograd.grad(loss, states)
    torch.testing.assert_close(error.back, wanted[:, :-1].flatten(0, 1), rtol=1e-9, atol=1e-14)
    assert error.loss == pytest.approx(loss.item(), rel=1e-12)


def test_many_slabs_give_the_same_error_to_the_bit_with_any_number_of_workers(monkeypatch):
    model = harness.llama("float64", tied=False)
    with torch.no_grad():
        states = model.model(IDS).last_hidden_state
    states.requires_grad_()
    loss = torch.nn.functional.cross_entropy(model.lm_head(states)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    wanted, weight = torch.autograd.grad(loss, [states, model.lm_head.weight])
    for name, value in (("SLAB_VOCABULARY", 7), ("TILE_VOCABULARY", 3), ("TILE_TOKENS", 4)):
        monkeypatch.setattr(zo, name, value)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            with zo.Workers(torch.device("cpu")) as workers:
                objective = zo.Objective(model, workers)
                h = states.detach()[:, :-1].flatten(0, 1)[None]
                results.append(objective.output_error(zo.Seen({}, {}, h), IDS, h[0], back=True))
        finally:
            torch.set_num_threads(threads)
    for error in results:
        torch.testing.assert_close(error.back, wanted[:, :-1].flatten(0, 1), rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(error.inside, weight, rtol=1e-9, atol=1e-14)
        assert torch.equal(error.back, results[0].back)
        assert torch.equal(error.inside, results[0].inside)


def test_the_guess_of_the_output_layer_is_its_gradient_within_the_leading_inputs(setting):
    objective, tensors, family, _ = setting
    model = objective.model
    (head,) = [tensor for tensor in tensors if tensor.parameter is model.lm_head.weight]
    weight = model.lm_head.weight.detach().clone().requires_grad_()
    with torch.no_grad():
        states = model.model(IDS).last_hidden_state
    loss = torch.nn.functional.cross_entropy((states @ weight.T)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(loss, weight)
    left, basis = family.guess[head.index]
    wanted = gradient @ basis.double() @ basis.double().T
    torch.testing.assert_close((left @ basis.T).double(), wanted, rtol=1e-4, atol=1e-7)


def test_the_guess_of_the_last_layer_points_along_its_gradient(setting):
    """What lies between it and the output is the final norm alone."""
    objective, tensors, family, _ = setting
    _, gradients = objective.gradient(IDS, IDS, tensors)
    (last,) = [tensor for tensor in tensors if tensor.name == "model.layers.1.mlp.down_proj.weight"]
    left, basis = family.guess[last.index]
    cosine = torch.nn.functional.cosine_similarity((left @ basis.T).double().flatten(), gradients[last.index].flatten(), dim=0)
    assert cosine > 0.7


def test_all_directions_are_as_long_and_differ_in_their_sign_alone(setting):
    _, tensors, family, _ = setting
    asked = queries(family, 20)
    for tensor in tensors:
        z = [left @ right.T for left, right in (family.direction(tensor, asked.at(query)).factors() for query in range(20))]
        assert all(part.norm().item() == pytest.approx(zo.FEEDBACK_NORM, rel=1e-5) for part in z)
        signs = [torch.sign((part * z[0]).sum()).item() for part in z]
        assert [abs((part * z[0]).sum().item()) / zo.FEEDBACK_NORM**2 for part in z] == pytest.approx([1.0] * 20, rel=1e-5)
        assert set(signs) == {1.0, -1.0}
        assert max(part.abs().max().item() for part in z) <= family.largest


def test_batched_measures_what_in_place_measures(setting):
    objective, tensors, family, _ = setting
    in_place = zo.projected_gradients(objective, tensors, lambda query: (IDS, IDS), queries(family)).projected_grads
    for group in (1, 3, 4):
        batched = zo.projected_gradients(objective, tensors, lambda query: (IDS, IDS), queries(family), group).projected_grads
        assert np.allclose(batched, in_place, rtol=1e-8, atol=1e-10)


def test_the_direction_measured_is_the_direction_applied(setting):
    objective, tensors, family, _ = setting
    asked = queries(family)
    c = zo.projected_gradients(objective, tensors, lambda query: (IDS, IDS), asked).projected_grads
    _, gradients = objective.gradient(IDS, IDS, tensors)
    for query in range(asked.q):
        z = [torch.zeros_like(tensor.matrix) for tensor in tensors]
        zo.add_directions(z, tensors, asked, np.eye(asked.q)[query], objective.workers)
        along = sum((g.view_as(part) * part).sum().item() for g, part in zip(gradients, z))
        assert along == pytest.approx(c[query], rel=1e-3, abs=1e-5)


def test_the_signs_of_matrices_and_queries_are_independent(setting):
    """So that (1/q) sum_i c_i z_i has the gradient's component along the guess as its mean, on every matrix."""
    _, tensors, family, _ = setting
    asked = queries(family, 4000)
    lefts = [[family.direction(tensor, asked.at(query)).factors()[0] for tensor in tensors] for query in range(asked.q)]
    signs = np.array([[torch.sign((left * first).sum()).item() for left, first in zip(row, lefts[0])] for row in lefts])
    correlation = signs.T @ signs / asked.q
    assert np.all(np.abs(correlation - np.eye(len(tensors))) < 5 / np.sqrt(asked.q))
    assert np.all(np.abs((signs[1:] * signs[:-1]).mean(0)) < 5 / np.sqrt(asked.q))


def test_shares_are_the_gradients_projection_on_the_guess(setting):
    """Measured by many queries, they come to <gradient, G> / ||G||^2, whatever the guess is worth."""
    objective, tensors, family, _ = setting
    _, gradients = objective.gradient(IDS, IDS, tensors)
    guesses = [left.double() @ basis.double().T for left, basis in (family.guess[tensor.index] for tensor in tensors)]
    wanted = np.array([((g.view_as(G) * G).sum() / G.square().sum()).item() for g, G in zip(gradients, guesses)])
    asked = queries(family, 400)
    c = zo.projected_gradients(objective, tensors, lambda query: (IDS, IDS), asked, 40).projected_grads
    shares = family.shares(tensors, [asked.at(query) for query in range(asked.q)], c)
    norms = np.array([G.norm().item() for G in guesses])
    error = np.sqrt(((wanted * norms) ** 2).sum() / asked.q) / norms
    assert np.all(np.abs(shares - wanted) < 5 * error)
    assert wanted[-1] == pytest.approx(shares[-1], rel=0.5)
    dropped = np.where(np.arange(asked.q) % 2, np.nan, c)
    assert np.all(np.isfinite(family.shares(tensors, [asked.at(query) for query in range(asked.q)], dropped)))


def test_what_is_applied_is_the_share_of_the_guess(setting):
    objective, tensors, family, _ = setting
    shares = np.linspace(-1, 2, len(tensors))
    outs = [torch.zeros_like(tensor.matrix) for tensor in tensors]
    zo.add_directions(outs, tensors, queries(zo.Share(family, tensors, shares), 1), np.ones(1), objective.workers)
    for out, tensor, share in zip(outs, tensors, shares):
        left, basis = family.guess[tensor.index]
        torch.testing.assert_close(out, share * left.double() @ basis.double().T, rtol=1e-5, atol=1e-9)


def test_a_running_mean_starts_from_its_prior_and_keeps_its_state():
    mean = zo.RunningMean(np.array([1.0, 1.0]), 0.9)
    assert mean.update(np.array([3.0, -1.0])) == pytest.approx([1.2, 0.8])
    assert mean.update(np.array([3.0, 1.0])) == pytest.approx([1.38, 0.82])
    other = zo.RunningMean(np.ones(2), 0.9)
    other.load(mean.state())
    assert np.array_equal(other.update(np.ones(2)), mean.update(np.ones(2)))
    with pytest.raises(ValueError, match="other tensors"):
        zo.RunningMean(np.ones(3), 0.9).load(mean.state())


def test_only_matrices_with_a_guess_move(runs):
    run = runs.train(**FLAGS, max_steps=3, save_interval=1, keep_checkpoints=9)
    first, last = (load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors") for step in (1, 3))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved == {name for name in first if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight"))}


def test_it_is_the_default_and_the_papers_is_one_flag_away():
    ours, _ = zo.parse_config([])
    assert (ours.direction, ours.optimizer, ours.rank, ours.query_budget_q) == ("feedback", "adam", 16, 1)
    paper, _ = zo.parse_config(["--direction", "gaussian"])
    assert (paper.direction, paper.optimizer, paper.rank, paper.query_budget_q) == ("gaussian", "sgd", 1, 8)
    for mode, direction, optimizer in (
        ("FO", "gaussian", "sgd"),
        ("Instruct", "feedback", "mudamw"),
        ("Calibrate", "gaussian", "sgd"),
    ):
        more = ["--bp_interval", "5"] if mode != "FO" else []
        other, _ = zo.parse_config(["--mode", mode, *more])
        assert (other.direction, other.optimizer) == (direction, optimizer)


@pytest.mark.parametrize("head", ["estimated", "closed_form"])
@pytest.mark.parametrize("q", [0, 3])
def test_its_run_is_resumed_and_replayed_bit_for_bit(runs, head, q):
    flags = FLAGS | {"head": head, "query_budget_q": q, "use_lr_scheduler": True, "eval_interval": 100}
    whole, run = runs.whole_and_resumed(6, **flags)
    assert set(harness.differences(whole, run)) == set()
    assert runs.replay(whole) == 0


def moved(run, first: int, last: int) -> dict[str, torch.Tensor]:
    """What changed from one checkpoint to another."""
    before, after = (load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors") for step in (first, last))
    return {name: after[name].double() - before[name].double() for name in before if not torch.equal(before[name], after[name])}


def test_the_norm_in_the_metrics_is_that_of_the_estimate(runs, monkeypatch):
    monkeypatch.setattr(zo, "FEEDBACK_MEMORY", 0.0)
    flags = FLAGS | {"optimizer": "sgd", "learning_rate": 1e-2, "max_decrease": 0, "query_budget_q": 3}
    run = runs.train(**flags, max_steps=2, save_interval=1)
    norm = sum(change.square().sum().item() for change in moved(run, 1, 2).values()) ** 0.5
    assert norm / 1e-2 == pytest.approx(float(harness.metrics(run)[-1]["grad_norm"]), rel=1e-2)


def test_without_queries_the_guess_is_followed_downhill_as_it_is(runs):
    flags = FLAGS | {"optimizer": "sgd", "learning_rate": 0.5, "query_budget_q": 0}
    run = runs.train(**flags, max_steps=2, save_interval=1)
    changes = moved(run, 1, 2)
    config = zo.read_config(run)
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step_00000001")
    with zo.Workers(torch.device("cpu")) as workers:
        corpus = harness.corpus(config)
        objective, ids = zo.Objective(model, workers), corpus.batch(1)
        tensors = zo.trainable_tensors(covered(model))
        seen = objective.see(ids, tensors, RANK, config.seed)
        (head,) = [tensor.index for tensor in tensors if tensor.parameter is model.lm_head.weight]
        error = objective.output_error(seen, ids, seen.h[0].float() @ seen.bases[head], back=True)
        guess = seen.guess(error, head)
    assert set(changes) == {tensor.name for tensor in tensors}
    for tensor in tensors:
        left, basis = guess[tensor.index]
        wanted = -0.5 * (left @ basis.T).double()
        assert (changes[tensor.name] - wanted).norm() < 1e-3 * wanted.norm()
    assert float(harness.metrics(run)[-1]["val_loss"]) < float(harness.metrics(run)[0]["val_loss"])


def test_a_run_without_queries_is_resumed(runs):
    flags = {"query_budget_q": 0, "head": "closed_form", "direction": "gaussian"}
    whole, run = runs.whole_and_resumed(4, **flags)
    assert harness.differences(whole, run) == []


def test_without_queries_nothing_but_the_exact_head_moves(runs):
    flags = {"query_budget_q": 0, "head": "closed_form", "direction": "gaussian", "keep_checkpoints": 9}
    run = runs.train(**flags, max_steps=3, save_interval=1)
    first, last = (load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors") for step in (1, 3))
    assert [name for name in first if not torch.equal(first[name], last[name])] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("head", ["estimated", "closed_form"])
@pytest.mark.parametrize("q", [0, 2])
def test_every_pass_is_counted(runs, head, q):
    run = runs.train(**FLAGS, query_budget_q=q, head=head, max_steps=3)
    config = zo.read_config(run)
    passes = 2 * q + 3
    assert int(harness.metrics(run)[-1]["forward_tokens"]) == 3 * passes * config.batch_size * config.block_size


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"mode": "Calibrate", "bp_interval": 2, "direction": "feedback"}, "--direction feedback: only --mode ZO"),
        ({"query_budget_q": 0, "direction": "gaussian"}, "--query_budget_q 0: only for"),
        ({"query_budget_q": 0, "mode": "FO"}, "--query_budget_q 0: only for"),
        ({"query_budget_q": 0, "query_data": "distinct"}, "--query_data: has no effect without queries"),
        ({"query_budget_q": 0, "optimizer": "sgd", "max_decrease": 0.1}, "--max_decrease: has no effect"),
    ],
)
def test_clashes_are_refused(errors, flags, line):
    code, lines = errors(harness.argv(**flags))
    assert code == 2
    assert any(line in each for each in lines)


def test_a_loss_that_is_not_finite_stops_before_the_update(runs, monkeypatch, capsys):
    whole = zo.Objective.output_error
    monkeypatch.setattr(zo.Objective, "output_error", lambda *a, **k: whole(*a, **k)._replace(loss=float("nan")))
    assert runs.code(**FLAGS, query_budget_q=0, max_steps=3) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: step 0: the loss is nan")
