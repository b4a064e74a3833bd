"""Directions: mean 0, E[z z^T] = I, independent wherever a coordinate differs, the same whenever asked."""

import math

import harness
import numpy as np
import pytest
import torch

import reproduce_zo_paper as zo

FAMILIES = {
    "gaussian": zo.Isotropic("gaussian"),
    "rademacher": zo.Isotropic("rademacher"),
    "lowrank1": zo.Isotropic("lowrank", 1),
    "lowrank4": zo.Isotropic("lowrank", 4),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
dense_family = pytest.mark.parametrize("family", [FAMILIES["gaussian"], FAMILIES["rademacher"]], ids=["gaussian", "rademacher"])


def tensors_of(*shapes) -> list[zo.Tensor]:
    return zo.trainable_tensors((f"p{i}", torch.nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes))


def whole(family, tensor: zo.Tensor, seed=0, step=0, query=0) -> torch.Tensor:
    """z on one tensor, put together from its blocks."""
    direction = family.direction(tensor, zo.Coordinates(seed, step, query))
    z = torch.full((tensor.rows, tensor.columns), math.nan)
    for block in tensor.blocks:
        direction.block(block, z[tensor.span(block)])
    return z


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()


# ---- moments ---------------------------------------------------------------------------------------------------------


@dense_family
def test_entries_have_mean_0_and_variance_1(family):
    (tensor,) = tensors_of((1500, 700))
    assert len(tensor.blocks) > 1
    z = whole(family, tensor)
    n = z.numel()
    assert abs(z.mean().item()) < 5 / math.sqrt(n)
    assert abs(z.square().mean().item() - 1) < 5 * math.sqrt(2 / n)


def test_gaussian_has_the_tails_of_a_gaussian():
    z = whole(FAMILIES["gaussian"], tensors_of((1500, 700))[0]).double()
    assert abs(z.pow(4).mean().item() - 3) < 5 * math.sqrt(96 / z.numel())
    assert abs(z.pow(3).mean().item()) < 5 * math.sqrt(15 / z.numel())
    assert 4.0 < z.abs().max().item() < FAMILIES["gaussian"].largest


@every_family
def test_covariance_over_queries_is_the_identity(family, small_blocks):
    """E[z z^T] = I, between the entries of a matrix and those of a vector too."""
    tensors, n = tensors_of((4, 3), (5,)), 6000
    z = torch.stack([torch.cat([whole(family, t, query=query).flatten() for t in tensors]) for query in range(n)]).double()
    covariance = z.T @ z / n
    spread = math.sqrt(8 / n)  # of a product of two entries, at most (a low-rank entry squared has variance 8)
    assert (covariance - torch.eye(z.shape[1])).abs().max().item() < 5 * spread
    assert z.mean(0).abs().max().item() < 5 / math.sqrt(n)


@every_family
def test_coordinates_make_directions_independent(family, small_blocks):
    first, second = tensors_of((256, 256), (256, 256))
    z = whole(family, first, seed=0, step=3, query=1)
    others = {
        "tensor": whole(family, second, seed=0, step=3, query=1),
        "query": whole(family, first, seed=0, step=3, query=2),
        "step": whole(family, first, seed=0, step=4, query=1),
        "seed": whole(family, first, seed=1, step=3, query=1),
        "step and query swapped": whole(family, first, seed=0, step=1, query=3),
    }
    freedom = z.numel() if family.name != "lowrank" else 256 * family.rank  # of a product, by its factors
    for what, other in others.items():
        assert abs(correlation(z, other)) < 5 / math.sqrt(freedom), what


@dense_family
def test_blocks_are_independent(family, small_blocks):
    (tensor,) = tensors_of((400, 64))
    assert len(tensor.blocks) == 100
    blocks = whole(family, tensor).view(100, -1)
    assert len({tuple(row.tolist()) for row in blocks}) == 100
    for shift in (1, 2, 50):
        assert abs(correlation(blocks, blocks.roll(shift, 0))) < 5 / math.sqrt(blocks.numel())


# ---- a function of coordinates ---------------------------------------------------------------------------------------


@every_family
def test_a_direction_is_the_same_each_time(family, small_blocks):
    (tensor,) = tensors_of((100, 30))
    z = whole(family, tensor, seed=5, step=6, query=7)
    torch.randn(3)
    assert torch.equal(z, whole(family, tensor, seed=5, step=6, query=7))


@every_family
def test_a_block_does_not_depend_on_the_order_of_asking(family, small_blocks):
    (tensor,) = tensors_of((100, 30))
    z = whole(family, tensor)
    direction = family.direction(tensor, zo.Coordinates(0, 0, 0))
    for block in reversed(tensor.blocks):
        span = tensor.span(block)
        out = torch.empty(span.stop - span.start, tensor.columns)
        direction.block(block, out)
        assert torch.equal(out, z[span])


@every_family
def test_seed_0_is_a_seed(family):
    (tensor,) = tensors_of((64, 64))
    assert torch.equal(whole(family, tensor, seed=0), whole(family, tensor, seed=0))
    assert not torch.equal(whole(family, tensor, seed=0), whole(family, tensor, seed=1))


# ---- single families -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 63, 64, 65, 95, 1000, 100_003])
def test_rademacher_is_plus_or_minus_1(size):
    (tensor,) = tensors_of((size,))
    z = whole(FAMILIES["rademacher"], tensor)
    assert z.abs().eq(1).all()
    if size > 30:
        assert z.eq(1).any()
        assert z.eq(-1).any()


def test_rademacher_uses_every_bit_once():
    """Each of the 32 places of a word is balanced, and unlike every other place."""
    (tensor,) = tensors_of((32 * 8000,))
    places = whole(FAMILIES["rademacher"], tensor).view(8000, 32)
    assert places.mean(0).abs().max().item() < 5 / math.sqrt(8000)
    off_diagonal = places.T @ places / 8000 - torch.eye(32)
    assert off_diagonal.abs().max().item() < 5 / math.sqrt(8000)


def test_rademacher_tail_is_not_the_start_of_the_last_word_again():
    ends = [whole(FAMILIES["rademacher"], tensors_of((70,))[0], query=query)[64:70, 0] for query in range(2000)]
    ends = torch.stack(ends)
    assert ends.mean(0).abs().max().item() < 5 / math.sqrt(2000)
    assert (ends.T @ ends / 2000 - torch.eye(6)).abs().max().item() < 5 / math.sqrt(2000)


@pytest.mark.parametrize("rank", [1, 3])
def test_lowrank_block_is_the_product_of_its_factors(rank, small_blocks):
    (tensor,) = tensors_of((50, 40))
    assert len(tensor.blocks) > 1
    z = whole(zo.Isotropic("lowrank", rank), tensor)
    left, right = zo.Isotropic("lowrank", rank).direction(tensor, zo.Coordinates(0, 0, 0)).factors()
    assert left.shape == (50, rank)
    assert right.shape == (40, rank)
    torch.testing.assert_close(z, left @ right.T)
    assert torch.linalg.matrix_rank(z).item() == rank


def test_lowrank_leaves_vectors_gaussian():
    (vector,) = tensors_of((3000,))
    assert not zo.Isotropic("lowrank", 2).low_rank(vector)
    assert torch.equal(whole(zo.Isotropic("lowrank", 2), vector), whole(FAMILIES["gaussian"], vector))


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "lowrank"])
@pytest.mark.parametrize("cosine", [0.2, 0.5, 0.9])
def test_guided_directions_keep_their_cosine_and_length(name, cosine, small_blocks):
    tensors, queries = tensors_of((80, 100), (50, 60), (100,)), 60
    guide = [torch.randn(t.rows, t.columns, generator=torch.Generator().manual_seed(t.index)) for t in tensors]
    norm = math.sqrt(sum(part.square().sum().item() for part in guide))
    guide = [part / norm for part in guide]
    dimension = sum(part.numel() for part in guide)
    family = zo.Guided(zo.Isotropic(name, 2), guide, cosine)
    unit = torch.cat([part.flatten() for part in guide])
    z = torch.stack([torch.cat([whole(family, t, query=query).flatten() for t in tensors]) for query in range(queries)])
    cosines = torch.nn.functional.cosine_similarity(z, unit[None])
    lengths = z.square().sum(1) / dimension
    spread = 4 / math.sqrt(dimension) if name != "lowrank" else 4 * math.sqrt(2 / 100)  # low rank: by its factors
    assert abs(cosines.mean().item() - cosine) < spread
    assert abs(lengths.mean().item() - 1) < spread
    along = (z @ unit).square().mean().item()
    assert abs(along / family.gain - 1) < 2 * spread / cosine


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "lowrank"])
@pytest.mark.parametrize("cosine", [None, 0.5])
def test_no_entry_is_larger_than_the_family_says(name, cosine):
    """The grid that weights are restored on relies on it."""
    (tensor,) = tensors_of((300, 200))
    family = zo.Isotropic(name)
    if cosine is not None:
        guide = torch.zeros(300, 200)
        guide[7, 7] = 1.0
        family = zo.Guided(family, [guide], cosine)
    assert max(whole(family, tensor, query=query).abs().max().item() for query in range(20)) <= family.largest * (1 + 1e-6)


def test_without_guidance_the_gain_is_1():
    assert all(family.gain == 1.0 for family in FAMILIES.values())


# ---- tensors ---------------------------------------------------------------------------------------------------------


def test_a_shared_parameter_is_one_tensor():
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    tensors = zo.trainable_tensors([("a", parameter), ("b", torch.nn.Parameter(torch.zeros(2))), ("c", parameter)])
    assert [(t.index, t.name) for t in tensors] == [(0, "a"), (1, "b")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_masters_are_refused(dtype):
    with pytest.raises(ValueError, match=r"weight is .*float32"):
        zo.trainable_tensors([("weight", torch.nn.Parameter(torch.zeros(3, 2, dtype=dtype)))])


def test_a_parameter_that_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match="weight is not contiguous"):
        zo.trainable_tensors([("weight", torch.nn.Parameter(torch.zeros(3, 2).T))])


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (1, 1000), (4, 3, 2), (3, 2, 2, 5)])
def test_blocks_cover_a_tensor_once(shape, small_blocks):
    (tensor,) = tensors_of(shape)
    covered = [row for block in tensor.blocks for row in range(*tensor.span(block).indices(tensor.rows))]
    assert covered == list(range(tensor.rows))
    assert tensor.rows * tensor.columns == tensor.parameter.numel()
    assert whole(FAMILIES["gaussian"], tensor).isfinite().all()


def test_square_is_the_expected_square_of_a_direction():
    """Of every family, on every tensor: the mean over many queries, to five times its standard error."""
    model = harness.llama("float32")
    tensors = zo.trainable_tensors(model.named_parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        guide = [torch.randn(tensor.rows, tensor.columns) * (1 + tensor.index) for tensor in tensors]
    whole = sum(part.square().sum() for part in guide).sqrt()
    guide = [part / whole for part in guide]
    bases = {
        t.index: torch.linalg.qr(torch.ones(t.columns, 2) + torch.eye(t.columns, 2)).Q for t in tensors if t.parameter.ndim == 2
    }
    scale = torch.linspace(0.5, 2.0, 61)
    scaled = {0: scale / scale.square().mean().sqrt()}
    aligned = zo.Aligned(2, bases, scaled)
    families = [zo.Isotropic(name, 2) for name in ("gaussian", "rademacher", "lowrank")] + [aligned]
    families += [zo.Guided(family, guide, 0.5) for family in (zo.Isotropic("gaussian"), aligned)]
    for family in families:
        for tensor in tensors[:6]:
            norms = []
            for query in range(300):
                out = torch.zeros(tensor.rows, tensor.columns)
                direction = family.direction(tensor, zo.Coordinates(1, 2, query))
                for block in tensor.blocks:
                    direction.block(block, out[tensor.span(block)])
                norms.append(out.square().sum().item())
            error = np.std(norms) / len(norms) ** 0.5
            assert abs(np.mean(norms) - family.square(tensor)) <= 5 * error + 1e-5 * family.square(tensor), (family, tensor.name)
