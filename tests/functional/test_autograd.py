"""Derivatives of the functions: right where supported, an error everywhere else."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from fastlora import functional as F
from tests.support.calls import (
    IDS,
    SCALING,
    SCALINGS,
    M,
    N,
    add,
    functions,
    linear,
    multi_linear,
    operands,
    rand,
    unfused_function,
)
from tests.support.helpers import assert_near

NAMES = ("x", "weight", "lora_A", "lora_B")
arguments = pytest.mark.parametrize("argument", range(4), ids=NAMES)


def as_function_of_argument(f, args, argument: int):
    """``f`` as a function of one of its arguments."""
    return lambda t: f(*args[:argument], t, *args[argument + 1 :])


@functions
def test_function_passes_gradcheck_in_float64(f):
    args = operands(f, torch.float64)
    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in args])
    assert_near(f(*args), unfused_function(f)(*args))


@pytest.mark.parametrize("p", [0.25, 1.0])
@pytest.mark.parametrize("f", [linear, add])
def test_function_passes_gradcheck_with_dropout(f, p):
    def same_mask(*args):
        torch.manual_seed(3)
        return f(*args, dropout_p=p, training=True)

    args = [t.requires_grad_() for t in operands(f, torch.float64)]
    assert torch.autograd.gradcheck(same_mask, args)


def test_lora_linear_biases_pass_gradcheck():
    args = operands(linear, torch.float64)
    biases = [rand(N, dtype=torch.float64).requires_grad_() for _ in range(2)]

    def f(bias, lora_bias):
        return F.lora_linear(*args, SCALING, bias=bias, lora_bias=lora_bias)

    assert torch.autograd.gradcheck(f, biases)


def test_add_passes_gradcheck_with_row_scales():
    x, _, A, B = operands(multi_linear, torch.float64)
    y = rand(M, N, dtype=torch.float64)
    scales = rand(M)

    def f(y, A, B):
        y = F.lora_add_(y * 2, x, A[0], B[0], SCALING)
        return F.multi_lora_add_(y, x, A, B, IDS, SCALINGS, row_scales=scales)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (y, A, B)])


@functions
@arguments
@pytest.mark.parametrize("second", range(4), ids=NAMES)
def test_double_backward_raises_or_is_right(f, argument, second):
    """Right: the gradient of a weight that another op multiplied by."""
    args = [t.requires_grad_() for t in operands(f)]

    def twice(f):
        first = torch.autograd.grad(f(*args).square().sum(), args[argument], create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), args[second])[0]

    if argument == NAMES.index("weight") and f not in (linear, multi_linear):
        assert_near(twice(f), twice(unfused_function(f)))
    else:
        with pytest.raises(RuntimeError, match="differentiable once"):
            twice(f)


@functions
@pytest.mark.parametrize("transform", [hessian, lambda f: grad(lambda t: grad(f)(t).sum())])
def test_torch_func_higher_derivatives_raise(f, transform):
    args = operands(f)
    with pytest.raises(RuntimeError, match=r"differentiable once|jvp"):
        transform(lambda A: f(*args[:2], A, args[3]).square().sum())(args[2])


@functions
@arguments
@pytest.mark.parametrize("tracked", [False, True])
def test_forward_mode_raises_for_any_operand(f, argument, tracked):
    """Whether or not something requires grad: a tangent is never dropped."""
    args = operands(f)
    g = as_function_of_argument(f, args, argument)
    args[3 if argument != 3 else 2].requires_grad_(tracked)
    t = args[argument].detach()
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(g, (t,), (t,))
    with pytest.raises(NotImplementedError, match="jvp"):
        jacfwd(g)(t)
    with pytest.raises(NotImplementedError, match="jvp"), forward_ad.dual_level():
        g(forward_ad.make_dual(t, t))


def test_forward_mode_of_unrelated_tensor_passes():
    args = operands(linear)
    with forward_ad.dual_level():
        other = forward_ad.make_dual(rand(M, N), rand(M, N))
        y = linear(*args) + other
        assert_near(forward_ad.unpack_dual(y).tangent, forward_ad.unpack_dual(other).tangent)


@functions
@arguments
def test_torch_func_grad_matches_unfused_torch(f, argument):
    args = operands(f)
    for transform in (grad, jacrev):
        ours = transform(as_function_of_argument(lambda *a: f(*a).square().sum(), args, argument))
        plain = transform(
            as_function_of_argument(
                lambda *a: unfused_function(f)(*a).square().sum(), args, argument
            )
        )
        assert_near(ours(args[argument]), plain(args[argument]))


@functions
@pytest.mark.parametrize(
    "in_dims", [(0, None, None, None), (1, None, None, 2), (0, 0, None, 1), (None, 0, 1, None)]
)
def test_vmap_matches_vmap_of_unfused_torch(f, in_dims):
    args = operands(f)
    batched = [
        t if d is None else torch.stack([t, t.flip(0), -t]).movedim(0, d)
        for t, d in zip(args, in_dims, strict=True)
    ]
    assert_near(vmap(f, in_dims)(*batched), vmap(unfused_function(f), in_dims)(*batched))


def test_vmap_gives_each_ensemble_member_its_gradients():
    """x shared, y and adapters not: what backward needs of the forward is each member's own."""
    x, _, A, B = operands(add)
    As, ys = torch.stack([A, -A, A.flip(0)]), rand(3, M, N)

    def loss(y, A, B):
        return F.lora_add_(y * 1, x, A, B, SCALING).square().sum()

    def plain(y, A, B):
        return (y + SCALING * (x @ A.T @ B.T)).square().sum()

    ours, want = (vmap(grad(f, argnums=(0, 1, 2)), (0, 0, None))(ys, As, B) for f in (loss, plain))
    for a, b in zip(ours, want, strict=True):
        assert_near(a, b)


@functions
@arguments
def test_vmap_gives_each_sample_its_gradients(f, argument):
    args = operands(f)
    xs = torch.stack([args[0], args[0].flip(0), -args[0]])
    in_dims = tuple(0 if i == 0 else None for i in range(4))
    results = [
        vmap(grad(lambda *a, g=g: g(*a).square().sum(), argnums=argument), in_dims)(xs, *args[1:])
        for g in (f, unfused_function(f))
    ]
    assert_near(*results)


@functions
def test_gradient_through_vmap_matches_unfused_torch(f):
    """torch.func's and the ordinary one: what is batched does not say that it requires grad."""
    args = operands(f)
    xs = torch.stack([args[0], args[0].flip(0)])

    def loss(g, xs):
        return vmap(lambda x: g(x, *args[1:]))(xs).square().sum()

    want = grad(lambda xs: loss(unfused_function(f), xs))(xs)
    assert_near(grad(lambda xs: loss(f, xs))(xs), want)
    leaf = xs.clone().requires_grad_()
    loss(f, leaf).backward()
    assert_near(leaf.grad, want)


def test_vmap_onto_unbatched_y_raises():
    x, _, A, B = operands(add)
    y = rand(M, N)
    with pytest.raises(RuntimeError, match=r"vmap: y .* must be batched"):
        vmap(lambda x: F.lora_add_(y, x, A, B, SCALING))(torch.stack([x, x]))


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("f", [linear, add])
def test_dropout_under_vmap_follows_its_randomness(f, randomness):
    args = operands(f)

    def drop(x):
        return f(x, *args[1:], dropout_p=0.5, training=True)

    one, two = vmap(drop, randomness=randomness)(torch.stack([args[0]] * 2))
    # Not to the bit: a GEMM may round otherwise at another alignment.
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-5) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(drop)(torch.stack([args[0]] * 2))
