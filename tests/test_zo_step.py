"""zo_step: one step on any function of the weights, for other people's loops."""

import copy
import re

import harness
import numpy as np
import pytest
import torch

import reproduce_zo_paper as zo

IDS = torch.arange(18).view(2, 9) * 7 % 61


def loss_of(model):
    """In the model's own precision: transformers takes its loss in float32."""
    return lambda: torch.nn.functional.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize("direction", ["gaussian", "rademacher", "lowrank", "kronecker"])
def test_it_is_a_step_along_the_estimated_gradient(direction):
    model, other = harness.llama("float64"), harness.llama("float64")
    given = {"seed": 3, "step": 5, "direction": direction, "rank": 1}
    grads, loss = zo.zo_gradient_estimator(other, other.parameters(), None, IDS, IDS, 4, 1e-4, "cpu", **given)
    losses, c = zo.zo_step(model.parameters(), loss_of(model), 4, 1e-4, 0.1, **given)
    assert losses.shape == (4, 2)
    assert losses.mean() == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_array_equal(c, zo.projected_gradients(losses, 1e-4))
    for one, before, grad in zip(model.parameters(), other.parameters(), grads):
        torch.testing.assert_close(one, before - 0.1 * grad, rtol=1e-4, atol=1e-6)


def test_adam_goes_on_by_its_state_alone():
    """Steps with the state, saved and loaded between them, are those of one sitting, and others without it."""
    found = []
    for keep in (True, True, False):
        model, state = harness.llama(), {}
        for step in range(4):
            state = {name: value.clone() for name, value in state.items()} if keep else {}
            zo.zo_step(model.named_parameters(), loss_of(model), 2, 1e-3, 1e-3, "adam", state, step=step)
        found.append([p.detach().clone() for p in model.parameters()])
        assert {name.rpartition("/")[0] for name in state} == {name for name, _ in model.named_parameters()}
    assert all(map(torch.equal, found[0], found[1]))
    assert not all(map(torch.equal, found[0], found[2]))


def test_what_has_no_gradient_is_learned():
    """The share of signs that are right, of a linear map of one's own, which is no language model."""
    generator = torch.Generator().manual_seed(0)
    x, true = torch.randn(400, 6, generator=generator), torch.randn(6, generator=generator)
    layer = torch.nn.Linear(6, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 0.3)

    def closure() -> float:
        return -((layer(x)[:, 0] > 0) == (x @ true > 0)).float().mean()

    before = closure().item()
    for step in range(60):
        zo.zo_step(layer.parameters(), closure, 8, 0.1, 0.1, step=step)
    assert closure().item() < min(-0.9, before - 0.1)


def test_weights_come_back_where_the_function_fails():
    model, calls, before = harness.llama(), [], None

    def failing() -> float:
        calls.append(0)
        if len(calls) % 9 == 4:
            raise KeyError("of one's own")
        return float("nan") if len(calls) % 9 == 8 else 1.0

    for error in (KeyError, FloatingPointError, KeyError):  # the first call puts the weights on their grid
        with pytest.raises(error):
            zo.zo_step(model.parameters(), failing, 3, 1e-3, 1e-3)
        before = before or copy.deepcopy(model.state_dict())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": 0}, "q=0 must be a whole number from 1"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be above 0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be above 0"),
        ({"direction": "aligned"}, "direction='aligned' must be one of gaussian, rademacher, lowrank, kronecker"),
        ({"optimizer": "mudamw"}, "optimizer='mudamw' must be one of sgd, adam"),
        ({"trainable_params": []}, "trainable_params is empty"),
        ({"optimizer": "adam", "state": {"other/step": torch.zeros(())}}, "state of unknown tensors"),
    ],
)
def test_odd_arguments_are_a_line(change, says):
    model = harness.llama()
    given = {"trainable_params": model.parameters(), "closure": loss_of(model), "q": 1, "epsilon": 1e-3}
    with pytest.raises(ValueError, match=re.escape(says)):
        zo.zo_step(**given | {"learning_rate": 1e-3} | change)
