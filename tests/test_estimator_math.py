"""The estimator: unbiased, to order epsilon^2, applied along the directions that were measured, leaving no trace."""

import copy
import gc
import itertools
import math
import weakref
from types import SimpleNamespace

import harness
import numpy as np
import pytest
import torch
from test_directions import aligned_family, flat, guide_of, tensors_of, whole

import reproduce_zo_paper as zo

FAMILIES = {"gaussian": zo.Gaussian(), "rademacher": zo.Rademacher(), "lowrank": zo.LowRank(2)}
NO_MUON = [("mudamw", name) for name in ("lowrank", "aligned", "guided aligned")]
every_family = pytest.mark.parametrize("name", FAMILIES)
KINDS = [*FAMILIES, "aligned", "guided", "guided aligned"]
every_kind = pytest.mark.parametrize("name", KINDS)
RULES = [pair for pair in itertools.product(("sgd", "adam", "mudamw"), KINDS) if pair not in NO_MUON]
on_both_paths = pytest.mark.parametrize("parallel", [False, True])


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(0))


def masked(ids: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3, zo.IGNORE_INDEX, ids)


class Setting:
    """A small Llama with tied embeddings, and queries of a family on a batch that is partly masked."""

    def __init__(self, name: str, workers, q: int = 3, epsilon: float = 1e-4, dtype: str = "float64"):
        self.model, self.ids, self.labels = harness.llama(dtype), tokens(), masked(tokens())
        self.objective = zo.Objective(self.model, workers)
        self.tensors = zo.trainable_tensors(self.model.named_parameters())
        family = aligned_family(self.tensors, 2) if "aligned" in name else FAMILIES.get(name, FAMILIES["gaussian"])
        family = zo.Guided(family, self.tensors, guide_of(self.tensors), 0.5) if "guided" in name else family
        self.queries = zo.Queries(family, 1, 2, q, epsilon)
        self.model.lm_head.weight.data[0, :2] = -1e-12
        self.grid = zo.Grid(self.tensors, epsilon, family.largest, workers)
        self.before = [parameter.detach().clone() for parameter in self.model.parameters()]

    def unmoved(self) -> bool:
        """Bit for bit: -0.0 is not 0.0."""
        return all(
            p.detach().numpy().tobytes() == b.numpy().tobytes() for p, b in zip(self.model.parameters(), self.before)
        )

    def losses(self, group: int = 0) -> np.ndarray:
        batch = lambda query: (self.ids, self.labels, None)  # noqa: E731
        return zo.query_losses(self.objective, self.tensors, batch, self.queries, group, self.grid)

    def directions(self, query: int) -> list[torch.Tensor]:
        return [whole(self.queries.family, t, 1, 2, query).view(t.parameter.shape) for t in self.tensors]


def measured(function, family, q: int, epsilon: float, workers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scalars of a function of 32 parameters [q], the directions [q, 32], and the parameters."""
    tensors = [zo.Tensor(t.index, t.name, t.parameter.double()) for t in tensors_of((5, 4), (3, 2), (6,))]
    for tensor in tensors:
        tensor.matrix.normal_(generator=torch.Generator().manual_seed(tensor.index))
    theta = lambda: torch.cat([tensor.matrix.flatten() for tensor in tensors])  # noqa: E731
    objective = SimpleNamespace(losses=lambda *batch: function(theta()), workers=workers)
    losses = zo.query_losses(objective, tensors, lambda query: (0, 0), zo.Queries(family, 0, 0, q, epsilon))
    z = torch.stack([flat(family, tensors, query) for query in range(q)])
    return torch.from_numpy(zo.projected_gradients(losses, epsilon)), z, theta()


@every_family
def test_projected_gradients_are_right_to_order_epsilon_squared(name, workers):
    """On a quadratic central differences are exact; on sum theta^3, c - grad . z is epsilon^2 sum z^3."""
    generator = torch.Generator().manual_seed(1)
    root, slope = torch.randn(33, 32, generator=generator, dtype=torch.float64).div(5).split([32, 1])
    c, z, theta = measured(lambda t: (root @ t).square().sum() / 2 + slope[0] @ t, FAMILIES[name], 9, 1e-2, workers)
    torch.testing.assert_close(c, z @ (root.T @ root @ theta + slope[0]), rtol=1e-8, atol=1e-8)
    for epsilon in (0.2, 0.05):
        c, z, theta = measured(lambda t: t.pow(3).sum(), FAMILIES[name], 2, epsilon, workers)
        torch.testing.assert_close(c - z @ (3 * theta.square()), epsilon**2 * z.pow(3).sum(1), rtol=1e-6, atol=0)


@every_kind
def test_losses_are_those_of_weights_moved_by_hand_on_both_paths(name, workers, small_blocks):
    """L(theta + epsilon z) and L(theta - epsilon z), tied embeddings moved once; c is the gradient's part along z."""
    setting = Setting(name, workers)
    losses, (_, gradient) = setting.losses(), setting.objective.gradient(setting.ids, setting.labels, setting.tensors)
    for query, zs in enumerate(map(setting.directions, range(3))):
        for column, sign in enumerate((1, -1)):
            moved = copy.deepcopy(setting.model)
            for parameter, z in zip(moved.parameters(), zs):
                parameter.data.add_(z, alpha=sign * 1e-4)
            loss = moved(input_ids=setting.ids, labels=setting.labels).loss.item()
            assert losses[query, column] == pytest.approx(loss, abs=1e-6)
        along = sum((part * z).sum().item() for part, z in zip(gradient, zs))
        assert zo.projected_gradients(losses, 1e-4)[query] == pytest.approx(along, rel=1e-3, abs=2e-3)
    for group in (1, 2, 3):
        np.testing.assert_allclose(setting.losses(group), losses, rtol=0, atol=1e-9)
    assert setting.unmoved()


@pytest.mark.parametrize(("optimizer", "name"), RULES)
def test_updates_are_along_what_was_measured(optimizer, name, workers, small_blocks):
    """Three steps equal torch's own optimizers on (1/q) sum c_i z_i / gain built by hand; a dropped query counts for
    nothing; weight decay is for matrices alone.
    """
    setting, c, theirs = Setting(name, workers), np.array([0.3, math.nan, 0.7]), []
    ours = zo.Optimizer(optimizer, setting.tensors, workers, 0.1, zo.outer_parameters(setting.model))
    other, zs = copy.deepcopy(setting.model), [setting.directions(query) for query in (0, 2)]
    for tensor, parameter in zip(setting.tensors, other.parameters()):
        how = {"params": [parameter], "lr": 0.01, "weight_decay": 0.1 * (parameter.ndim > 1)}
        if optimizer == "sgd":
            theirs.append(torch.optim.SGD(**how))
        elif optimizer == "mudamw" and parameter.ndim == 2 and "embed" not in tensor.name:
            theirs.append(torch.optim.Muon(**how, adjust_lr_fn="match_rms_adamw"))
        else:
            theirs.append(torch.optim.AdamW(**how, betas=(0.9, 0.95)))
        parameter.grad = (c[0] * zs[0][tensor.index] + c[2] * zs[1][tensor.index]) / 2 / setting.queries.family.gain
    for _ in range(3):
        ours.apply_estimate(setting.tensors, setting.queries, c, 0.01)
        for each in theirs:
            each.step()
    for one, two, old in zip(setting.model.parameters(), other.parameters(), setting.before):
        torch.testing.assert_close(one - old, two - old, rtol=1e-4, atol=1e-4 * (two - old).abs().max().item())


@every_kind
def test_weights_come_back_and_the_number_of_workers_changes_no_bit_of_an_update(name, small_blocks, workers):
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        with zo.Workers(torch.device("cpu")) as several:
            setting = Setting(name, several, q=20, epsilon=1e-3, dtype="float32")
            for group in (0, 20):
                assert np.isfinite(setting.losses(group)).all()
                assert setting.unmoved()
            optimizer, c = zo.Optimizer("sgd", setting.tensors, several), np.linspace(-1, 1, 20)
            optimizer.apply_estimate(setting.tensors, setting.queries, c, 0.1)
            results.append(list(setting.model.parameters()))
    assert all(torch.equal(one, two) for one, two in zip(*results))


@pytest.mark.parametrize(("what", "call"), [("losses", 1), ("losses", 2), ("losses", 3), ("draw", 5), ("draw", 200)])
@pytest.mark.parametrize("count", [1, 3])
def test_weights_come_back_when_measuring_fails(what, call, count, small_blocks, monkeypatch, workers):
    """A forward pass, or one block of a direction in the midst of moving the weights: out of memory, say."""
    torch.set_num_threads(count)
    with zo.Workers(torch.device("cpu")) as several:
        setting, calls = Setting("gaussian", several, dtype="float32"), itertools.count(1)
        owner = setting.objective if what == "losses" else zo
        own = getattr(owner, what)

        def failing(*args):
            if next(calls) == call:
                raise RuntimeError("in the midst" if what == "draw" or not setting.unmoved() else "nothing had moved")
            return own(*args)

        monkeypatch.setattr(owner, what, failing)
        with pytest.raises(RuntimeError, match="in the midst"):
            setting.losses()
    assert setting.unmoved()


def estimate(model, **how) -> tuple[list[torch.Tensor], torch.Tensor]:
    arguments = {"trainable_params": model.parameters(), "loss_fn": None, "inputs": tokens(), "labels": tokens()}
    return zo.zo_gradient_estimator(model, **arguments | {"q": 3, "epsilon": 1e-4, "device": "cpu"} | how)


@every_family
@on_both_paths
@pytest.mark.parametrize("data", ["shared", "distinct"])
def test_the_function_returns_the_mean_of_c_z(name, parallel, data, workers):
    """Of a tied weight under both its names; with distinct data, each query on its own rows."""
    setting, ids = Setting(name, workers), tokens(6)
    named = list(setting.model.named_parameters(remove_duplicate=False))
    how = {"parallel_q_computation": parallel, "parallel_batch_size": 2, "query_data": data, "trainable_params": named}
    how |= {"direction": name, "rank": 2, "inputs": ids, "labels": masked(ids)}
    grads, loss = estimate(setting.model, seed=1, step=2, **how)
    assert setting.unmoved()
    rows = lambda query: slice(2 * query, 2 * query + 2) if data == "distinct" else slice(6)  # noqa: E731
    batch = lambda query: (ids[rows(query)], masked(ids)[rows(query)], None)  # noqa: E731
    losses = zo.query_losses(setting.objective, setting.tensors, batch, setting.queries)
    assert loss.item() == pytest.approx(losses.mean(), rel=1e-6)
    c, zs = zo.projected_gradients(losses, 1e-4), [setting.directions(query) for query in range(3)]
    of = {id(t.parameter): sum(c[i] / 3 * zs[i][t.index] for i in range(3)) for t in setting.tensors}
    assert len(grads) == len(of) + 1
    for grad, (_, parameter) in zip(grads, named):
        torch.testing.assert_close(grad, of[id(parameter)].to(grad.dtype), rtol=1e-4, atol=1e-4)
    for seed, step in [(0, 2), (1, 0)]:
        assert not torch.allclose(estimate(setting.model, seed=seed, step=step, **how)[0][1], grads[1], atol=0.01)


WRONG = [("q", value) for value in (0, -1, 2.5, math.inf)] + [("rank", value) for value in (0, -1, 1.5)]
WRONG += [("epsilon", value) for value in (0.0, -1e-3, math.nan, math.inf, 1e300)] + [("parallel_batch_size", 0)]
WRONG += [("query_data", "distict"), ("query_data", "distinct"), ("direction", "gausian"), ("labels", tokens(3))]
WRONG += [("labels", tokens() * 0 - 100), ("labels", tokens() + 61), ("inputs", tokens() + 61)]
WRONG += [("trainable_params", [torch.nn.Parameter(torch.zeros(3))]), ("trainable_params", []), ("shape", (2, 1))]
WRONG += [("inputs", tokens() / 2), ("trainable_params", [torch.nn.Parameter(torch.zeros(3).half())])]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda each: str(each)[:12])
@on_both_paths
def test_what_cannot_be_used_is_refused_in_one_line_and_changes_nothing(tiny_llama, name, value, parallel):
    before = copy.deepcopy(tiny_llama.state_dict())
    wrong = dict.fromkeys(("inputs", "labels"), tokens(*value)) if name == "shape" else {name: value}
    with pytest.raises(ValueError, match=r"^[^\n]{10,250}$"):
        estimate(tiny_llama, parallel_q_computation=parallel, **wrong)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


@on_both_paths
@pytest.mark.parametrize("broken", ["losses", "weights"])
def test_what_is_not_finite_is_an_error(tiny_llama, broken, parallel):
    tiny_llama.lm_head.weight.data[0, 0] *= math.nan if broken == "weights" else 1.0
    cross_entropy = torch.nn.functional.cross_entropy
    loss_fn = (lambda *given: cross_entropy(*given) * math.inf) if broken == "losses" else None
    with pytest.raises(FloatingPointError, match="finite"):
        estimate(tiny_llama, parallel_q_computation=parallel, loss_fn=loss_fn)


@pytest.mark.parametrize("head", ["tied", "untied", "with a bias and huge logits"])
def test_loss_and_gradients_are_transformers_and_autograds(head, workers, monkeypatch):
    """The next-token shift and the -100 labels, for one group and for several; and, with any number of workers, the
    closed form: the output layer's gradient, of a tied embedding the output side's alone, and that of its input.
    """
    for name, size in {"TILE_TOKENS": 5, "TILE_VOCABULARY": 3, "SLAB_VOCABULARY": 7}.items():
        monkeypatch.setattr(zo, name, size)
    model, ids, labels = harness.llama("float64", head == "tied"), tokens(6), masked(tokens(6))
    if "bias" in head:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-3, 3, 61, dtype=torch.float64))
        model.lm_head.weight.data.mul_(300)
    tensors, objective = zo.trainable_tensors(model.named_parameters()), zo.Objective(model, workers)
    assert objective.sliced
    for rows, loss in zip(range(0, 6, 2), objective.losses(ids, labels, None, 3).tolist()):
        theirs = model(input_ids=ids[rows : rows + 2], labels=labels[rows : rows + 2]).loss
        assert loss == pytest.approx(theirs.item(), rel=1e-6)
    (loss, gradients), theirs = objective.gradient(ids, labels, tensors), model(input_ids=ids, labels=labels).loss
    assert loss == pytest.approx(theirs.item(), rel=1e-6)
    for ours, other in zip(gradients, torch.autograd.grad(theirs, list(model.parameters()))):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-5 * other.abs().max().item())
    hidden = model.model(ids).last_hidden_state.detach().requires_grad_()
    logits = model.lm_head(hidden)[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    back, inside = torch.autograd.grad(wanted, [hidden, model.lm_head.weight])
    errors = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with zo.Workers(torch.device("cpu")) as several:
            errors.append(zo.Objective(model, several).error(hidden.detach(), labels, back=True))
        assert errors[-1].loss == pytest.approx(wanted.item(), rel=1e-12)
        torch.testing.assert_close(errors[-1].back, back[:, :-1].flatten(0, 1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(errors[-1].weight, inside, rtol=1e-9, atol=1e-12)
        assert all(torch.equal(one, two) for one, two in zip(errors[-1][1:3], errors[0][1:3]))


@pytest.mark.parametrize("direction", ["gaussian", "lowrank"])
def test_what_a_pass_holds_is_freed_without_the_garbage_collector(direction, workers, monkeypatch):
    """Which does not know how large hidden states are."""
    made, begin = weakref.WeakSet(), zo.HeadTiles.__init__
    monkeypatch.setattr(zo.HeadTiles, "__init__", lambda self, *given: made.add(self) or begin(self, *given))
    model, ids = harness.llama(), torch.arange(40).view(4, 10)
    tensors, objective = zo.trainable_tensors(model.named_parameters()), zo.Objective(model, workers)
    queries, batch = zo.Queries(zo.DIRECTIONS[direction](), 0, 0, 3, 1e-3), zo.query_batch(ids, ids, 3, "shared")
    gc.disable()
    try:
        for group in (0, 2):
            zo.query_losses(objective, tensors, batch, queries, group)
        objective.error(objective.hidden(ids).detach(), ids, back=True)
        assert not made
    finally:
        gc.enable()
