"""Other libraries as providers pass the gate or are absent with a reason."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks.harness import gate
from benchmarks.harness.case import Absent, Case
from benchmarks.peers import training as peers_training
from benchmarks.suites.linear import Linear
from benchmarks.suites.multi import Multi
from tests.benchmarks.small_case import case_of


def verdict_of(name: str, case: Case) -> gate.Verdict:
    """The gate's on one of the providers that there are on a GPU."""
    work = case.work
    work.providers = {k: work.providers[k] for k in ("base", "torch")}
    work.providers[name] = work.gpu_providers[name]
    verdicts = gate.check(case, seed=1)
    assert (verdicts["base"].status, verdicts["torch"].status) == ("ok", "ok")
    return verdicts[name]


LIBRARIES = {"unsloth": "linear", "vllm": "decode", "sglang": "decode"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_peer_is_absent_when_library_is_missing(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    work = Multi("decode") if LIBRARIES[library] == "decode" else Linear(backward=True)
    verdict = verdict_of(library, case_of(work, "bf16"))
    assert verdict.status == "absent"
    assert "cannot be imported: ModuleNotFoundError" in verdict.reason
    assert verdict.reason.startswith(library)


@pytest.mark.parametrize("library", ["vllm", "sglang"])
def test_server_peers_are_absent_in_fp32(library):
    verdict = verdict_of(library, case_of(Multi("decode"), "fp32"))
    assert (verdict.status, verdict.reason[-4:]) == ("absent", "fp32")


def module(monkeypatch, name: str, **names) -> None:
    made = ModuleType(name)
    made.__dict__.update(names)
    monkeypatch.setitem(sys.modules, name, made)


class Meta:
    """vLLM's, as far as the provider knows it: the ids are all that this one keeps."""

    @staticmethod
    def make(max_loras, max_num_tokens, device):
        return Meta()

    def prepare_tensors(self, token_lora_mapping):
        assert token_lora_mapping.dtype == torch.int32
        self.ids = token_lora_mapping

    def meta_args(self, token_nums, specialize_active_lora):
        assert token_nums == len(self.ids)
        return (self.ids,)


def vllm_of(monkeypatch, off=1.0, fits=True) -> None:
    """A stand-in for vLLM's kernels, in torch. off: a factor of the adapters' part."""

    def shrink(x, lora_A, h, ids, scaling):
        for row in (ids >= 0).nonzero().flatten().tolist():
            h[0, row] = scaling * off * (x[row] @ lora_A[0][ids[row]].T)

    def expand(h, lora_B, y, ids, *, add_inputs):
        for row in (ids >= 0).nonzero().flatten().tolist():
            y[row] += (h[0, row] @ lora_B[0][ids[row]].float().T).to(y.dtype)

    names = {"LoRAKernelMeta": Meta, "lora_expand": expand, "lora_shrink": shrink}
    if not fits:
        names["lora_shrink"] = lambda x, lora_A, h, ids: None
    module(monkeypatch, "vllm.lora.ops.triton_ops", **names)


def sglang_of(monkeypatch, off=1.0, fits=True) -> None:
    """A stand-in for SGLang's kernels, in torch: segment by segment as its batch says."""

    def segments(known):
        assert known.max_len == 16
        for i in range(known.num_segments):
            start, end = known.seg_indptr[i : i + 2].tolist()
            assert 0 < end - start <= known.max_len
            slot = int(known.weight_indices[i])
            yield known.permutation[start:end], slot, int(known.lora_ranks[slot])

    def shrink(x, weights, known, num_slices):
        h = x.new_full((len(x), weights.shape[1]), float("nan"))
        for rows, slot, r in segments(known):
            if r:
                h[rows, :r] = x[rows] @ weights[slot, :r].T
        return h

    def expand(x, weights, known, slice_offsets, max_slice_size, base_output, slice_offsets_cpu):
        assert slice_offsets.tolist() == slice_offsets_cpu.tolist() == [0, max_slice_size]
        for rows, slot, r in segments(known):
            if r:
                part = x[rows, :r] @ weights[slot, :, :r].T
                base_output[rows] += off * known.scalings[slot].to(part.dtype) * part

    dense = "sglang.kernels.ops.lora.dense"
    names = {"chunked_sgmv_lora_shrink_forward": shrink} if fits else {"shrink": shrink}
    module(monkeypatch, f"{dense}.chunked_sgmv_shrink", **names)
    module(monkeypatch, f"{dense}.chunked_sgmv_expand", chunked_sgmv_lora_expand_forward=expand)
    module(monkeypatch, "sglang.srt.lora.utils", LoRABatchInfo=SimpleNamespace)


def unsloth_of(monkeypatch, off=1.0, fits=True) -> None:
    class LoRA_W:
        @staticmethod
        def apply(x, weight, state, lora_A, lora_B, scaling):
            assert state is None
            return x @ weight.T + off * scaling * (x @ lora_A.T) @ lora_B.T

    if not fits:
        LoRA_W.apply = staticmethod(lambda x, weight: x @ weight.T)
    module(monkeypatch, "unsloth.kernels.fast_lora", LoRA_W=LoRA_W)


FAKES = [
    *((vllm_of, "vllm", lambda phase=phase: Multi(phase)) for phase in ("decode", "prefill")),
    *(
        (sglang_of, "sglang", lambda phase=phase: Multi(phase))
        for phase in ("decode", "prefill", "mixed")
    ),
    *((unsloth_of, "unsloth", lambda b=b: Linear(backward=b)) for b in (False, True)),
]


@pytest.mark.parametrize("fake, library, work", FAKES)
def test_peer_library_is_held_to_the_gate(fake, library, work, monkeypatch):
    """Stand-ins in sys.modules: what is tested is what the providers hand over."""
    fake(monkeypatch)
    verdict = verdict_of(library, case_of(work(), "fp16"))
    assert verdict.status == "ok", verdict.reason
    fake(monkeypatch, off=1.02)
    verdict = verdict_of(library, case_of(work(), "fp16"))
    assert (verdict.status, "y: error" in verdict.reason) == ("failed", True)


@pytest.mark.parametrize("fake, library", [(vllm_of, "vllm"), (sglang_of, "sglang")])
def test_peers_handle_rows_without_adapter_and_mixed_ranks(fake, library, monkeypatch):
    fake(monkeypatch)
    sizes = {"T": 45, "K": 40, "N": 56, "R": 24, "S": 3}
    work = Multi("decode")
    mixed = Case(work, "cpu", "fp16", sizes, workload="distinct", ranks="mixed")
    drawn = work.operands

    def operands(case, seed):
        o = drawn(case, seed)
        o["ids"][[0, 5, 44]] = -1  # among the rows that the gate looks at
        return o

    monkeypatch.setattr(work, "operands", operands)
    verdict = verdict_of(library, mixed)
    assert verdict.status == "ok", verdict.reason


@pytest.mark.parametrize(
    "fake, library, said",
    [
        (vllm_of, "vllm", "is not as expected here: TypeError"),
        (sglang_of, "sglang", "cannot be imported: ImportError"),
        (unsloth_of, "unsloth", "is not as expected here: TypeError"),
    ],
)
def test_peer_is_absent_when_its_interface_differs(fake, library, said, monkeypatch):
    fake(monkeypatch, fits=False)
    monkeypatch.setattr("benchmarks.peers.calls.find_version", lambda name: f"of {name}")
    work = Linear(backward=False) if library == "unsloth" else Multi("decode")
    verdict = verdict_of(library, case_of(work, "fp16"))
    assert verdict.status == "absent"
    assert verdict.reason.startswith(f"{library} of {library} {said}")


def test_peer_op_of_other_schema_is_absent(monkeypatch):
    vllm_of(monkeypatch)
    kernels = sys.modules["vllm.lora.ops.triton_ops"]
    kernels.lora_shrink = torch.ops.aten.mm
    verdict = verdict_of("vllm", case_of(Multi("decode"), "fp16"))
    assert verdict.status == "absent"
    assert "aten::mm() expected at most 2 argument(s)" in verdict.reason
    assert "Declaration" not in verdict.reason

    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    kernels.lora_shrink = broken
    verdict = verdict_of("vllm", case_of(Multi("decode"), "fp16"))
    assert verdict.status == "error"


@pytest.mark.parametrize("fits", [True, False])
def test_liger_patches_only_one_model(fits, monkeypatch):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    before = {name: getattr(llama, name) for name in peers_training._SHARED}
    seen = []

    def apply(*, rope, model):
        llama.LlamaMLP = llama.LlamaRMSNorm = object
        if not fits:
            raise TypeError("no argument 'rope'")

    names = {"apply_liger_kernel_to_llama": apply, "liger_rotary_pos_emb": "Liger's"}
    module(monkeypatch, "liger_kernel.transformers", **names)

    class Model(torch.nn.Linear):
        def get_base_model(self):
            return self

        def forward(self, x):
            seen.append(llama.apply_rotary_pos_emb)
            return super().forward(x)

    model = Model(2, 2).eval()
    if fits:
        assert peers_training.apply_liger(model) is model
        assert model.training
        model(torch.ones(1, 2))
        with pytest.raises(RuntimeError):
            model(torch.ones(1, 3))
        assert seen == ["Liger's"] * 2
    else:
        with pytest.raises(Absent, match="is not as expected here: TypeError"):
            peers_training.apply_liger(model)
    assert {name: getattr(llama, name) for name in before} == before
