"""Bad input to the functions: the error names the argument, and nothing has changed."""

import math

import pytest
import torch

from fastlora import functional as F
from tests.support.helpers import signed, unchanged

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}
M, N, K, R, S = 4, 5, 7, 3, 2


def zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


def linear() -> dict[str, object]:
    tensors = {"x": signed(M, K, **CPU), "weight": signed(N, K, **CPU), "bias": signed(N, **CPU)}
    adapter = {"lora_A": signed(R, K, **CPU), "lora_B": signed(N, R, **CPU), "scaling": 0.5}
    return {**tensors, **adapter, "lora_bias": signed(N, **CPU), "dropout_p": 0.1, "training": True}


def add() -> dict[str, object]:
    kwargs = {"y": signed(M, N, **CPU), **linear()}
    return {k: v for k, v in kwargs.items() if k not in ("weight", "bias", "lora_bias")}


def multi_linear() -> dict[str, object]:
    base = {"x": signed(M, K, **CPU), "weight": signed(N, K, **CPU), "bias": signed(N, **CPU)}
    slots = {"lora_A": signed(S, R, K, **CPU), "lora_B": signed(S, N, R, **CPU)}
    rows = {"adapter_ids": torch.tensor([0, -1, 1, 0]), "row_scales": torch.ones(M)}
    return {**base, **slots, **rows, "scalings": torch.ones(S), "ranks": torch.tensor([3, 1])}


def multi_add() -> dict[str, object]:
    kwargs = {"y": signed(M, N, **CPU), **multi_linear()}
    return {k: v for k, v in kwargs.items() if k not in ("weight", "bias")}


def merge() -> dict[str, object]:
    return {"weight": signed(N, K, **CPU), "adapters": [adapter()]}


def swap() -> dict[str, object]:
    weight, adapters = signed(N, K, **CPU), [adapter()]
    return {"weight": weight, "receipt": F.merge_(weight, adapters), "adapters": adapters}


def adapter(**others: object) -> tuple[object, ...]:
    return tuple({"A": signed(R, K, **CPU), "B": signed(N, R, **CPU), "s": 0.5, **others}.values())


FUNCTIONS = {
    linear: F.lora_linear,
    add: F.lora_add_,
    multi_linear: F.multi_lora_linear,
    multi_add: F.multi_lora_add_,
    merge: F.merge_,
    swap: F.swap_,
}
NO_TENSOR = "expected a torch.Tensor, got"
FLOATS = "expected one of float16, bfloat16, float32, float64, got"
META = {"device": "meta"}

# For each argument: which functions, a bad value, the error and what its message says.
BAD = [
    ([linear, add, multi_linear, multi_add], "x", "x", TypeError, f"{NO_TENSOR} str"),
    (
        [linear, multi_linear],
        "x",
        zeros(M, 6),
        ValueError,
        r"expected shape \(..., 7\), got \(4, 6",
    ),
    ([linear, add, multi_linear, multi_add], "x", zeros(), ValueError, r"expected .*got \(\)"),
    ([linear, multi_linear], "x", zeros(M, K).half(), TypeError, "dtype torch.float32, got .*16"),
    ([linear, multi_linear], "x", zeros(M, K, **META), ValueError, "device cpu, got meta"),
    ([linear, multi_linear], "weight", None, TypeError, f"{NO_TENSOR} NoneType"),
    ([linear, multi_linear, merge], "weight", zeros(K), ValueError, r"shape \(N, K\), got \(7,\)"),
    (
        [linear, multi_linear, merge],
        "weight",
        zeros(N, K).int(),
        TypeError,
        f"{FLOATS} torch.int32",
    ),
    ([linear, multi_linear], "bias", zeros(4), ValueError, r"expected shape \(5,\), got \(4,\)"),
    ([linear, multi_linear], "bias", zeros(5).half(), TypeError, "dtype torch.float32, got .*16"),
    ([linear, multi_linear], "bias", 1.0, TypeError, f"{NO_TENSOR} float"),
    ([linear, add, multi_linear, multi_add], "lora_A", [1.0], TypeError, f"{NO_TENSOR} list"),
    ([linear], "lora_A", zeros(R, 6), ValueError, r"shape \(R, 7\), got \(3, 6\)"),
    ([linear, add], "lora_A", zeros(R), ValueError, r"expected shape \(R, .*\), got \(3,\)"),
    ([linear, add], "lora_A", zeros(R, K).int(), TypeError, f"{FLOATS} torch.int32"),
    ([linear, add], "lora_A", zeros(R, K, **META), ValueError, "expected the device cpu, got meta"),
    ([linear, add, multi_linear, multi_add], "lora_B", None, TypeError, f"{NO_TENSOR} NoneType"),
    ([linear], "lora_B", zeros(R, N), ValueError, r"expected shape \(5, 3\), got \(3, 5\)"),
    ([linear, add], "lora_B", zeros(N, 2), ValueError, r"expected shape \(5, 3\), got \(5, 2\)"),
    (
        [linear, add],
        "lora_B",
        zeros(N, R).half(),
        TypeError,
        "expected lora_A's dtype .*32, got .*16",
    ),
    ([linear], "lora_bias", zeros(5, 1), ValueError, r"expected shape \(5,\), got \(5, 1\)"),
    ([linear], "lora_bias", zeros(5).half(), TypeError, "dtype torch.float32, got .*16"),
    ([linear, add], "scaling", math.nan, ValueError, "expected a finite number, got nan"),
    ([linear, add], "scaling", -math.inf, ValueError, "expected a finite number, got -inf"),
    ([linear, add], "scaling", "2", TypeError, "expected a float, got str"),
    ([linear, add], "scaling", torch.ones(()), TypeError, "expected a float, got Tensor"),
    ([linear, add], "dropout_p", 1.5, ValueError, r"expected a probability in \[0, 1\], got 1.5"),
    ([linear, add], "dropout_p", -0.1, ValueError, "expected a probability .*got -0.1"),
    ([linear, add], "dropout_p", math.nan, ValueError, "expected a probability .*got nan"),
    ([linear, add], "dropout_p", None, TypeError, "expected a float, got NoneType"),
    ([add, multi_add], "y", 0, TypeError, f"{NO_TENSOR} int"),
    ([add, multi_add], "y", zeros(M, 4), ValueError, r"expected shape \(4, 5\), got \(4, 4\)"),
    ([add, multi_add], "y", zeros(1, N), ValueError, r"expected shape \(4, 5\), got \(1, 5\)"),
    (
        [add, multi_add],
        "y",
        zeros(M, N, requires_grad=True),
        RuntimeError,
        "leaf that requires grad",
    ),
    ([multi_linear], "lora_A", zeros(R, K), ValueError, r"shape \(S, R, 7\), got \(3, 7\)"),
    ([multi_linear], "lora_B", zeros(S, R, N), ValueError, r"\(2, 5, 3\), got \(2, 3, 5\)"),
    ([multi_add], "lora_B", zeros(1, N, R), ValueError, r"\(2, 5, 3\), got \(1, 5, 3\)"),
    ([multi_linear, multi_add], "scalings", [1.0, 1.0], TypeError, f"{NO_TENSOR} list"),
    ([multi_linear, multi_add], "scalings", zeros(3), ValueError, r"shape \(2,\), got \(3,\)"),
    ([multi_linear, multi_add], "scalings", zeros(2).double(), TypeError, "float32, got .*64"),
    ([multi_linear, multi_add], "scalings", zeros(2) / 0, ValueError, "finite numbers, got nan"),
    ([multi_linear, multi_add], "ranks", 3, TypeError, f"{NO_TENSOR} int"),
    ([multi_linear, multi_add], "ranks", zeros(2), TypeError, "int32 or int64, got torch.float32"),
    ([multi_linear, multi_add], "ranks", zeros(1).int(), ValueError, r"shape \(2,\), got \(1,\)"),
    ([multi_linear, multi_add], "row_scales", 1.0, TypeError, f"{NO_TENSOR} float"),
    (
        [multi_linear, multi_add],
        "row_scales",
        zeros(M).int(),
        TypeError,
        "floats on cpu, got .*int32",
    ),
    ([multi_linear, multi_add], "row_scales", zeros(3), ValueError, r"shape \(4,\) .*got \(3,\)"),
    ([multi_linear, multi_add], "row_scales", zeros(), ValueError, r"got \(\)"),
    ([multi_linear, multi_add], "adapter_ids", [0, 1], TypeError, f"{NO_TENSOR} list"),
    (
        [multi_linear, multi_add],
        "adapter_ids",
        zeros(M),
        TypeError,
        "int32 or int64, got .*float32",
    ),
    ([multi_linear, multi_add], "adapter_ids", zeros(3).int(), ValueError, r"\(4,\) .*got \(3,\)"),
    ([multi_linear, multi_add], "adapter_ids", zeros().int(), ValueError, r"got \(\)"),
    *(
        (
            [multi_linear, multi_add],
            "adapter_ids",
            torch.tensor([0, bad, 1, 0]),
            ValueError,
            message,
        )
        for bad, message in [(2, r"ids in \[-1, 2\), got 2"), (-2, r"ids in \[-1, 2\), got -2")]
    ),
    *(
        ([multi_linear], "adapter_ids", F.group_rows(zeros(rows).int(), slots), ValueError, message)
        for rows, slots, message in [(M, 3, "3 slots, but there are 2"), (3, S, r"got \(3,\)")]
    ),
    ([merge], "weight", [[1.0]], TypeError, f"{NO_TENSOR} list"),
    ([merge], "weight", zeros(1, K).expand(N, K), ValueError, "elements of their own"),
    ([merge, swap], "adapters", zeros(1), TypeError, r"expected \[\(lora_A.*got Tensor"),
    ([merge, swap], "adapters", None, TypeError, r"expected \[\(lora_A.*got NoneType"),
    ([merge, swap], "adapters", [zeros(1)], TypeError, r"expected \(lora_A, .*got Tensor"),
    ([merge, swap], "adapters", [(zeros(R, K), zeros(N, R))], TypeError, "expected .*got tuple"),
    *(
        ([merge, swap], "adapters", [adapter(), bad], error, message)
        for bad, error, message in [
            (adapter(A=zeros(R, 6)), ValueError, r"lora_A: expected shape \(R, 7\), got \(3, 6\)"),
            (adapter(A="A"), TypeError, f"lora_A: {NO_TENSOR} str"),
            (adapter(B=zeros(N, 2)), ValueError, r"lora_B: expected shape \(5, 3\), got \(5, 2\)"),
            (adapter(B=zeros(N, R).half()), TypeError, "lora_B: expected lora_A's dtype"),
            (adapter(s=math.inf), ValueError, "scaling: expected a finite number, got inf"),
            (adapter(s=None), TypeError, "scaling: expected a float, got NoneType"),
        ]
    ),
]


@pytest.mark.parametrize(
    "make, name, value, error, message",
    [
        pytest.param(make, *case, id=f"{FUNCTIONS[make].__name__}-{case[0]}-{number}")
        for number, (makers, *case) in enumerate(BAD)
        for make in makers
    ],
)
def test_function_rejects_bad_input_naming_argument(make, name, value, error, message):
    kwargs = {**make(), name: value}
    expected = message if name == "adapters" and ": " in message else f"{name}: .*{message}"
    with unchanged(kwargs), pytest.raises(error, match=expected):
        FUNCTIONS[make](**kwargs)


@pytest.mark.parametrize("make", FUNCTIONS)
def test_function_accepts_operands_before_spoiling(make):
    FUNCTIONS[make](**make())


@pytest.mark.parametrize("name, value", [("weight", "w"), ("bias", 1.0), ("x", None)])
def test_lora_linear_rejects_bad_types_under_autocast(name, value):
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=f"{name}: {NO_TENSOR}"),
    ):
        F.lora_linear(**{**linear(), name: value})


@pytest.mark.parametrize(
    "slots, error, message",
    [
        (-1, ValueError, "num_slots: expected a count of adapter slots, got -1"),
        (2.0, TypeError, "num_slots: expected an int, got float"),
        (1, ValueError, r"adapter_ids: expected ids in \[-1, 1\), got 1"),
    ],
)
def test_group_rows_rejects_bad_number_of_slots(slots, error, message):
    with pytest.raises(error, match=message):
        F.group_rows(torch.tensor([0, 1]), slots)


@pytest.mark.parametrize("receipt", [None, {}, ()])
@pytest.mark.parametrize("act", [F.unmerge_, lambda *args: F.swap_(*args, [])])
def test_unmerge_and_swap_reject_anything_but_a_receipt(act, receipt):
    weight = signed(N, K, **CPU)
    with unchanged(weight), pytest.raises(TypeError, match="receipt: expected a MergeReceipt, got"):
        act(weight, receipt)
