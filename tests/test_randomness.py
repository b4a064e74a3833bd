"""Everything random is a function of its coordinates."""

import hashlib
import itertools

import numpy as np
import pytest
import torch

import reproduce_zo_paper as zo

CPU = torch.device("cpu")


def test_streams_are_part_of_the_format_and_every_coordinate_has_its_own():
    """Journals hold scalars only: renumbering a purpose would rebuild other models from them."""
    assert (zo.PURPOSE_INIT, zo.PURPOSE_DIRECTION, zo.PURPOSE_DATA, zo.PURPOSE_BASIS) == (1, 2, 3, 4)
    expected = np.random.SeedSequence(42, spawn_key=(2, 10, 3, 5, 1)).generate_state(1, np.uint64)[0]
    assert zo.stream_seed(42, zo.PURPOSE_DIRECTION, 10, 3, 5, 1) == int(expected)
    grid = itertools.product((0, 1, 2**32, 2**62), (1, 2, 3), range(6), range(6), range(6))
    seeds = {zo.stream_seed(*coordinates) for coordinates in grid}
    for place in range(4):
        seeds |= {zo.stream_seed(9, 2, *(value if at == place else 3 for at in range(4))) for value in range(10, 1000)}
    assert len(seeds) == 4 * 3 * 6**3 + 4 * 990


def test_directions_are_part_of_the_format():
    """On a CPU: numpy's SFC64, two bytes a normal, one bit a sign; another count changes none of the first numbers."""
    at = zo.Coordinates(42, 10, 3).of(5, 1)
    assert at == (42, zo.PURPOSE_DIRECTION, 10, 3, 5, 1)
    drawn = np.random.SFC64(np.random.SeedSequence(42, spawn_key=(2, 10, 3, 5, 1))).random_raw(300)
    assert [int(word) for word in drawn[:2]] == [0x876632ED39B9C13F, 0xD2A1E3526ECA949D]
    levels = zo.normal_levels()
    for count in (1, 3, 4, 31, 1200):
        index = torch.from_numpy(drawn.view(np.uint16)[:count].astype(np.int64))
        assert torch.equal(zo.normals(torch.empty(count), *at), levels[index])
        bits = np.unpackbits(drawn.view(np.uint8), bitorder="little")[:count].astype(np.float32)
        signs = torch.empty(count)
        zo.Rademacher.fill(signs, *at)
        assert torch.equal(signs, torch.from_numpy(2 * bits - 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_a_gpu_draws_is_as_distributed_and_a_function_of_coordinates():
    at, count = zo.Coordinates(42, 10, 3).of(5, 1), 1 << 22
    for fill, values, fourth in ((zo.normals, None, 3.0), (zo.Rademacher.fill, {-1.0, 1.0}, 1.0)):
        one, same, other = (torch.empty(count, device="cuda") for _ in range(3))
        for out, where in ((one, at), (same, at), (other, (*at[:-1], 2))):
            fill(out, *where)
        assert torch.equal(one, same)
        assert abs((one * other).mean().item()) < 5 / count**0.5
        assert abs(one.mean().item()) < 5 / count**0.5
        assert one.double().pow(4).mean().item() == pytest.approx(fourth, abs=0.03)
        assert values is None or set(one.unique().tolist()) == values
        assert one.abs().max() <= zo.Gaussian.largest


def test_the_levels_are_a_normal_distribution_of_65536_equal_parts():
    digest = hashlib.sha256(zo.normal_levels().numpy().tobytes()).hexdigest()
    assert digest.startswith("8babbcaf96568f10")  # they are part of the format
    levels = zo.normal_levels().double()
    assert levels.mean().item() == 0
    assert levels.square().mean().item() == pytest.approx(1, abs=1e-7)
    assert levels.pow(4).mean().item() == pytest.approx(2.9992, abs=1e-4)  # 3
    assert 4.3 < levels.max() == -levels.min() < 4.4
    parts = torch.special.ndtr(levels)
    assert (parts - (torch.arange(2**16) + 0.5) / 2**16).abs().max() < 2e-5


class Blocks(zo.Corpus):
    """A corpus of `blocks` blocks of 4 tokens, each the number of its block."""

    def __init__(self, blocks: int, batch_size: int, seed: int):
        self.config, self.device = zo.Config(batch_size=batch_size, block_size=4, seed=seed), CPU
        self.source, self.blocks = self.config.source, blocks
        self.tokens = {"train": np.repeat(np.arange(blocks, dtype=np.uint16), 4)}


def test_a_batch_depends_on_its_step_alone_and_an_epoch_has_every_block_once():
    orders = {tuple(range(100))}
    for blocks, batch_size, seed in [
        (1, 1, 0),
        (2, 1, 0),
        (64, 16, 0),
        (65, 5, 0),
        (12, 4, 0),
        (13, 4, 0),
        (7, 7, 0),
        (5, 3, 0),
        (100, 10, 0),
        (100, 10, 1),
    ]:
        batches = [Blocks(blocks, batch_size, seed).batch(step)[0] for step in reversed(range(3 * blocks))]
        assert all(batch.dtype == torch.int64 and batch.eq(batch[:, :1]).all() for batch in batches)
        epochs = torch.cat(batches[::-1])[:, 0].view(-1, blocks).tolist()
        assert all(sorted(epoch) == list(range(blocks)) for epoch in epochs)
        orders |= {tuple(epoch) for epoch in epochs[:3] if blocks == 100}
    assert len(orders) == 7
    assert np.abs(np.corrcoef(list(orders)) - np.eye(7)).max() < 5 / 100**0.5  # they are mixed
