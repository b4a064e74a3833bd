"""Directions that live where the layers' inputs live: their shape, and the same measurement on both paths."""

import numpy as np
import pytest
import torch
import transformers

import reproduce_zo_paper as zo

IDS = torch.arange(2 * 9).view(2, 9) * 7 % 61


@pytest.fixture
def setting():
    about = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(about).double().eval()
    with zo.Workers(torch.device("cpu")) as workers:
        tensors = zo.trainable_tensors(model.named_parameters())
        objective = zo.Objective(model, workers)
        bases = objective.see(IDS, tensors, 2, 0).bases
        scale = {t.index: torch.linspace(0.5, 2.0, 61) for t in tensors if t.parameter is model.lm_head.weight}
        yield objective, tensors, zo.Queries(zo.Aligned(2, bases, scale), 3, 4, 5, 1e-4)


def test_every_matrix_has_an_orthonormal_basis_and_no_vector_has(setting):
    _, tensors, queries = setting
    bases = queries.family.bases
    assert set(bases) == {tensor.index for tensor in tensors if tensor.parameter.ndim == 2}
    for index, basis in bases.items():
        assert basis.shape == (tensors[index].columns, 2)
        assert torch.allclose(basis.T @ basis, torch.eye(2), atol=1e-5)


def test_rows_are_scaled_where_they_have_a_scale_and_nowhere_else(setting):
    _, tensors, queries = setting
    plain = zo.Aligned(2, queries.family.bases, {})
    for query in range(3):
        for tensor in (tensor for tensor in tensors if tensor.parameter.ndim == 2):
            left, _ = queries.family.direction(tensor, queries.at(query)).factors()
            bare, _ = plain.direction(tensor, queries.at(query)).factors()
            scale = queries.family.row_scale.get(tensor.index, torch.ones(tensor.rows))
            assert torch.equal(left, bare * scale[:, None])


def test_the_basis_holds_the_leading_directions_of_the_inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator) * torch.tensor([9.0, 5.0] + [0.1] * 10)
    basis = zo.leading_directions(x, 2, 0, 0)
    right = torch.linalg.svd(x, full_matrices=False).Vh[:2]
    assert torch.allclose(basis @ basis.T, right.T @ right, atol=1e-3)


def test_batched_measures_what_in_place_measures(setting):
    objective, tensors, queries = setting
    in_place = zo.projected_gradients(objective, tensors, lambda query: (IDS, IDS), queries).projected_grads
    for group in (1, 2, 5):
        batched = zo.projected_gradients(objective, tensors, lambda query: (IDS, IDS), queries, group).projected_grads
        assert np.allclose(batched, in_place, rtol=1e-8, atol=1e-10)


def test_the_direction_measured_is_the_direction_applied(setting):
    """c agrees with the true gradient along the z that an update of that query alone adds, to O(epsilon^2)."""
    objective, tensors, queries = setting
    c = zo.projected_gradients(objective, tensors, lambda query: (IDS, IDS), queries).projected_grads
    _, gradients = objective.gradient(IDS, IDS, tensors)
    for query in range(queries.q):
        z = [torch.zeros_like(tensor.matrix) for tensor in tensors]
        zo.add_directions(z, tensors, queries, np.eye(queries.q)[query], objective.workers)
        along = sum((g.view_as(part) * part).sum().item() for g, part in zip(gradients, z))
        assert along == pytest.approx(c[query], rel=1e-3, abs=1e-4)


def test_a_step_promises_no_more_than_allowed():
    c = np.array([3.0, -4.0])
    assert zo.trusted_rate(1.0, c, 0.05, 1.0) == pytest.approx(0.05 / 12.5)
    assert zo.trusted_rate(1e-3, c, 0.05, 1.0) == 1e-3
    assert zo.trusted_rate(1.0, c, 0.0, 1.0) == 1.0


def test_an_aligned_run_is_replayed_bit_for_bit(runs, capsys):
    run = runs.train(mode="ZO", direction="aligned", rank=2, max_steps=5, learning_rate=1.0)
    assert runs.replay(run) == 0
    assert "bitwise equal to" in capsys.readouterr().out
