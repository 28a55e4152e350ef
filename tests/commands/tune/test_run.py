"""`fastlora tune`, run with a simulated clock, keeps the fastest correct candidate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastlora.commands import main as cli
from fastlora.commands import progress
from fastlora.commands.tune import run as tuning
from fastlora.ops import availability

if (why := availability.unusable("triton")) is not None:
    pytest.skip(f"kernels do not run here: {why}", allow_module_level=True)

from fastlora.backends.triton import linear as lora
from fastlora.kernels.choose import choice, records
from fastlora.kernels.choose.ledger import Problem
from fastlora.kernels.linear import gemm
from fastlora.kernels.tile import configs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (17, 64, 40, 8)
SIZE = 2


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    choice.forget()
    yield tmp_path
    choice.forget()


def rows(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / records.file_of(choice.gpu_name(DEVICE))).read_text())


def candidate_of(call) -> object:
    """The candidate that a timed call runs; None for the product that all are compared with."""
    keywords = getattr(call, "keywords", {})
    return keywords.get("config") or keywords.get("path")


def clock_preferring(*favourites):
    """A clock for which these take 1 µs, and everything else a little more."""
    return lambda call: 1.0 if candidate_of(call) in favourites else 1.2


def tune(clock, shapes=(SHAPE,), kernels=None, **options) -> bool:
    options = {"rounds": 1, "dtypes": ("bf16",), **options}
    return tuning.tune(DEVICE, shapes, kernels=kernels, clock=clock, **options)


def config(kernel: str, shape=SHAPE, dtype=torch.bfloat16):
    return choice.config_of(kernel, Problem(*shape, SIZE), dtype, DEVICE)


@pytest.mark.parametrize(
    "kernel", ["one_pass", "shrink", "shrink_beside", "gemm", "expand", "gradient"]
)
@pytest.mark.parametrize("last", [0, -1])
def test_tune_makes_launches_take_fastest_config(kernel, last):
    """By the shape that a launch asks with: ``gradient`` with (M, M, C, R), for lora_A C is K."""
    favourite = configs.CANDIDATES[kernel][last]
    assert tune(clock_preferring(favourite), kernels=[kernel])
    M, K, N, R = SHAPE
    asked = [(M, M, K, R), (M, M, N, R)] if kernel == "gradient" else [SHAPE, (M, N, K, R)]
    for shape in asked:
        assert config(kernel, shape) == favourite
        assert config(kernel, (2 * shape[0], *shape[1:])) == favourite
    far = Problem(100 * M, 100 * K, 100 * N, R, SIZE)
    default = configs.default(kernel, far.M, far.N, choice.arch_of(DEVICE))
    assert config(kernel, far[:4]) == default
    assert config(kernel, asked[0], torch.float16) == configs.default(
        kernel, *asked[0][::2], choice.arch_of(DEVICE)
    )


@pytest.mark.parametrize("path", ["one_pass", "two_pass", "library"])
def test_tune_makes_ops_take_fastest_path(path):
    assert tune(clock_preferring(path))
    M, K, N, R = SHAPE
    for op, shape in {"lora_linear": SHAPE, "lora_linear_backward": (M, N, K, R)}.items():
        problem = Problem(*shape, SIZE)
        got = choice.path_of(op, problem, torch.bfloat16, torch.bfloat16, False, DEVICE)
        assert got == path
        got = choice.path_of(op, problem, torch.bfloat16, torch.float32, False, DEVICE)
        assert got == path
    if path != "library":
        problem = Problem(*SHAPE, SIZE, False)
        got = choice.path_of("lora_add_", problem, torch.bfloat16, torch.bfloat16, False, DEVICE)
        assert got == path


def test_tune_rows_record_measurement_and_versions(cache):
    assert tune(lambda call: 3.0 if candidate_of(call) else 2.5)
    found = rows(cache)
    stamp = {"gpu": choice.gpu_name(DEVICE), **choice.versions()}
    for row in found:
        assert stamp.items() <= row.items()
        assert (row["dtype"], row["us"], row["base_us"]) == ("bf16", 3.0, 2.5)
        assert row["commit"]
        assert ("config" in row) != ("path" in row)
    kernels = {row["kernel"] for row in found if "config" in row}
    assert kernels >= {"one_pass", "shrink", "gemm", "expand", "gradient"}
    gradients = {tuple(row[n] for n in "MKNR") for row in found if row["kernel"] == "gradient"}
    M, K, N, R = SHAPE
    assert gradients == {(M, M, K, R), (M, M, N, R)}
    ops = ["lora_linear", "lora_add_", "lora_linear_backward"]
    paths = {row["kernel"]: [row[letter] for letter in "MKNR"] for row in found if "path" in row}
    backward = [SHAPE[0], SHAPE[2], SHAPE[1], SHAPE[3]]
    shapes = [list(SHAPE), list(SHAPE), backward]
    assert paths == dict(zip([f"path of {op}" for op in ops], shapes, strict=True))


def test_tune_never_times_a_wrong_candidate(monkeypatch, capsys):
    favourite, other = configs.CANDIDATES["gemm"][:2]
    right, timed = gemm.gemm, []

    def wrong(x, w, y, h, b, scaling, config, **options):
        right(x, w, y, h, b, scaling, config, **options)
        if config == favourite:
            y[-1, -1] = 100

    def clock(call):
        timed.append(candidate_of(call))
        return {favourite: 1.0, other: 2.0}.get(candidate_of(call), 3.0)

    # ``launch`` hands config on as a keyword.
    monkeypatch.setattr(gemm, "gemm", wrong)
    assert not tune(clock, kernels=["gemm"])
    assert favourite not in timed
    assert config("gemm") == other
    said = capsys.readouterr().out
    assert f"WRONG gemm {favourite}: y errs by" in said


def test_tune_rejects_candidate_that_writes_nothing(monkeypatch):
    """Even if the candidate before left the right numbers there."""
    favourite, right = configs.CANDIDATES["gemm"][-1], gemm.gemm

    def lazy(x, w, y, h, b, scaling, config, **options):
        if config != favourite:
            right(x, w, y, h, b, scaling, config, **options)

    monkeypatch.setattr(gemm, "gemm", lazy)
    assert not tune(clock_preferring(favourite), kernels=["gemm"])
    assert config("gemm") != favourite


def test_tune_never_times_a_wrong_path(monkeypatch, capsys):
    right = lora.lora_linear

    def wrong(*args, path):
        y, h = right(*args, path=path)
        return (y * 1.1 if path == "library" else y), h

    monkeypatch.setattr(lora, "lora_linear", wrong)
    assert not tune(clock_preferring("library"))
    assert "WRONG path of lora_linear library: y errs by" in capsys.readouterr().out
    problem = Problem(*SHAPE, SIZE)
    args = (torch.bfloat16, torch.bfloat16, False, DEVICE)
    assert choice.path_of("lora_linear", problem, *args) != "library"


def test_tune_skips_candidate_that_does_not_run(monkeypatch, capsys):
    favourite, other = configs.CANDIDATES["gemm"][:2]
    right = gemm.gemm

    def failing(*args, config, **options):
        if config == favourite:
            raise RuntimeError("out of resource: shared memory\nReducing block sizes may help")
        right(*args, config, **options)

    monkeypatch.setattr(gemm, "gemm", failing)
    clock = clock_preferring(favourite, other)
    assert tune(clock, kernels=["gemm"])
    assert config("gemm") == other
    said = capsys.readouterr().out
    assert f"skipped gemm {favourite}: RuntimeError: out of resource: shared memory\n" in said


def test_tune_writes_no_row_when_nothing_runs(monkeypatch, cache):
    def failing(*args, **options):
        raise RuntimeError

    monkeypatch.setattr(gemm, "gemm", failing)
    assert tune(clock_preferring(), kernels=["gemm", "shrink"])
    assert {row["kernel"] for row in rows(cache)} == {"shrink"}


def test_tune_interleaves_rounds_and_compares_medians(cache):
    """Three candidates; the one with a lucky round loses, and the hopeless one is dropped."""
    times = {64: [1.0, 9.0, 9.0], 128: [1.4, 1.4, 2.0], None: [4.0, 6.0, 5.0]}
    seen = []

    def clock(call):
        key = getattr(candidate_of(call), "BN", None)
        if candidate_of(call) is not None and candidate_of(call).BM == 128:
            seen.append("hopeless")
            return 100.0
        seen.append(key)
        return times[key][seen.count(key) - 1]

    # Square: one product, which is forward's and backward's.
    assert tune(clock, shapes=[(17, 64, 64, 8)], kernels=["expand"], rounds=3)
    assert seen == [None, 64, 128, "hopeless", None, 64, 128, None, 128]
    (row,) = rows(cache)
    assert (row["config"]["BN"], row["us"], row["base_us"]) == (128, 1.4, 5.0)


def test_interrupted_tune_keeps_finished_rows(cache, monkeypatch):
    step = progress.Progress.step

    def interrupted(self, what):
        step(self, what)
        if "M=33" in what:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.Progress, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(clock_preferring(), shapes=[SHAPE, (33, 64, 64, 8)], kernels=["shrink"])
    assert {row["M"] for row in rows(cache)} == {17}


def test_second_tune_replaces_rows_of_first(cache):
    for favourite in configs.CANDIDATES["expand"][:2]:
        assert tune(clock_preferring(favourite), kernels=["expand"])
        assert [row["config"] for row in rows(cache)] == [vars(favourite)] * 2
        assert config("expand") == favourite


def test_tune_times_paths_with_new_configs(cache, tmp_path):
    favourite, seen = configs.CANDIDATES["shrink"][-1], []

    def clock(call):
        if isinstance(candidate_of(call), str):
            seen.append(config("shrink"))
        return 1.0 if candidate_of(call) == favourite else 2.0

    folder = tmp_path / "elsewhere"
    before = config("shrink")
    assert before != favourite
    assert tune(clock, folder=folder)
    assert set(seen) == {favourite}
    assert rows(folder)
    assert not list(cache.glob("*.json"))
    assert config("shrink") == before


def test_tune_writes_float32_candidates_unfitted(cache):
    """So that what is read is fitted once: by the call that it is for."""
    assert tune(lambda call: 1.0, kernels=["gemm"], dtypes=("fp32",))
    assert all(row["dtype"] == "fp32" for row in rows(cache))
    assert rows(cache)[0]["config"] == vars(configs.CANDIDATES["gemm"][0])


def test_default_shapes_include_their_transposes():
    assert len(set(tuning.SHAPES)) == len(tuning.SHAPES) == 36
    assert {(M, N, K, R) for M, K, N, R in tuning.SHAPES} == set(tuning.SHAPES)


def test_tune_command_exits_2_without_gpu(monkeypatch, capsys):
    monkeypatch.setattr(availability, "no_gpu", lambda: "no CUDA GPU was found")
    assert cli.main(["tune", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "fastlora tune: no CUDA GPU was found\n"


@pytest.mark.parametrize("outcome, code", [(True, 0), (False, 1), (KeyboardInterrupt, 130)])
def test_tune_command_passes_options_and_exit_code(monkeypatch, tmp_path, outcome, code):
    seen = {}

    def fake(device, shapes, **options):
        seen.update(options, shapes=shapes)
        if outcome is KeyboardInterrupt:
            raise outcome
        return outcome

    monkeypatch.setattr(tuning, "tune", fake)
    monkeypatch.setattr(availability, "no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(availability, "cannot", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
    arguments = f"--shapes 1,2,3,4 5,6,7,8 --dtype fp16 --kernel gemm --save {tmp_path}"
    assert cli.main(["tune", *arguments.split()]) == code
    assert seen.pop("shapes") == [(1, 2, 3, 4), (5, 6, 7, 8)]
    wanted = {"dtypes": ["fp16"], "kernels": ["gemm"], "folder": tmp_path, "rounds": 3}
    assert seen == wanted
    assert cli.main(["tune", "--quick"]) == code
    assert (seen["shapes"], seen["rounds"], seen["kernels"]) == (tuning.QUICK, 1, None)
