"""
What a second call looks at, and what it trusts: the path of a call that ran before.

The path belongs to CUDA memory. Here host memory stands in for it, behind torch's own tensors and
our own adapter, and the reference for the kernel; tests/test_streams.py has the real ones.
"""

import ctypes
import gc
import itertools
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from cupy_headnorm import (
    CaptureError,
    HeadNorm,
    _dispatch,
    _interop,
    _kernels,
    layer_norm,
    ops,
    reference,
    rms_norm,
)
from cupy_headnorm._layout import Device, as_numpy
from cupy_headnorm._spec import NormCall

torch = pytest.importorskip("torch")
CUDA = Device("cuda", 0)


class HostAsCuda(type(_interop.library_of(torch.empty(0), "x"))):
    """torch's adapter, for which host memory is that of a GPU."""

    def __init__(self, torch):
        super().__init__(torch)
        self.stream = lambda index: 7
        read = self.glance

        def glance(x):
            # The tensor's own answers, but for where it lies.
            stand_in = SimpleNamespace(
                is_cuda=True,
                is_neg=x.is_neg,
                requires_grad=x.requires_grad,
                data_ptr=x.data_ptr,
                get_device=lambda: 0,
                shape=x.shape,
                stride=x.stride,
                dtype=x.dtype,
            )
            return read(stand_in)

        self.glance = glance

    def view(self, x, role, *rows):
        view = super().view(x, role, *rows)
        return view._replace(layout=view.layout._replace(device=CUDA))


@pytest.fixture
def slow(monkeypatch):
    """Stand in for the GPU, and list the shapes of x that went step by step."""
    library = HostAsCuda(torch)
    for kind in (torch.Tensor, torch.nn.Parameter):
        monkeypatch.setitem(_interop.quick, kind, library)
        monkeypatch.setitem(_interop._found, kind, library)
    monkeypatch.setattr(_interop, "import_cupy", lambda: None)
    monkeypatch.setattr(_interop, "upload", lambda array, _: _on_device(_interop.view(array, "x")))
    monkeypatch.setattr(_interop, "synchronize", lambda index: None)
    monkeypatch.setattr(_kernels, "refuse_capture", lambda stream, what: None)
    monkeypatch.setattr(
        _kernels, "prepare", lambda call, *_: Launch(SimpleNamespace(rows=call.rows), call)
    )
    monkeypatch.setattr(_kernels, "over_rows", over_rows)
    monkeypatch.setattr(_kernels, "runner", lambda launch: Runner(launch.call))
    monkeypatch.setattr(_dispatch, "_thread", _dispatch._Thread())
    monkeypatch.setattr(_dispatch, "_plans", {})
    shapes = []
    step_by_step = _dispatch.step_by_step

    def listing(norm, x, *arguments, **options):
        shapes.append(tuple(x.shape))
        return step_by_step(norm, x, *arguments, **options)

    monkeypatch.setattr(_dispatch, "step_by_step", listing)
    return shapes


class Launch(NamedTuple):
    params: SimpleNamespace
    call: NormCall


def over_rows(launch, rows):
    """As the kernel does: it meets the outermost length in the number of rows alone."""
    outermost, *inner = launch.call.axes
    outermost = outermost._replace(size=outermost.size * rows // launch.call.rows)
    call = launch.call._replace(axes=(outermost, *inner), rows=rows)
    return Launch(SimpleNamespace(rows=rows), call)


def _on_device(view):
    return view._replace(layout=view.layout._replace(device=CUDA))


class Runner:
    """Does what the kernel does with the same addresses and the same grid of rows."""

    def __init__(self, call):
        self.call = call

    def __call__(self, x, out, weight, bias, stream):
        assert stream == 7
        spec = self.call.spec

        def rows(address, dtype, strides):
            layout = SimpleNamespace(
                size=1,
                shape=(*(axis.size for axis in self.call.axes), spec.head_dim),
                strides=(*strides, dtype.itemsize),
                dtype=dtype,
            )
            return as_numpy(address, layout, None, writeable=True)

        axes = self.call.axes
        parameters = [
            rows(address, dtype, [getattr(axis, name) for axis in axes]) if dtype else None
            for name, address, dtype in (
                ("weight", weight, spec.weight),
                ("bias", bias, spec.bias),
            )
        ]
        reference.apply(
            self.call,
            rows(x, spec.x, [axis.x for axis in axes]),
            *parameters,
            rows(out, spec.x, [axis.out for axis in axes]),
        )


def tensor(rng, *shape, dtype=torch.float32):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)


def expected(x, *parameters, norm=reference.rms_norm, **options):
    return norm(x.numpy(), *(p.numpy() for p in parameters), **options)


def test_the_second_call_only_looks(slow, rng):
    weight = tensor(rng, 4, 64)
    norm = HeadNorm(weight)
    for calls in range(3):
        x, y = tensor(rng, 5, 4, 64), torch.empty(5, 4, 64)
        right = expected(x, weight)
        np.testing.assert_array_equal(norm(x), right)
        np.testing.assert_array_equal(norm(x, out=y), right)
        norm(x, out=x)
        np.testing.assert_array_equal(x, right)
        # In place is known from out of place: only addresses differ.
        assert len(slow) == 2, f"step by step again in round {calls}"


def test_functions_are_remembered_too(slow, rng):
    for _ in range(3):
        x, weight, bias = tensor(rng, 5, 4, 64), tensor(rng, 4, 64), tensor(rng, 64)
        np.testing.assert_array_equal(rms_norm(x, weight), expected(x, weight))
        np.testing.assert_array_equal(
            layer_norm(x, weight, bias), expected(x, weight, bias, norm=reference.layer_norm)
        )
        assert len(slow) == 2


def test_options_of_a_function_make_it_another(slow, rng):
    x = tensor(rng, 5, 4, 64)
    for eps in (1e-6, 1.0, 1e-6, 1.0):
        np.testing.assert_array_equal(rms_norm(x, eps=eps), expected(x, eps=eps))
    assert len(slow) == 2


LAYOUTS = {
    "contiguous": lambda n, rng: tensor(rng, n, 4, 64),
    "batch of one": lambda n, rng: tensor(rng, 1, n, 4, 64),
    "slice of packed": lambda n, rng: tensor(rng, n, 6, 64)[:, 1:5],
    "slice of a batch of one": lambda n, rng: tensor(rng, 1, n, 6, 64)[:, :, :4],
    "flat": lambda n, rng: tensor(rng, n, 256),
    "flat slice": lambda n, rng: tensor(rng, n, 512)[:, 256:],
    "expanded": lambda n, rng: tensor(rng, 1, 4, 64).expand(n, 4, 64),
    "every other token": lambda n, rng: tensor(rng, 2 * n, 4, 64)[::2],
}


@pytest.mark.parametrize(
    ("layout", "out"),
    [
        (layout, out)
        for layout in LAYOUTS
        for out in ("new", "in place", "given")
        if (layout, out) != ("expanded", "in place")  # it has no place for each result
    ],
)
def test_another_number_of_tokens_is_no_new_plan(slow, rng, layout, out):
    weight, bias = tensor(rng, 4, 64), tensor(rng, 64)
    norm = HeadNorm(weight, bias, kind="layer")
    for tokens in (7, 3, 20, 2, 7):
        x = LAYOUTS[layout](tokens, rng)
        right = expected(x, weight, bias, norm=reference.layer_norm, num_heads=4, head_dim=64)
        target = {"new": None, "in place": x, "given": torch.empty(x.shape)}[out]
        np.testing.assert_array_equal(norm(x, out=target), right)
    assert len(slow) == 1


def test_lengths_that_are_not_outermost(slow, rng):
    weight = tensor(rng, 64)
    norm = HeadNorm(weight)
    for length in (3, 5, 3, 5):
        for x in (
            tensor(rng, 2, length, 4, 64),  # sequences in a batch
            tensor(rng, 2, 4, length, 64).transpose(1, 2),
            tensor(rng, 4, length, 64).transpose(0, 1),  # tokens first, heads outermost in memory
            tensor(rng, 4, 9, 64)[:, :length].transpose(0, 1),
            tensor(rng, length, 1, 64).expand(length, 4, 64),
        ):
            np.testing.assert_array_equal(norm(x), expected(x, weight))


def test_heads_first_layouts_are_told_apart(slow, rng):
    """The outermost axis may be that of the heads: then its length is no number of tokens."""
    weight = tensor(rng, 4, 64)
    norm = HeadNorm(weight)
    for tokens in (5, 9):
        x = tensor(rng, 4, tokens, 64)
        right = expected(x, weight, heads_axis=-3)
        np.testing.assert_array_equal(norm(x, heads_axis=-3), right)
        np.testing.assert_array_equal(norm(x[None], heads_axis=-3)[0], right)
        np.testing.assert_array_equal(norm(x, heads_axis=0), right)
    with pytest.raises(ValueError, match="3 heads on axis -3; needs num_heads=4"):
        norm(tensor(rng, 3, 5, 64), heads_axis=-3)
    with pytest.raises(ValueError, match="3 heads on axis -2; needs num_heads=4"):
        norm(tensor(rng, 1, 3, 64))


def test_one_token_and_none_after_many(slow, rng):
    weight = tensor(rng, 64)
    norm = HeadNorm(weight)
    for tokens in (6, 1, 0, 6, 1, 0):
        x = tensor(rng, tokens, 4, 64)
        np.testing.assert_array_equal(norm(x), expected(x, weight))


def test_what_the_first_call_refuses_the_second_does_too(slow, rng):
    x, y = tensor(rng, 8, 4, 64), torch.empty(8, 4, 64)
    norm = HeadNorm(tensor(rng, 64))
    weight = tensor(rng, 64)
    with torch.no_grad():
        norm(x), norm(x, out=y), norm(x, out=x), rms_norm(x, weight), rms_norm(x, weight, out=y)
    requires_grad = x.clone().requires_grad_()
    for call in (norm, lambda t: norm(x, out=t), lambda t: norm(t, out=y)):
        with pytest.raises(ValueError, match="requires grad and grad mode is on"):
            call(requires_grad)
        with pytest.raises(TypeError, match="a lazily negated view"):
            call(torch._neg_view(x))
        with pytest.raises(TypeError, match="a Subclass, a subclass of torch.Tensor"):
            call(x.as_subclass(Subclass))
    with pytest.raises(ValueError, match="weight requires grad"):
        rms_norm(x, weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="x has shape"):
        norm(tensor(rng, 8, 4, 32))
    with pytest.raises(TypeError, match="out has dtype float16"):
        norm(x, out=y.half())
    with pytest.raises(TypeError, match="out is a ndarray"):
        norm(x, out=y.numpy())


class Subclass(torch.Tensor):
    pass


def test_overlap_is_looked_for_at_every_call(slow, rng):
    memory = tensor(rng, 12, 4, 64)
    norm = HeadNorm()
    norm(memory[:4], out=memory[8:])
    known = len(slow)
    with pytest.raises(ValueError, match="out overlaps x in part"):
        norm(memory[:4], out=memory[2:6])
    with pytest.raises(ValueError, match="out overlaps x in part"):
        norm(memory[2:6], out=memory[:4])
    right = expected(memory[:4])
    norm(memory[:4], out=memory[4:8])  # side by side is apart
    np.testing.assert_array_equal(memory[4:8], right)
    norm(memory[:4], out=memory[:4])  # other objects, one place
    np.testing.assert_array_equal(memory[:4], right)
    assert len(slow) == known + 2
    x, parameters = tensor(rng, 4, 64), tensor(rng, 2, 64)
    rms_norm(x, parameters[0], parameters[1], out=torch.empty(4, 64))
    known = len(slow)
    for which in range(2):
        out = torch.empty(6, 64)
        shared = [out[0], parameters[0]] if which == 0 else [parameters[0], out[0]]
        with pytest.raises(ValueError, match=f"out overlaps {('weight', 'bias')[which]}; needs"):
            rms_norm(x, *shared, out=out[:4])
    assert len(slow) == known + 2


def test_interleaved_slices_are_told_apart_exactly(slow, rng):
    packed = tensor(rng, 5, 6, 64)
    queries, keys = packed[:, :2], packed[:, 2:4]
    norm = HeadNorm()
    for _ in range(2):
        right = expected(queries)
        norm(queries, out=keys)
        np.testing.assert_array_equal(keys, right)
    with pytest.raises(ValueError, match="out overlaps x in part"):
        norm(packed[:, :2], out=packed[:, 1:3])


def test_versions_count_every_write(slow, rng):
    x, y = tensor(rng, 5, 4, 64), torch.empty(5, 4, 64)
    norm = HeadNorm()
    for n in range(1, 4):
        norm(x, out=x)
        with torch.no_grad():
            norm(x, out=y)
        assert (x._version, y._version) == (n, n)
    assert norm(x)._version == 0


def test_norms_that_agree_share_their_plans_and_keep_their_weights(slow, rng):
    x = tensor(rng, 5, 4, 64)
    for _ in range(3):
        weight = tensor(rng, 64)
        np.testing.assert_array_equal(HeadNorm(weight)(x), expected(x, weight))
    # A norm's first call uploads its weight; the plan is there.
    assert len(_dispatch._plans) == 1
    assert len(_dispatch._thread.calls) == 1


def test_unload_and_load_again(slow, rng):
    x, weight = tensor(rng, 5, 4, 64), tensor(rng, 64)
    norm = HeadNorm(weight)
    for _ in range(2):
        for _ in range(2):
            np.testing.assert_array_equal(norm(x), expected(x, weight))
        norm.unload()
        assert not norm._norm.ready


def test_a_warmed_call_only_looks(slow, rng):
    norm = HeadNorm(tensor(rng, 64))
    x = tensor(rng, 5, 4, 64)
    before = x.clone()
    norm.warmup(x)
    assert torch.equal(x, before)
    known = len(slow)
    norm(x), norm(x, out=x)
    assert len(slow) == known


def test_the_cache_is_bounded(slow, rng, monkeypatch):
    monkeypatch.setattr(_dispatch, "_MAX_CALLS", 4)
    norm = HeadNorm()
    for heads in range(1, 12):
        x = tensor(rng, 1, heads, 3, 64)
        np.testing.assert_array_equal(norm(x), expected(x))
        sizes = [len(_dispatch._thread.calls), len(_dispatch._thread.families)]
        assert max(*sizes, len(_dispatch._plans)) <= 4


def test_threads_have_parameters_of_their_own(slow, rng):
    """A call writes addresses into its parameters; two threads in one call must not share them."""
    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)
    norm(x)
    here = _dispatch._thread.calls
    there = []

    def other():
        norm(x)
        there.append(_dispatch._thread.calls)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert here.keys() == there[0].keys()
    assert all(here[key].run is not there[0][key].run for key in here)


def test_tracing_and_modes_go_step_by_step(slow, rng):
    from torch.utils.flop_counter import FlopCounterMode

    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)
    norm(x)
    with FlopCounterMode(display=False):
        np.testing.assert_array_equal(norm(x), expected(x))
    assert len(slow) == 2
    with torch.device("cpu"):  # a function mode that looks on
        norm(x)
    assert len(slow) == 2
    with pytest.raises(TypeError, match="traced by torch.jit.trace"):
        torch.jit.trace(lambda t: norm(t), x)


def test_every_path_asks_for_the_stream_of_now(slow, rng, monkeypatch):
    streams = []
    monkeypatch.setattr(
        _kernels,
        "runner",
        lambda launch: lambda x, out, weight, bias, stream: streams.append(stream),
    )
    now = iter(range(100, 200))
    monkeypatch.setattr(_interop.quick[torch.Tensor], "stream", lambda index: next(now))
    norm, weight = HeadNorm(tensor(rng, 64)), tensor(rng, 64)
    norm(tensor(rng, 5, 4, 64)), rms_norm(tensor(rng, 5, 4, 64), weight)
    calls = (norm, lambda x: norm(x, out=x), lambda x: rms_norm(x, weight))
    for call, tokens in itertools.product(calls, (5, 5, 7, 7)):
        asked = next(now)
        call(tensor(rng, tokens, 4, 64))
        assert streams[-1] > asked


def test_what_would_be_lost_is_refused_when_it_is_known(slow, rng):
    """Transforms hand a norm tensors of layouts that it remembers, without memory behind them."""
    norm, weight = HeadNorm(), tensor(rng, 64)
    x = tensor(rng, 8, 4, 64)
    calls = (norm, lambda t: norm(t, out=t), lambda t: rms_norm(t, weight))
    for call in calls:
        call(x.clone()), call(x[0].clone())
    known = len(slow)
    for call, (trace, message) in itertools.product(calls, LOST):
        with pytest.raises(TypeError, match=message):
            trace(call, x)
    for call in calls:
        np.testing.assert_array_equal(call(x.clone()), call(x.clone()))
    assert len(slow) == known + len(calls) * len(LOST)


def _dual(call, x):
    with torch.autograd.forward_ad.dual_level():
        call(torch.autograd.forward_ad.make_dual(x, x))


LOST = (
    (lambda call, x: torch.func.vmap(lambda t: call(t))(x), "inside a torch.func transform"),
    (
        lambda call, x: torch.func.grad(lambda t: call(t).sum())(x),
        "inside a torch.func transform",
    ),
    (_dual, "a forward-mode AD dual"),
    (lambda call, x: call(torch._to_functional_tensor(x)), "functional, without memory"),
    (lambda call, x: call(x.to_sparse()), "of layout torch.sparse_coo"),
    (lambda call, x: call(x.to("meta")), "on the meta device"),
)


def test_a_new_result_is_refused_in_a_capture_on_every_path(slow, rng, monkeypatch):
    """That of a library whose pool knows nothing of graphs, as CuPy's."""
    monkeypatch.setattr(_interop.quick[torch.Tensor], "allocates_in_graphs", False)
    norm = HeadNorm(tensor(rng, 64))
    x = tensor(rng, 5, 4, 64)
    norm(x), norm(x.clone(), out=x.clone())

    def refuse(stream, what):
        raise CaptureError(what)

    monkeypatch.setattr(_kernels, "refuse_capture", refuse)
    for tokens in (5, 7):
        x = tensor(rng, tokens, 4, 64)
        with pytest.raises(CaptureError, match="a result without out would be allocated"):
            norm(x)
        right = reference.rms_norm(x.numpy(), norm.weight)
        np.testing.assert_array_equal(norm(x, out=x), right)
    # A plan of a kernel that is loaded loads nothing.
    np.testing.assert_array_equal(
        norm(x[None], out=x[None])[0], reference.rms_norm(right, norm.weight)
    )


def test_another_alignment_is_another_plan(slow, rng):
    norm = HeadNorm(tensor(rng, 64))
    values = tensor(rng, 5, 4, 64, dtype=torch.float16)

    def shifted(by):
        x = torch.empty(values.numel() + 16, dtype=torch.float16)
        x = x[by : by + values.numel()].view(values.shape)
        return x.copy_(values)

    right = norm(shifted(0))
    for number, shifts in enumerate([(0, 0), (0, 1), (1, 0), (4, 2)], 1):
        for further in (0, 0, 8):
            x, out = (shifted(by + further) for by in shifts)
            np.testing.assert_array_equal(norm(x, out=out), right)
            assert len(slow) == 1 + number


def test_calls_go_with_their_thread(slow, rng):
    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)

    def other():
        norm(x)
        return [weakref.ref(call.run) for call in _dispatch._thread.calls.values()]

    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            (run,) = pool.submit(other).result()
        gc.collect()
        assert run() is None
    assert len(_dispatch._plans) == 1


class Launches:
    """CUDA for `_kernels.runner`: two devices, 1 current, and what is launched on which."""

    def __init__(self, monkeypatch, count=2):
        cupy = pytest.importorskip("cupy", exc_type=ImportError)
        self.current = 1
        self.found = []
        self.broken = False
        runtime, driver = cupy.cuda.runtime, cupy.cuda.driver
        monkeypatch.setattr(_kernels, "_thread", threading.local())
        monkeypatch.setattr(runtime, "getDeviceCount", lambda: count)
        monkeypatch.setattr(runtime, "getDevice", lambda: self.current)
        monkeypatch.setattr(runtime, "setDevice", lambda i: setattr(self, "current", i))
        monkeypatch.setattr(driver, "launchKernel", self._launch)

    def _launch(self, function, *grid_and_block):
        *_, stream, arguments, _ = grid_and_block
        time.sleep(1e-4)  # others run here: what they share is overwritten
        if self.broken:
            raise RuntimeError("the launch failed")
        params = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0]
        addresses = tuple((ctypes.c_uint64 * 4).from_address(params))
        self.found.append((self.current, stream, addresses))

    @staticmethod
    def on(device):
        params = _kernels._PARAMS["float32", 1](rows=3)
        return _kernels.Launch(1, 2, 32, device, params, None)


@pytest.mark.parametrize("device", [0, 1])
def test_the_device_of_the_arrays_is_current_while_launching(device, monkeypatch):
    cuda = Launches(monkeypatch)
    run = _kernels.runner(cuda.on(device))
    assert cuda.current == 1
    run(10, 20, 30, 40, 7)
    assert cuda.found == [(device, 7, (10, 20, 30, 40))]
    assert cuda.current == 1
    cuda.broken = True
    with pytest.raises(RuntimeError, match="the launch failed"):
        run(10, 20, 30, 40, 7)
    assert cuda.current == 1


def test_a_threads_first_launch_makes_the_context_current(monkeypatch):
    """Also where there is one device, and later launches do not ask which is current."""
    cuda = Launches(monkeypatch, count=1)
    cuda.current = 0
    chosen = []
    monkeypatch.setattr(cuda_runtime(), "setDevice", chosen.append)
    launch = cuda.on(0)
    _kernels.runner(launch), _kernels.runner(launch)
    assert chosen == [0]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_kernels.runner, launch).result()(1, 2, 3, 4, 7)
    assert chosen == [0, 0]


def cuda_runtime():
    import cupy

    return cupy.cuda.runtime


def test_runners_of_one_launch_share_nothing(monkeypatch):
    cuda = Launches(monkeypatch)
    launch = cuda.on(1)

    def work(number):
        run = _kernels.runner(launch)
        for n in range(20):
            run(number, n, number, n, number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(cuda.found) == 80
    for _, stream, addresses in cuda.found:
        assert addresses == (stream, addresses[1], stream, addresses[1])
    assert launch.params.x == 0


def test_an_argument_that_changes_is_read_at_every_call(slow, rng):
    for library in (lambda t: t, lambda t: t.numpy()):
        x = library(tensor(rng, 5, 4, 64))
        eps = torch.tensor(0.0)
        for value in (1.0, 4.0):
            eps.fill_(value)
            right = reference.rms_norm(np.asarray(x), eps=value)
            np.testing.assert_array_equal(rms_norm(x, eps=eps), right)


def test_a_mode_that_changes_what_torch_makes_is_seen(slow, rng):
    class Smaller(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.empty_like:
                return torch.empty(1)
            return function(*args, **(kwargs or {}))

    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)
    norm(x)
    with Smaller(), pytest.raises(ValueError, match=r"out has shape \(1,\); needs that of x"):
        norm(x)


def test_a_result_inside_a_transform_is_refused_by_name(slow, rng):
    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)
    norm(x)
    with pytest.raises(TypeError, match="inside a torch.func transform"):
        torch.func.grad(lambda z: (norm(x), z.sum())[1])(tensor(rng, 3))


def test_heads_axis_is_an_integer_on_a_known_call_too(slow, rng):
    norm, x = HeadNorm(), tensor(rng, 5, 4, 64)
    norm(x)
    for axis in (-2.0, np.array([-2.0]), torch.tensor(-2.0)):
        with pytest.raises(TypeError, match="heads_axis is .*; needs an integer"):
            norm(x, heads_axis=axis)
    np.testing.assert_array_equal(norm(x, heads_axis=np.int64(-2)), expected(x))
    for axis in (64, -65):
        with pytest.raises(ValueError, match=f"heads_axis is {axis}; needs one of the 64 axes"):
            norm(x, heads_axis=axis)


def test_strides_of_the_tokens_tell_families_apart(slow, rng):
    norm, memory = HeadNorm(), tensor(rng, 40, 4, 64)
    for step, tokens in ((1, 5), (2, 5), (1, 7), (2, 7), (3, 6), (1, 9)):
        x = memory[: step * tokens : step]
        np.testing.assert_array_equal(norm(x), expected(x))
        np.testing.assert_array_equal(norm(x[None], out=torch.empty(1, tokens, 4, 64))[0], norm(x))


def test_identities_of_norms_are_bounded(slow, rng):
    x = tensor(rng, 5, 4, 64)
    for i in range(20):
        HeadNorm(eps=1e-6 * (i + 1))(x)
    info = _dispatch.identity.cache_info()
    assert info.currsize <= info.maxsize


def test_a_geometry_of_ones_own_needs_cuda_memory():
    norm, x = HeadNorm(), torch.ones(3, 64)
    with pytest.raises(ValueError, match="x is in host memory; a launch configuration needs CUDA"):
        ops.launch(norm.plan(x), x)
