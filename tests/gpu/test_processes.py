"""
Processes on a GPU: what they share on disk, how they fork, leave and are interrupted.

Each is started from a text. Those that need no GPU are in tests/gpu/test_faults.py.
"""

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from processes import assert_well_ended, environment, run
from streams import DIM, normal
from streams import SPIN as SPIN_KERNEL
from tolerances import assert_alike

from cupy_headnorm import HeadNorm, reference

pytestmark = pytest.mark.gpu
pytest.importorskip("torch")
cupy = pytest.importorskip("cupy", exc_type=ImportError)


RESULT = """
import hashlib, json, os, signal, sys, threading, time
import cupy
import numpy as np
from cupy_headnorm import GPUUnavailableError, HeadNorm, QKNorm, rms_norm
from cupy_headnorm._cuda import compiler, once
HEAD_DIMS = (64, 96, 128, 160, 192)

def values(head_dim):
    return np.sin(np.arange(6 * head_dim, dtype=np.float32)).reshape(3, 2, head_dim)

def digest(head_dims=HEAD_DIMS, array=cupy.asarray):
    found = hashlib.sha256()
    for head_dim in head_dims:
        y = HeadNorm(np.ones(head_dim, np.float32))(array(values(head_dim)))
        found.update(getattr(y, "get", lambda: y)().tobytes())
    return found.hexdigest()

cupy.zeros(1)
"""
"""A digest of results: one kernel of ours for each head_dim, and none of CuPy."""
KERNELS = 5

SPIN = f"""
kernel = cupy.RawKernel(r'''{SPIN_KERNEL}''', "spin")
def spin(stream, cycles=1_000_000_000):
    kernel((1,), (1,), (np.int64(cycles),), stream=stream)
"""


@pytest.fixture(scope="module")
def right():
    """Return the function `digest` of this process."""
    scope = {}
    exec(RESULT, scope)
    return scope["digest"]


def assert_whole(cache):
    """Assert that the folder has each kernel once, whole, and nothing half-written."""
    files = sorted(cache.glob("*.cubin"))
    assert len(files) == KERNELS
    for file in files:
        found, cubin = file.read_bytes()[:40], file.read_bytes()[40:]
        assert hashlib.sha1(cubin).hexdigest() == found.decode()
    assert not list(cache.glob("tmp*"))


def test_sixteen_processes_fill_one_cache_at_once(tmp_path, right):
    cache = tmp_path / "cache"
    code = f"{RESULT}\nprint('ready', flush=True)\nsys.stdin.readline()\nprint(digest())"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, env=environment(CUPY_CACHE_DIR=str(cache)), text=True, **pipes)
        for _ in range(16)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 16
        assert not list(cache.glob("*.cubin"))
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (printed, said) in zip(processes, ends, strict=True):
        assert_well_ended(process.returncode, said)
        assert printed == f"{right()}\n"
    assert_whole(cache)


def test_garbage_in_the_cache_is_compiled_again(tmp_path, right, rng):
    cache = tmp_path / "cache"
    code = f"{RESULT}\nprint(digest())"
    assert run(code, CUPY_CACHE_DIR=str(cache)) == [right()]
    assert_whole(cache)
    spoil = (
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: len(data) // 2],
        lambda data: rng.bytes(len(data)),
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    )
    for file, spoilt in zip(sorted(cache.glob("*.cubin")), spoil, strict=True):
        file.write_bytes(spoilt(file.read_bytes()))
    (cache / "garbage").write_bytes(rng.bytes(1000))
    assert run(code, CUPY_CACHE_DIR=str(cache)) == [right()]
    assert_whole(cache)


READ_ONLY = """
import ctypes

class Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

class Capabilities(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]

# Root may write anywhere, unless it gives that up: CAP_DAC_OVERRIDE is 1.
libc, header, held = ctypes.CDLL(None), Header(0x20080522, 0), (Capabilities * 2)()
libc.capget(ctypes.byref(header), held)
held[0].effective &= ~(1 << 1)
libc.capset(ctypes.byref(header), held)
try:
    open(os.path.join(os.environ["CUPY_CACHE_DIR"], "probe"), "w").close()
    sys.exit("the folder can be written")
except PermissionError:
    pass
print(digest())
for _ in range(2):
    try:
        digest([224])
    except GPUUnavailableError as error:
        print(error)
print(digest())
print(digest([224], np.asarray))
"""


def test_a_cache_that_cannot_be_written_is_read(tmp_path, right):
    cache = tmp_path / "cache"
    code = f"{RESULT}\nprint(digest())"
    assert run(code, CUPY_CACHE_DIR=str(cache)) == [right()]
    cache.chmod(0o555)
    try:
        first, error, again, second, on_host = run(RESULT + READ_ONLY, CUPY_CACHE_DIR=str(cache))
    finally:
        cache.chmod(0o755)
    assert first == second == right()
    for told in (error, again):
        assert told.startswith(f"the kernel cache {cache} cannot be written (")
        assert told.endswith("needs: CUPY_CACHE_DIR set to a writeable folder")
    assert on_host == right([224], np.asarray)
    assert_whole(cache)


FORK = """
import torch

norm = HeadNorm(np.ones(64, np.float32))
qk = QKNorm(norm, norm)
x = cupy.asarray(values(64))
tensor = torch.from_numpy(values(64)).cuda()
part = tensor[..., :40]  # torch asks for the device when it slices

calls = {
    "cupy": lambda: norm(x),
    "cupy in place": lambda: norm(x, out=x),
    "cupy, a new norm": lambda: HeadNorm(np.ones(64, np.float32))(x),
    "cupy, a new kernel": lambda: rms_norm(x[..., :40], out=x[..., :40]),
    "qk": lambda: qk(x, x),
    "torch in place": lambda: norm(tensor, out=tensor),
    "torch, a new kernel": lambda: rms_norm(part, out=part),
}
for name, call in calls.items():
    if "new" not in name:
        call(), call()
cupy.cuda.runtime.deviceSynchronize()

def in_child(work):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            with os.fdopen(writer, "w") as file:
                json.dump(work(), file)
        finally:
            os._exit(0)
    os.close(writer)
    for _ in range(300):
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hung"
    with os.fdopen(reader) as file:
        return json.loads(file.read() or '"died"')

def on_gpu():
    found = {}
    for _ in range(2):
        for name, call in calls.items():
            try:
                call()
                found[name] = "no error"
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    found["host"] = digest(array=np.asarray)
    return found

before = digest()
print(json.dumps(in_child(lambda: digest(array=np.asarray))))
print(json.dumps(in_child(on_gpu)))
for call in calls.values():
    call()
print(json.dumps([before, digest()]))
"""


def test_a_forked_child_is_told_and_its_parent_unhurt(right):
    """CUDA does not survive a fork."""
    of_host, of_gpu, of_parent = map(json.loads, run(RESULT + FORK))
    on_host = right(array=np.asarray)
    assert of_host == on_host
    assert of_gpu.pop("host") == on_host
    assert len(of_gpu) == 7
    for name, told in of_gpu.items():
        assert told.startswith("GPUUnavailableError: CUDA was used before this process was"), name
        assert "spawn" in told
    assert of_parent == [right()] * 2


def test_spawned_workers(rng):
    weight, values = rng.standard_normal(DIM).astype(np.float32), normal(rng)
    norm = HeadNorm(weight)
    xs = [cupy.asarray(part) for part in np.split(values, 4)]
    norm(xs[0])  # this process has loaded what they must load again
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(norm, xs))
    for y, part in zip(found, np.split(values, 4), strict=True):
        assert isinstance(y, cupy.ndarray)
        assert_alike(y.get(), reference.rms_norm(part, weight))


LEAVING = {
    "cupy": """
stream = cupy.cuda.Stream(non_blocking=True)
x = cupy.asarray(values(64))
with stream:
    norm(x), qk(x, x)
    stream.synchronize()
    spin(stream)
    y = norm(x), norm(x, out=x), qk(x, x)
print(stream.done)
""",
    "torch": """
import torch
from types import SimpleNamespace
stream = torch.cuda.Stream()
x = torch.from_numpy(values(64)).cuda()
torch.cuda.synchronize()
with torch.cuda.stream(stream):
    norm(x), qk(x, x)
    stream.synchronize()
    spin(SimpleNamespace(ptr=stream.cuda_stream))
    y = norm(x), norm(x, out=x), qk(x, x)
print(stream.query())
""",
    "DLPack": """
class Another:
    def __init__(self, array):
        self.array = array
    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)
    def __dlpack_device__(self):
        return self.array.__dlpack_device__()
    def __array_namespace__(self):
        return cupy
stream = cupy.cuda.Stream(non_blocking=True)
x = Another(cupy.asarray(values(64)))
with stream:
    norm(x), qk(x, x)
    stream.synchronize()
    spin(stream)
    y = norm(x), qk(x, x)
print(stream.done)
""",
}


@pytest.mark.parametrize("producer", LEAVING)
def test_leaving_with_work_in_flight(producer):
    norms = "norm = HeadNorm(np.ones(64, np.float32))\nqk = QKNorm(norm, norm)\n"
    assert run(RESULT + SPIN + norms + LEAVING[producer]) == ["False"]


ANOTHER_MAKES = """
def another_makes():
    if not once._making.acquire(blocking=False):
        return True
    once._making.release()
    return False
"""

INTERRUPTS = 14
INTERRUPT = f"""
signal.signal(signal.SIGINT, signal.default_int_handler)
struck = []
for n in range({INTERRUPTS}):
    head_dim = 200 + 8 * n
    before = len(compiler._functions)

    def strike():
        while not another_makes():
            time.sleep(1e-4)
        time.sleep(0.01 * n)
        os.kill(os.getpid(), signal.SIGINT)

    striking = threading.Thread(target=strike)
    striking.start()
    try:
        digest([head_dim])
        striking.join()
        time.sleep(0.1)
    except KeyboardInterrupt:
        pass
    striking.join()
    struck.append(len(compiler._functions) == before)
    asked = []
    asking = threading.Thread(target=lambda: asked.append(another_makes()))
    asking.start()
    asking.join()
    assert asked == [False]
    print(digest([head_dim]))
print(sum(struck))
"""


def test_a_compile_that_is_interrupted_is_done_again(tmp_path, right):
    # One that strikes a finalizer is reported and lost.
    *found, struck = run(
        RESULT + ANOTHER_MAKES + INTERRUPT,
        may_complain=True,
        CUPY_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert found == [right([200 + 8 * n]) for n in range(INTERRUPTS)]
    assert int(struck) > 1, "the others were too late to interrupt anything"


HANDLERS = """
signal.alarm(100)  # ends it if it waits for itself
found, struck = [], 0
for n in range(8):
    head_dim = 1000 + 8 * n
    inside = head_dim if n % 2 else head_dim + 200

    def handler(*_):
        global struck
        struck += head_dim not in {key[0].head_dim for key in compiler._functions}
        found.append([inside, digest([inside])])

    def strike():
        while not another_makes():
            time.sleep(1e-4)
        time.sleep(0.01 * n)
        os.kill(os.getpid(), signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, handler)
    striking = threading.Thread(target=strike)
    striking.start()
    found.append([head_dim, digest([head_dim])])
    striking.join()
    time.sleep(0.1)
    found += [[dim, digest([dim])] for dim in (head_dim, inside)]
print(json.dumps(found))
print(struck)
"""


def test_a_handler_calls_while_its_thread_compiles(tmp_path, right):
    """The kernel that is being compiled, and another one; both are used again afterwards."""
    found, struck = run(RESULT + ANOTHER_MAKES + HANDLERS, CUPY_CACHE_DIR=str(tmp_path / "cache"))
    found = json.loads(found)
    assert len(found) == 8 * 4
    for head_dim, bits in found:
        assert bits == right([head_dim])
    assert int(struck) > 1, "the others were too late to find a compile"
