"""The bench: what it measures, refuses, writes and draws. Never how fast."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cupy_headnorm import bench, cli
from cupy_headnorm.bench import (
    clocks,
    command,
    providers,
    record,
    report,
    suite,
    workloads,
)
from cupy_headnorm.bench import (
    costs as bench_costs,
)
from cupy_headnorm.bench.providers import PROVIDERS, Provider
from cupy_headnorm.bench.workloads import Case

CASE = Case(3, 2, 64, "float16", "rms", "contiguous")
FIELDS = {*Case._fields, "provider", "microseconds", "gigabytes_per_second", "share"}


@pytest.fixture
def host(monkeypatch):
    """Measure on the host, fast, where there is a GPU too."""
    monkeypatch.setattr(command, "timer", clocks.Host)
    monkeypatch.setattr(bench_costs, "_CALLS", 2)
    monkeypatch.setattr(clocks, "_HOST_SECONDS", 0.001)


class TorchHost(clocks.Host):
    """Stands in for torch on a GPU: torch tensors in inference mode, but the host's clock."""

    name = "torch"

    def __init__(self):
        super().__init__()
        import torch

        self.torch = torch

    def __enter__(self):
        self.enter_context(self.torch.inference_mode())
        return self

    def array(self, values):
        return clocks.as_torch(values).clone()

    def empty(self, shape, dtype):
        return self.torch.empty(shape, dtype=getattr(self.torch, dtype.name))

    def multiply(self, array):
        array.mul_(1)


def run(capsys, *arguments):
    code = cli.main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def timing(case, provider, microseconds=1.0, share=1.0):
    return {
        **case._asdict(),
        "provider": provider,
        "microseconds": microseconds,
        "gigabytes_per_second": 1000.0,
        "share": share,
    }


def made_up(**parts):
    empty = {"timings": [], "host": [], "once": {}, "targets": [], "unavailable": {}}
    head = {"device": "NVIDIA Made Up 1", "versions": {}, "date": "2026-01-02", "command": "bench"}
    return {**head, "timer": "torch", **empty, **parts}


def test_the_command_without_a_gpu_writes_a_table_and_json(tmp_path):
    file = tmp_path / "results.json"
    arguments = ["--tokens", "1", "2", "--num-heads", "2", "--head-dim", "64", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "cupy_headnorm", "bench", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("2 x 2 x 64") == 1
    results = json.loads(file.read_text())
    assert results["command"].startswith("python -m cupy_headnorm bench --tokens 1 2 ")
    assert results["versions"]["numpy"] == np.__version__
    assert results["date"].startswith("20")
    assert results["targets"] == []
    pytest.importorskip("torch")
    names = ["copy", "multiply", "ours", "naive", "functional"]
    assert [t["provider"] for t in results["timings"]] == names * 2
    for row in results["timings"]:
        assert set(row) == FIELDS
        assert row["microseconds"] > 0
        assert row["share"] >= 0
        moved = 2 * row["tokens"] * 2 * 64 * 2 / row["microseconds"] / 1e3
        assert row["gigabytes_per_second"] == pytest.approx(moved, rel=0.01, abs=0.06)
    calls = {row["call"] for row in results["host"]}
    assert {
        "ours, in place on NumPy",
        "ours, new result on torch, host memory",
        "F.rms_norm",
    } <= calls
    assert PROVIDERS["functional"].label not in calls  # it is F.rms_norm
    for label in ("device copy", "naive NumPy", "ours, in place on NumPy"):
        assert label in done.stdout


def test_importing_the_package_leaves_the_bench_alone():
    code = (
        "import sys, cupy_headnorm; print([m for m in sys.modules if 'bench' in m or '_tim' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cupy_headnorm" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--providers", "ours", "magic"], "provider 'magic' is not known; needs one of copy, "),
        (["--suite", "/nowhere"], "--suite would write to /nowhere; needs a folder that is there"),
        (["--json", "/nowhere/a.json"], "--json would write to /nowhere; needs a folder"),
        (["--plot", "/nowhere/a.svg"], "--plot would write to /nowhere; needs a folder"),
        (["--plot", "a.pdf"], "--plot is a.pdf; needs a name that ends in .png or .svg"),
        (["--from", "/nowhere"], "No such file"),
        (
            ["--from", "/nowhere", "--kind", "layer", "--providers", "ours"],
            "--from is given with --kind, --providers; needs it without",
        ),
        (["--host", "--dtype", "float16"], "--host is given with --dtype; needs it without"),
        (["--suite", "--head-dim", 64], "--suite is given with --head-dim; needs it without"),
        (
            ["--tokens", 5, "--megabytes", 1],
            "--megabytes is given with --tokens; needs it without",
        ),
    ],
)
def test_errors(arguments, message, capsys, host):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "has no device, date"),
        ("[]", "holds only []; needs names"),
        ("null", "holds only None; needs names"),
    ],
)
def test_from_another_file(text, message, tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text(text)
    code, _, err = run(capsys, "--from", file)
    assert code == 2
    assert message in err
    assert "a file of --json" in err
    assert err.count("\n") == 1


def damaged(where, value):
    """Return results of which one part, by its path, is another value; of ... it is missing."""
    results = made_up(
        versions={"numpy": "2.4"},
        timings=[timing(bench_costs.HOST_CASE, "ours"), timing(bench_costs.HOST_CASE, "copy")],
        host=[{"call": "ours", "microseconds": 1}],
        once={"import_ms": 3.5},
        targets=[{"what": "a", "needed": "b", "measured": None, "where": None, "met": None}],
        unavailable={"liger": "not there"},
    )
    *path, last = where
    part = results
    for name in path:
        part = part[name]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return results


DAMAGED = {
    "holds versions None; needs names with values": (("versions",), None),
    "holds versions.numpy 2; needs text": (("versions", "numpy"), 2),
    "holds device None; needs text": (("device",), None),
    "holds date 2026; needs text": (("date",), 2026),
    "holds timings {}; needs a list": (("timings",), {}),
    "holds timings[1] None; needs names with values": (("timings", 1), None),
    "has no share in timings[0]; needs it": (("timings", 0, "share"), ...),
    "holds timings[0].share '1'; needs a number": (("timings", 0, "share"), "1"),
    "holds timings[0].share nan; needs a number": (("timings", 0, "share"), float("nan")),
    "holds timings[0].share 1000": (("timings", 0, "share"), 10**400),
    "holds timings[0].tokens 1.5; needs an integer": (("timings", 0, "tokens"), 1.5),
    "holds timings[0].tokens True; needs an integer": (("timings", 0, "tokens"), True),
    "holds timings[0].kind []; needs text": (("timings", 0, "kind"), []),
    "holds timings[1].num_kv_heads None; needs an i": (("timings", 1, "num_kv_heads"), None),
    "holds host None; needs a list": (("host",), None),
    "holds host[0].microseconds inf; needs a number": (("host", 0, "microseconds"), float("inf")),
    "has no call in host[0]; needs it": (("host", 0, "call"), ...),
    "holds once []; needs names with values": (("once",), []),
    "holds once.import_ms 'long'; needs a number": (("once", "import_ms"), "long"),
    "holds targets None; needs a list": (("targets",), None),
    "holds targets[0].met 1; needs true, false or null": (("targets", 0, "met"), 1),
    "holds unavailable.liger None; needs text": (("unavailable", "liger"), None),
    "has no unavailable; needs it": (("unavailable",), ...),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_from_a_damaged_file(message, tmp_path, capsys):
    file = tmp_path / "damaged.json"
    file.write_text(json.dumps(damaged(*DAMAGED[message])))
    code, out, err = run(capsys, "--from", file)
    assert (code, out) == (2, "")
    assert f"damaged.json {message}" in err
    assert err.count("\n") == 1


RESULTS = (Path(__file__).resolve().parents[2] / "notebooks/results").glob("*.json")
SUITES = [path for path in sorted(RESULTS) if "timings" in json.loads(path.read_text())]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_committed_results_are_read_and_written_as_they_are(path, tmp_path):
    kept = json.loads(path.read_text())
    results = record.read(path)
    assert dataclasses.asdict(results) == kept
    assert suite.judge(results)
    record.write(results, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == kept


def test_what_the_bench_was_called_by_is_still_there():
    assert bench.measure is command.measure
    assert bench.run is command.run
    assert bench.version("numpy") == np.__version__
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert parser.parse_args(["--tokens", "3"]).tokens == [bench.count("3")]


def test_from_a_whole_file_with_more(tmp_path, capsys):
    file = tmp_path / "whole.json"
    file.write_text(json.dumps(damaged(("timings", 0, "more"), None)))
    code, out, err = run(capsys, "--from", file)
    assert (code, err) == (0, "")
    assert "liger" in out.lower()


def test_a_missing_library_is_named_with_its_remedy(monkeypatch, capsys, host):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, "--plot=a.png")
    assert code == 2
    assert "needs matplotlib: pip install " in err
    assert "[bench]" in err


def test_providers_can_be_chosen_and_the_missing_say_why(capsys, host, tmp_path):
    file = tmp_path / "results.json"
    code, out, _ = run(
        capsys, "--tokens", 2, "--num-heads", 2, "--head-dim", 64, "--json", file,
        "--providers", "ours", "ours-row",
    )  # fmt: skip
    assert code == 0
    results = json.loads(file.read_text())
    assert {t["provider"] for t in results["timings"]} == {"ours"}
    assert results["unavailable"] == {"ours-row": "runs on a GPU only"}
    assert "ours, one block per row: not available: runs on a GPU only" in out


def test_a_provider_whose_library_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    found, unavailable = providers.find(SimpleNamespace(name="torch"))
    assert "ours" in found
    assert "liger" not in found
    assert unavailable["liger"].endswith("needs: pip install liger-kernel")
    assert "naive" not in unavailable  # it belongs to the host
    _, unavailable = providers.find(SimpleNamespace(name="cupy"), ["functional"])
    assert unavailable["functional"]


def test_host_alone(capsys, host, monkeypatch, tmp_path):
    monkeypatch.setattr(
        bench_costs, "_in_new_process", lambda code, *_, **__: float("numpy" in code)
    )
    file = tmp_path / "results.json"
    code, out, _ = run(capsys, "--host", "--json", file)
    results = json.loads(file.read_text())
    assert (code, results["timings"]) == (0, [])
    assert results["once"]["import_milliseconds"] == 0
    assert results["once"]["import_beside_numpy_milliseconds"] == 1
    assert "import milliseconds" in out


def test_code_in_a_new_process(tmp_path):
    assert bench_costs._in_new_process(bench_costs._IMPORT, str(tmp_path)) > 0
    with pytest.raises(RuntimeError, match="a new process failed: .*ZeroDivisionError"):
        bench_costs._in_new_process("1 / 0", str(tmp_path))


def test_peers_that_raise_or_disagree_get_no_row(monkeypatch):
    def shifted(work):
        return lambda i: work.norms[0](work.xs[i]) * np.float16(1.5)

    def raising(work):
        raise OSError("no   such\nthing")

    monkeypatch.setitem(PROVIDERS, "shifted", Provider("shifted", shifted, ("numpy",)))
    monkeypatch.setitem(PROVIDERS, "raising", Provider("raising", raising, ("numpy",)))
    unavailable = {}
    rows = command.measure(CASE, ["ours", "shifted", "raising"], clocks.Host(), unavailable)
    assert [row["provider"] for row in rows] == ["ours"]
    assert unavailable["raising"] == f"OSError: no such thing at {CASE}"
    assert unavailable["shifted"].startswith("disagrees with ours by 0.5 of")
    monkeypatch.setitem(PROVIDERS, "ours", PROVIDERS["ours"]._replace(build=raising))
    with pytest.raises(OSError, match="no   such"):
        command.measure(CASE, ["ours"], clocks.Host(), {})


def test_a_peer_that_is_wrong_in_the_last_token_alone_gets_no_row(monkeypatch):
    def short(work):
        def call(i):
            y = work.norms[0](work.xs[i])
            y[-1] = 0
            return y

        return call

    monkeypatch.setitem(PROVIDERS, "short", Provider("short", short, ("numpy",)))
    rows = command.measure(CASE._replace(tokens=100), ["short"], clocks.Host(), unavailable := {})
    assert rows == []
    assert unavailable["short"].startswith("disagrees with ours by 1 of")


def test_the_hosts_time_is_that_of_one_call_and_all_buffers_are_used(monkeypatch):
    now, used = 0.0, []

    def call(i):
        nonlocal now
        now += 1e-4
        used.append(i)

    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now))
    assert clocks.Host().microseconds(call, 3) == pytest.approx(100)
    assert len(used) > 100
    assert all(used.count(i) == pytest.approx(len(used) / 3, abs=20) for i in range(3))


def test_a_gpus_time_is_the_median_of_replays_over_all_buffers():
    events, used, replayed = [], [], []
    spent = iter([9.0, 3.0, 6.0] * 5)

    class Event:
        def record(self, stream):
            events.append(stream)

        def synchronize(self):
            assert len(replayed) > 1, "the first replay is not timed"

    class Gpu(clocks._OnGpu):
        stream = SimpleNamespace(synchronize=lambda: used.append("synchronized"))
        _event, _elapsed = Event, staticmethod(lambda start, stop: next(spent))

        def _captured(self, calls):
            assert used.pop() == "synchronized"
            used.clear()
            assert list(calls) == [i % 5 for i in range(12)]
            return partial(replayed.append, "replay")

    assert Gpu().microseconds(lambda i: used.append(i) or i, 5) == pytest.approx(6e3 / 12)
    assert used == [i % 5 for i in range(12)]
    assert (len(replayed), events) == (16, [Gpu.stream] * 30)
    assert [clocks.Gpu.rotation(None, nbytes) for nbytes in (0, 2**23, 2**40)] == [64, 64, 2]


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("layout", workloads.LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peers_agree_on_torch_tensors(kind, layout, dtype, host):
    pytest.importorskip("transformers")
    case = Case(5, 4, 48, dtype, kind, layout)
    unavailable = {}
    names = ["copy", "multiply", "ours", "functional", "eager"]
    rows = command.measure(case, names, TorchHost(), unavailable)
    assert unavailable == {}
    # Peers return memory of their own, so in place there are none.
    assert [row["provider"] for row in rows] == (names[:3] if case.in_place else names)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_whole_array_expression_agrees(kind, dtype, host):
    unavailable = {}
    case = Case(5, 4, 48, dtype, kind, "misaligned")
    rows = command.measure(case, ["naive"], clocks.Host(), unavailable)
    assert (len(rows), unavailable) == (1, {})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_misaligned_rows_start_one_element_behind_a_boundary(dtype):
    case = Case(3, 2, 64, dtype, "rms", "misaligned")
    work = workloads.prepare(case, clocks.Host())
    for x, (result,) in zip(work.xs, work.results, strict=True):
        offset = x.ctypes.data - x.base.ctypes.data
        assert offset == x.itemsize
        assert all(stride % 16 == 0 for stride in x.strides[:2])
        assert result.flags.c_contiguous


def test_inputs_are_random_and_the_same_for_every_buffer():
    case = Case(300, 32, 128, "float32", "rms", "packed-qkv")  # more than a block of randoms
    work = workloads.prepare(case, clocks.Host())
    first, second = work.xs
    assert np.array_equal(first, second)
    assert not np.shares_memory(first, second)
    assert np.count_nonzero(first) == first.size
    assert len(np.unique(first[:100])) > 400_000
    assert work.results[0][0].shape == first.shape
    assert first.strides == ((32 + 8 + 8) * 128 * 4, 128 * 4, 4)  # keys and values lie between


def test_shares_are_of_the_better_ceiling(monkeypatch, host):
    spent = iter([5.0, 2.0, 4.0])
    monkeypatch.setattr(clocks.Host, "microseconds", lambda *_: next(spent))
    rows = command.measure(CASE, ["copy", "ours"], clocks.Host(), {})
    assert [row["microseconds"] for row in rows] == [5, 4]
    assert [row["share"] for row in rows] == [0.4, 0.5]


def test_the_median_of_the_rounds_counts(monkeypatch, host):
    spent = iter([5.0, 2.0, 40.0, 6.0, 20.0, 4.0, 7.0, 3.0, 5.0])
    monkeypatch.setattr(clocks.Host, "microseconds", lambda *_: next(spent))
    monkeypatch.setattr(clocks.Host, "rounds", 3)
    rows = command.measure(CASE, ["copy", "ours"], clocks.Host(), {})
    assert [row["microseconds"] for row in rows] == [6, 5]
    assert [row["share"] for row in rows] == [0.5, 0.6]


def test_a_cost_that_fails_is_named_and_the_rest_is_kept(capsys, host, monkeypatch, tmp_path):
    def broken():
        raise MemoryError("too little")

    monkeypatch.setattr(bench_costs, "import_times", broken)
    code, _, _ = run(capsys, "--host", "--json", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert code == 0
    assert results["host"]
    assert results["unavailable"]["broken"] == "MemoryError: too little"


def test_a_terminal_shows_how_far_it_is(capsys, host, monkeypatch):
    arguments = ("--tokens", 1, 2, "--num-heads", 2, "--providers", "copy")
    assert run(capsys, *arguments)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = run(capsys, *arguments)
    assert code == 0
    assert "measuring" not in out
    assert "\rmeasuring 3 of 3 " in err


def test_the_suite_writes_a_file_named_for_the_device(capsys, host, monkeypatch, tmp_path):
    tiny = [(CASE, None), (CASE._replace(layout="in-place"), ["ours"])]
    monkeypatch.setattr(command, "suite", lambda on: iter(tiny))
    monkeypatch.setattr(command, "_device_and_versions", lambda: ("NVIDIA Made Up (1)", {}))
    monkeypatch.setattr(bench_costs, "_in_new_process", lambda code, *_, **__: 500.0)
    small = bench_costs.reference_costs
    monkeypatch.setattr(bench_costs, "reference_costs", lambda: small(tokens=64))
    code, out, err = run(capsys, "--suite", tmp_path)
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "made-up-1.json").read_text())
    assert results["command"] == "python -m cupy_headnorm bench --suite"
    layouts = [(t["layout"], t["provider"]) for t in results["timings"]]
    assert ("in-place", "ours") in layouts
    assert ("in-place", "copy") not in layouts
    assert ("contiguous", "naive") in layouts
    judged = {row["what"]: row for row in results["targets"]}
    assert judged["import: ms"]["met"] is False
    assert judged["plan miss: us"]["met"] is None
    assert judged["reference, 1 GiB: extra MiB"]["met"] is True
    assert "Numbers to reach" in out
    assert "missed" in out


def test_the_suite_holds_a_case_for_every_number_to_reach():
    timings = [timing(case, "ours") for case, _ in suite.suite(SimpleNamespace(name="torch"))]
    assert len(timings) < 300
    judged = suite.judge(record.Results(**made_up(timings=timings)))
    # Those of q and k hold ours by positions and others against it too.
    of_shares = [
        row for row in judged if "share" in row["what"] and "not turned" not in row["what"]
    ]
    assert len(of_shares) == 8
    assert all(row["met"] is True for row in of_shares), judged
    assert all(row["met"] is None for row in judged if row not in of_shares)
    sized = {t["layout"] for t in timings}
    assert sized == set(workloads.LAYOUTS)


def big(head_dim, kind="rms", layout="contiguous", tokens=100_000):
    return Case(tokens, 32, head_dim, "float16", kind, layout)


def judge(**parts):
    return {row["what"]: row for row in suite.judge(record.Results(**made_up(**parts)))}


@pytest.mark.parametrize(
    ("what", "limit", "case"),
    [
        ("rms, out of place: share of a copy", 0.98, big(128)),
        ("rms, in place or packed: share", 0.94, big(128, layout="in-place")),
        ("rms, in place or packed: share", 0.94, big(64, layout="packed-qkv")),
        ("layer, out of place: share", 0.97, big(96, "layer")),
        ("layer, in place or packed: share", 0.93, big(96, "layer", "packed-qkv-in-place")),
        ("head_dim 72, 80, 100, 112, 160: share", 0.97, big(72)),
        ("other head_dim, misaligned: share", 0.8, big(37)),
        ("other head_dim, misaligned: share", 0.8, big(128, layout="misaligned")),
    ],
)
def test_shares_are_held_against_their_targets(what, limit, case):
    good, bad = timing(case, "ours", share=limit), timing(case, "ours", share=limit - 0.001)
    ignored = [
        timing(case, "liger", share=0.1),
        timing(case._replace(tokens=10), "ours", share=0.1),
    ]
    row = judge(timings=[good, *ignored])[what]
    assert (row["met"], row["measured"], row["where"]) == (True, limit, str(case))
    rows = judge(timings=[bad, good, *ignored])
    assert (rows[what]["met"], rows[what]["measured"]) == (False, pytest.approx(limit - 0.001))
    assert [name for name, row in rows.items() if row["met"] is not None] == [what]


def test_rows_below_64_bytes_have_no_target():
    rows = judge(timings=[timing(big(31, tokens=10**6), "ours", share=0.1)])
    assert all(row["met"] is None for row in rows.values())
    rows = judge(timings=[timing(big(32, tokens=10**6), "ours", share=0.1)])
    assert rows["other head_dim, misaligned: share"]["met"] is False


def test_one_token_is_held_against_the_copy_and_the_fastest_peer():
    spent = {"copy": 1.0, "multiply": 0.1, "ours": 1.3, "ours-row": 0.1, "liger": 1.2, "eager": 9.0}
    timings = [timing(bench_costs.HOST_CASE, name, us) for name, us in spent.items()]
    rows = judge(timings=timings)
    copies, peers = (rows[f"1 token: times {what}"] for what in ("a copy", "any peer"))
    assert (copies["met"], copies["measured"]) == (True, 1.3)
    assert (peers["met"], peers["where"]) == (False, "ours 1.3 us, liger 1.2")
    assert all(row["met"] is None for row in judge(timings=timings, timer="numpy").values())


def test_host_times_and_single_numbers_are_held_against_their_targets():
    spent = {
        bench_costs.LAUNCH: 4.0,
        bench_costs.FUNCTION: 5.0,
        bench_costs.FUNCTIONAL: 10.0,
        bench_costs.TORCH_IN_PLACE: 7.0,
        bench_costs.TORCH_NEW: 9.0,
        bench_costs.CUPY_IN_PLACE: 7.0,
    }
    once = {
        "plan_miss_torch_microseconds": 39.0,
        "plan_miss_cupy_microseconds": 41.0,
        "first_call_cold_milliseconds": 399.0,
        "first_call_disk_cache_milliseconds": 81.0,
        "import_milliseconds": 80.0,
        "reference_extra_mebibytes": 17.0,
        "reference_milliseconds": 100.0,
        "whole_array_milliseconds": 250.0,
    }
    host = [{"call": call, "microseconds": us} for call, us in spent.items()]
    rows = judge(host=host, once=once)
    assert {what: row["met"] for what, row in rows.items() if row["met"] is not None} == {
        "host, in place on torch: times cuLaunchKernel": True,
        "host, in place on torch: times F.rms_norm": False,
        "host, new result on torch: times F.rms_norm": True,
        "host, in place on CuPy: times Function(...)": False,
        "plan miss: us": False,
        "first call, cold: ms": True,
        "first call, disk cache: ms": False,
        "import: ms": True,
        "reference, 1 GiB: extra MiB": False,
        "reference: times faster than whole arrays": True,
    }
    assert rows["plan miss: us"]["where"] == "plan miss cupy microseconds"
    assert rows["reference: times faster than whole arrays"]["measured"] == 2.5


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("parts", ["both", "timings", "host"])
def test_plot_from_a_file(suffix, parts, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    case = bench_costs.HOST_CASE
    timings = [
        timing(case._replace(tokens=tokens), name, share=share)
        for tokens in (1, 16, 256)
        for name, share in (("copy", 1.0), ("ours", 0.9), ("eager", 0.0))
    ]
    host = [{"call": "peer", "microseconds": 9.0}, {"call": "ours, in place", "microseconds": 5.0}]
    results = made_up(
        timings=[] if parts == "host" else timings, host=[] if parts == "timings" else host
    )
    source, picture = tmp_path / "results.json", tmp_path / f"plot.{suffix}"
    source.write_text(json.dumps(results))
    code, out, err = run(capsys, "--from", source, "--plot", picture)
    assert (code, err) == (0, "")
    assert "NVIDIA Made Up 1, 2026-01-02" in out
    if parts != "timings":
        assert out.index("ours, in place") < out.index("peer")  # the fastest first
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    if suffix == "svg":
        assert b"#d55e00" in data  # the colour of ours
        code, *_ = run(capsys, "--from", source, "--plot", picture)
        assert picture.read_bytes() == data


def test_a_plot_shows_the_case_with_the_most_numbers_of_tokens():
    case = bench_costs.HOST_CASE
    timings = [
        timing(case._replace(tokens=tokens), name, share=share)
        for tokens in (1, 16, 256)
        for name, share in (("copy", 0.8), ("ours", 0.5))
    ]
    timings.append(timing(case._replace(tokens=5), "ours"))  # for a number to reach
    timings.append(timing(case._replace(kind="layer"), "ours"))
    shown, lines = report._lines(timings)
    assert shown == case._replace(tokens=0)
    assert lines == {"ours": [(1, 2), (16, 2), (256, 2)]}, "times what half the ceiling's speed is"


def test_a_plot_of_nothing(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    source = tmp_path / "results.json"
    source.write_text(json.dumps(made_up()))
    code, _, err = run(capsys, "--from", source, "--plot", tmp_path / "plot.png")
    assert code == 2
    assert "hold neither device nor host times" in err


def test_the_reference_needs_little_beside_its_result():
    costs = bench_costs.reference_costs(tokens=1024)  # 16 MiB
    assert 0 < costs["reference_extra_mebibytes"] < 16


TIMERS = [pytest.param(clocks.Gpu, id="cupy"), pytest.param(clocks.TorchGpu, id="torch")]


@pytest.mark.gpu
@pytest.mark.parametrize("make", TIMERS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("layout", workloads.LAYOUTS)
def test_every_provider_that_is_found_agrees_and_is_timed(make, kind, layout):
    on = make()
    names, _ = providers.find(on)
    case = Case(64, 32, 128, "bfloat16", kind, layout)
    unavailable = {}
    rows = command.measure(case, names, on, unavailable)
    # The others need compilers, which may be missing.
    assert set(unavailable) <= {"compile", "liger"}
    timed = [n for n in names if not (case.in_place and providers.is_peer(n))]
    assert [row["provider"] for row in rows] == [n for n in timed if n not in unavailable]
    assert all(row["microseconds"] > 0 for row in rows)


@pytest.mark.gpu
@pytest.mark.parametrize("make", TIMERS)
def test_host_times_on_a_gpu(make, monkeypatch):
    monkeypatch.setattr(bench_costs, "_CALLS", 3)
    on = make()
    names, _ = providers.find(on)
    failed = {}
    rows = bench_costs.host_times(names, on, failed)
    calls = {row["call"] for row in rows}
    wanted = {
        bench_costs.LAUNCH,
        bench_costs.FUNCTION,
        bench_costs.CUPY_IN_PLACE,
        bench_costs.CUPY_NEW,
    }
    if on.name == "torch":
        wanted |= {bench_costs.TORCH_IN_PLACE, bench_costs.TORCH_NEW, bench_costs.FUNCTIONAL}
    assert wanted <= calls
    assert set(failed) <= {"compile", "liger"}
    misses = bench_costs.plan_misses(on)
    kinds = {on.name, "cupy", "sequences", "q_and_k"}
    assert set(misses) == {f"plan_miss_{kind}_microseconds" for kind in kinds}
    assert all(value > 0 for value in misses.values())


@pytest.mark.gpu
def test_nothing_but_the_result_is_allocated():
    pytest.importorskip("torch")
    assert bench_costs.gpu_memory(clocks.TorchGpu()) == {"gpu_extra_bytes": 0}


@pytest.mark.gpu
@pytest.mark.slow
def test_first_calls_in_new_processes():
    assert all(value > 0 for value in bench_costs.first_calls().values())


def test_a_provider_that_fails_at_a_host_call_is_named(monkeypatch):
    def broken(work):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(PROVIDERS, "naive", PROVIDERS["naive"]._replace(build=broken))
    monkeypatch.setattr(bench_costs, "_own_calls", lambda work: ())
    unavailable = {}
    assert bench_costs.host_times(["copy", "naive"], clocks.Host(), unavailable) == []
    assert unavailable == {"naive": "RuntimeError: no such kernel at a host call"}
    # What was found before is the better reason.
    unavailable = {"naive": "disagrees with ours"}
    assert bench_costs.host_times(["naive"], clocks.Host(), unavailable) == []
    assert unavailable == {"naive": "disagrees with ours"}


def test_torch_that_cannot_use_the_gpu_says_why(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = f"torch {torch.__version__} sees no CUDA device"
    assert clocks.torch_on_gpu() == reason
    on = SimpleNamespace(name="cupy")
    assert providers._missing(PROVIDERS["functional"], on) == reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert providers._missing(PROVIDERS["functional"], on).startswith("takes torch tensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert clocks.torch_on_gpu() == "torch is not installed; needs: pip install torch"


def test_a_module_that_breaks_at_import_is_no_provider(monkeypatch, tmp_path):
    (tmp_path / "breaks_at_import.py").write_text("raise RuntimeError('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    provider = Provider("a peer", None, ("numpy",), ("breaks_at_import",))
    reason = providers._missing(provider, SimpleNamespace(name="numpy"))
    assert reason == "RuntimeError: no driver"
