"""--weights bfloat16: updates that are rounded at random and right on average, queries that never write the weights."""

import copy
import math

import harness
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_init_from import flags as folder_flags

import reproduce_zo_paper as zo

HALF = {"weights": "bfloat16", "parallel_q_computation": True}
VALUES = torch.tensor([1.0, -1.0, 0.3, -0.3, 1e-3, 1.0039, -2.7e-7, 0.0, 3.1e4, 1e-38])


def neighbours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 numbers next to float32 ones, towards zero and away from it."""
    low = (values.view(torch.int32) & -(2**16)).view(torch.float32)
    return low, torch.where(low == values, low, (low.view(torch.int32) + 2**16).view(torch.float32))


def stored(values: torch.Tensor, *at: int) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    zo.store(out, values.clone(), *at)
    return out


def test_rounding_is_to_a_neighbour_right_on_average_and_a_function_of_coordinates():
    """The mean of 20,000 draws is within five standard deviations of each value."""
    count, (low, high) = 20_000, neighbours(VALUES)
    drawn = stored(VALUES.repeat(count, 1), 3, 1, 4, 1, 5).float()
    assert ((drawn == low) | (drawn == high)).all()
    spread = ((high.double() - VALUES) * (VALUES.double() - low)).abs().sqrt() / math.sqrt(count)
    assert ((drawn.double().mean(0) - VALUES.double()).abs() <= 5 * spread).all()
    exact = low == high
    assert exact.sum() == 3
    assert (drawn[:, exact] == VALUES[exact]).all()
    many = torch.rand(4000)
    assert torch.equal(stored(many, 0, 1, 2, 3, 0), stored(many, 0, 1, 2, 3, 0))
    others = [(1, 1, 2, 3, 0), (0, 2, 2, 3, 0), (0, 1, 3, 3, 0), (0, 1, 2, 4, 0), (0, 1, 2, 3, 1)]
    assert all(not torch.equal(stored(many, 0, 1, 2, 3, 0), stored(many, *other)) for other in others)


def pair(name: str = "gaussian", q: int = 3) -> tuple:
    """A model with matrices in bfloat16, the same in float32, their tensors, and queries."""
    model = zo.lowered(harness.llama().to(torch.bfloat16))
    exact = copy.deepcopy(model).float()
    tensors = [zo.trainable_tensors(each.named_parameters(), half=True) for each in (model, exact)]
    return model, exact, *tensors, zo.Queries(zo.DIRECTIONS[name](2), 7, 11, q, 1e-2)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "mudamw"])
@pytest.mark.parametrize("name", ["gaussian", "rademacher", "lowrank", "kronecker"])
def test_updates_are_those_of_float32_up_to_the_rounding(name, optimizer, workers, small_blocks):
    model, exact, half, full, queries = pair(name)
    before = [parameter.detach().clone() for parameter in exact.parameters()]
    for each, tensors in ((model, half), (exact, full)):
        rule = zo.Optimizer(optimizer, tensors, workers, 0.1 * (optimizer != "sgd"), zo.outer_parameters(each))
        rule.apply_estimate(tensors, queries, np.array([0.5, math.nan, -2.0]), 1e-3)
        if optimizer != "sgd":
            assert {value.dtype for value in rule.state_dict().values()} == {torch.float32}
    for own, other, old in zip(model.parameters(), exact.parameters(), before):
        most = torch.maximum(*((high - low).abs() for low, high in map(neighbours, (other.detach(), old + 1e-20))))
        if own.dtype == torch.bfloat16:  # a neighbour
            assert ((own - other).abs() <= 1.01 * most).all()
        else:
            torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
    assert [parameter.dtype for parameter in model.parameters()].count(torch.bfloat16) == 15


def test_small_updates_are_not_lost(workers):
    """2,000 steps of a hundredth of half the spacing each, where rounding to the nearest would never move."""
    parameter = torch.nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16))
    (tensor,) = tensors = zo.trainable_tensors([("w", parameter)], half=True)
    rule = zo.Optimizer("sgd", tensors, workers)
    for step in range(2000):
        rule.apply_gradients({0: torch.ones(64, 64)}, 2.0**-8 / 100, step)
    assert tensor.matrix.float().mean().item() == pytest.approx(1 - 2000 * 2.0**-8 / 100, abs=1e-3)


@pytest.mark.parametrize("name", ["gaussian", "lowrank"])
def test_small_estimates_are_not_lost(name, workers, small_blocks):
    """One step of about a twentieth of the spacing: what moved is what float32 would have moved, on average."""
    parameter = torch.nn.Parameter(torch.full((128, 64), 1.5, dtype=torch.bfloat16))
    (tensor,) = tensors = zo.trainable_tensors([("w", parameter)], half=True)
    queries, z = zo.Queries(zo.DIRECTIONS[name](4), 0, 0, 1, 1e-3), torch.empty(128, 64)
    for block in tensor.blocks:
        queries.directions(0, tensors)[0](block, z[tensor.span(block)])
    zo.Optimizer("sgd", tensors, workers).apply_estimate(tensors, queries, np.array([1.0]), 2.0**-7 / 20)
    moved = 1.5 - tensor.matrix.float()
    assert (moved * z).sum().item() == pytest.approx((2.0**-7 / 20 * z * z).sum().item(), rel=0.15)


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "kronecker", "lowrank"])
def test_losses_are_at_the_weights_plus_and_minus_epsilon_z(name, workers, small_blocks):
    """By hand: a float32 model at theta +- epsilon z, cast to bfloat16 for dense families as the batched pass does."""
    model, exact, half, full, queries = pair(name)
    before = copy.deepcopy(model.state_dict())
    ids = torch.arange(40).view(4, 10)
    objective = zo.Objective(model, workers, torch.bfloat16)
    batch = zo.query_batch(ids, ids, queries.q, "shared")
    found = zo.query_losses(objective, half, batch, queries, 3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for query in range(queries.q):
        for column, sign in enumerate((1, -1)):
            other = copy.deepcopy(exact)
            for tensor, parameter in zip(full, other.parameters()):
                z = torch.empty(tensor.rows, tensor.columns)
                direction = queries.family.direction(tensor, queries.at(query))
                for block in tensor.blocks:
                    direction(block, z[tensor.span(block)])
                parameter.data.add_(sign * queries.epsilon * z.view_as(parameter))
            loss = zo.Objective(other, workers, torch.bfloat16).losses(ids, ids).item()
            assert found[query, column] == pytest.approx(loss, abs=4e-3)
    assert abs(found[:, 0] - found[:, 1]).max() > 1e-2


def test_rows_of_a_perturbed_embedding_are_made_in_float32(workers):
    _, model, _, tensors, queries = pair("lowrank")
    ids, table = torch.arange(12).view(2, 6), model.get_input_embeddings()
    at = next(tensor for tensor in tensors if tensor.parameter is table.weight)
    objective, z = zo.Objective(model, workers, torch.bfloat16), torch.empty(at.rows, at.columns)
    queries.directions(0, tensors)[at.index](0, z)
    with torch.no_grad(), objective.quiet():
        found = zo.Batched(objective, tensors, queries, range(1), 2, 6).embedding(table, ids.repeat(2, 1))
    wanted = [(at.matrix + sign * queries.epsilon * z)[ids] for sign in (1, -1)]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-7)


def test_bfloat16_weights_are_not_perturbed_in_place(runs, workers, failure):
    model, _, half, _, queries = pair()
    ids = torch.arange(40).view(4, 10)
    batch = zo.query_batch(ids, ids, 3, "shared")
    with pytest.raises(ValueError, match="what is perturbed in place must be float32"):
        zo.query_losses(zo.Objective(model, workers, torch.bfloat16), half, batch, queries)
    with pytest.raises(ValueError, match="what is perturbed must be float32"):
        zo.zo_step(model.named_parameters(), lambda: 0.0, 1, 1e-3, 1e-3)
    says = "--weights bfloat16: queries in place would move such weights; take --scope lora:R, or --parallel_q_comp"
    failure(says, runs.code, weights="bfloat16")
    says = "--dtype float32: weights in bfloat16 are computed with in bfloat16"
    failure(says, runs.code, **HALF, dtype="float32")


@pytest.mark.parametrize(
    "more",
    [
        {"direction": "lowrank"},
        {"optimizer": "adam", "direction": "rademacher"},
        {"optimizer": "mudamw", "weight_decay": 0.1},
        {"mode": "FO", "query_budget_q": None, "parallel_q_computation": None},
        {"direction": "feedback", "query_budget_q": 1, "carry": "branch"},
        {"mode": "Instruct", "bp_interval": 2, "direction": "gaussian"},
        {"head": "closed_form"},
        {"scope": "layerwise", "stage_steps": "2,2"},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_resume_and_replay_are_bitwise(runs, more):
    kept = harness.weights(runs.goes_on(5, **HALF | more))
    assert {value.dtype for value in kept.values() if value.ndim > 1} == {torch.bfloat16}
    assert {value.dtype for value in kept.values() if value.ndim == 1} == {torch.float32}
    assert all(value.isfinite().all() for value in kept.values())


def test_a_loaded_model_is_computed_as_transformers_does(runs, saved):
    """And adapters beside bfloat16 weights are float32, so that their queries may be in place."""
    folder, out = saved(), runs.folder / "out"
    given = folder_flags(folder, weights="bfloat16", scope="lora:2", max_steps=2, export_dir=out)
    run = runs.train(**given, export_adapter=True)
    assert {v.dtype for v in load_file(out / "adapter_model.safetensors").values()} == {torch.float32}
    corpus = harness.corpus(zo.read_config(run))
    ids = corpus.sequences("validation", corpus.validation_rows)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert float(harness.metrics(run)[0]["val_loss"]) == pytest.approx(loss, abs=2e-2)


def test_what_is_not_finite_stays_so():
    """Among them the NaN that CUDA makes, whose bits would carry into the sign."""
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0x7F800000, -(2**23)], dtype=torch.int64)
    values = patterns.to(torch.int32).view(torch.float32).repeat(500, 1)
    assert not stored(values, 0, 1, 2, 3, 0).isfinite().any()


def test_a_weight_that_is_not_finite_ends_the_run_and_is_named(runs, monkeypatch, failure):
    own, calls = zo.store, []

    def damaged(out: torch.Tensor, values: torch.Tensor, *at: int) -> None:
        own(out, values, *at)
        calls.append(at)
        if at[1] == 2 and at[2] == 3:
            out[0] = math.nan

    monkeypatch.setattr(zo, "store", damaged)
    line = failure("step 2: model.layers.", runs.code, **HALF, max_steps=4, save_interval=1, code=3)
    assert "holds a value that is not finite" in line
    kept = harness.weights(harness.only_run(runs.folder / "logs"))
    assert all(value.isfinite().all() for value in kept.values())


def test_gradients_of_an_embedding_are_summed_in_float32(workers):
    """Of 4,096 tokens, most of them the same: a bfloat16 sum would stop growing."""
    model, exact, half, full, _ = pair()
    ids = torch.zeros(128, 32, dtype=torch.int64)
    ids[::7] = torch.arange(32) % 61
    table = next(tensor.index for tensor in half if "embed" in tensor.name)
    one, two = (
        zo.Objective(each, workers, torch.bfloat16).gradient(ids, ids, own)[1][table].float()
        for each, own in ((model, half), (exact, full))
    )
    assert (one - two).norm() < 0.02 * two.norm()


def test_norms_are_loaded_and_kept_as_they_are(runs, saved):
    """Also through an export of a bfloat16 run, which goes on from it."""
    folder, out = saved(), runs.folder / "out"
    first = load_file(folder / "model.safetensors")
    norms = {name: value + torch.rand(value.shape) / 3 for name, value in first.items() if value.ndim == 1}
    save_file(first | norms, folder / "model.safetensors", metadata={"format": "pt"})
    given = folder_flags(folder, **HALF, learning_rate=1e-12, max_steps=1, export_dir=out)
    runs.train("one", **given)
    assert all(torch.equal(load_file(out / "model.safetensors")[name], value) for name, value in norms.items())


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("q", [1, 3])
def test_a_query_with_as_many_rows_as_tokens_is_batched_too(runs, weights, q, recwarn):
    """A token more, which nothing sees: two signs of 8 rows, and 16 tokens; it is float32's in place."""
    shape = {"batch_size": 8, "block_size": 16, "query_budget_q": q, "max_steps": 2, "parallel_q_computation": True}
    run = runs.train("batched", **shape, parallel_batch_size=2, weights=weights, prompt="the people", max_samples=200)
    assert not [each for each in recwarn if "one after the other" in str(each.message)]
    if weights == "float32":
        plain = runs.train("plain", **shape | {"parallel_q_computation": None}, max_samples=200)
        one, two = (zo.Journal(each / "journal.jsonl", zo.read_config(each).identity).get(0) for each in (run, plain))
        assert one.loss == pytest.approx(two.loss, abs=1e-5)
        np.testing.assert_allclose(one.projected_grads, two.projected_grads, atol=2e-2)
