"""The estimator: unbiased, of order epsilon^2, applied along the directions that were measured, and leaving no trace."""

import copy
import itertools
import math

import harness
import numpy as np
import pytest
import torch
import transformers

import reproduce_zo_paper as zo

CPU = torch.device("cpu")
FAMILIES = {
    "gaussian": zo.Isotropic("gaussian"),
    "rademacher": zo.Isotropic("rademacher"),
    "lowrank": zo.Isotropic("lowrank", 2),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


class Function:
    """An objective that is a function of parameters, for estimators to measure."""

    def __init__(self, function, shapes, workers):
        generator = torch.Generator().manual_seed(3)
        self.parameters = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
        self.tensors = zo.trainable_tensors((f"p{i}", p) for i, p in enumerate(self.parameters))
        self.function, self.workers, self.device = function, workers, CPU

    def flat(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters])

    def losses(self, input_ids, labels, groups=1, batched=None) -> torch.Tensor:
        return self.function(self.flat())[None]

    def estimate(self, queries: zo.Queries) -> zo.Estimate:
        return zo.projected_gradients(self, self.tensors, lambda query: (None, None), queries)


def direction(tensors, queries: zo.Queries, query: int) -> list[torch.Tensor]:
    """z_i on every tensor, put together from its blocks, in float64."""
    parts = []
    for tensor in tensors:
        z = torch.empty(tensor.rows, tensor.columns, dtype=tensor.parameter.dtype)
        for block in tensor.blocks:
            queries.family.direction(tensor, queries.at(query)).block(block, z[tensor.span(block)])
        parts.append(z.double().view(tensor.parameter.shape))
    return parts


def flat_direction(tensors, queries: zo.Queries, query: int) -> torch.Tensor:
    return torch.cat([part.flatten() for part in direction(tensors, queries, query)])


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed))


def estimate_of(model, ids, queries: zo.Queries, workers, group: int = 0) -> tuple[zo.Estimate, list[zo.Tensor]]:
    tensors = zo.trainable_tensors(model.named_parameters())
    objective = zo.Objective(model, workers)
    return zo.projected_gradients(objective, tensors, lambda query: (ids, ids), queries, group), tensors


# ---- expectation and bias --------------------------------------------------------------------------------------------

QUADRATIC_SHAPES = [(5, 4), (3, 2), (6,)]


def quadratic(dimension: int = 32):
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) / math.sqrt(dimension)
    matrix, slope = root @ root.T, torch.randn(dimension, generator=generator, dtype=torch.float64)
    return (lambda theta: theta @ matrix @ theta / 2 + slope @ theta), (lambda theta: matrix @ theta + slope)


@every_family
def test_the_estimate_is_unbiased(name, workers):
    """On a quadratic central differences are exact, so the mean of c z is the gradient within its standard error."""
    value, gradient = quadratic()
    function, q = Function(value, QUADRATIC_SHAPES, workers), 1200
    queries = zo.Queries(FAMILIES[name], 0, 0, q, 1e-2)
    c = function.estimate(queries).projected_grads
    true = gradient(function.flat())
    samples = torch.stack([c[i] * flat_direction(function.tensors, queries, i) for i in range(q)])
    error = samples.std(0) / math.sqrt(q)
    assert ((samples.mean(0) - true).abs() < 5 * error).all()
    along = samples @ true / true.square().sum()
    assert abs(along.mean().item() - 1) < 5 * along.std().item() / math.sqrt(q) < 0.5


@every_family
def test_a_projected_gradient_is_the_gradient_along_z(name, workers):
    value, gradient = quadratic()
    function = Function(value, QUADRATIC_SHAPES, workers)
    queries = zo.Queries(FAMILIES[name], 0, 4, 20, 1e-2)
    c = function.estimate(queries).projected_grads
    true = gradient(function.flat())
    expected = [(flat_direction(function.tensors, queries, i) @ true).item() for i in range(20)]
    np.testing.assert_allclose(c, expected, rtol=1e-9, atol=1e-9)


def test_the_norm_of_the_estimate_is_what_theory_says(workers):
    """E||g||^2 = (d + q + 1) / q ||grad||^2 for Gaussian directions."""
    value, gradient = quadratic()
    function, q, steps = Function(value, QUADRATIC_SHAPES, workers), 4, 200
    true = gradient(function.flat()).square().sum().item()
    norms = []
    for step in range(steps):
        queries = zo.Queries(FAMILIES["gaussian"], 0, step, q, 1e-2)
        c = function.estimate(queries).projected_grads
        norms.append((sum(c[i] * flat_direction(function.tensors, queries, i) for i in range(q)) / q).square().sum().item())
    norms = np.array(norms) / true
    assert abs(norms.mean() - (32 + q + 1) / q) < 5 * norms.std() / math.sqrt(steps)


@every_family
def test_the_bias_is_of_order_epsilon_squared(name, workers):
    """On sum theta^3, c - grad . z is exactly epsilon^2 sum z^3."""
    function = Function(lambda theta: theta.pow(3).sum(), QUADRATIC_SHAPES, workers)
    biases = {}
    for epsilon in (0.2, 0.1, 0.05):
        queries = zo.Queries(FAMILIES[name], 0, 0, 1, epsilon)
        c = function.estimate(queries).projected_grads[0]
        theta, z = function.flat(), flat_direction(function.tensors, queries, 0)
        biases[epsilon] = c - (3 * theta.square() @ z).item()
        assert biases[epsilon] == pytest.approx(epsilon**2 * z.pow(3).sum().item(), rel=1e-6)
    assert biases[0.2] / biases[0.1] == pytest.approx(4, rel=1e-5)
    assert biases[0.1] / biases[0.05] == pytest.approx(4, rel=1e-5)


def test_the_mean_loss_is_the_loss_to_order_epsilon_squared(workers):
    function = Function(lambda theta: theta.pow(3).sum(), QUADRATIC_SHAPES, workers)
    at_theta = function.function(function.flat()).item()
    errors = []
    for epsilon in (0.2, 0.1):
        estimate = function.estimate(zo.Queries(FAMILIES["gaussian"], 0, 0, 3, epsilon))
        errors.append(estimate.loss - at_theta)
    assert errors[0] / errors[1] == pytest.approx(4, rel=1e-5)


@every_family
def test_the_estimate_points_along_a_models_true_gradient(name, tiny_llama):
    """On a language model: the mean of many queries, against backpropagation, within its standard error."""
    model, ids, calls, q = tiny_llama.double(), tokens(), 8, 20
    parameters = list(model.parameters())
    true = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters)
    true = torch.cat([part.flatten() for part in true]).double()
    along = []
    for step in range(calls):
        grads, _ = zo.zo_gradient_estimator(model, parameters, None, ids, ids, q, 1e-4, "cpu", step=step, direction=name, rank=2)
        along.append((torch.cat([g.flatten() for g in grads]) @ true / true.square().sum()).item())
    assert abs(np.mean(along) - 1) < 5 * np.std(along) / math.sqrt(calls) < 0.9


# ---- what is measured is what is applied -----------------------------------------------------------------------------


def guided(tensors) -> zo.Guided:
    guide = [torch.randn(t.rows, t.columns, generator=torch.Generator().manual_seed(t.index)) for t in tensors]
    norm = math.sqrt(sum(part.square().sum().item() for part in guide))
    return zo.Guided(zo.Isotropic("gaussian"), [part / norm for part in guide], 0.5)


def family_for(name: str, tensors):
    return guided(tensors) if name == "guided" else FAMILIES[name]


every_kind = pytest.mark.parametrize("name", [*FAMILIES, "guided"])


@every_kind
def test_losses_are_those_of_weights_moved_by_hand(name, workers, small_blocks):
    """L(theta + epsilon z) and L(theta - epsilon z) with z from its blocks, tied embeddings moved once."""
    model, ids = harness.llama("float64"), tokens()
    tensors = zo.trainable_tensors(model.named_parameters())
    queries = zo.Queries(family_for(name, tensors), 1, 2, 3, 1e-2)
    estimate, _ = estimate_of(model, ids, queries, workers)
    objective = zo.Objective(copy.deepcopy(model), workers)
    for query in range(3):
        for column, sign in enumerate((1, -1)):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for parameter, z in zip(moved.parameters(), direction(tensors, queries, query)):
                    parameter.add_(z, alpha=sign * 1e-2)
            objective.model = moved
            objective.head = moved.get_output_embeddings()
            assert estimate.losses[query, column] == pytest.approx(objective.losses(ids, ids).item(), abs=1e-9)


@every_kind
def test_sgd_moves_along_what_was_measured(name, workers, small_blocks):
    """theta changes by -lr/q sum c_i z_i, with the z_i that were measured (over the gain, where guided)."""
    model = harness.llama("float64")
    tensors = zo.trainable_tensors(model.named_parameters())
    queries = zo.Queries(family_for(name, tensors), 1, 2, 3, 1e-3)
    estimate, _ = estimate_of(model, tokens(), queries, workers)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    zo.Optimizer("sgd", tensors, 0.0, set(), workers).apply_estimate(queries, estimate.projected_grads, 0.1)
    zs = [direction(tensors, queries, query) for query in range(3)]
    for index, (parameter, old) in enumerate(zip(model.parameters(), before)):
        wanted = -0.1 / 3 / queries.family.gain * sum(c * z[index] for c, z in zip(estimate.projected_grads, zs))
        assert wanted.abs().max() > 0
        torch.testing.assert_close(parameter.detach() - old, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("name", ["adam", "mudamw"])
def test_adam_and_mudamw_get_the_gradient_that_was_measured(name, workers, small_blocks):
    """Three steps equal torch's own optimizers on gradients built by hand."""
    model = harness.llama("float64")
    other = copy.deepcopy(model)
    tensors = zo.trainable_tensors(model.named_parameters())
    ours = zo.Optimizer(name, tensors, 0.1, zo.outer_parameters(model), workers)
    plain, muon = [], []
    for parameter_name, parameter in other.named_parameters():
        hidden = parameter.ndim == 2 and "embed" not in parameter_name and name == "mudamw"
        (muon if hidden else plain).append(parameter)
    theirs = [
        torch.optim.AdamW([p for p in plain if p.ndim > 1], 0.01, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW([p for p in plain if p.ndim == 1], 0.01, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    if muon:
        theirs.append(torch.optim.Muon(muon, 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    c = np.array([0.3, -1.2, 0.7])
    for step in range(3):
        queries = zo.Queries(FAMILIES["gaussian"], 0, step, 3, 1e-3)
        for index, parameter in enumerate(other.parameters()):
            parameter.grad = sum(c[i] / 3 * direction(tensors, queries, i)[index] for i in range(3))
        for optimizer in theirs:
            optimizer.step()
        ours.apply_estimate(queries, c, 0.01)
    for one, two in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sgd_decays_matrices_only(workers):
    model = harness.llama("float64")
    tensors = zo.trainable_tensors(model.named_parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    queries = zo.Queries(FAMILIES["gaussian"], 0, 0, 1, 1e-3)
    zo.Optimizer("sgd", tensors, 0.5, set(), workers).apply_estimate(queries, np.array([0.0]), 0.1)
    for parameter, old in zip(model.parameters(), before):
        torch.testing.assert_close(parameter.detach(), old * (0.95 if old.ndim > 1 else 1.0))


def test_a_dropped_query_counts_for_nothing(workers):
    """NaN in place of c_1: the update is that of the other queries, over their number."""
    models = [harness.llama("float64") for _ in range(2)]
    queries = zo.Queries(FAMILIES["gaussian"], 0, 0, 3, 1e-3)
    for model, c in zip(models, ([0.5, math.nan, -2.0], [0.75, 0.0, -3.0])):
        tensors = zo.trainable_tensors(model.named_parameters())
        zo.Optimizer("sgd", tensors, 0.0, set(), workers).apply_estimate(queries, np.array(c), 0.1)
    for one, two in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "lowrank"])
def test_the_number_of_workers_changes_no_bit(name, small_blocks):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            model = harness.llama()
            with zo.Workers(CPU) as workers:
                tensors = zo.trainable_tensors(model.named_parameters())
                queries = zo.Queries(FAMILIES[name], 0, 0, 3, 1e-3)
                zo.Grid(tensors, 1e-3, 6.0, workers)
                zo.Optimizer("sgd", tensors, 0.0, set(), workers).apply_estimate(queries, np.array([1.0, -2.0, 0.5]), 0.1)
            results.append([parameter.detach().clone() for parameter in model.parameters()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results))


# ---- weights come back -----------------------------------------------------------------------------------------------


@every_kind
def test_weights_come_back_bit_for_bit(name, workers, small_blocks):
    model, ids = harness.llama(), tokens()
    tensors = zo.trainable_tensors(model.named_parameters())
    objective = zo.Objective(model, workers)
    queries = zo.Queries(family_for(name, tensors), 0, 0, 40, 1e-3)
    grid = zo.Grid(tensors, 1e-3, queries.family.largest, workers)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    zo.sequential_losses(objective, grid, lambda query: (ids, ids), queries, range(40))
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before))


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_weights_come_back_when_a_forward_pass_fails(call, workers, small_blocks):
    model, ids = harness.llama(), tokens()
    tensors = zo.trainable_tensors(model.named_parameters())
    objective, calls = zo.Objective(model, workers), []
    grid = zo.Grid(tensors, 1e-3, FAMILIES["gaussian"].largest, workers)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    losses = objective.losses

    def failing(*args):
        calls.append(args)
        assert not all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before))
        if len(calls) == call:
            raise RuntimeError("broken forward")
        return losses(*args)

    objective.losses = failing
    queries = zo.Queries(FAMILIES["gaussian"], 0, 0, 2, 1e-3)
    with pytest.raises(RuntimeError, match="broken forward"):
        zo.sequential_losses(objective, grid, lambda query: (ids, ids), queries, range(2))
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before))


def test_settling_moves_weights_by_rounding_only_and_once(workers, small_blocks):
    model = harness.llama()
    tensors = zo.trainable_tensors(model.named_parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    grid = zo.Grid(tensors, 1e-3, 6.0, workers)
    settled = [parameter.detach().clone() for parameter in model.parameters()]
    for tensor, old in zip(tensors, before):
        for block in tensor.blocks:
            span = tensor.span(block)
            moved = (tensor.matrix[span] - old.view(tensor.rows, tensor.columns)[span]).abs().max().item()
            largest = old.view(tensor.rows, tensor.columns)[span].abs().max().item()
            assert moved <= grid.spacing[tensor.index, block] / 2 <= 2 * (largest + 0.04) * 2.0**-24
    zo.Grid(tensors, 1e-3, 6.0, workers)
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), settled))


def test_settling_names_a_tensor_that_is_not_finite(workers):
    model = harness.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    tensors = zo.trainable_tensors(model.named_parameters())
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.up_proj"):
        zo.Grid(tensors, 1e-3, 6.0, workers)


@pytest.mark.parametrize("count", [1, 3])
def test_weights_come_back_when_a_direction_cannot_be_drawn(count, small_blocks, monkeypatch):
    """One block of many fails, in the midst of moving the weights: out of memory, say."""
    threads, model, ids = torch.get_num_threads(), harness.llama(), tokens()
    torch.set_num_threads(count)
    try:
        with zo.Workers(CPU) as workers:
            tensors = zo.trainable_tensors(model.named_parameters())
            objective = zo.Objective(model, workers)
            grid = zo.Grid(tensors, 1e-3, 6.0, workers)
            before = [parameter.detach().clone() for parameter in model.parameters()]
            draw, calls = zo.draw, []

            def failing(*args):
                calls.append(args)
                if len(calls) == 10:
                    raise RuntimeError("no memory for a block")
                return draw(*args)

            monkeypatch.setattr(zo, "draw", failing)
            queries = zo.Queries(FAMILIES["gaussian"], 0, 0, 1, 1e-3)
            with pytest.raises(RuntimeError, match="no memory for a block"):
                zo.sequential_losses(objective, grid, lambda query: (ids, ids), queries, range(1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before))


# ---- the library function --------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("parallel", [False, True])
def test_the_function_returns_the_mean_of_c_z(name, parallel, workers):
    model, ids = harness.llama("float64"), tokens()
    grads, loss = zo.zo_gradient_estimator(
        model, model.named_parameters(), None, ids, ids, 3, 1e-3, "cpu", parallel, 2, seed=8, step=9, direction=name, rank=2
    )
    queries = zo.Queries(FAMILIES[name], 8, 9, 3, 1e-3)
    estimate, tensors = estimate_of(model, ids, queries, workers)
    assert loss.item() == pytest.approx(estimate.losses.mean(), rel=1e-6)
    for index, (grad, parameter) in enumerate(zip(grads, model.parameters())):
        wanted = sum(c / 3 * direction(tensors, queries, i)[index] for i, c in enumerate(estimate.projected_grads))
        assert (grad.shape, grad.dtype) == (parameter.shape, parameter.dtype)
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_tied_weights_are_one_direction(workers):
    """Passed once or under both names, tied or not moved twice: the same losses and gradient."""
    model, ids = harness.llama("float64"), tokens()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors = zo.trainable_tensors(model.named_parameters(remove_duplicate=False))
    assert len(tensors) == len(list(model.parameters()))
    queries = zo.Queries(FAMILIES["gaussian"], 0, 0, 1, 0.01)
    seen = []
    objective = zo.Objective(model, workers)
    theta = model.lm_head.weight.detach().clone()
    losses = objective.losses

    def looking(*args):
        seen.append(model.lm_head.weight.detach() - theta)
        return losses(*args)

    objective.losses = looking
    zo.projected_gradients(objective, tensors, lambda query: (ids, ids), queries)
    z = direction(tensors, queries, 0)[0]
    torch.testing.assert_close(seen[0], 0.01 * z, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(seen[1], -0.01 * z, rtol=1e-6, atol=1e-9)


def test_distinct_data_is_a_loop_of_single_queries(workers):
    """Each query on its own rows: the same as asking one query at a time with those rows."""
    model, ids, q = harness.llama("float64"), tokens(6), 3
    grads, loss = zo.zo_gradient_estimator(
        model, list(model.parameters()), None, ids, ids, q, 1e-3, "cpu", seed=2, query_data="distinct"
    )
    tensors = zo.trainable_tensors(model.named_parameters())
    objective, queries = zo.Objective(model, workers), zo.Queries(FAMILIES["gaussian"], 2, 0, q, 1e-3)
    grid = zo.Grid(tensors, 1e-3, 6.0, workers)
    measured = [
        zo.sequential_losses(objective, grid, lambda query: (ids[2 * query : 2 * query + 2],) * 2, queries, [i]) for i in range(q)
    ]
    c = [(m[0, 0] - m[0, 1]) / 2e-3 for m in measured]
    assert loss.item() == pytest.approx(np.mean(measured), rel=1e-9)
    for index, grad in enumerate(grads):
        wanted = sum(c[i] / q * direction(tensors, queries, i)[index] for i in range(q))
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"q": 0}, {"epsilon": 0.0}, {"epsilon": math.nan}, {"q": 3, "query_data": "distinct"}, {"parallel_batch_size": 0}]
)
def test_bad_arguments_are_refused(tiny_llama, wrong):
    ids = tokens()
    arguments = {"q": 2, "epsilon": 1e-3} | wrong
    with pytest.raises(ValueError, match=r"q=|epsilon|rows"):
        zo.zo_gradient_estimator(tiny_llama, tiny_llama.parameters(), None, ids, ids, device="cpu", **arguments)


def test_seed_and_step_are_coordinates(tiny_llama):
    ids = tokens()

    def first(**at) -> torch.Tensor:
        return zo.zo_gradient_estimator(tiny_llama, tiny_llama.parameters(), None, ids, ids, 1, 1e-3, "cpu", **at)[0][0]

    assert torch.equal(first(), first(seed=0, step=0))
    assert not torch.equal(first(), first(seed=1))
    assert not torch.equal(first(), first(step=1))


# ---- the loss --------------------------------------------------------------------------------------------------------


def masked(ids: torch.Tensor, share: float = 0.3) -> torch.Tensor:
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < share
    return torch.where(hidden, -100, ids)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_transformers_own(tied, workers):
    """The next-token shift and the -100 labels, for one group and for several."""
    model, ids = harness.llama(tied=tied), tokens(6)
    labels = masked(ids)
    objective = zo.Objective(model, workers)
    assert objective.sliced
    with torch.no_grad():
        assert objective.losses(ids, ids).item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=2e-6)
        groups = objective.losses(ids, labels, 3)
        assert groups.dtype == torch.float64
        for group in range(3):
            rows = slice(2 * group, 2 * group + 2)
            theirs = model(input_ids=ids[rows], labels=labels[rows]).loss.item()
            assert groups[group].item() == pytest.approx(theirs, abs=2e-6)


def test_a_loss_of_ones_own_sees_shifted_logits(workers):
    model, ids = harness.llama("float64"), tokens(4)
    seen = []

    def loss_fn(logits, labels):
        seen.append((logits, labels))
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)

    loss = zo.Objective(model, workers, loss_fn=loss_fn).losses(ids, ids).item()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(seen[0][0].double(), logits[:, :-1].flatten(0, 1).double())
    assert torch.equal(seen[0][1], ids[:, 1:].flatten())
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    assert loss == pytest.approx(wanted.item(), rel=1e-9)


@pytest.mark.parametrize("vocabulary", [3, 16, 33, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_token_losses_are_cross_entropies(vocabulary, bias, monkeypatch, workers):
    """Tiles of tokens and vocabulary, whole and partial, joined without loss of precision."""
    for name, size in {"TILE_TOKENS": 8, "TILE_VOCABULARY": 8, "SLAB_VOCABULARY": 16}.items():
        monkeypatch.setattr(zo, name, size)
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(12, vocabulary, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 3, generator=generator)
        h = torch.randn(2, 19, 12, generator=generator, dtype=torch.float64)
        targets = torch.randint(vocabulary, (2, 19), generator=generator)
        targets[0, 3] = targets[1, :5] = -100
        ours = zo.token_losses(h, targets, zo.HeadTiles(head, 2, 1), workers)
        theirs = torch.nn.functional.cross_entropy(head(h).transpose(1, 2), targets, reduction="none")
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert ours[targets == -100].eq(0).all()


def test_token_losses_of_huge_logits_are_finite(workers):
    head = torch.nn.Linear(2, 5, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4, 0], [-1e4, 0], [0, 1], [0, 2], [0, 3]]))
        losses = zo.token_losses(torch.ones(1, 2, 2), torch.tensor([[0, 1]]), zo.HeadTiles(head, 1, 1), workers)
    assert losses[0, 0].item() == pytest.approx(0.0, abs=1e-3)
    assert losses[0, 1].item() == pytest.approx(2e4, rel=1e-5)


def gpt2_with_dropout() -> torch.nn.Module:
    about = transformers.GPT2Config(
        vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(about)


def test_dropout_is_off_while_losses_are_taken_and_on_again_after(workers):
    model, ids = gpt2_with_dropout().train(), tokens()
    objective = zo.Objective(model, workers)
    one, two = objective.losses(ids, ids).item(), objective.losses(ids, ids).item()
    assert one == two
    assert model.training
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        assert one == pytest.approx(model.eval()(input_ids=ids, labels=ids).loss.item(), abs=2e-6)


def test_dropout_is_off_in_backpropagation(workers):
    model, ids = gpt2_with_dropout().train(), tokens()
    tensors = zo.trainable_tensors(model.named_parameters())
    one, two = (zo.Objective(model, workers).gradient(ids, ids, tensors) for _ in range(2))
    assert one[0] == two[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1]))


@pytest.mark.parametrize("tied", [True, False])
def test_the_true_gradient_is_autograds(tied, workers, monkeypatch):
    monkeypatch.setattr(zo, "TILE_TOKENS", 5)
    model, ids = harness.llama(tied=tied), tokens(4)
    labels = masked(ids)
    tensors = zo.trainable_tensors(model.named_parameters())
    loss, gradients = zo.Objective(model, workers).gradient(ids, labels, tensors)
    theirs = model(input_ids=ids, labels=labels).loss
    assert loss == pytest.approx(theirs.item(), abs=2e-6)
    for ours, other in zip(gradients, torch.autograd.grad(theirs, list(model.parameters()))):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-6)


# ---- learning rates and theory ---------------------------------------------------------------------------------------


def test_the_schedule_warms_up_and_ends_at_its_minimum():
    config = zo.Config(learning_rate=1.0, use_lr_scheduler=True, warmup_steps=10, min_lr=0.1)
    rates = [zo.scheduled_rate(config, step, 110) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == max(rates) == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[110] == pytest.approx(0.1)
    assert zo.scheduled_rate(zo.Config(learning_rate=0.5), 77, 110) == 0.5


def test_the_estimators_norm_is_that_of_its_vector(workers):
    (tensor,) = zo.trainable_tensors([("w", torch.nn.Parameter(torch.zeros(200, 300)))])
    queries, c = zo.Queries(FAMILIES["gaussian"], 0, 0, 3, 1e-3), np.array([1.0, -2.0, 0.5])
    out = torch.zeros(200, 300)
    zo.add_directions([out], [tensor], queries, c / 3, workers)
    assert zo.estimator_norm(c, 60_000, 1.0) == pytest.approx(out.norm().item(), rel=0.03)
