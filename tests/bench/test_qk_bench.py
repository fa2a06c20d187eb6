"""The bench of q and k together: what it measures, refuses, writes. Never how fast."""

import json

import numpy as np
import pytest
from test_bench import FIELDS, TIMERS, TorchHost, host, judge, made_up, run, timing  # noqa: F401

from cupy_headnorm.bench import clocks, costs, providers, record, report, suite, workloads
from cupy_headnorm.bench import command as bench_command
from cupy_headnorm.bench.providers import CEILINGS, Provider
from cupy_headnorm.bench.providers import QK_PROVIDERS as PROVIDERS
from cupy_headnorm.bench.workloads import QK_CASE as CASE
from cupy_headnorm.bench.workloads import Case

pytestmark = pytest.mark.usefixtures("host")

OURS = ("ours", "ours-positions", "ours-plain", "ours-two")
SMALL = Case(5, 4, 48, "bfloat16", "qk-rope", "packed-qkv-in-place", 2)
TINY = ("--op", "qk-rope", "--tokens", 3, "--num-heads", 4, "--num-kv-heads", 2, "--head-dim", 16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("make", [clocks.Host, TorchHost])
def test_every_provider_agrees_on_the_host(make, dtype):
    pytest.importorskip("transformers")
    unavailable = {}
    names = [*CEILINGS, *OURS, "eager"]
    rows = bench_command.measure(SMALL._replace(dtype=dtype), names, make(), unavailable)
    assert ([row["provider"] for row in rows], unavailable) == (names, {})


def test_q_and_k_are_slices_of_one_buffer_and_the_ceiling_has_their_bytes():
    work = workloads.prepare(SMALL, clocks.Host())
    for (q, k), (x, y) in zip(work.inputs, work.plain, strict=True):
        assert (q.shape, k.shape) == ((5, 4, 48), (5, 2, 48))
        assert k.ctypes.data - q.ctypes.data == q.nbytes // 5
        assert q.strides == k.strides == (8 * 48 * 2, 48 * 2, 2)
        assert np.array_equal(np.concatenate((q, k), 1), x)
        assert q.nbytes + k.nbytes == x.nbytes == y.nbytes == SMALL.nbytes // 2
        assert x.flags.c_contiguous
    assert not np.array_equal(*work.weights)


def test_all_work_in_place_but_the_modules():
    pytest.importorskip("transformers")
    work = workloads.prepare(SMALL, clocks.Host())
    q, k = work.inputs[0]
    for name in (*OURS, "eager"):
        before = q.copy(), k.copy()
        PROVIDERS[name].build(work)(0)
        changed = [not np.array_equal(*pair) for pair in zip((q, k), before, strict=True)]
        assert changed == [name != "eager"] * 2, name


def test_tokens_rotate_and_plain_ones_do_not():
    work = workloads.prepare(SMALL._replace(tokens=1), clocks.Host())
    rotated, plain = work.expected(), work.expected(unrotated=True)
    for one, other in zip(rotated, plain, strict=True):
        assert np.abs(one.astype(float) - other.astype(float)).max() > 0.1


@pytest.mark.parametrize("part", [0, 1])
def test_a_peer_that_disagrees_on_either_part_gets_no_row(part, monkeypatch):
    def shifted(work):
        def call(i):
            results = list(work.expected())
            results[part] = results[part] * results[part].dtype.type(1.5)
            return tuple(results)

        return call

    provider = Provider("shifted", shifted, ("numpy",))
    monkeypatch.setitem(PROVIDERS, "shifted", provider)
    unavailable = {}
    rows = bench_command.measure(SMALL, ["ours", "shifted"], clocks.Host(), unavailable)
    assert [row["provider"] for row in rows] == ["ours"]
    assert unavailable["shifted"].startswith("disagrees with ours by 0.5 of")
    assert unavailable["shifted"].endswith("5 x 4+2 x 48 bfloat16 qk-rope packed-qkv-in-place")


def test_ours_may_not_fail(monkeypatch):
    def raising(work):
        raise OSError("no such thing")

    provider = PROVIDERS["ours-positions"]._replace(build=raising)
    monkeypatch.setitem(PROVIDERS, "ours-positions", provider)
    with pytest.raises(OSError, match="no such thing"):
        bench_command.measure(SMALL, ["ours-positions"], clocks.Host(), {})


def test_the_command_writes_a_table_and_json_and_a_plot(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    file, plot = tmp_path / "results.json", tmp_path / "plot.svg"
    code, out, err = run(capsys, *TINY, "--json", file)
    assert (code, err) == (0, "")
    results = json.loads(file.read_text())
    assert [row["provider"] for row in results["timings"]] == [*CEILINGS, *OURS, "eager"]
    for row in results["timings"]:
        assert set(row) == FIELDS
        assert (row["kind"], row["layout"]) == ("qk-rope", "packed-qkv-in-place")
        assert (row["tokens"], row["num_heads"], row["num_kv_heads"]) == (3, 4, 2)
        moved = 2 * 3 * (4 + 2) * 16 * 2 / row["microseconds"] / 1e3
        assert row["gigabytes_per_second"] == pytest.approx(moved, rel=0.01, abs=0.06)
    assert results["host"] == []  # they are of one norm
    assert out.count("3 x 4+2 x 16") == 1
    for name in OURS:
        assert PROVIDERS[name].label in out
    code, again, err = run(capsys, "--from", file, "--plot", plot)
    assert (code, err) == (0, "")
    assert "3 x 4+2 x 16" in again
    assert b"<?xml" in plot.read_bytes()[:8]


def test_megabytes_are_of_q_and_k(capsys, tmp_path):
    file = tmp_path / "results.json"
    tiny = [word for word in TINY if word not in ("--tokens", 3)]
    arguments = [*tiny, "--megabytes", 0.1, "--providers", "copy", "--json", file]
    assert run(capsys, *arguments)[0] == 0
    (row,) = json.loads(file.read_text())["timings"]
    assert row["tokens"] == int(0.1e6 / (6 * 16 * 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "qk"], "invalid choice: 'qk'"),
        ([*TINY, "--kind", "layer"], "--op qk-rope is given with --kind; needs it without"),
        ([*TINY, "--layout", "in-place"], "--op qk-rope is given with --layout; needs it without"),
        ([*TINY, "--host"], "--host is given with --op, --tokens, --num-heads, --num-kv-heads, "),
        ([*TINY, "--suite"], "--suite is given with --op, --tokens, --num-heads, --num-kv-heads, "),
        (["--num-kv-heads", 2], "--op norm is given with --num-kv-heads; needs it without"),
        ([*TINY, "--providers", "liger"], "provider 'liger' is not known; needs one of copy, "),
        ([*TINY[:-1], 15], "rotary_dim is 15; needs an even number"),
    ],
)
def test_errors(arguments, message, capsys):
    try:
        code, out, err = run(capsys, *arguments)
    except SystemExit as refused:  # argparse's own
        code, (out, err) = refused.code, capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_suite_takes_providers_of_either(capsys, monkeypatch, tmp_path):
    norm = Case(3, 2, 16, "float32", "rms", "contiguous")
    cases = [(norm, None), (norm._replace(tokens=4), ["ours"]), (SMALL, None)]
    monkeypatch.setattr(bench_command, "suite", lambda on: iter(cases))
    monkeypatch.setattr(costs, "reference_costs", dict)
    monkeypatch.setattr(costs, "import_times", dict)
    providers = ["--providers", "naive", "ours-two"]
    code, _, err = run(capsys, "--suite", tmp_path, *providers)
    assert (code, err) == (0, "")
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    timed = [(row["kind"], row["provider"]) for row in results["timings"]]
    assert timed == [("rms", "naive"), ("qk-rope", "ours-two")]
    command = "python -m cupy_headnorm bench --suite --providers naive ours-two"
    assert results["command"] == command, "not of the whole suite"
    assert results["host"]


def test_names_of_both_tables_are_labelled_alike():
    for name in PROVIDERS:
        assert report._label(name) == PROVIDERS[name].label


def test_files_from_before_q_and_k_were_timed_are_read(tmp_path):
    case, file = Case(3, 2, 16, "float32", "rms", "contiguous"), tmp_path / "results.json"
    row = timing(case, "ours")
    del row["num_kv_heads"]
    file.write_text(json.dumps(made_up(timings=[row])))
    (read,) = record.read(file).timings
    assert suite.case_of(read) == case


@pytest.mark.parametrize(
    ("what", "limit", "tokens", "provider"),
    [
        ("q and k, 16,384 tokens: share", 0.94, 16384, "ours"),
        ("q and k, 16,384 tokens: share", 0.94, 16384, "ours-positions"),
        ("q and k, 4,096 tokens: share", 0.92, 4096, "ours"),
        ("q and k, 4,096 tokens: share", 0.92, 4096, "ours-positions"),
        ("q and k, not turned: share", 0.96, 16384, "ours-plain"),
    ],
)
def test_shares_are_held_against_their_targets(what, limit, tokens, provider):
    case = CASE._replace(tokens=tokens)
    ignored = [timing(case, "eager", share=0.1), timing(case._replace(tokens=9), "ours", share=0.1)]
    for share, met in ((limit, True), (limit - 0.001, False)):
        rows = judge(timings=[timing(case, provider, share=share), *ignored])
        assert rows[what]["met"] is met
        assert rows[what]["where"] == f"{provider}, {case}"
        assert [name for name, row in rows.items() if row["met"] is not None] == [what]


def test_one_token_is_held_against_the_copy_and_two_norms():
    spent = {"copy": 1.0, "multiply": 0.1, "ours": 1.4, "ours-positions": 1.45, "ours-two": 1.42}
    timings = [timing(CASE, name, us) for name, us in spent.items()]
    rows = judge(timings=timings)
    copies, norms = (rows[f"q and k, 1 token: times {what}"] for what in ("a copy", "two norms"))
    assert (copies["met"], copies["measured"]) == (True, 1.45)
    assert (norms["met"], norms["where"]) == (False, "ours-positions 1.45 us, ours-two 1.42")
    assert [name for name, row in rows.items() if row["met"] is not None] == [
        "q and k, 1 token: times a copy",
        "q and k, 1 token: times two norms",
    ]


@pytest.mark.parametrize("timer", ["torch", "numpy"])
def test_the_suite_holds_cases_of_q_and_k(timer):
    on = type("Timer", (), {"name": timer})
    tokens = [c.tokens for c, names in suite.suite(on) if c == CASE._replace(tokens=c.tokens)]
    assert tokens == ([1, 32, 4096, 16384] if timer == "torch" else [1, 32])


@pytest.mark.gpu
@pytest.mark.parametrize("make", TIMERS)
@pytest.mark.parametrize("tokens", [1, 32, 4096])
def test_every_provider_that_is_found_agrees_and_is_timed(make, tokens):
    on = make()
    names, _ = providers.find(on, providers=PROVIDERS)
    unavailable = {}
    rows = bench_command.measure(CASE._replace(tokens=tokens), names, on, unavailable)
    assert set(unavailable) <= {"compile"}  # needs a compiler, which may be missing
    wanted = [name for name in names if name not in unavailable]
    assert [row["provider"] for row in rows] == wanted
    assert set(OURS) <= set(wanted)
    assert all(row["microseconds"] > 0 for row in rows)
