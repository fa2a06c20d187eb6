"""What `launcher.runner` launches, and on which device."""

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cupy_headnorm._cuda import launcher
from cupy_headnorm._cuda.launcher import Launch
from cupy_headnorm._plans import head_norm

WORDS = tuple((word, word) for word in range(4))


class Launches:
    """CUDA for `launcher.runner`: two devices, 1 current, and what is launched on which."""

    def __init__(self, monkeypatch, count=2):
        cupy = pytest.importorskip("cupy", exc_type=ImportError)
        self.current = 1
        self.found = []
        self.counted = []
        self.broken = False
        runtime, driver = cupy.cuda.runtime, cupy.cuda.driver
        monkeypatch.setattr(launcher, "_thread", threading.local())
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
        *addresses, rows = (ctypes.c_uint64 * 5).from_address(params)
        self.found.append((self.current, stream, tuple(addresses)))
        self.counted.append((rows, grid_and_block[0]))

    @staticmethod
    def on(device):
        params = head_norm._params_type(ctypes.c_float, 1, True)(rows=3)
        return Launch(1, 2, 32, device, params, 0, 3, type(params).rows.offset, None, None)


@pytest.mark.parametrize("device", [0, 1])
def test_the_device_of_the_arrays_is_current_while_launching(device, monkeypatch):
    cuda = Launches(monkeypatch)
    run = launcher.runner(cuda.on(device), WORDS)
    assert cuda.current == 1
    run(7, (10, 20, 30, 40))
    assert cuda.found == [(device, 7, (10, 20, 30, 40))]
    assert cuda.current == 1
    cuda.broken = True
    with pytest.raises(RuntimeError, match="the launch failed"):
        run(7, (10, 20, 30, 40))
    assert cuda.current == 1


def test_a_threads_first_launch_makes_the_context_current(monkeypatch):
    """Also where there is one device, and later launches do not ask which is current."""
    cuda = Launches(monkeypatch, count=1)
    cuda.current = 0
    chosen = []
    monkeypatch.setattr(cuda_runtime(), "setDevice", chosen.append)
    launch = cuda.on(0)
    launcher.runner(launch, WORDS), launcher.runner(launch, WORDS)
    assert chosen == [0]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(launcher.runner, launch, WORDS).result()(7, (1, 2, 3, 4))
    assert chosen == [0, 0]


def cuda_runtime():
    import cupy

    return cupy.cuda.runtime


def test_runners_of_one_launch_share_nothing(monkeypatch):
    cuda = Launches(monkeypatch)
    launch = cuda.on(1)

    def work(number):
        run = launcher.runner(launch, WORDS)
        for n in range(20):
            run(number, (number, n, number, n))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(cuda.found) == 80
    for _, stream, addresses in cuda.found:
        assert addresses == (stream, addresses[1], stream, addresses[1])
    assert launch.params.x == 0


@pytest.mark.parametrize("device", [0, 1])
def test_runs_over_other_lengths_share_parameters_and_keep_their_counts(device, monkeypatch):
    cuda = Launches(monkeypatch)
    launch = cuda.on(device)
    run_of = launcher.runners(launch, WORDS)
    run, longer = run_of(launch), run_of(launch.over(5, 90))
    for one, count in ((run, (3, 2)), (longer, (90, 5)), (run, (3, 2))):
        one(7, (1, 2, 3, 4))
        assert cuda.counted[-1] == count
        assert cuda.found[-1] == (device, 7, (1, 2, 3, 4))
    assert launch.params.rows == 3


def test_a_run_inside_of_its_like_over_another_length_has_its_own_parameters(monkeypatch):
    """As where a signal's handler calls between the writing of the parameters and the launch."""
    cuda = Launches(monkeypatch)
    launch = cuda.on(1)
    run_of = launcher.runners(launch, WORDS)
    longer, inside = run_of(launch.over(5, 90)), [lambda: longer(8, (5, 6, 7, 8))]
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda t: inside.pop()() if inside else sleep(t))
    run_of(launch)(7, (1, 2, 3, 4))
    assert cuda.found == [(1, 8, (5, 6, 7, 8)), (1, 7, (1, 2, 3, 4))]
    assert cuda.counted == [(90, 5), (3, 2)]
