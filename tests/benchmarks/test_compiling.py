"""Compiled providers run in one graph, pass the gate, or are absent with a reason."""

import os
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks import cases
from benchmarks.harness import gate
from benchmarks.harness.case import Absent, Case
from benchmarks.peers.compiling import compile_call
from benchmarks.suites.linear import Linear
from benchmarks.suites.multi import Multi
from tests.benchmarks.small_case import SIZES, case_of

# Inductor's, for what is no library's product.
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"
)


WORKS = {
    "forward": lambda: Linear(backward=False),
    "train": lambda: Linear(backward=True),
    "decode": lambda: Multi("decode"),
}


@needs_compiler
@pytest.mark.parametrize("which", WORKS)
def test_compiled_provider_compiles_once_for_all_copies(which):
    case = case_of(WORKS[which](), compiled=True)
    compilers = [name for name in case.providers if name.endswith("-compiled")]
    assert len(compilers) == (4 if which == "decode" else 3)
    torch.compiler.reset()
    counters.clear()
    verdicts = {name: verdict for name, verdict in gate.check(case, 1).items() if name in compilers}
    present = [name for name, verdict in verdicts.items() if verdict.status != "absent"]
    assert {verdicts[name].status for name in present} == {"ok"}, verdicts
    assert set(compilers) - set(present) <= {"peft-compiled"}
    assert counters["stats"]["unique_graphs"] == len(present)
    # Other values in the copies: who compiled the first one's in answers with them.
    for name in present:
        copies = [case.work.operands(case, seed) for seed in range(1, 12)]
        copies = [o | {"ids": copies[0]["ids"]} if "ids" in o else o for o in copies]
        for o, call in [(o, case.providers[name](case, o)) for o in copies]:
            eager, got = case.providers[name.removesuffix("-compiled")](case, o)(), call()
            assert all(torch.allclose(got[k], eager[k], atol=1e-5) for k in eager), name
    assert counters["stats"]["unique_graphs"] == len(present)


@pytest.mark.full  # compiling once is quick
def test_compiled_provider_compiles_every_shape_separately():
    """More of them in one process than torch.compile keeps of one function."""
    work = Linear(backward=False)
    for M in range(1, 12):
        case = Case(work, "cpu", "fp32", {"M": M, **SIZES}, compiled=True)
        call = case.providers["fastlora-compiled"](case, case.work.operands(case, 0))
        assert call()["y"].shape == (M, 56)


def test_compiled_cases_are_registered_with_their_providers():
    for listed, multi in ((cases.CPU, "multi-prefill"), (cases.CUDA, "multi-decode")):
        layers = [c for c in listed if c.compiled and c.suite not in ("model", "overhead")]
        names = {case.work.name for case in layers}
        assert names == {"linear-forward", "linear-train", multi}
        assert all(case.work.compiled_providers for case in listed if case.compiled)
        assert not any(case.dropout for case in listed if case.compiled)
        assert not any("-compiled" in n for c in listed if not c.compiled for n in c.providers)


def test_compiled_providers_are_absent_without_compiler(monkeypatch, tmp_path):
    from torch._inductor import config

    def builder(case, o, wrap):
        return wrap(lambda: {"y": torch.relu(o["x"]) + 1})

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    case = case_of(Linear(backward=False))
    missing = {"cpp.cxx": (None, str(tmp_path / "g++")), "force_disable_caches": True}
    with (
        config.patch(missing),
        pytest.raises(Absent, match=r"cannot compile here: .*C\+\+ compiler"),
    ):
        compile_call(builder, case, case.work.operands(case, 0))


def test_compiled_provider_is_absent_with_graph_breaks():
    def breaks(case, o, wrap):
        return wrap(lambda: torch._dynamo.graph_break() or {"y": o["x"]})

    case = case_of(Linear(backward=False))
    with pytest.raises(Absent, match="no single graph"):
        compile_call(breaks, case, case.work.operands(case, 0))
    case = case_of(Linear(backward=True), dropout=0.1)
    with pytest.raises(Absent, match="dropout masks"):
        case.work.compiled_providers["torch-compiled"](case, case.work.operands(case, 0))
