"""Adapters loaded from tensors, as a training loop sends them while batches run."""

from __future__ import annotations

import threading
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from tests.support.helpers import same_bits
from tests.support.models import assert_agree, llama, logits, quiet, randomise_lora, tokens

pytestmark = quiet

K, N, VERSIONS = 16, 8, 1000


class One(nn.Module):
    """A linear whose weight is zero: what comes out is the adapter's part alone."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(K, N, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, inputs):
        return self.proj(inputs)


def version(v: int) -> tuple[dict[str, torch.Tensor], LoRAConfig, float]:
    """Another rank, scaling, A and B for each v, all small whole numbers; and what comes out.

    Every product of parts of two versions, of which r, A and B have no factor in common, differs.
    """
    r, alpha = 1 + v % 5, float(1 + v % 7)
    a, b = float(1 + v % 11), float(1 + v % 13)
    tensors = {
        "base_model.model.proj.lora_A.weight": torch.full((r, K), a),
        "base_model.model.proj.lora_B.weight": torch.full((N, r), b),
    }
    config = LoRAConfig(r=r, lora_alpha=alpha * r, target_modules=["proj"])
    return tensors, config, alpha * r * a * b * K


def test_batches_see_whole_versions_of_replaced_adapter():
    """Every batch sees one version, whole, that was current while it ran; the neighbour its own."""
    server = MultiLoRAModel(One(), max_adapters=2, max_rank=8, target_modules=["proj"])
    fixed, config, of_fixed = version(4321)
    server.load_adapter_from_tensors(fixed, config, "fixed")
    tensors, config, _ = version(0)
    server.load_adapter_from_tensors(tensors, config, "policy")
    begun, done, wrong, seen = [0], [0], [], set()
    over = threading.Event()
    wants = [version(v)[2] for v in range(VERSIONS)]

    def run() -> None:
        x = torch.ones(3, 2, K)
        while not over.is_set():
            first = done[0]
            y = server(x, adapter_names=["policy", None, "fixed"])
            last = begun[0]
            got = y[0, 0, 0].item()
            current = [v for v in range(first, last + 1) if wants[v] == got]
            alike = all(
                (row == want).all() for row, want in zip(y, (got, 0, of_fixed), strict=True)
            )
            if not current or not alike:
                wrong.append((first, last, y))
                return
            seen.update(current)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for v in range(1, VERSIONS):
            tensors, config, _ = version(v)
            begun[0] = v
            server.load_adapter_from_tensors(tensors, config, "policy")
            done[0] = v
            for tensor in tensors.values():
                tensor.fill_(torch.nan)  # the sender's own again
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[0]
    assert len(seen) > 10
    stats = server.bank.stats()
    assert (stats.known, stats.leases) == (2, 0)
    # Nothing is left of a thousand versions.
    server.unload_adapter("policy", wait=True)
    server.unload_adapter("fixed", wait=True)
    stats = server.bank.stats()
    assert (stats.device_bytes_used, stats.host_bytes_used) == (0, 0)


@pytest.mark.parametrize("whose", ["fastlora", "peft"])
def test_policy_is_trained_and_served_in_one_process(whose):
    """Trained, sent and served in one process; without its adapter it is the base, bit for bit."""
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    ids = tokens(2, 6)
    base = logits(llama(), ids)
    model: Any
    if whose == "fastlora":
        model = fastlora.replace_linear(llama(), LoRAConfig(**options))
    else:
        model = peft.get_peft_model(llama(), peft.LoraConfig(**options))
        fastlora.patch_peft(model)
    randomise_lora(model, 0.5)
    # Who is not in a batch makes room, and nothing else has a copy.
    server = MultiLoRAModel(llama(), max_adapters=1, max_rank=8, host_bytes=0)
    other = randomise_lora(fastlora.replace_linear(llama(), LoRAConfig(**options)), 0.5)
    server.load_adapter_from_tensors(
        fastlora.adapter_state_dict(other), LoRAConfig(**options), "other"
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        if whose == "fastlora":
            sent, config = fastlora.adapter_state_dict(model), LoRAConfig(**options)
        else:
            sent, config = peft.get_peft_model_state_dict(model), model.peft_config["default"]
        server.load_adapter_from_tensors(sent, config, "policy")
        of_policy = logits(model, ids)
        with fastlora.disable_adapter(model) if whose == "fastlora" else model.disable_adapter():
            assert same_bits(logits(model, ids), base)
        model(ids, labels=ids).loss.backward()
        optimizer.step()  # in place: what was sent is a copy
        optimizer.zero_grad()
        server(ids, adapter_names=["other", None])
        served = logits(server, ids, adapter_names=["policy", None])
        assert_agree(served[:1], of_policy[:1], base[:1])
        assert_agree(served[1:], base[1:], None)
        assert not same_bits(logits(model, ids), of_policy)


@pytest.mark.parametrize(
    "change, kind, says",
    [
        ({"tensors": [1]}, TypeError, "tensors: expected .name: tensor."),
        ({"base_model.model.proj.lora_A.weight": "x"}, TypeError, "A.weight: expected a tensor of"),
        ({"proj.lora_A.weight": torch.ones(2, K)}, ValueError, "is given twice"),
        ({"base_model.model.proj.lora_B.weight": torch.ones(N, 3)}, ValueError, "expected shape"),
        (
            {"base_model.model.other.lora_A.weight": torch.ones(2, K)},
            ValueError,
            "unexpected other",
        ),
        ({"config": LoRAConfig(r=9, target_modules=["proj"])}, ValueError, "rank of at most 8"),
        (
            {"config": {"r": 2, "target_modules": ["proj"], "use_dora": True}},
            ValueError,
            "use_dora",
        ),
        ({"config": 3}, TypeError, "config: expected"),
        ({"adapter_name": "__base__"}, ValueError, "means the base model"),
    ],
)
def test_load_from_tensors_error_changes_nothing(change, kind, says):
    server = MultiLoRAModel(One(), max_rank=8, target_modules=["proj"])
    tensors, config, want = version(1)
    server.load_adapter_from_tensors(tensors, config, "policy")
    given = {"tensors": tensors, "config": config, "adapter_name": "policy"}
    keys = given.keys() & change.keys()
    given |= change if keys else {"tensors": tensors | change}
    with pytest.raises(kind, match=says):
        server.load_adapter_from_tensors(**given)
    got = server(torch.ones(1, 1, K), adapter_names=["policy"])
    assert (got == want).all()
    assert server.adapters == ("policy",)


def test_load_from_tensors_accepts_base_head_from_peft():
    """As get_peft_model_state_dict gives it: the base's is passed over, another is refused."""
    settings = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model: Any = peft.get_peft_model(llama(tie_word_embeddings=False), settings)
    server = MultiLoRAModel(llama(tie_word_embeddings=False), max_rank=8)
    sent = peft.get_peft_model_state_dict(model, save_embedding_layers=True)
    along = "base_model.model.lm_head.base_layer.weight"
    assert along in sent
    ids = tokens(1, 6)
    with pytest.raises(ValueError, match="not served here"):
        server.load_adapter_from_tensors(sent, model.peft_config["default"], "head")
    server = MultiLoRAModel(
        llama(tie_word_embeddings=False), max_rank=8, target_modules=["lm_head"]
    )
    server.load_adapter_from_tensors(sent, model.peft_config["default"], "head")
    assert_agree(logits(server, ids, adapter_names=["head"]), logits(model, ids))
    sent[along] = sent[along] + 1
    with pytest.raises(ValueError, match=r"rows of lm_head\.weight of its own"):
        server.load_adapter_from_tensors(sent, model.peft_config["default"], "head")
