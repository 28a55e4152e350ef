"""LoRA under ``fully_shard`` (FSDP2): the losses of one process, and an adapter saved whole.

Every process holds a part of each parameter, float32 adapters on a base of ``--dtype`` in one
group, and takes its share of a batch's rows. The first one also trains alone on whole batches; both
must have the same losses, and the adapter that the shards were gathered into the same logits.

    torchrun --nproc-per-node 2 examples/finetune_fsdp2.py [--steps 20] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

import fastlora
from fastlora.demo.corpora import DOMAINS, make_domain_text
from fastlora.demo.model import clone, cut_rows, make_byte_tokenizer, make_small_llama

# Relative, of losses. Adam divides by what may be tiny, so that differences of rounding grow from
# step to step; in half precision they are larger to begin with.
TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2}


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)


def join_processes() -> torch.device:
    """Joins the processes that torchrun has started, each with a device of its own."""
    if not torch.cuda.is_available():
        distributed.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl", device_id=device)
    return device


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domain", choices=list(DOMAINS), default="calendar")
    parser.add_argument("--rows", type=int, default=2, help="a process, in a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32", help="the base's")
    out = Path(tempfile.gettempdir()) / "fastlora-fsdp2"
    parser.add_argument("--out", type=Path, default=out, help="where the adapter goes")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    device = join_processes()
    process, processes = distributed.get_rank(), distributed.get_world_size()

    # The same in every process, by the seed.
    tokenizer = make_byte_tokenizer()
    base = make_small_llama(options.hidden, options.layers, len(tokenizer), seed=0)
    base = base.to(device, getattr(torch, options.dtype))
    config = fastlora.LoRAConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear"
    )
    alone = fastlora.replace_linear(clone(base), config).train()
    model = clone(alone)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)

    batch = options.rows * processes
    characters = 2 * batch * options.length * options.steps
    text = make_domain_text(options.domain, 0, characters).train
    blocks = cut_rows(tokenizer, text, options.length).to(device)
    optimizer, alone_optimizer = (
        make_optimizer(model, options.rate),
        make_optimizer(alone, options.rate),
    )
    worst, mean, whole = 0.0, torch.zeros(()), torch.zeros(())
    for i in range(options.steps):
        ids = blocks[i * batch : (i + 1) * batch]
        mean = take_step(model, optimizer, ids.chunk(processes)[process])
        distributed.all_reduce(mean)
        mean /= processes
        if process == 0:
            whole = take_step(alone, alone_optimizer, ids)
            worst = max(worst, abs(mean.item() / whole.item() - 1))
            if i in (0, options.steps - 1):
                print(f"step {i + 1}: {mean:.4f} of {processes} processes, {whole:.4f} of one")

    # Every process calls; the first one writes.
    fastlora.save_adapter(model, options.out)
    if process == 0:
        loaded = fastlora.load_adapter(clone(base), options.out).eval()
        parameters = fastlora.adapter_state_dict(loaded)
        print(f"saved {sum(p.numel() for p in parameters.values()):,} parameters to {options.out}")
        with torch.no_grad():
            gathered = loaded(input_ids=ids, labels=ids).loss.item()
            want = alone.eval()(input_ids=ids, labels=ids).loss.item()
        print(f"loss with it {gathered:.4f}, of one process {want:.4f}")
        worst = max(worst, abs(gathered / want - 1))
    distributed.destroy_process_group()
    if worst > TOLERANCE[options.dtype]:
        allowed = TOLERANCE[options.dtype]
        raise SystemExit(f"the losses are apart by {worst:.0e}, more than {allowed:.0e}")


if __name__ == "__main__":
    main()
