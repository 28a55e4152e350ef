"""A run fails on wrong results, missing providers or a peer that is far ahead each time."""

import pytest
import torch

from benchmarks import RESULTS, cases, judge
from benchmarks import cli as bench
from benchmarks.harness import lines, machine, runner
from benchmarks.harness.case import Ceilings
from benchmarks.harness.terminal import Plain
from benchmarks.reports import compare, earlier_results, peer_limit
from tests.benchmarks.result_lines import line, write_lines

MANY = "multi-decode-bf16-T16-K2048-N2048-R16-S8-uniform"
UNDONE = "merge-unmerge-bf16-K2048-N2048-R16"


def case_lines(case=MANY, **ratios):
    """Lines of a case: ratios to the base by provider; None: absent."""
    found = []
    for name, ratio in ratios.items():
        values, fields = [ratio or 1.0] * 3, {"threads": 1, "cpu_ratio": {"p50": ratio}}
        each = line(name.replace("_", "-"), *values, case=case, **fields)
        found.append(each if ratio else without_times(each, "absent", "not here"))
    return found


def without_times(each, status, reason):
    kept = {k: v for k, v in each.items() if k not in ("ratio", "ms")}
    return {**kept, "status": status, "reason": reason}


@pytest.mark.parametrize(
    "name, instructions, threads, folder",
    [
        ("AMD EPYC", "avx512_bf16", 1, "cpu/amd-epyc-avx512_bf16/1-thread"),
        (
            "Intel(R) Xeon(R) Processor",
            "avx512_bf16+amx",
            2,
            "cpu/intel-xeon-processor-avx512_bf16-amx/2-threads",
        ),
        (
            "Intel(R) Core(TM) i5-8500 CPU @ 3.00GHz",
            "avx2",
            6,
            "cpu/intel-core-i5-8500-cpu-3-00ghz-avx2/6-threads",
        ),
    ],
)
def test_cpu_folder_has_name_instructions_and_threads(name, instructions, threads, folder):
    assert machine.name_cpu_folder(name, instructions, threads) == folder


def test_cpu_with_amx_has_separate_folder(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_CPUINFO", info)
    monkeypatch.setattr(machine, "cpu_name", lambda: "Some Maker's CPU")
    monkeypatch.setattr(machine.native, "unusable", lambda: None)
    monkeypatch.setattr(machine.native, "instruction_set", lambda: "avx512_bf16")
    folders = []
    for flags in ("avx512_bf16 amx_bf16 amx_tile", "avx512_bf16"):
        info.write_text(f"model name\t: Some Maker's CPU\nflags\t\t: fpu {flags}\n")
        folders.append(machine.name_folder("cpu").rsplit("/", 1)[0])
    assert folders == ["cpu/some-maker-s-cpu-avx512_bf16-amx", "cpu/some-maker-s-cpu-avx512_bf16"]
    assert machine.collect_facts("cpu")["instruction_set"] == "avx512_bf16"
    monkeypatch.setattr(machine.native, "unusable", lambda: "not built")
    assert machine.find_instruction_set() == "no native"


def test_earlier_results_are_found_in_device_folder(tmp_path):
    other = tmp_path / "cpu" / "another-avx2" / "1-thread"
    mine = tmp_path / machine.name_folder("cpu")
    for folder in (other, tmp_path / "sub" / "cpu" / "another-avx2" / "1-thread"):
        folder.mkdir(parents=True)
        write_lines(folder, line("fastlora"))
    found, why = earlier_results.find(tmp_path, "cpu")
    assert found == []
    assert why.startswith(f"no evidence of this CPU ({machine.find_device_name('cpu')}, ")
    assert machine.find_instruction_set() in why
    assert why.endswith("nothing to compare with; have: cpu/another-avx2/1-thread")
    for path in (other, other / "linear.jsonl"):
        assert [len(found) for found in earlier_results.find(path, "cpu")] == [1, 0]
    mine.mkdir(parents=True)
    write_lines(mine, line("fastlora"), line("torch"))
    assert [len(found) for found in earlier_results.find(tmp_path, "cpu")] == [2, 0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"linear.jsonl, found none in .*empty"):
        earlier_results.find(tmp_path / "empty", "cpu")


def test_list_changes_ignores_other_instruction_sets():
    def judged(then: dict, now: dict) -> bool:
        before, after = line("fastlora", **then), line("fastlora", 9, 9, 9, **now)
        (change,) = compare.list_changes([after], [before])
        return change.slower

    amx = {"instruction_set": "avx512_bf16+amx"}
    assert judged(amx, amx)
    assert not judged({"instruction_set": "avx512_bf16"}, amx)
    assert judged({}, amx)  # older lines do not say


@pytest.fixture
def judge_runs(monkeypatch):
    """Judges what successive measurements give; and the cases that each of them measured."""

    def judged(*measurements, good=True):
        state, asked = {}, []

        def measure(names):
            asked.append(sorted(names))
            new = measurements[len(asked) - 1]
            state.update({name: [ln for ln in new if ln["case"] == name] for name in names})
            return good or len(asked) == 1

        monkeypatch.setattr(runner, "run", lambda chosen, *_: measure([c.name for c in chosen]))
        monkeypatch.setattr(runner, "read_lines", lambda case, folder: state[case.name])
        chosen = [case for case in cases.CPU if case.name in (MANY, UNDONE)]
        measure([case.name for case in chosen])
        measured = judge.Run(chosen, RESULTS, [], 1.0, Plain(1))
        return judge.judge_by_peers(measured, 2.5), asked[1:]

    return judged


WELL = case_lines(UNDONE, base=1, torch=1.1, peft=11, fastlora=5)
FAST = WELL + case_lines(base=1, torch=1.2, peft=1.5, fastlora=1.1, fastlora_pages=1.1)
SLOW = WELL + case_lines(base=1, torch=1.2, peft=1.5, fastlora=3.1, fastlora_pages=1.1)


def test_judge_fails_case_over_bound_three_times(judge_runs, capsys):
    assert judge_runs(SLOW, SLOW, SLOW) == (False, [[MANY]] * 2)
    assert f"over 2.5 times the fastest peer each of 3 times: {MANY}: fastlora" in (
        capsys.readouterr().out
    )


def test_judge_passes_case_over_bound_twice(judge_runs):
    assert judge_runs(FAST) == (True, [])
    assert judge_runs(SLOW, FAST) == (True, [[MANY]])
    assert judge_runs(SLOW, SLOW, FAST) == (True, [[MANY]] * 2)
    pages = WELL + case_lines(base=1, torch=1.2, peft=1.5, fastlora=1.1, fastlora_pages=4)
    assert judge_runs(SLOW, pages)[0]
    # 2.4 times as long as the fastest, not as torch.
    near = WELL + case_lines(base=1, torch=0.5, torch_gather=0.46, fastlora=1.1, fastlora_pages=1.1)
    assert judge_runs(near)[0]


def test_judge_fails_when_second_measurement_fails(judge_runs):
    assert not judge_runs(SLOW, FAST, good=False)[0]


def test_judge_excuses_known_loss_to_one_peer(judge_runs, capsys):
    assert judge_runs(FAST)[0]
    said = capsys.readouterr().out
    assert f"not judged: {UNDONE}: fastlora takes 4.55 times as long as torch: addmm_" in said
    slow = FAST[len(WELL) :] + case_lines(UNDONE, base=1, torch=1.1, peft=1.5, fastlora=5)
    assert not judge_runs(slow, slow, slow)[0]


def test_judge_fails_when_our_provider_is_missing(judge_runs, capsys):
    gone = WELL + case_lines(base=1, torch=1.2, peft=1.5, fastlora=1.1, fastlora_pages=None)
    assert not judge_runs(gone)[0]
    assert f"ours is missing: {MANY}: fastlora-pages absent: not here" in capsys.readouterr().out
    assert not judge_runs(WELL + case_lines(base=1, torch=1.2, fastlora=1.1))[0]
    here = WELL + case_lines(base=1, torch=1.2, peft=None, fastlora=1.1, fastlora_pages=1)
    assert judge_runs(here)[0]


def test_pair_with_fastest_pairs_compiled_with_compiled():
    found = case_lines(
        torch=1, torch_compiled=0.2, fastlora=1.5, fastlora_compiled=0.6, base=1, merged=0.1
    )
    beside = {
        pair.ours["provider"]: pair.other["provider"]
        for pair in peer_limit.pair_with_fastest(found)
    }
    assert beside == {"fastlora": "torch", "fastlora-compiled": "torch-compiled"}
    (pair,) = peer_limit.pair_with_fastest(case_lines(torch=1, peft_compiled=0.5, fastlora=1.5))
    assert pair.other["provider"] == "peft-compiled"


def test_compute_times_needs_both_clocks_with_one_thread():
    """Waiting for a core that others use lengthens one of them."""

    def factor(**fields):
        found = case_lines(torch=1, fastlora=4)
        (pair,) = peer_limit.pair_with_fastest({**each, **fields} for each in found)
        return peer_limit.compute_times(pair)

    assert factor() == 4
    assert factor(cpu_ratio={"p50": 1.0}) == 1
    assert factor(cpu_ratio={"p50": 1.0}, threads=2) == 4
    assert factor(cpu_ratio={"p50": 1.0}, device="cuda") == 4
    found = case_lines(torch=1, peft=1.5, fastlora=3)
    found[0]["cpu_ratio"] = {"p50": 3.0}  # torch waited least, and worked the most
    (pair,) = peer_limit.pair_with_fastest(found)
    assert (pair.other["provider"], peer_limit.compute_times(pair)) == ("peft", 2)


def test_amx_losses_are_excused_only_with_amx():
    found = case_lines("linear-invariant-bf16-M512-K64-N64-R4", torch=1, fastlora_invariant=6)
    assert [peer_limit.compute_times(pair) for pair in peer_limit.pair_with_fastest(found)] == [6]
    amx = [{**each, "instruction_set": "avx512_bf16+amx"} for each in found]
    assert peer_limit.pair_with_fastest(amx) == []
    assert len(peer_limit.list_excused(amx)) == 1


def test_stored_evidence_has_only_known_losses():
    folders = {file.parent for file in RESULTS.glob("cpu/*/*/linear.jsonl")}
    if not folders:
        pytest.skip("the results are in the repository, not in a source distribution")
    kept = [folder for folder in folders if not folder.name.endswith(("-quick", "-shapes"))]
    seen = set()
    for folder in kept:
        found = lines.read_all(folder)
        assert max(map(peer_limit.compute_times, peer_limit.pair_with_fastest(found))) <= 2.5, (
            folder
        )
        seen |= {
            known
            for pair, known in peer_limit.list_excused(found)
            if peer_limit.compute_times(pair) > 2.5
        }
    measured = {known for known in peer_limit.KNOWN if "EPYC" in known.measured}
    assert seen >= measured > set()


@pytest.fixture
def run_bench(tmp_path, monkeypatch):
    """``fastlora bench``'s exit code where every case gives these lines."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(runner, "_measure_ceilings", lambda *_: Ceilings(1.0, {}))

    def code(found, *words):
        def run_some(batch, command, file, timeout):
            file.write_text("")
            for each in found:
                lines.write(each, file)
            return [(case, runner.read_lines(case, file.parent)) for case in batch]

        monkeypatch.setattr(runner, "run_some", run_some)
        command = ["--device", "cpu", "--threads", "1", "--save", str(tmp_path), "--case", MANY]
        return bench.main([*command, *words])

    yield code
    torch.set_num_threads(threads)


BOUND = ("--max-over-peers", "2.5")
RIGHT = FAST[len(WELL) :]


@pytest.mark.parametrize("words", [(), BOUND])
def test_bench_fails_on_wrong_results_whatever_the_time(run_bench, words):
    def but(status, reason):
        ours = [ln["provider"] == "fastlora" for ln in RIGHT]
        pairs = zip(RIGHT, ours, strict=True)
        return [without_times(ln, status, reason) if is_ours else ln for ln, is_ours in pairs]

    assert run_bench(RIGHT, *words) == 0
    assert run_bench(but("failed", "y: error 1 over 0.1"), *words) == 1
    assert run_bench(but("error", "ValueError: no"), *words) == 1
    assert (
        run_bench([without_times({**RIGHT[0], "provider": None}, "crashed", "SIGSEGV")], *words)
        == 1
    )
    assert run_bench(but("absent", "not here"), *words) == (1 if words else 0)


def test_tolerated_slowdown_is_shown_but_passes(run_bench, tmp_path, capsys):
    before = tmp_path / "before.jsonl"
    for each in case_lines(base=1, torch=1.2, fastlora=0.5, fastlora_pages=0.5):
        lines.write(each, before)
    compared = ("--compare", str(before))
    assert run_bench(RIGHT, *compared) == 1
    capsys.readouterr()
    assert run_bench(RIGHT, *compared, "--tolerate-slower", *BOUND) == 0
    shown = capsys.readouterr().out
    assert "slower" in shown
    assert "again" not in shown
    assert run_bench(RIGHT, "--tolerate-slower") == 2
    assert "--tolerate-slower: expected --compare" in capsys.readouterr().err


def test_bound_holds_without_evidence_of_this_cpu(run_bench, tmp_path, capsys):
    root = tmp_path / "kept"
    other = root / "cpu" / "another-avx2" / "1-thread"
    other.mkdir(parents=True)
    write_lines(other, *case_lines(base=1, torch=1.2, fastlora=0.1), suite="multi")
    words = ("--compare", str(root), "--tolerate-slower", *BOUND)
    assert run_bench(RIGHT, *words) == 0
    shown = capsys.readouterr().out
    assert "no evidence of this CPU" in shown
    assert "cases in" in shown.splitlines()[-1]
    assert "slower by" not in shown
    assert run_bench(SLOW[len(WELL) :], *words) == 1
    assert run_bench(SLOW[len(WELL) :], *words[:2]) == 0
