"""The estimator: unbiased, to order epsilon^2, applied along the directions that were measured, leaving no trace."""

import copy
import math

import harness
import numpy as np
import pytest
import torch
import transformers
from test_directions import aligned_family, flat, guide_of, whole

import reproduce_zo_paper as zo

CPU = torch.device("cpu")
FAMILIES = {"gaussian": zo.Gaussian(), "rademacher": zo.Rademacher(), "lowrank": zo.LowRank(2)}
every_family = pytest.mark.parametrize("name", FAMILIES)
every_kind = pytest.mark.parametrize("name", [*FAMILIES, "aligned", "guided", "guided aligned"])


def family_for(name: str, tensors: list[zo.Tensor]):
    base = FAMILIES["gaussian"] if name == "guided" else FAMILIES.get(name) or aligned_family(tensors, 2)
    return zo.Guided(base, tensors, guide_of(tensors), 0.5) if "guided" in name else base


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(0))


def masked(ids: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3, zo.IGNORE_INDEX, ids)


class Setting:
    """A small Llama, its objective and some queries of a family, on a batch that is partly masked."""

    def __init__(self, name: str, workers, q: int = 3, epsilon: float = 1e-4, dtype: str = "float64"):
        self.model, self.ids, self.labels = harness.llama(dtype), tokens(), masked(tokens())
        self.tensors = zo.trainable_tensors(self.model.named_parameters())
        self.objective, self.workers = zo.Objective(self.model, workers), workers
        self.queries = zo.Queries(family_for(name, self.tensors), 1, 2, q, epsilon)
        self.grid = zo.Grid(self.tensors, epsilon, self.queries.family.largest, workers)
        self.before = self.weights()

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def unmoved(self) -> bool:
        return all(torch.equal(parameter, old) for parameter, old in zip(self.model.parameters(), self.before))

    def losses(self, group: int = 0) -> np.ndarray:
        batch = lambda query: (self.ids, self.labels)  # noqa: E731
        return zo.query_losses(self.objective, self.tensors, batch, self.queries, group, self.grid)

    def directions(self, query: int) -> list[torch.Tensor]:
        parts = [(t, whole(self.queries.family, t, 1, 2, query)) for t in self.tensors]
        return [z.view(tensor.parameter.shape) for tensor, z in parts]


class Function(zo.Objective):
    """An objective that is a function of parameters."""

    def __init__(self, function, workers):
        shapes, generator = [(5, 4), (3, 2), (6,)], torch.Generator().manual_seed(3)
        parameters = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
        self.tensors = zo.trainable_tensors((f"p{i}", parameter) for i, parameter in enumerate(parameters))
        self.function, self.workers = function, workers

    def theta(self) -> torch.Tensor:
        return torch.cat([tensor.parameter.detach().flatten() for tensor in self.tensors])

    def losses(self, input_ids, labels, groups=1, batched=None) -> torch.Tensor:
        return self.function(self.theta())[None]

    def scalars(self, family, step: int, q: int, epsilon: float) -> np.ndarray:
        queries = zo.Queries(family, 0, step, q, epsilon)
        return zo.projected_gradients(zo.query_losses(self, self.tensors, lambda query: (None, None), queries), epsilon)


# ---- expectation and bias --------------------------------------------------------------------------------------------


@every_family
def test_the_estimate_is_unbiased_and_as_long_as_theory_says(name, workers):
    """On a quadratic central differences are exact: c is grad . z, the mean of c z is the gradient within its standard
    error, and of Gaussian directions E||g||^2 = (d + q + 1) / q ||grad||^2.
    """
    generator, n, q = torch.Generator().manual_seed(1), 1200, 4
    root = torch.randn(32, 32, generator=generator, dtype=torch.float64) / math.sqrt(32)
    matrix, slope = root @ root.T, torch.randn(32, generator=generator, dtype=torch.float64)
    function = Function(lambda theta: theta @ matrix @ theta / 2 + slope @ theta, workers)
    c = function.scalars(FAMILIES[name], 0, n, 1e-2)
    true = matrix @ function.theta() + slope
    z = torch.stack([flat(FAMILIES[name], function.tensors, query) for query in range(n)])
    np.testing.assert_allclose(c, z @ true, rtol=1e-8, atol=1e-8)
    samples = torch.from_numpy(c)[:, None] * z
    assert ((samples.mean(0) - true).abs() < 5 * samples.std(0) / math.sqrt(n)).all()
    if name == "gaussian":
        norms = samples.view(n // q, q, 32).mean(1).square().sum(1) / true.square().sum()
        assert abs(norms.mean() - (32 + q + 1) / q) < 5 * norms.std() / math.sqrt(n // q)


@every_family
def test_the_bias_is_of_order_epsilon_squared(name, workers):
    """On sum theta^3, c - grad . z is exactly epsilon^2 sum z^3."""
    function = Function(lambda theta: theta.pow(3).sum(), workers)
    z = flat(FAMILIES[name], function.tensors, 0)
    for epsilon in (0.2, 0.1, 0.05):
        bias = function.scalars(FAMILIES[name], 0, 1, epsilon)[0] - (3 * function.theta().square() @ z).item()
        assert bias == pytest.approx(epsilon**2 * z.pow(3).sum().item(), rel=1e-6)


# ---- what is measured is what is applied -----------------------------------------------------------------------------


@every_kind
def test_losses_are_those_of_weights_moved_by_hand_on_both_paths(name, workers, small_blocks):
    """L(theta + epsilon z) and L(theta - epsilon z), tied embeddings moved once; c is the gradient's part along z."""
    setting = Setting(name, workers)
    losses = setting.losses()
    _, gradient = setting.objective.gradient(setting.ids, setting.labels, setting.tensors)
    for query in range(3):
        zs = setting.directions(query)
        for column, sign in enumerate((1, -1)):
            moved = copy.deepcopy(setting.model)
            with torch.no_grad():
                for parameter, z in zip(moved.parameters(), zs):
                    parameter.add_(z, alpha=sign * 1e-4)
                loss = moved(input_ids=setting.ids, labels=setting.labels).loss.item()
            assert losses[query, column] == pytest.approx(loss, abs=1e-6)
        along = sum((part * z).sum().item() for part, z in zip(gradient, zs))
        assert zo.projected_gradients(losses, 1e-4)[query] == pytest.approx(along, rel=1e-3, abs=2e-3)
    for group in (1, 2, 3):
        np.testing.assert_allclose(setting.losses(group), losses, rtol=0, atol=1e-9)
    assert setting.unmoved()


@every_kind
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "mudamw"])
def test_updates_are_along_what_was_measured(optimizer, name, workers, small_blocks):
    """Three steps equal torch's own optimizers on (1/q) sum c_i z_i / gain built by hand; a dropped query counts for
    nothing; weight decay is for matrices alone.
    """
    setting, other = Setting(name, workers), harness.llama("float64")
    how = {"decay": 0.1, "outer": zo.outer_parameters(setting.model)}
    ours, c = zo.Optimizer(optimizer, setting.tensors, workers, **how), np.array([0.3, math.nan, 0.7])
    theirs = []
    for tensor, parameter in zip(setting.tensors, other.parameters()):
        decay = 0.1 * (parameter.ndim > 1)
        if optimizer == "mudamw" and parameter.ndim == 2 and "embed" not in tensor.name:
            theirs.append(torch.optim.Muon([parameter], 0.01, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        elif optimizer != "sgd":
            theirs.append(torch.optim.AdamW([parameter], 0.01, betas=(0.9, 0.95), weight_decay=decay))
    other.load_state_dict(setting.model.state_dict())
    for _ in range(3):
        zs = [setting.directions(query) for query in (0, 2)]
        for index, parameter in enumerate(other.parameters()):
            gradient = (c[0] * zs[0][index] + c[2] * zs[1][index]) / 2 / setting.queries.family.gain
            parameter.grad = gradient
            if optimizer == "sgd":
                parameter.data.mul_(1 - 0.01 * 0.1 * (parameter.ndim > 1)).sub_(0.01 * gradient)
        for each in theirs:
            each.step()
        ours.apply_estimate(setting.tensors, setting.queries, c, 0.01)
    for one, two in zip(setting.model.parameters(), other.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        assert one.grad is None
    assert not setting.unmoved()


@every_family
def test_the_number_of_workers_changes_no_bit(name, small_blocks):
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        with zo.Workers(CPU) as workers:
            setting = Setting(name, workers, dtype="float32")
            measured = [setting.losses(), setting.losses(2)]
            c = np.array([1.0, -2.0, 0.5])
            zo.Optimizer("sgd", setting.tensors, workers).apply_estimate(setting.tensors, setting.queries, c, 0.1)
            results.append((measured, setting.weights()))
        torch.set_num_threads(threads)
    (one, weights), (two, others) = results
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(weights, others))


# ---- weights come back -----------------------------------------------------------------------------------------------


@every_kind
def test_weights_come_back_bit_for_bit(name, workers, small_blocks):
    setting = Setting(name, workers, q=20, epsilon=1e-3, dtype="float32")
    assert np.isfinite(setting.losses()).all()
    assert setting.unmoved()
    assert np.isfinite(setting.losses(10)).all()
    assert setting.unmoved()


@pytest.mark.parametrize(("what", "call"), [("losses", 1), ("losses", 2), ("losses", 3), ("draw", 5), ("draw", 200)])
@pytest.mark.parametrize("count", [1, 3])
def test_weights_come_back_when_measuring_fails(what, call, count, small_blocks, monkeypatch):
    """A forward pass, or one block of a direction in the midst of moving the weights: out of memory, say."""
    threads, calls = torch.get_num_threads(), []
    torch.set_num_threads(count)
    with zo.Workers(CPU) as workers:
        setting = Setting("gaussian", workers, dtype="float32")
        owner = setting.objective if what == "losses" else zo
        own = getattr(owner, what)

        def failing(*args):
            calls.append(what == "draw" or not setting.unmoved())
            if len(calls) == call:
                raise RuntimeError("broken")
            return own(*args)

        monkeypatch.setattr(owner, what, failing)
        with pytest.raises(RuntimeError, match="broken"):
            setting.losses()
    torch.set_num_threads(threads)
    assert all(calls)
    assert setting.unmoved()


def test_making_a_grid_rounds_once_and_names_what_is_not_finite(workers, small_blocks):
    setting = Setting("gaussian", workers, dtype="float32")
    for tensor, raw in zip(setting.tensors, harness.llama().parameters()):
        raw = raw.detach().view(tensor.rows, tensor.columns)
        for block in tensor.blocks:
            old, spacing = raw[tensor.span(block)], setting.grid.spacing[tensor.index, block]
            assert (tensor.matrix[tensor.span(block)] - old).abs().max().item() <= spacing / 2
            assert spacing / 2 <= 2 * (old.abs().max().item() + 0.04) * 2.0**-24
    zo.Grid(setting.tensors, 1e-4, 6.0, workers)
    assert setting.unmoved()
    with torch.no_grad():
        setting.model.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.up_proj"):
        zo.Grid(setting.tensors, 1e-4, 6.0, workers)


# ---- the library function --------------------------------------------------------------------------------------------


def estimate(model, ids: torch.Tensor, **how) -> tuple[list[torch.Tensor], torch.Tensor]:
    arguments = {"trainable_params": list(model.parameters()), "loss_fn": None, "inputs": ids, "labels": ids}
    return zo.zo_gradient_estimator(model, **arguments | {"q": 3, "epsilon": 1e-4, "device": "cpu"} | how)


@every_family
@pytest.mark.parametrize("parallel", [False, True])
def test_the_function_returns_the_mean_of_c_z(name, parallel, workers):
    setting = Setting(name, workers)
    how = {"parallel_q_computation": parallel, "parallel_batch_size": 2, "direction": name, "rank": 2}
    how |= {"seed": 1, "step": 2, "labels": setting.labels}
    named = list(setting.model.named_parameters(remove_duplicate=False))
    grads, loss = estimate(setting.model, setting.ids, trainable_params=named, **how)
    losses = setting.losses()
    c, zs = zo.projected_gradients(losses, 1e-4), [setting.directions(query) for query in range(3)]
    assert loss.item() == pytest.approx(losses.mean(), rel=1e-6)
    of = {id(t.parameter): sum(c[i] / 3 * zs[i][t.index] for i in range(3)) for t in setting.tensors}
    assert len(grads) == len(of) + 1  # a tied weight under both its names
    for grad, (_, parameter) in zip(grads, named):
        assert (grad.shape, grad.dtype) == (parameter.shape, parameter.dtype)
        torch.testing.assert_close(grad, of[id(parameter)], rtol=1e-4, atol=1e-4)


def test_distinct_data_seed_and_step_are_what_they_say(tiny_llama):
    """Distinct data is a loop of single queries on their own rows; a seed or step more is another direction."""
    ids = tokens(6)
    grads, loss = estimate(tiny_llama, ids, seed=2, query_data="distinct", epsilon=1e-3)
    objective, parts = zo.Objective(tiny_llama, zo.Workers(CPU)), []
    tensors = zo.trainable_tensors(tiny_llama.named_parameters())
    queries = zo.Queries(FAMILIES["gaussian"], 2, 0, 3, 1e-3)
    for i in range(3):
        rows = ids[2 * i : 2 * i + 2]
        parts.append(zo.query_losses(objective, tensors, lambda query, rows=rows: (rows, rows), queries, chosen=[i]))
    c = zo.projected_gradients(np.concatenate(parts), 1e-3)
    assert loss.item() == pytest.approx(np.mean(parts), rel=1e-9)
    for grad, tensor in zip(grads, tensors):
        wanted = sum(c[i] / 3 * whole(FAMILIES["gaussian"], tensor, 2, 0, i) for i in range(3))
        torch.testing.assert_close(grad, wanted.view(grad.shape), rtol=1e-4, atol=1e-5)
    first = estimate(tiny_llama, ids)[0][0]
    assert torch.equal(first, estimate(tiny_llama, ids, seed=0, step=0)[0][0])
    assert not any(torch.equal(first, estimate(tiny_llama, ids, **more)[0][0]) for more in ({"seed": 1}, {"step": 1}))


OTHER = torch.full((2, 9), 61)
WRONG = [{"q": value} for value in (0, -1, 2.5, math.inf)] + [{"rank": value} for value in (0, -1, 1.5)]
WRONG += [{"epsilon": value} for value in (0.0, -1e-3, math.nan, math.inf, 1e300)]
WRONG += [{"query_data": "distict"}, {"q": 3, "query_data": "distinct"}, {"direction": "gausian"}]
WRONG += [{"parallel_batch_size": 0}]
WRONG += [{"labels": torch.full((2, 9), -100)}, {"labels": OTHER}, {"inputs": OTHER}, {"labels": tokens(3)}]
WRONG += [{"trainable_params": []}, {"trainable_params": [torch.nn.Parameter(torch.zeros(3))]}]
WRONG += [{"inputs": tokens(2, 1), "labels": tokens(2, 1)}, {"inputs": tokens(0), "labels": tokens(0)}]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: "-".join(f"{k}={str(v)[:12]}" for k, v in wrong.items()))
@pytest.mark.parametrize("parallel", [False, True])
def test_what_cannot_be_used_is_refused_in_one_line_and_changes_nothing(tiny_llama, wrong, parallel):
    before = copy.deepcopy(tiny_llama.state_dict())
    with pytest.raises(ValueError, match=r"^[^\n]{10,250}$"):
        estimate(tiny_llama, tokens(), parallel_q_computation=parallel, **wrong)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


@pytest.mark.parametrize("fault", ["losses", "weights"])
@pytest.mark.parametrize("parallel", [False, True])
def test_what_is_not_finite_is_a_floating_point_error_on_both_paths(tiny_llama, fault, parallel):
    def loss_fn(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels) * (math.inf if fault == "losses" else 1.0)

    if fault == "weights":
        with torch.no_grad():
            tiny_llama.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="finite"):
        estimate(tiny_llama, tokens(), parallel_q_computation=parallel, loss_fn=loss_fn)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_transformers_and_autograds(tied, workers, monkeypatch):
    """The next-token shift and the -100 labels, for one group and for several; and, with any number of workers, the
    closed form: the output layer's gradient, of a tied embedding the output side's alone, and that of its input.
    """
    for name, size in {"TILE_TOKENS": 5, "TILE_VOCABULARY": 3, "SLAB_VOCABULARY": 7}.items():
        monkeypatch.setattr(zo, name, size)
    model, ids = harness.llama("float64", tied), tokens(6)
    labels, tensors = masked(ids), zo.trainable_tensors(model.named_parameters())
    objective = zo.Objective(model, workers)
    assert objective.sliced
    for group, loss in enumerate(objective.losses(ids, labels, 3).tolist()):
        rows = slice(2 * group, 2 * group + 2)
        assert loss == pytest.approx(model(input_ids=ids[rows], labels=labels[rows]).loss.item(), rel=1e-6)
    loss, gradients = objective.gradient(ids, labels, tensors)
    theirs = model(input_ids=ids, labels=labels).loss
    assert loss == pytest.approx(theirs.item(), rel=1e-6)
    for ours, other in zip(gradients, torch.autograd.grad(theirs, list(model.parameters()))):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-7)
    hidden = model.model(ids).last_hidden_state.detach().requires_grad_()
    weight = model.lm_head.weight.detach().clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy((hidden @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    back, inside = torch.autograd.grad(loss, [hidden, weight])
    threads, errors = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with zo.Workers(CPU) as several:
            errors.append(zo.Objective(model, several).error(hidden.detach(), labels, back=True))
    torch.set_num_threads(threads)
    for error in errors:
        assert error.loss == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(error.back, back[:, :-1].flatten(0, 1), rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(error.weight, inside, rtol=1e-9, atol=1e-14)
        assert torch.equal(error.back, errors[0].back)
        assert torch.equal(error.weight, errors[0].weight)


def test_a_loss_of_ones_own_sees_shifted_logits(workers):
    model, ids, seen = harness.llama("float64"), tokens(4), []

    def loss_fn(logits, labels):
        seen[:] = logits, labels
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)

    loss = zo.Objective(model, workers, loss_fn=loss_fn).losses(ids, ids).item()
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).detach()
    torch.testing.assert_close(seen[0], logits)
    assert torch.equal(seen[1], ids[:, 1:].flatten())
    assert loss == pytest.approx(loss_fn(logits, ids[:, 1:].flatten()).item(), rel=1e-9)


@pytest.mark.parametrize("vocabulary", [3, 16, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_token_losses_are_cross_entropies(vocabulary, bias, monkeypatch, workers):
    """Tiles of tokens and vocabulary, whole and partial, joined without loss of precision, however large the logits."""
    for name, size in {"TILE_TOKENS": 8, "TILE_VOCABULARY": 8, "SLAB_VOCABULARY": 16}.items():
        monkeypatch.setattr(zo, name, size)
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(12, vocabulary, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 3, generator=generator)
        h = torch.randn(2, 19, 12, generator=generator, dtype=torch.float64)
        h[1, 7:9] *= 1e4
        targets = torch.randint(vocabulary, (2, 19), generator=generator)
        targets[0, 3] = targets[1, :5] = -100
        ours = zo.token_losses(h, targets, zo.HeadTiles(head, 2, 1), workers)
        theirs = torch.nn.functional.cross_entropy(head(h).transpose(1, 2), targets, reduction="none")
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


def test_dropout_is_off_while_losses_and_gradients_are_taken_and_on_again_after(workers):
    drop = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "bos_token_id": 0, "eos_token_id": 0}
    about = transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=4, **drop)
    with torch.random.fork_rng(devices=[]):
        model, ids = transformers.GPT2LMHeadModel(about).train(), tokens()
    objective, tensors = zo.Objective(model, workers), zo.trainable_tensors(model.named_parameters())
    (one, first), (two, second) = (objective.gradient(ids, ids, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(module.training for module in model.modules())
    plain = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert [one, two, objective.losses(ids, ids).item()] == pytest.approx([plain] * 3, abs=2e-6)


def test_rates_follow_their_schedule_and_promise_no_more_than_allowed():
    config = zo.Config(learning_rate=1.0, use_lr_scheduler=True, warmup_steps=10, min_lr=0.1)
    rates = [zo.schedule(config, step, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[109] == pytest.approx(0.1)
    c = np.array([3.0, -4.0])
    assert [zo.trusted_rate(1.0, c, most, 1.0) for most in (0.05, 0.0)] == pytest.approx([0.05 / 12.5, 1.0])
    assert zo.trusted_rate(1e-3, c, 0.05, 1.0) == 1e-3
