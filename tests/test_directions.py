"""Directions: mean 0, E[z z^T] as promised, independent wherever a coordinate differs, the same whenever asked."""

import math
import re

import harness
import numpy as np
import pytest
import torch

import reproduce_zo_paper as zo

FAMILIES = {
    "gaussian": zo.Gaussian(),
    "rademacher": zo.Rademacher(),
    "lowrank": zo.LowRank(),
    "lowrank4": zo.LowRank(4),
    "kronecker": zo.Kronecker(),
}
PRODUCTS = (zo.LowRank, zo.Kronecker)  # of two normals
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def tensors_of(*shapes) -> list[zo.Tensor]:
    return zo.trainable_tensors((f"p{i}", torch.nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes))


def whole(family, tensor: zo.Tensor, seed=0, step=0, query=0) -> torch.Tensor:
    """z on one tensor, put together from its blocks, in the parameter's dtype."""
    direction = family.direction(tensor, zo.Coordinates(seed, step, query))
    z = torch.full((tensor.rows, tensor.columns), math.nan, dtype=tensor.parameter.dtype)
    for block in reversed(tensor.blocks):
        direction(block, z[tensor.span(block)])
    return z


def flat(family, tensors: list[zo.Tensor], query: int) -> torch.Tensor:
    return torch.cat([whole(family, tensor, query=query).flatten() for tensor in tensors]).double()


def guide_of(tensors: list[zo.Tensor]) -> dict[int, torch.Tensor]:
    """A gradient whose norm is not 1, with a single large entry."""
    guide = {t.index: torch.randn(t.rows, t.columns, generator=torch.Generator().manual_seed(t.index)) for t in tensors}
    guide[tensors[0].index][0, 0] = 10.0
    return guide


def aligned_family(tensors: list[zo.Tensor], rank: int) -> zo.Aligned:
    """Aligned on matrices, with orthonormal bases, and with a scale of mean square 1 for the rows of the first one."""
    generator, scale = torch.Generator().manual_seed(9), torch.logspace(-3, 0, tensors[0].rows)
    vectors = {t.index: torch.randn(t.columns, generator=generator) for t in tensors if t.parameter.ndim == 2}
    mirrors = {index: torch.eye(len(v)) - 2 * torch.outer(v, v) / (v @ v) for index, v in vectors.items()}
    bases = {index: mirror[:, :rank].contiguous() for index, mirror in mirrors.items()}
    return zo.Aligned(rank, bases, {0: scale / scale.square().mean().sqrt()})


@every_family
def test_covariance_over_queries_is_the_identity(family, small_blocks):
    """E[z z^T] = I, between the entries of a matrix (more than the bits of a word) and those of a vector too."""
    tensors, n = tensors_of((3, 23), (5,)), 2500
    z = torch.stack([flat(family, tensors, query) for query in range(n)])
    variance = 8 if isinstance(family, PRODUCTS) else 2  # of a product of two entries, at most
    assert (z.T @ z / n - torch.eye(z.shape[1])).abs().max().item() < 5 * math.sqrt(variance / n)
    assert z.mean(0).abs().max().item() < 5 / math.sqrt(n)
    assert not isinstance(family, zo.Rademacher) or z.abs().eq(1).all()


@every_family
def test_each_coordinate_makes_an_independent_direction_and_nothing_else_does(family, small_blocks):
    """Also of single blocks, which `whole` asks for last to first."""
    first, second = tensors_of((256, 256), (256, 256))
    z = whole(family, first, seed=0, step=3, query=1)
    out = torch.empty(1, 256)
    family.direction(first, zo.Coordinates(0, 3, 1))(7, out)
    assert torch.equal(out, z[7:8])
    others = [whole(family, first, *at) for at in [(0, 3, 2), (0, 4, 1), (1, 3, 1), (0, 1, 3)]]
    others += [whole(family, second, 0, 3, 1), z.roll(1, 0)]  # of another tensor, and of the next block
    freedom = 256 * family.rank if isinstance(family, PRODUCTS) else z.numel()  # of a product, by its factors
    for other in others:
        correlation = torch.corrcoef(torch.stack([z.flatten(), other.flatten()]))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(freedom)


SHAPES = [(40, 64), (61, 24), (64, 61), (97, 12), (7, 12), (25, 1), (160, 160), (50, 48), (320, 320), (192, 576)]


@pytest.mark.parametrize("shape", SHAPES)
def test_kronecker_directions_are_products_of_full_rank(shape, small_blocks):
    """Row i m2 + k is that of A (x) B, also where it has more rows than the matrix, and in any block."""
    (tensor,) = tensors_of(shape)
    direction, z = zo.Kronecker().direction(tensor, zo.Coordinates(0, 0, 0)), whole(zo.Kronecker(), tensor)
    exact = torch.kron(direction.left.double(), direction.right.double())
    torch.testing.assert_close(z, exact[: shape[0]].float(), rtol=1e-6, atol=0)
    assert torch.linalg.matrix_rank(exact[: shape[0]]) == min(shape)
    assert exact.shape[1] == shape[1]
    assert shape[0] <= len(exact) < shape[0] + len(direction.right)


def test_estimates_are_as_long_as_theory_says():
    """E||<G, z> z||^2 / ||G||^2 on one matrix of m x n: gaussian d + 2, low rank (m + 2) (n + 2) for rank 1, and
    Kronecker (m1 n1 + 2) (m2 n2 + 2).
    """
    (tensor,), n = tensors_of((16, 9)), 8000
    gradient = torch.randn(16 * 9, generator=torch.Generator().manual_seed(3))
    m1, n1 = zo.Kronecker().direction(tensor, zo.Coordinates(0, 0, 0)).left.shape
    assert 16 % m1 == 0  # no row is left out
    kronecker = (m1 * n1 + 2) * (16 * 9 / (m1 * n1) + 2)
    wanted = {zo.Gaussian(): 16 * 9 + 2, zo.LowRank(): 18 * 11, zo.Kronecker(): kronecker}
    for family, square in wanted.items():
        z = torch.stack([whole(family, tensor, query=query).flatten() for query in range(n)])
        found = (z @ gradient).square() * z.square().sum(1) / gradient.square().sum()
        assert abs(found.mean().item() - square) < 5 * found.std().item() / math.sqrt(n)
        assert found.std().item() / math.sqrt(n) < 0.06 * square


def test_aligned_lives_where_the_inputs_live(workers):
    """z = D A Q^T: Q the leading directions of what a layer is given, D the row scale, A standard normal."""
    model, given, frequencies = harness.llama(), {}, np.arange(61) ** 2
    tensors, ids = zo.trainable_tensors(model.named_parameters()), torch.arange(18).view(2, 9) * 7 % 61
    objective = zo.Objective(model, workers)
    for module in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        module.register_forward_pre_hook(lambda m, x: given.update({id(m.weight): x[0].detach().flatten(0, -2)}))
    model.lm_head(model.model(ids).last_hidden_state[:, :-1])
    prepared = zo.Aligned(2)
    prepared.prepare(tensors, next(t for t in tensors if t.parameter is model.lm_head.weight), frequencies)
    family = prepared.look(objective, tensors, ids, 0)
    wanted = torch.tensor((frequencies + 1.0) ** 0.25).float()
    torch.testing.assert_close(family.row_scale[0], wanted / wanted.square().mean().sqrt())
    assert set(family.bases) == {t.index for t in tensors if t.parameter.ndim == 2}
    for index, basis in family.bases.items():
        x, tensor = given[id(tensors[index].parameter)], tensors[index]
        explained = (x @ basis).square().sum() / torch.linalg.svdvals(x)[:2].square().sum()
        torch.testing.assert_close(basis.T @ basis, torch.eye(2), rtol=0, atol=1e-5)
        assert 0.98 < explained <= 1.0001, tensor.name
        z = torch.stack([whole(family, tensor, query=query) for query in range(40)])
        torch.testing.assert_close(z @ basis @ basis.T, z, rtol=0, atol=1e-4)
        a = z @ basis / family.row_scale.get(index, torch.ones(tensor.rows))[:, None]
        assert abs(a.square().mean().item() - 1) < 5 * math.sqrt(2 / a.numel())


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("name", ["gaussian", "rademacher", "lowrank4", "kronecker", "aligned"])
@pytest.mark.parametrize("rho", [0.0, 0.2, 0.8])
def test_directions_have_their_length_and_guided_ones_their_cosine_and_gain(name, rho, left_out, small_blocks):
    """Also where one tensor (an output layer in closed form) is left out of the guide and of the queries."""
    every = tensors_of((80, 100), (50, 60), (100,))
    tensors, base, guide = every[left_out:], FAMILIES.get(name) or aligned_family(every, 3), guide_of(every[left_out:])
    family = zo.Guided(base, tensors, guide, rho) if rho else base
    unit = torch.cat([part.flatten() for part in guide.values()])
    unit, square = (unit / unit.norm()).double(), sum(base.square(tensor) for tensor in tensors)
    z = torch.stack([flat(family, tensors, query) for query in range(40)])
    spread = 5 / math.sqrt(
        {"lowrank4": 4 * 50, "kronecker": 56, "aligned": square}.get(name, z.shape[1])
    )  # low rank: by its factors
    assert abs((z @ unit / z.norm(dim=1)).mean().item() - rho) < spread
    assert abs(z.square().sum(1).mean().item() / square - 1) < spread
    assert abs(sum(family.square(tensor) for tensor in tensors) / z.square().sum(1).mean().item() - 1) < spread
    assert not rho or abs((z @ unit).square().mean().item() / family.gain - 1) < 2 * spread / rho


@pytest.mark.parametrize("cosine", [None, 0.001, 0.5, 0.95])
def test_no_entry_is_larger_than_the_family_says(cosine):
    """The grid that weights are restored on relies on it, for every family and rank."""
    tensors = tensors_of((300, 2), (40, 64), (50,))
    families = [zo.Gaussian(), zo.Rademacher(), zo.Kronecker()]
    for rank in (1, 3, 64):
        families += [zo.LowRank(rank), aligned_family(tensors, rank)]
    for family in families:
        bent = family if cosine is None else zo.Guided(family, tensors, guide_of(tensors), cosine)
        entries = [whole(bent, tensor, query=query).abs().max().item() for tensor in tensors for query in range(30)]
        assert max(entries) <= bent.largest * (1 + 1e-6), (type(family).__name__, family.rank)
    assert all(family.gain == 1.0 for family in families)


def test_parameters_are_numbered_once_and_blocks_cover_them(small_blocks):
    shared = torch.nn.Parameter(torch.zeros(3, 2))
    assert [(t.index, t.name) for t in zo.trainable_tensors([("a", shared), ("b", shared)])] == [(0, "a")]
    with pytest.raises(ValueError, match="weight is not contiguous"):
        zo.trainable_tensors([("weight", torch.nn.Parameter(shared.detach().T))])
    for tensor in tensors_of((), (1,), (7,), (5, 3), (1, 1000), (4, 3, 2), (3, 2, 2, 50)):
        rows = [row for block in tensor.blocks for row in range(*tensor.span(block).indices(tensor.rows))]
        assert rows == list(range(tensor.rows))
        assert tensor.rows * tensor.columns == tensor.parameter.numel()
        assert whole(FAMILIES["gaussian"], tensor).isfinite().all()


def test_the_family_that_the_documentation_adds_is_one_class(monkeypatch):
    """Its code, with a line in DIRECTIONS, is a family of the library function: the same on both paths."""
    text = (harness.ROOT / "ZO_OPTIMIZATION_README.md").read_text("utf-8")
    names = dict(vars(zo))
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    monkeypatch.setitem(zo.DIRECTIONS, "sparse", names["Sparse"])
    (tensor,) = tensors_of((60, 1000))
    z = whole(names["Sparse"](), tensor)
    assert sorted(set(z.abs().flatten().tolist())) == [0, pytest.approx(8**0.5)]
    assert z.square().mean().item() == pytest.approx(1, abs=0.05)
    assert abs(z.mean().item()) < 0.02
    model, ids = harness.llama("float64"), torch.arange(18).view(2, 9)
    given = (model, list(model.parameters()), None, ids, ids, 3, 1e-4, "cpu")
    (one, _), (two, _) = (zo.zo_gradient_estimator(*given, parallel, direction="sparse") for parallel in (False, True))
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
