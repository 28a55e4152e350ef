"""Which path and config a product takes: the ledger, verified rows, limits of the chip."""

import itertools
import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.choose import choice, ledger, records
from fastlora.kernels.choose.ledger import PATHS, Problem
from fastlora.kernels.tile import configs, fitting

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SHAPES = [
    Problem(M, K, N, R, 2)
    for M in (1, 16, 64, 256, 2048, 8192)
    for K, N in ((4096, 4096), (4096, 14336), (14336, 4096))
    for R in (16, 64)
]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An empty cache, nothing shipped; (cache, shipped)."""
    found = tmp_path / "cache", tmp_path / "shipped"
    monkeypatch.setenv("FASTLORA_CACHE", str(found[0]))
    monkeypatch.setattr(records, "SHIPPED", found[1])
    choice.forget()
    yield found
    choice.forget()


def chosen_path(problem: Problem, first: bool = False) -> str:
    return choice.path_of("lora_linear", problem, BF16, BF16, first, CPU)


@pytest.mark.parametrize("problem", SHAPES)
def test_predicted_path_is_never_faster_than_base_product(problem):
    on = ledger.machine(90)
    for name in PATHS:
        assert ledger.predicted(name, problem, on) >= ledger.base(problem, on)


def test_ledger_takes_one_pass_for_few_rows():
    chosen = {p[:4]: ledger.best(p, 90, ("one_pass", "two_pass", "library")) for p in SHAPES}
    assert {name for (M, *_), name in chosen.items() if M <= 64} == {"one_pass"}
    assert {name for (M, *_), name in chosen.items() if M >= 2048} <= {"two_pass", "library"}
    wide = [p for p in SHAPES if p.M >= 2048 and p.N >= p.K]
    assert {ledger.best(p, 90, PATHS) for p in wide} == {"overlapped"}


def test_ledger_takes_library_for_large_float32():
    """Its products are plain loops here."""
    for p in SHAPES:
        if p.M >= 256:
            assert ledger.best(p._replace(size=4, precise=True), 90, PATHS) == "library"


def test_unknown_machines_count_as_nearest_older():
    assert ledger.machine(120) == ledger.MACHINES[100]
    assert ledger.machine(89) == ledger.MACHINES[80]
    assert ledger.machine(75) == ledger.MACHINES[80]


@pytest.mark.parametrize(
    "name, problem, arch, first, can",
    [
        ("one_pass", Problem(16, 8, 8, 128, 2), 80, False, True),
        ("one_pass", Problem(16, 8, 8, 129, 2), 80, False, False),
        ("one_pass", Problem(65, 8, 8, 65, 2), 90, False, False),
        ("one_pass", Problem(64, 8, 8, 33, 2, masked="x"), 90, False, False),
        ("one_pass", Problem(64, 8, 8, 33, 2, masked="y"), 90, False, True),
        ("one_pass", Problem(1, 8, 8, 33, 4), 90, False, False),
        ("two_pass", Problem(1, 8, 8, 512, 4), 80, True, True),
        ("overlapped", Problem(1, 8, 8, 8, 2), 80, False, False),
        ("overlapped", Problem(1, 8, 8, 8, 2), 90, True, False),
        ("library", Problem(1, 8, 8, 8, 2), 80, True, True),
        ("library", Problem(1, 8, 8, 8, 2, weight=False), 80, True, False),
    ],
)
def test_possible_tells_which_path_can_run(name, problem, arch, first, can):
    assert choice.possible(name, problem, arch, first) is can


def test_overlapped_path_is_impossible_when_interpreted(monkeypatch):
    monkeypatch.setattr(choice, "interpreted", lambda: False)
    assert choice.possible("overlapped", Problem(1, 8, 8, 8, 2), 90, False)
    monkeypatch.setattr(choice, "interpreted", lambda: True)
    assert not choice.possible("overlapped", Problem(1, 8, 8, 8, 2), 90, False)


def write_verified_rows(*paths: str, **fields) -> None:
    row = {"op": "lora_linear", "dtype": "bf16", "arch": 90, **choice.versions(), **fields}
    rows = [row | {"path": name} for name in paths]
    records.write(records.VERIFIED, rows, ("op", "dtype", "arch", "path", "triton"))
    choice.forget()


def test_verified_path_is_preferred_to_unverified():
    small = Problem(4, 4096, 4096, 16, 2)
    assert chosen_path(small) == "one_pass"
    write_verified_rows("library", "two_pass", dtype="fp16")
    assert chosen_path(small) == "one_pass", "rows of another dtype say nothing"
    write_verified_rows("library", "two_pass")
    assert chosen_path(small) == "two_pass"
    assert choice.verified("lora_linear", "bf16", 90) == ("library", "two_pass")
    assert choice.verified("lora_linear", None, 90) == ("library", "two_pass")
    assert choice.verified("lora_linear", "bf16", 80) == ()


def test_cached_rows_of_another_triton_are_ignored(folders):
    write_verified_rows("library", triton="0.0")
    assert choice.verified("lora_linear", "bf16", 90) == ()
    folders[1].mkdir()
    (folders[0] / records.VERIFIED).rename(folders[1] / records.VERIFIED)
    choice.forget()
    assert choice.verified("lora_linear", "bf16", 90) == ("library",), "those that ship hold"


@pytest.mark.parametrize("content", ["", "[1, 2]", "{}", "[", '[{"op": "lora_linear"}]'])
def test_damaged_file_counts_as_without_rows(folders, content):
    folders[0].mkdir()
    (folders[0] / records.VERIFIED).write_text(content)
    assert choice.verified("lora_linear", "bf16", 90) == ()


def test_write_replaces_rows_of_the_same_keys(folders):
    keys = ("a", "b")
    for rows in ([{"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 1, "c": 1}], [{"a": 1, "b": 1, "c": 2}]):
        file = records.write("some.json", rows, keys)
    assert file == folders[0] / "some.json"
    assert json.loads(file.read_text()) == [{"a": 1, "b": 1, "c": 2}, {"a": 2, "b": 1, "c": 1}]
    assert {child.name for child in folders[0].iterdir()} == {"some.json", ".lock"}


def test_failed_write_leaves_the_file_unchanged(folders, monkeypatch):
    file = records.write("some.json", [{"a": 1}], ("a",))
    monkeypatch.setattr(records.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        records.write("some.json", [{"a": 2}], ("a",))
    assert json.loads(file.read_text()) == [{"a": 1}]
    assert {child.name for child in folders[0].iterdir()} == {"some.json", ".lock"}


@pytest.mark.parametrize(
    "environment, want",
    [
        ({"FASTLORA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/fastlora"),
        ({"HOME": "/c"}, "/c/.cache/fastlora"),
    ],
)
def test_cache_folder_follows_environment_variables(environment, want, monkeypatch):
    for name in ("FASTLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(records.cache_folder()) == want


def test_records_are_not_kept_without_a_home(monkeypatch):
    """As in many containers: nothing is kept, nothing fails."""
    for name in ("FASTLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(records.Path, "home", nobody)
    assert records.cache_folder().name == "fastlora"
    choice.forget()
    assert choice.verified("lora_linear", "bf16", 90) == ()


def test_cached_rows_of_other_kernels_are_ignored():
    write_verified_rows("library", kernels="0123456789ab")
    assert choice.verified("lora_linear", "bf16", 90) == ()
    write_verified_rows("library")
    assert choice.verified("lora_linear", "bf16", 90) == ("library",)


SHAPE = {"M": 4, "K": 4096, "N": 4096, "R": 16}
GOOD = {"kernel": "one_pass", "dtype": "bf16", **SHAPE, "config": {}}


@pytest.mark.parametrize(
    "row",
    [
        {**GOOD, "config": {"BM": 16}},
        {**GOOD, "config": {**vars(configs.CANDIDATES["one_pass"][0]), "BM": 48}},
        {**GOOD, "config": None},
        {"kernel": "one_pass", "dtype": "bf16", "config": {}},
        {**GOOD, "M": "4"},
        {**GOOD, "kernel": "gone"},
        {**GOOD, "kernel": "path of lora_linear", "path": "gone"},
        {},
    ],
)
def test_rows_not_understood_are_passed_over(row, folders):
    name = records.file_of(choice.gpu_name(CPU))
    records.write(name, [row | choice.versions()], ("kernel",))
    choice.forget()
    small = Problem(*SHAPE.values(), 2)._replace(K=4096, N=4096, R=16)
    assert chosen_path(small) == "one_pass"
    want = configs.default("one_pass", 4, 4096, 90)
    assert choice.config_of("one_pass", small, BF16, CPU) == want


def test_timing_with_weight_ignored_for_products_without():
    name = records.file_of(choice.gpu_name(CPU))
    row = {"kernel": "path of lora_linear", "dtype": "bf16", **SHAPE, "path": "two_pass"}
    records.write(name, [row | {"weight": True} | choice.versions()], ("kernel",))
    choice.forget()
    small = Problem(4, 4096, 4096, 16, 2)
    assert chosen_path(small) == "two_pass"
    assert chosen_path(small._replace(weight=False)) == "one_pass"


def test_file_of_turns_gpu_name_into_filename():
    assert records.file_of("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


def test_use_path_forces_path_that_can_run():
    small = Problem(4, 4096, 4096, 16, 2)
    with choice.use_path("library"):
        assert chosen_path(small) == "library"
        with choice.use_path("one_pass"):
            assert chosen_path(small) == "one_pass"
            assert chosen_path(small._replace(R=300)) != "one_pass", "where it can run alone"
    assert chosen_path(small) == "one_pass"
    message = "path: expected one of one_pass, .*got 'fastest'"
    with pytest.raises(ValueError, match=message), choice.use_path("fastest"):
        pass


NEEDS = [
    fitting.Need(size, lora_size, R, masked, precise, arch)
    for (size, lora_size, precise), R, masked, arch in itertools.product(
        ((2, 2, False), (2, 4, False), (4, 4, False), (4, 4, True)),
        (1, 16, 64, 128, 512),
        ("", "x", "y"),
        (80, 89, 90, 100, 120),
    )
]


def test_fitted_configs_stay_within_their_need():
    for need in NEEDS:
        for kernel, shipped in configs.CANDIDATES.items():
            for config in shipped:
                fit = fitting.fitted(config, need)
                sizes = {k: v for k, v in vars(fit).items() if k.startswith("B")}
                assert type(fit) is type(config)
                assert all(v >= 16 and v & (v - 1) == 0 for v in sizes.values()), (fit, need)
                if isinstance(fit, configs.Gemm) and (need.masked == "y" or need.size == 4):
                    assert fit.BM * fit.BN <= 128 * 128, (kernel, need)
                if need.R <= 128 or not isinstance(fit, configs.OnePass):
                    assert fitting.shared(fit, need) <= need.shared, (fit, need)
                if isinstance(fit, configs.Shrink):
                    slim = fitting.fitted(config, need._replace(slim=True))
                    assert fitting.shared(slim, need) <= fitting.SLIM, (slim, need)


def test_default_configs_are_among_the_shipped():
    """So that what runs without a measurement is what was compiled and can be tuned."""
    for kernel, shipped in configs.CANDIDATES.items():
        for M, N, arch in itertools.product((1, 64, 1000, 8192), (64, 4096), (80, 90, 100)):
            assert configs.default(kernel, M, N, arch) in shipped, (kernel, M, N, arch)
