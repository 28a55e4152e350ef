"""The dropout mask: its bits, its rate, where it applies, and that all backends have the same."""

import math
import os
import textwrap

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastlora import functional as F
from fastlora.backends import dropout
from fastlora.backends.torch import wide_products as products
from tests.support import forks, helpers, oracle
from tests.support.calls import add, linear, operands
from tests.support.helpers import DTYPES, assert_accurate, leaves, same_bits, signed

SEEDS = [0, 1, -1, 2**63 - 2, -(2**63), 0x1234_5678_9ABC_DEF0]
WORD = 0xFFFF_FFFF


def philox(seed: int, column_group: int, row: int) -> list[int]:
    """Philox4x32-7 from the paper's definition, in Python's integers."""
    key = [seed & WORD, seed >> 32 & WORD]
    counter = [column_group, row, 0, 0]
    for _ in range(7):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            right >> 32 ^ counter[1] ^ key[0],
            right & WORD,
            left >> 32 ^ counter[3] ^ key[1],
            left & WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return counter


def keeps_by_definition(seed: int, row: int, column: int, p: float) -> bool:
    word = philox(seed, column // 8, row)[column % 8 // 2]
    return (word >> 16 * (column % 2) & 0xFFFF) >= round(p * 65536)


def seed_tensor(value: int, device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64, device=device)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first_row", [0, 5, 2**31, 2**32 - 5])
def test_keep_mask_is_philox_of_seed_and_position(seed, first_row, device):
    mask = dropout.keep_mask(4, 19, 0.3, seed_tensor(seed, device), first_row)
    want = [[keeps_by_definition(seed, first_row + m, k, 0.3) for k in range(19)] for m in range(4)]
    assert mask.dtype == torch.bool
    assert mask.tolist() == want


def test_keep_mask_does_not_depend_on_tiles(device):
    seed = dropout.new_seed(device)
    whole = dropout.keep_mask(63, 431, 0.5, seed)
    parts = [(0, 7), (7, 8), (8, 63)]
    tiles = [dropout.keep_mask(last - first, 431, 0.5, seed, first) for first, last in parts]
    assert torch.equal(torch.cat(tiles), whole)
    assert torch.equal(dropout.keep_mask(63, 100, 0.5, seed), whole[:, :100])


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keep_mask_has_its_rate_everywhere(p, device):
    """Within five standard deviations, in all and in each lane; neighbours are independent."""
    mask = dropout.keep_mask(1024, 512, p, dropout.new_seed(device)).double().cpu()
    kept = 1 - dropout.threshold(p) / 65536

    def near(share: torch.Tensor, probability: float, count: int) -> bool:
        spread = math.sqrt(probability * (1 - probability) / count)
        return bool(((share - probability).abs() <= 5 * spread).all())

    assert near(mask.mean(), kept, mask.numel())
    assert near(mask.view(-1, 64, 8).mean((0, 1)), kept, mask.numel() // 8)
    assert near((mask[:, 1:] * mask[:, :-1]).mean(), kept**2, mask.numel() // 3)
    assert near((mask[1:] * mask[:-1]).mean(), kept**2, mask.numel() // 3)


def test_kept_elements_are_scaled_to_same_mean():
    for p in (0.1, 1 / 3, 0.9):
        kept = 1 - dropout.threshold(p) / 65536
        assert dropout.keep_scale(p) * kept == pytest.approx(1, abs=1e-15)
    x = signed(2048, 64, dtype=torch.bfloat16, device=torch.device("cpu"))
    dropped = dropout.dropped(x, 0.1, torch.tensor(5))
    kept = dropped != 0
    # 1 / 0.9 is no bfloat16: rounded by itself it would be off by 1.6e-3 everywhere.
    assert float((dropped[kept].double() / x[kept].double()).mean() * 0.9 - 1) == pytest.approx(
        0, abs=2e-4
    )


@pytest.mark.parametrize("p", [0.0, 1e-7])
def test_p_too_small_drops_nothing(p):
    args = operands(linear)
    for f in (linear, add):
        assert same_bits(f(*args, dropout_p=p, training=True), f(*args))


@pytest.mark.parametrize("f", [linear, add])
def test_p_of_1_leaves_the_base_product(f):
    args = [t.requires_grad_() for t in operands(f)]
    y = f(*args, dropout_p=1.0, training=True)
    base = torch.nn.functional.linear(*args[:2])
    assert torch.equal(y, base)
    dy = torch.randn_like(y)
    dx, dA, dB = torch.autograd.grad(y, (args[0], args[2], args[3]), dy)
    assert torch.equal(dx, torch.autograd.grad(base, args[0], dy)[0])
    assert not dA.any()
    assert not dB.any()


def test_nothing_is_dropped_or_drawn_without_training():
    args, state = operands(linear), torch.get_rng_state()
    assert same_bits(linear(*args, dropout_p=0.9, training=False), linear(*args))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("f", [linear, add])
def test_seed_comes_from_torch_generator(f, device):
    args = [t.to(device) for t in operands(f, rows=63)]
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append([f(*args, dropout_p=0.5, training=True) for _ in range(2)])
    assert all(same_bits(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_new_seed_uses_all_64_bits():
    seeds = torch.stack([dropout.new_seed(torch.device("cpu")) for _ in range(200)])
    ones = torch.stack([(seeds >> bit & 1).double().mean() for bit in range(64)])
    assert bool(((ones - 0.5).abs() < 0.25).all())


@pytest.mark.parametrize("dtype, lora_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("M, K", [(63, 31), (2, 300_001)])
def test_dropout_matches_oracle_forward_and_backward(M, K, dtype, lora_dtype, device):
    """One mask forward and backward, on the LoRA branch alone; rows may be wider than a block."""
    N, R, p, scaling = 5, 3, 0.4, -0.75
    assert M * K < products._CPU_BLOCK or K > products._CPU_BLOCK
    base, lora = {"dtype": dtype, "device": device}, {"dtype": lora_dtype, "device": device}
    tensors = {
        "x": signed(M, K, **base),
        "weight": signed(N, K, **base),
        "lora_A": signed(R, K, **lora),
        "lora_B": signed(N, R, **lora),
    }
    torch.manual_seed(11)
    keep = dropout.keep_mask(M, K, p, dropout.new_seed(device))
    mask = {"keep": keep, "keep_scale": dropout.keep_scale(p)}
    torch.manual_seed(11)
    ours, plain = leaves(tensors), leaves(tensors)
    y = F.lora_linear(*ours.values(), scaling, dropout_p=p, training=True)
    unfused = helpers.lora_linear(*plain.values(), scaling, **mask)
    assert_accurate(y, oracle.lora_linear(*tensors.values(), scaling, **mask), unfused, dtype)
    dy = signed(M, N, **base)
    y.backward(dy)
    unfused.backward(dy)
    want = oracle.lora_linear_grads(dy, *tensors.values(), scaling, **mask)
    for name in tensors:
        assert_accurate(ours[name].grad, want[name], plain[name].grad, dtype)


@pytest.mark.parametrize("f", [linear, add])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_the_mask(reentrant, f, device):
    """Forward runs twice and has the same mask both times."""
    results = []
    args = [t.to(device) for t in operands(f, rows=63)]
    for run in (None, checkpoint):
        own = [t.clone().requires_grad_() for t in args]
        torch.manual_seed(5)

        def step(*a):
            return f(*a, dropout_p=0.5, training=True).sin()

        y = step(*own) if run is None else run(step, *own, use_reentrant=reentrant)
        torch.rand(3, device=device)  # the generator has moved on before backward
        y.sum().backward()
        results.append([y, *(t.grad for t in own)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


TWIN = """
    import torch
    from fastlora.backends import dropout
    from fastlora.kernels.tile import philox

    for rows, columns, p, seed in {cases}:
        seed = torch.tensor(seed, dtype=torch.int64, device="{device}")
        theirs = philox.keep_mask(rows, columns, dropout.threshold(p), seed)
        ours = dropout.keep_mask(rows, columns, p, seed).float()
        assert theirs.dtype == ours.dtype and torch.equal(theirs, ours), (rows, columns, p, seed)
        assert p in (0.0, 1.0) or columns < 9 or 0 < ours.mean() < 1
    print("equal")
"""


def test_triton_mask_equals_torch_mask_bitwise(device):
    pytest.importorskip("triton", reason="triton is not installed")
    sizes = [(1, 1), (17, 129), (33, 8), (5, 1128), (0, 5)]
    cases = [(*size, p, SEEDS[i]) for i, size in enumerate(sizes) for p in (0.0, 0.1, 0.5, 1.0)]
    env = {**os.environ, "TRITON_INTERPRET": "1" if device.type == "cpu" else "0"}
    result = forks.run(textwrap.dedent(TWIN).format(cases=cases, device=device), env=env)
    assert result.stdout == "equal\n", result.stderr
