"""PEFT models in pairs, one plain and one patched, and what is done to both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

import fastlora
from fastlora.integrations.peft import linear as peft_linear
from tests.support.models import assert_agree, bert, llama, tokens


class Mlp(nn.Module):
    """Linears with and without bias, of odd sizes; what PEFT calls a custom model."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.lin0 = nn.Linear(11, 20, dtype=dtype)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 13, bias=False, dtype=dtype)
        self.head = nn.Linear(13, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.lin1(self.relu(self.lin0(x)))))


def gpt2(layers: int = 2) -> nn.Module:
    """Its linears are transformers' Conv1D."""
    sizes = {
        "n_embd": 32,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 32,
        "initializer_range": 0.3,
    }
    config = transformers.GPT2Config(vocab_size=97, eos_token_id=None, bos_token_id=None, **sizes)
    return transformers.GPT2LMHeadModel(config).eval()


KINDS = ["mlp", "llama", "gpt2", "bert"]
TARGETS = {
    "mlp": ["lin0", "lin1"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value"],
}
_BUILD: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
}


def config(kind: str, **options: Any) -> peft.LoraConfig:
    given = {"target_modules": TARGETS[kind], "r": 5, "lora_alpha": 7} | options
    return peft.LoraConfig(**given, fan_in_fan_out=kind == "gpt2")


def peft_model(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A PEFT model whose adapters matter; the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        more, sizes = options.pop("get", {}), options.pop("sizes", {})
        model = peft.get_peft_model(
            _BUILD[kind](**sizes).to(dtype), config(kind, **options), **more
        )
    return fill_adapters(model).eval()


def fill_adapters(model: nn.Module) -> nn.Module:
    """Signed numbers in every adapter, the same in every model of these names."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(drawn)
    return model


def pair(kind: str, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The model as PEFT has it, and patched."""
    plain, patched = peft_model(kind, *args, **options), peft_model(kind, *args, **options)
    fastlora.patch_peft(patched)
    return plain, patched


def inputs(kind: str, rows: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    if kind == "mlp":
        return {"x": torch.randn(rows, 11, dtype=dtype)}
    return {"input_ids": tokens(rows, 6)}


def run(model: nn.Module, given: dict[str, Tensor], **more: Any) -> Tensor:
    found = model(**given, **more)
    return found if isinstance(found, Tensor) else found.logits


def assert_same(plain: nn.Module, patched: nn.Module, act: Callable[[nn.Module], Any]) -> None:
    """What ``act`` returns of both, their gradients and their parameters agree."""
    wanted = act(plain)
    found = act(patched)
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert_agree(got, want)
    own, others = dict(patched.named_parameters()), dict(plain.named_parameters())
    assert own.keys() == others.keys()
    for name, want in others.items():
        assert own[name].requires_grad == want.requires_grad, name
        assert (own[name].grad is None) == (want.grad is None), name
        if want.is_floating_point() and want.numel() and bool(want.any()):
            assert_agree(own[name].detach(), want.detach())
        if want.grad is not None and bool(want.grad.any()):
            assert_agree(own[name].grad, want.grad)


@contextmanager
def count_forwards(monkeypatch: Any) -> Any:
    """How often layers ran on fastlora, and how often PEFT's forward did."""
    counts = {"one": 0, "many": 0, "peft": 0}

    def count(owner: Any, name: str, key: str) -> None:
        before = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[key] += 1
            return before(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    with monkeypatch.context() as monkeypatch:
        count(peft_linear, "_run_one_for_all", "one")
        count(peft_linear, "_run_one_a_row", "many")
        count(lora.Linear, "forward", "peft")
        yield counts


def train_adapters(model: nn.Module, given: Any, steps: int = 3, **more: Any) -> list[Tensor]:
    """Losses of a few steps, the adapters trained, the model's own dropout the same each time."""
    torch.manual_seed(3)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = run(model, given, **more).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    model.eval()
    return losses


def add_second_adapter(model: nn.Module) -> nn.Module:
    """A second adapter, of another rank, scaling and other layers."""
    more = config("mlp", r=9, lora_alpha=4, use_rslora=True, target_modules=["lin1", "head"])
    model.add_adapter("other", more)
    return fill_adapters(model).eval()


def inject_adapter(model: nn.Module, settings: peft.LoraConfig, name: str = "default") -> None:
    """An adapter of PEFT's in a model that stays what it is, active alone."""
    peft.inject_adapter_in_model(settings, model, name)
    for layer in model.modules():
        if isinstance(layer, lora.LoraLayer):
            layer.set_adapter(name)


def added_by_transformers(model: Any, settings: peft.LoraConfig, name: str = "default") -> None:
    """The same by the model's own ``add_adapter``; skips where that wants a newer PEFT."""
    try:
        model.add_adapter(settings, name)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(
            f"transformers {transformers.__version__} refuses PEFT {peft.__version__}: {error}"
        )


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def inputs_of_ones() -> dict[str, Tensor]:
    return {"x": torch.ones(3, 11)}


def inputs_of_tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(1, 13).view(2, 6)}
