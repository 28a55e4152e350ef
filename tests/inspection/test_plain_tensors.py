"""Weights that no op can read are refused where they are taken, all by one check."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from fastlora import functional as F
from fastlora.inspection.plain_tensors import explain_unreadable
from fastlora.modules.trained import TrainableMultiLoRALinear
from fastlora.modules.training_rows import TrainingRows
from tests.support.helpers import Wrapped
from tests.support.models import untouched

pytestmark = pytest.mark.filterwarnings("ignore:.*Sparse CSR")
FORM = "a tests.support.helpers.Wrapped, which holds its numbers in a form of its own"
ODD = {
    "subclass": (Wrapped, f"its weight is {FORM}"),
    "sparse": (Tensor.to_sparse_csr, "its weight is one of layout torch.sparse_csr"),
    "mkldnn": (Tensor.to_mkldnn, "its weight is one of layout torch._mkldnn"),
    "qint8": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "is torch.qint8"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "its weight is torch.float8_e4m3fn"),
    "bias": (Wrapped, f"its bias is {FORM}"),
}


def model(odd: str | None = None) -> nn.Sequential:
    """Two linears, of which the second has an odd weight, or bias."""
    made = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).requires_grad_(False)
    if odd is not None:
        name = "bias" if odd == "bias" else "weight"
        parameter = getattr(made[1], name)
        setattr(made[1], name, nn.Parameter(ODD[odd][0](parameter), requires_grad=False))
    return made


SETTINGS = fastlora.LoRAConfig(r=2, target_modules=["1"])
ENTRIES = {
    "replace_linear": lambda m: fastlora.replace_linear(m, SETTINGS),
    "adapter_names": lambda m: fastlora.replace_linear(m, SETTINGS, adapter_names=["a", "b"]),
    "MultiLoRAModel": lambda m: fastlora.MultiLoRAModel(m, target_modules=["1"]),
    "FastLoRALinear": lambda m: fastlora.FastLoRALinear.from_linear(m[1]),
    "MultiLoRALinear": lambda m: fastlora.MultiLoRALinear.from_linear(m[1], 2, 2),
    "Trainable": lambda m: TrainableMultiLoRALinear.from_linear(m[1], TrainingRows(["a"])),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("entry", [*ENTRIES, "load_adapter"])
def test_unreadable_weight_is_refused_at_every_entry(entry, odd, tmp_path):
    given = model(odd)
    take = ENTRIES.get(entry)
    if take is None:
        fastlora.save_adapter(fastlora.replace_linear(model(), SETTINGS), tmp_path)
        take = lambda m: fastlora.load_adapter(m, tmp_path)  # noqa: E731
    error = TypeError if "Linear" in entry or entry == "Trainable" else ValueError
    error = ValueError if entry == "replace_linear" else error
    before = {name: id(module) for name, module in given.named_modules()}
    with pytest.raises(error, match=ODD[odd][1]):
        take(given)
    assert {name: id(module) for name, module in given.named_modules()} == before


@pytest.mark.parametrize("odd", ["subclass", "sparse", "mkldnn"])
def test_merge_refuses_unreadable_weight(odd):
    weight = model(odd)[1].weight
    found = ODD[odd][1].removeprefix("its weight is ")
    with pytest.raises(
        TypeError, match=f"weight: expected a plain tensor with numbers, got {found}"
    ):
        F.merge_(weight, [(torch.ones(2, 16), torch.ones(8, 2), 1.0)])


def test_all_linear_skips_unreadable_weight():
    given = fastlora.replace_linear(
        model("subclass"), fastlora.LoRAConfig(target_modules="all-linear")
    )
    found = fastlora.report(given)
    assert list(found.replaced) == ["0"]
    assert FORM in found.skipped["1"]
    assert f"skipped 1: its weight is {FORM}" in str(found)


def test_from_conv1d_refuses_unreadable_weight():
    utils = pytest.importorskip("transformers.pytorch_utils")
    conv = utils.Conv1D(16, 8)
    conv.weight = nn.Parameter(Wrapped(conv.weight.detach()), requires_grad=False)
    with pytest.raises(TypeError, match=f"its weight is {FORM}"):
        fastlora.FastLoRAConv1D.from_conv1d(conv)


class Deaf(Wrapped):
    """As torchao's: it knows torch's ops and says so of others."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if "fastlora" in str(func):
            raise NotImplementedError(f"Deaf: unimplemented {func}")
        return super().__torch_dispatch__(func, types, args, kwargs)


class Dumb(Deaf):
    """As torch's own: by returning NotImplemented."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if "fastlora" in str(func):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("kind", [Deaf, Dumb])
def test_layer_quantized_later_is_refused_at_call(kind):
    """As torchao's quantize_ does to all subclasses of nn.Linear: each call says which operand."""
    said = f"weight: expected a plain tensor.*test_plain_tensors.{kind.__name__}, which holds"
    given = fastlora.replace_linear(model(), SETTINGS).eval()
    many = fastlora.MultiLoRALinear.from_linear(model()[1], 2, 2)
    for layer in (given[1], many):
        layer.weight = nn.Parameter(kind(layer.weight.detach()), requires_grad=False)
    x = torch.randn(3, 8)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=said):
            given(x)
    with pytest.raises(TypeError, match=said):
        many(torch.randn(3, 16), torch.zeros(3, dtype=torch.int32))
    with untouched(given[0]), pytest.raises(TypeError, match=f"1: {said}"):
        fastlora.merge_adapter(given)


class Tagged(nn.Parameter):
    """Plain numbers with something beside them, as several libraries load weights."""

    tag = "q_proj"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_plain_tensor_subclasses_stay_accepted():
    x, given = torch.randn(3, 8), model()
    given[1].weight = Tagged(given[1].weight, requires_grad=False)
    wanted = given(x)
    assert torch.allclose(fastlora.replace_linear(given, SETTINGS)(x), wanted, atol=1e-6)
    with FakeTensorMode():
        fake = fastlora.replace_linear(model(), SETTINGS)
        assert fake(torch.empty(3, 8)).shape == (3, 8)
    with torch.device("meta"):
        assert fastlora.replace_linear(model(), SETTINGS)[1].weight.is_meta
    assert explain_unreadable(torch.nn.Buffer(torch.ones(2, 2))) is None
    seen = []

    def look(t):
        seen.append((explain_unreadable(t), F.base_linear(t, given[0].weight, None)))
        return t.sum()

    torch.func.vmap(torch.func.grad(look))(torch.randn(2, 8))
    assert seen[0][0] is None


def test_nested_tensors_are_explained_as_unreadable():
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    assert "NestedTensor, which holds" in str(explain_unreadable(jagged))
    strided = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    assert explain_unreadable(strided) == "a nested one"


def test_patch_peft_leaves_unreadable_layer_to_peft():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["0", "1"])
    theirs = peft.get_peft_model(model("subclass"), settings)
    reason = "its base_layer has a weight of type Wrapped"
    with pytest.raises(ValueError, match=f"1 of 2 .*model.1: {reason}"):
        fastlora.patch_peft(theirs, strict=True)
    assert fastlora.patch_peft(theirs).skipped == {"base_model.model.1": reason}
    x = torch.randn(3, 8)
    wanted = theirs(x)
    fastlora.unpatch_peft(theirs)
    assert torch.allclose(theirs(x), wanted, atol=1e-6)
