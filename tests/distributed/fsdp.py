"""fully_shard over the processes, equal to one process; adapters saved whole, loaded in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

import fastlora
from fastlora import LoRAConfig
from tests.distributed.nets import (
    Block,
    Net,
    assert_same,
    batches,
    gradients,
    loss_of,
    mean_over_processes,
    net,
    optimizer_of,
    rows_of_process,
    train,
    trainable_parameters,
)

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded(model: Any, layers: bool = False, **options: Any) -> Any:
    """By block, or by layer within, and the rest at the root."""
    for block in model.blocks:
        if layers:
            fully_shard(block.up, **options)
            fully_shard(block.down, **options)
        fully_shard(block, **options)
    return fully_shard(model, **options)


def same_as_one_process(_: Path) -> None:
    data = batches(3)
    kinds: list[dict[str, Any]] = [{}, {"layers": True}, {"reshard_after_forward": False}]
    kinds += [{"offload_policy": CPUOffloadPolicy(pin_memory=False)}]
    for options in kinds:
        one, other = net(), sharded(net(), **options)
        assert all(isinstance(p, DTensor) for p in other.parameters())
        assert train(other, data) == pytest.approx(train(one, data, alone=True), rel=1e-5)
        assert_same(trainable_parameters(other), trainable_parameters(one))
    one, other = net(), fully_shard(net())
    assert train(other, data) == pytest.approx(train(one, data, alone=True), rel=1e-5)


def float32_adapters_on_a_half_base(_: Path) -> None:
    """One group holds both; only what is trained must be of one dtype."""
    data = batches(3, dtype=torch.bfloat16)
    one, other = net(torch.bfloat16), sharded(net(torch.bfloat16))
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16, torch.float32}
    assert train(other, data) == pytest.approx(train(one, data, alone=True), rel=1e-3)
    # Activations are rounded alike; sums over rows are float32's, in another order.
    assert_same(trainable_parameters(other), trainable_parameters(one), 1e-4)
    mixed = sharded(net(torch.bfloat16, bias="all"))
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        loss_of(mixed, rows_of_process(data[0]))


def mixed_precision(_: Path) -> None:
    """Gathered as bfloat16, summed and kept as float32: one process's model cast to bfloat16."""
    for dtype in (torch.bfloat16, torch.float32):
        one = net(dtype).to(torch.bfloat16)
        other, data = sharded(net(dtype), mp_policy=BF16), batches(1, dtype=torch.bfloat16)[0]
        want, got = loss_of(one, data), loss_of(other, rows_of_process(data))
        want.backward()
        got.backward()
        assert mean_over_processes(got) == pytest.approx(want.item(), rel=1e-3)
        assert all(p.grad.dtype == torch.float32 for p in trainable_parameters(other).values())
        # Each process rounds its gradient to eight bits, then float32 sums them.
        assert_same(gradients(other), gradients(one), 2**-7)


def recomputed_activations(_: Path) -> None:
    data = batches(2)
    one, other = net(lora_dropout=0.0), net(lora_dropout=0.0)
    for i, block in enumerate(other.blocks):
        other.blocks[i] = checkpoint_wrapper(block)
        fully_shard(other.blocks[i])
    fully_shard(other)
    assert train(other, data) == pytest.approx(train(one, data, alone=True), rel=1e-5)
    want = {name: p.detach() for name, p in trainable_parameters(one).items()}
    got = {
        n.replace("_checkpoint_wrapped_module.", ""): p
        for n, p in trainable_parameters(other).items()
    }
    assert_same(got, want)


def dropout(_: Path) -> None:
    """Each process draws masks of its own, and recomputes the same ones."""
    model, again = net(lora_dropout=0.5), net(lora_dropout=0.5)
    for i, block in enumerate(again.blocks):
        again.blocks[i] = checkpoint_wrapper(block)
    sharded(model), sharded(again)
    rank, batch = distributed.get_rank(), rows_of_process(batches(1)[0])
    for one in (model, again):
        torch.manual_seed(rank)
        loss_of(one, batch).backward()
    want = list(gradients(model).values())
    for got, expected in zip(gradients(again).values(), want, strict=True):
        assert_same(got, expected)


def accumulated(_: Path) -> None:
    one, other = net(), sharded(net())
    data = batches(1, rows=8)[0]
    loss_of(one, data).backward()
    halves = zip(*(t.chunk(2) for t in data), strict=True)
    for last, half in enumerate(halves):
        other.set_requires_gradient_sync(bool(last))
        (loss_of(other, rows_of_process(half)) / 2).backward()
    assert_same(gradients(other), gradients(one))


def checkpoints(folder: Path) -> None:
    """Model and optimizer through torch.distributed.checkpoint: training goes on as if unbroken."""
    data = batches(4)
    model = sharded(net())
    optimizer = optimizer_of(model)
    _step(model, optimizer, data[:2])
    dcp.save(_state(model, optimizer), checkpoint_id=folder / "dcp")
    _step(model, optimizer, data[2:])
    fresh = sharded(net())
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(0.5)
    other = optimizer_of(fresh)
    state = _state(fresh, other)
    dcp.load(state, checkpoint_id=folder / "dcp")
    states.set_state_dict(
        fresh, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    _step(fresh, other, data[2:])
    for got, want in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(got.full_tensor(), want.full_tensor())
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = states.get_model_state_dict(model, options=whole)
    if distributed.get_rank() == 0:
        one = net()
        one.load_state_dict(full)
        x, _ = data[0]
        want = net()
        train(want, data, alone=True)
        assert_same(one(x), want(x))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Any]) -> None:
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, rows_of_process(batch)).backward()
        optimizer.step()


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = states.get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def adapters_are_saved_whole(folder: Path) -> None:
    x, _ = batches(1)[0]
    for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        extra = {"bias": "all", "lora_bias": True} if dtype == torch.float32 else {}
        model = net(dtype, **extra)
        for i, block in enumerate(model.blocks):
            model.blocks[i] = checkpoint_wrapper(block)
        sharded(model)
        train(model, batches(2, dtype=dtype))
        fastlora.save_adapter(model, folder / kind)
        # At once, in every process: the file is there when the call returns.
        one = net(dtype, **extra)
        fastlora.load_adapter(one, folder / kind)
        want = {name: p.full_tensor() for name, p in model.named_parameters() if "lora_" in name}
        for name, parameter in one.named_parameters():
            if "lora_" in name:
                wrapped = name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.")
                wrapped = wrapped.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module.")
                assert parameter.dtype == want[wrapped].dtype
                assert torch.equal(parameter, want[wrapped]), name
        assert not list((folder / kind).glob("*.new"))
        fresh = sharded(net(dtype, **extra))
        fastlora.load_adapter(fresh, folder / kind)
        assert_same(fresh(x.to(dtype)), one(x.to(dtype)), 1e-5 if dtype == torch.float32 else 2**-7)


def loads_after_forward_left_gathered(folder: Path) -> None:
    """The root keeps its parameters gathered after a forward: copies, which it then drops."""
    x, _ = batches(1)[0]
    one, other = net(), fully_shard(net())
    with torch.no_grad():
        for parameter in trainable_parameters(one).values():
            parameter.mul_(-0.5)
        other(x)
    assert not any(isinstance(p, DTensor) for p in other.parameters())
    if distributed.get_rank() == 0:
        fastlora.save_adapter(one, folder / "adapter")
    distributed.barrier()
    fastlora.load_adapter(other, folder / "adapter", is_trainable=True)
    with torch.no_grad():
        assert_same(other(x), one(x))
    fastlora.save_adapter(other, folder / "again")
    assert all(isinstance(p, DTensor) for p in other.parameters())
    files = [folder / name / "adapter_model.safetensors" for name in ("adapter", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def several_adapters(folder: Path) -> None:
    """Rows of adapters that other processes have none of: gradients of all are exchanged."""
    names = ("anna", "ben", "dora")
    one, other = net(adapter_names=names), sharded(net(adapter_names=names))
    batch, rows = batches(1)[0], ["anna", None, "ben", "anna"]
    mine = list(rows[2 * distributed.get_rank() :][:2])
    for model, whose, of in ((one, rows, batch), (other, mine, rows_of_process(batch))):
        x, target = of
        with fastlora.use_adapters(model, whose):
            (model(x) - target).square().sum().backward()
    assert_same(gradients(other), {name: g / 2 for name, g in gradients(one).items()})
    assert not any("dora" in name for name in gradients(other))
    fastlora.save_adapter(other, folder / "ben", adapter_name="ben")
    fastlora.load_adapter(other, folder / "ben", adapter_name="anna", is_trainable=True)
    fastlora.load_adapter(one, folder / "ben", adapter_name="anna", is_trainable=True)
    assert_same(trainable_parameters(other), trainable_parameters(one))


def refusals(_: Path) -> None:
    model = sharded(net())
    before = [p.to_local().clone() for p in model.parameters()]
    x, _ = batches(1)[0]
    with pytest.raises(TypeError, match="sharded over processes; gather it before merging"):
        fastlora.merge_adapter(model)
    with pytest.raises(TypeError, match="sharded over processes"):
        fastlora.merge_and_unload(model)
    # Past the forward that would gather them.
    with pytest.raises(TypeError, match="x: expected a DTensor beside a weight"):
        model.blocks[0].up(x)
    assert all(
        torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True)
    )
    late = sharded(Net())
    with pytest.raises(ValueError, match="sharded over processes already"):
        fastlora.replace_linear(late, LoRAConfig(r=2, target_modules=["up", "down"]))
    with pytest.raises(ValueError, match="sharded over processes already"):
        fastlora.MultiLoRAModel(late, target_modules=["up", "down"])


def fsdp1(folder: Path) -> None:
    """Flat parameters: trained as they are, saved where they are gathered, never in parts."""
    data, one = batches(3), net()
    other = FullyShardedDataParallel(
        net(), auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True,
        device_id=torch.device("cpu"),
    )  # fmt: skip
    assert train(other, data) == pytest.approx(train(one, data, alone=True), rel=1e-5)
    with pytest.raises(RuntimeError, match=r"lora_[AB]: expected shape .* spread over processes"):
        fastlora.save_adapter(other, folder / "adapter")
    assert not (folder / "adapter").exists()
    with FullyShardedDataParallel.summon_full_params(other, writeback=False):
        if distributed.get_rank() == 0:
            fastlora.save_adapter(other, folder / "adapter")
    distributed.barrier()
    loaded = net()
    fastlora.load_adapter(loaded, folder / "adapter", is_trainable=True)
    assert_same(trainable_parameters(loaded), trainable_parameters(one))
    with pytest.raises(RuntimeError, match="spread over processes"):
        fastlora.load_adapter(other, folder / "adapter")
