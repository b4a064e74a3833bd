"""float32 products on a CPU by oneDNN: those of torch, whatever the shape, the layout and the form of the call."""

import itertools
import subprocess
import sys

import harness
import pytest
import torch

import reproduce_zo_paper as zo

pytestmark = pytest.mark.skipif(
    not (hasattr(torch.library, "get_kernel") and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch can't be given oneDNN's products",
)
SHAPES = [(512, 256, 300), (1, 256, 5000), (5000, 8, 64), (5000, 64, 256), (300, 5000, 129), (3, 4, 5), (64, 64, 0)]
LAYOUTS = [*itertools.product(("rows", "columns", "slice"), repeat=2)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laid_out(rows: int, columns: int, layout: str, seed: int) -> torch.Tensor:
    """A matrix in memory by rows, by columns, or as a part of a larger one."""
    whole = drawn(rows * 2, columns + 3, seed=seed)
    whole = whole.T.contiguous().T if layout == "columns" else whole
    return whole[:rows, :columns].contiguous() if layout == "rows" else whole[:rows, 3:]


def near(found: torch.Tensor, wanted: torch.Tensor, k: int) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6 * max(1, k))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_of_a_product_is_torchs(shape, layout):
    zo.multiply_by_onednn()
    (m, k, n), (a, b) = shape, (laid_out(*size, own, 1) for size, own in zip((shape[:2], shape[1:]), layout))
    wanted, c, bias = a.double() @ b.double(), laid_out(m, n, "slice", 2), drawn(n)
    near(a @ b, wanted, k)
    near(torch.mm(a, b, out=torch.empty(m, n)), wanted, k)
    near(torch.mm(a, b, out=torch.empty(n, m).T), wanted, k)
    near(torch.addmm(c, a, b), wanted + c, k)
    near(torch.addmm(bias, a, b), wanted + bias, k)
    near(torch.addmm(c, a, b, beta=0.5, alpha=2), 2 * wanted + 0.5 * c, k)
    near(torch.nn.functional.linear(a[None], b.T, bias)[0], wanted + bias, k)
    near(c.clone().addmm_(a, b), wanted + c, k)
    near(c.clone().addmm_(a, b, beta=0, alpha=3), 3 * wanted, k)
    part = torch.zeros(m, 2 * n + 1)[:, ::2][:, :n]
    near(part.addmm_(a, b), wanted, k)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_onednn_is_given_what_it_is_fast_with(layout):
    """With a part of a larger matrix on the right it takes a thousand times as long."""
    zo.multiply_by_onednn()
    a, b = laid_out(512, 256, layout[0], 1), laid_out(256, 300, layout[1], 1)
    given = {}
    for right in (b, b.T.contiguous().T):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            a @ right
        given[right.is_contiguous() or right.T.is_contiguous()] = "mkldnn" in str([e.key for e in seen.key_averages()])
    assert given == {True: True, False: False} if layout[1] != "rows" else given == {True: True}


def test_other_dtypes_and_wrong_shapes_are_as_ever():
    zo.multiply_by_onednn()
    a = drawn(200, 300)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        assert (a.to(dtype) @ a.T.to(dtype)).dtype == dtype
    half, bias = a.bfloat16(), drawn(200, seed=1).bfloat16()
    exact = half.double() @ half.T.double()
    for found, wanted in ((half @ half.T, exact), (torch.addmm(bias, half, half.T), exact + bias.double())):
        torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=2**-7)
    strided = drawn(400, seed=2)[::2]
    near(torch.addmm(strided, a, a.T), a.double() @ a.T.double() + strided.double(), 300)
    with pytest.raises(RuntimeError):
        torch.mm(a[0], a.T)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        a @ a
    with pytest.raises(RuntimeError, match="dtype"):
        a @ a.T.double()
    assert torch.isnan((a * torch.nan) @ a.T).all()


def test_gradients_are_those_of_float64():
    zo.multiply_by_onednn()
    x, w = drawn(4, 130, 256).requires_grad_(), drawn(300, 256, seed=1).requires_grad_()
    ones = torch.autograd.grad(torch.nn.functional.linear(x, w).sum(), (x, w))  # of a gradient of strides 0
    torch.testing.assert_close(ones[0][0, 0], w.detach().sum(0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ones[1][0], x.detach().sum((0, 1)), rtol=1e-4, atol=1e-3)
    y = torch.nn.functional.linear(x, w).square().mean()
    found = torch.autograd.grad(y, (x, w))
    wide = [value.detach().double().requires_grad_() for value in (x, w)]
    wanted = torch.autograd.grad(torch.nn.functional.linear(*wide).square().mean(), wide)
    for one, two in zip(found, wanted):
        torch.testing.assert_close(one.double(), two, rtol=0, atol=1e-5 * two.abs().max().item())


@pytest.mark.parametrize("more", [{"direction": "lowrank", "parallel_q_computation": True}, {"mode": "FO"}], ids=str)
def test_a_run_with_such_products_goes_on_and_is_replayed_bit_for_bit(runs, monkeypatch, more):
    zo.multiply_by_onednn()
    monkeypatch.setattr(zo, "LEAST_PRODUCT", 1)
    whole = runs.goes_on(5, **more)
    monkeypatch.setattr(zo, "LEAST_PRODUCT", 1 << 60)
    other = runs.train("other", **more, max_steps=5)
    one, two = (harness.column(each, "val_loss")[-1] for each in (whole, other))
    assert one == pytest.approx(two, abs=1e-4)


def test_importing_the_script_leaves_torch_as_it_is():
    code = "import reproduce_zo_paper as zo, torch; torch.ones(9); print(zo.multiply_by_onednn.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
