"""Everything random is a function of its coordinates, and nothing else is touched."""

import itertools
import random

import numpy as np
import pytest
import torch

import reproduce_zo_paper as zo

CPU = torch.device("cpu")


# ---- coordinates to streams ------------------------------------------------------------------------------------------


def test_a_stream_is_the_same_each_time():
    one = torch.randn(100, generator=zo.stream(CPU, 7, zo.PURPOSE_DIRECTION, 1, 2, 3, 4))
    torch.manual_seed(99)
    torch.randn(10)
    other = torch.randn(100, generator=zo.stream(CPU, 7, zo.PURPOSE_DIRECTION, 1, 2, 3, 4))
    assert torch.equal(one, other)


@pytest.mark.parametrize("place", range(4))
def test_every_coordinate_gives_its_own_stream(place):
    seeds = set()
    for value in range(2000):
        coordinates = [3, 3, 3, 3]
        coordinates[place] = value
        seeds.add(zo.stream_seed(0, zo.PURPOSE_DIRECTION, *coordinates))
    assert len(seeds) == 2000


def test_neighbouring_coordinates_never_meet():
    grid = itertools.product(range(3), (zo.PURPOSE_INIT, zo.PURPOSE_DIRECTION, zo.PURPOSE_DATA), range(6), range(6), range(6))
    seeds = [zo.stream_seed(*coordinates) for coordinates in grid]
    assert len(set(seeds)) == len(seeds)


def test_large_seeds_keep_all_their_bits():
    seeds = [5, 5 + 2**32, 5 + 2**40, 5 + 2**62]
    assert len({zo.stream_seed(seed, zo.PURPOSE_INIT, 0) for seed in seeds}) == len(seeds)


def test_streams_are_part_of_the_format():
    """Journals hold scalars only: renumbering a purpose would rebuild other models from them."""
    assert (zo.PURPOSE_INIT, zo.PURPOSE_DIRECTION, zo.PURPOSE_DATA) == (1, 2, 3)
    expected = np.random.SeedSequence(42, spawn_key=(2, 10, 3, 5, 1)).generate_state(1, np.uint64)[0]
    assert zo.stream_seed(42, zo.PURPOSE_DIRECTION, 10, 3, 5, 1) == int(expected)


# ---- global generators -----------------------------------------------------------------------------------------------


@pytest.fixture
def untouched():
    """Fails where torch's, numpy's or Python's global generator moved, or torch's default was replaced."""

    def state():
        name, keys, *rest = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate()

    torch.manual_seed(1234)
    np.random.seed(1234)  # noqa: NPY002
    random.seed(1234)
    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize(
    "flags",
    [
        {"mode": "FO"},
        {"mode": "ZO", "optimizer": "mudamw", "direction": "rademacher"},
        {"mode": "ZO", "optimizer": "adam", "direction": "lowrank", "parallel_q_computation": True},
        {"mode": "Instruct", "bp_interval": 2},
        {"mode": "Calibrate", "bp_interval": 2, "query_data": "distinct"},
    ],
    ids=lambda flags: "-".join(str(value) for value in flags.values()),
)
def test_a_run_leaves_the_global_generators_alone(runs, untouched, flags):
    runs.train(max_steps=3, **flags)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("direction", ["gaussian", "rademacher", "lowrank"])
def test_the_estimator_leaves_the_global_generators_alone(tiny_llama, untouched, direction, parallel):
    ids = torch.arange(24).view(2, 12)
    parameters = list(tiny_llama.parameters())
    zo.zo_gradient_estimator(tiny_llama, parameters, None, ids, ids, 3, 1e-3, "cpu", parallel, direction=direction)


# ---- permutations ----------------------------------------------------------------------------------------------------

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 255, 256, 257, 1000, 1024, 1025, 4096, 5000]


@pytest.mark.parametrize("size", SIZES)
def test_permuted_is_a_bijection(size):
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (2**62, 7)]:
        image = zo.permuted(np.arange(size), size, seed, epoch)
        assert image.dtype == np.int64
        assert np.array_equal(np.sort(image), np.arange(size))


def test_permuted_does_not_depend_on_what_is_asked_together():
    whole = zo.permuted(np.arange(1000), 1000, 3, 1)
    some = np.array([999, 0, 17, 17, 500])
    assert np.array_equal(zo.permuted(some, 1000, 3, 1), whole[some])
    assert zo.permuted(np.array([], np.int64), 1000, 3, 1).size == 0


def test_permuted_leaves_its_argument_alone():
    index = np.arange(50)
    zo.permuted(index, 50, 0, 0)
    assert np.array_equal(index, np.arange(50))


def test_permutations_mix():
    """Neither order nor neighbourhood survives; epochs and seeds are unrelated."""
    size = 10_000
    index = np.arange(size)
    one = zo.permuted(index, size, 0, 0)
    bound = 5 / np.sqrt(size)
    for other in (index, np.roll(one, 1), zo.permuted(index, size, 0, 1), zo.permuted(index, size, 1, 0)):
        assert abs(np.corrcoef(one, other)[0, 1]) < bound
        assert (one == other).sum() < 10  # one is expected by chance


def test_every_permutation_of_three_occurs():
    seen = {tuple(zo.permuted(np.arange(3), 3, seed, 0)) for seed in range(200)}
    assert len(seen) == 6


# ---- batches ---------------------------------------------------------------------------------------------------------


class Blocks(zo.Corpus):
    """A corpus of `blocks` blocks whose every token is the number of its block."""

    def __init__(self, blocks: int, batch_size: int, seed: int = 0):
        self.config = zo.Config(batch_size=batch_size, block_size=4, seed=seed)
        self.device, self.blocks = CPU, blocks
        self.train = np.repeat(np.arange(blocks, dtype=np.uint16), 4)

    def rows(self, steps) -> list[int]:
        """The blocks seen in these steps, in order."""
        return [row for step in steps for row in self.batch(step)[:, 0].tolist()]


@pytest.mark.parametrize(("blocks", "batch_size"), [(12, 4), (13, 4), (7, 7), (5, 3), (64, 5), (4, 4)])
def test_every_block_once_an_epoch(blocks, batch_size):
    seen = Blocks(blocks, batch_size).rows(range(3 * blocks))
    for epoch in range(3 * batch_size):
        assert sorted(seen[epoch * blocks : (epoch + 1) * blocks]) == list(range(blocks))


def test_epochs_and_seeds_have_their_own_order():
    one, other = Blocks(100, 10, seed=0), Blocks(100, 10, seed=1)
    orders = [tuple(one.rows(range(lo, lo + 10))) for lo in (0, 10, 20)] + [tuple(other.rows(range(10)))]
    assert len(set(orders)) == 4
    assert orders[0] != tuple(range(100))


def test_a_batch_depends_on_its_step_alone():
    corpus = Blocks(50, 4)
    forward = [corpus.batch(step) for step in range(30)]
    backward = [corpus.batch(step) for step in reversed(range(30))]
    for one, other in zip(forward, reversed(backward)):
        assert torch.equal(one, other)
    assert torch.equal(Blocks(50, 4).batch(29), forward[29])


def test_a_batch_holds_whole_blocks_in_order():
    corpus = Blocks(10, 2)
    corpus.train = np.arange(40, dtype=np.uint16)
    batch = corpus.batch(3)
    assert batch.dtype == torch.int64
    assert batch.shape == (2, 4)
    for row in batch:
        assert row[0] % 4 == 0
        assert torch.equal(row, torch.arange(4) + row[0])
