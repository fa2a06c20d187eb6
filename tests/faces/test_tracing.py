"""torch.compile breaks its graph around a norm; what cannot break, says so and loses nothing."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from cupy_headnorm import HeadNorm, ops, reference, rms_norm

torch = pytest.importorskip("torch")

DEVICES = [
    pytest.param("cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
WEIGHT = np.linspace(0.5, 1.5, 64, dtype=np.float32)
NORM = HeadNorm(WEIGHT)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


class Attention(torch.nn.Module):
    """A layer whose norm is ours, as after a swap in a loaded model."""

    def __init__(self, device):
        super().__init__()
        self.q_norm = torch.nn.RMSNorm(64, device=device)
        self.q_norm.forward = NORM.forward

    def forward(self, x):
        return self.q_norm(x.sin()).cos()


def in_place(x):
    y = x.sin()
    return NORM(y, out=y).cos()


CALLS = {
    "norm": lambda device: lambda x: NORM(x.sin()).cos(),
    "forward": lambda device: (
        lambda x: NORM.forward(x.sin(), intermediates=True)["hidden_states"].cos()
    ),
    "reference": lambda device: lambda x: NORM.forward_reference(x.sin()).cos(),
    "function": lambda device: lambda x: ops.layer_norm(x.sin(), x[0, 0]).cos(),
    "in place": lambda device: in_place,
    "module": Attention,
}


def compared(function, backend, device):
    """Call `function` compiled and as it is, on more shapes than one; return the graphs' sizes."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(function, backend=counting)
    with torch.no_grad():
        for tokens in (3, 5, 7, 3):
            x = torch.randn(tokens, 2, 64, device=device)
            torch.testing.assert_close(compiled(x), function(x))
    return graphs


@pytest.mark.parametrize("call", CALLS)
def test_compile_breaks_the_graph_around_a_norm(device, call):
    graphs = compared(CALLS[call](device), "eager", device)
    # What is before the norm and after it, for one number of tokens and then for any.
    assert len(graphs) == 4
    assert all(graphs)
    # Dynamo stopped at the norm, and tried none of the functions below it.
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 2


@pytest.mark.parametrize(
    "whole", [rms_norm, NORM, NORM.forward], ids=["function", "norm", "forward"]
)
def test_a_norm_that_is_all_there_is_to_compile(device, whole):
    assert compared(whole, "eager", device) == []


def test_compile_with_aot_autograd(device):
    assert len(compared(CALLS["norm"](device), "aot_eager", device)) == 4


@pytest.mark.slow
def test_compile_as_it_is_by_default(device):
    if device == "cpu" and not shutil.which("g++"):
        pytest.skip("needs g++, with which torch compiles for the host")
    assert len(compared(CALLS["norm"](device), "inductor", device)) == 4


@pytest.mark.parametrize("first", ["torch", "cupy_headnorm"])
def test_the_first_call_of_all_may_be_compiled(device, first):
    """Before it nothing of ours has met torch, and Dynamo nothing of ours."""
    second = {"torch": "cupy_headnorm", "cupy_headnorm": "torch"}[first]
    code = (
        f"import {first}, {second}\n"
        "call = torch.compile(lambda x: cupy_headnorm.rms_norm(x.sin()).cos(), backend='eager')\n"
        f"x = torch.randn(3, 2, 64, device={device!r})\n"
        "y = call(x)\n"
        "torch.testing.assert_close(y, cupy_headnorm.rms_norm(x.sin()).cos())\n"
        "print(sum(torch._dynamo.utils.counters['graph_break'].values()))"
    )
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning"]
    done = subprocess.run([sys.executable, *warnings, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_gradient_is_refused_under_compile(device):
    x = torch.ones(3, 64, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=r"x requires grad .*torch.no_grad\(\)"):
        torch.compile(CALLS["norm"](device), backend="eager")(x)


WHOLE = {
    "function": lambda x: rms_norm(x) + 1,
    "norm": lambda x: NORM(x) + 1,
    "forward": lambda x: NORM.forward(x) + 1,
    "reference": lambda x: NORM.forward_reference(x) + 1,
    "constructor": lambda x: HeadNorm(x[0])(x),
    "no more": rms_norm,
}
NO_GRAPH = "cupy_headnorm launches kernels of its own, .* needs torch.compile without fullgraph"


@pytest.mark.parametrize("call", WHOLE)
def test_fullgraph_is_refused(device, call):
    compiled = torch.compile(WHOLE[call], backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=NO_GRAPH):
        compiled(torch.ones(3, 64, device=device))


TRACED = "{} is traced by .*{}.*, which would lose this norm; needs an eager call"


def test_export_is_refused(device):
    class Model(torch.nn.Module):
        def forward(self, x):
            return NORM(x) * 2

    x = torch.ones(3, 64, device=device)
    with pytest.raises(TypeError, match=TRACED.format("x", "torch.export")):
        torch.export.export(Model(), (x,), strict=False)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=NO_GRAPH):
        torch.export.export(Model(), (x,), strict=True)


@pytest.mark.parametrize(
    "options",
    [
        {"tracing_mode": "real"},
        {"tracing_mode": "fake"},
        {"tracing_mode": "symbolic"},
        {"pre_dispatch": True},
    ],
    ids=str,
)
def test_make_fx_is_refused(device, options):
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.ones(3, 64, device=device)
    NORM(x)
    for call, name in (
        (lambda x: NORM(x), "x"),
        (lambda x: rms_norm(x, x[0]), "x"),
        (lambda x: HeadNorm(x[0]), "weight"),
    ):
        with pytest.raises(TypeError, match=TRACED.format(name, "make_fx")):
            make_fx(call, **options)(x)


def test_jit_trace_is_refused(device):
    x = torch.ones(3, 64, device=device)
    NORM(x)
    for call, name in ((lambda x: NORM(x), "x"), (lambda x: HeadNorm(x[0])(x), "weight")):
        with pytest.raises(TypeError, match=TRACED.format(name, "torch.jit.trace")):
            torch.jit.trace(call, (x,))


def test_real_tensors_under_a_fake_mode_are_refused(device):
    """torch would make a result without memory, for the norm to write."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.ones(3, 64, device=device)
    NORM(x)
    with FakeTensorMode(), pytest.raises(TypeError, match=TRACED.format("x", "FakeTensorMode")):
        NORM(x)


def counting_flops():
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def looking_on():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    return Mode()


@pytest.mark.parametrize("mode", [counting_flops, looking_on, lambda: torch.device("cpu")])
def test_modes_that_lose_nothing_are_let_through(device, mode):
    x = torch.randn(3, 2, 64, device=device)
    expected = NORM(x)
    with mode():
        assert torch.equal(NORM(x), expected)
        assert NORM(x, out=x) is x
    assert torch.equal(x, expected)


def test_the_answer_of_a_compiled_norm_is_that_of_the_reference(device):
    x = torch.randn(3, 2, 64, device=device)
    y = torch.compile(lambda x: NORM(x + 1), backend="eager")(x)
    expected = reference.rms_norm((x + 1).cpu().numpy(), WEIGHT)
    torch.testing.assert_close(y.cpu(), torch.from_numpy(expected))
