"""Options, and the libraries that every test written against `library` runs on."""

import functools
import os
import warnings
from pathlib import Path

import alone
import numpy as np
import pytest
import sanitize
from libraries import CuPyLibrary, NumPyLibrary, StrictLibrary, TorchLibrary

import cupy_headnorm
from cupy_headnorm._arrays import dtypes

# The reason is asked for once: it cannot change while tests run.
GPU_REASON = cupy_headnorm.environment().reason
CONFIGURING = pytest.StashKey[warnings.catch_warnings]()


def pytest_addoption(parser):
    parser.addoption("--real", help="folder of a real checkpoint with activations.safetensors")
    parser.addoption(
        "--all-architectures", action="store_true", help="compile the kernels for every GPU"
    )
    parser.addoption("--cases", type=int, help="calls drawn on a GPU, of all tests together")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Let the asserts of helpers tell the values, as those of tests do."""
    pytest.register_assert_rewrite(
        "host_cases", "processes", "properties", "qk_cases", "stand_in", "untrusted", "tolerances"
    )
    config.pluginmanager.register(alone)
    # Whatever plugins are installed may warn while they are configured, as pytest-benchmark and
    # pytest-asyncio do: an error there would end the run. All others stay errors.
    config.stash[CONFIGURING] = warnings.catch_warnings()
    config.stash[CONFIGURING].__enter__()
    warnings.simplefilter("default")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    session.config.stash[CONFIGURING].__exit__()


def pytest_terminal_summary(terminalreporter):
    """Say how many calls were drawn."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    cases = sum(
        value
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "cases"
    )
    if cases:
        terminalreporter.write_line(f"{cases} drawn calls")


def pytest_collection_modifyitems(config, items):
    asked = "real_model" in config.getoption("markexpr")
    for item in items:
        if sanitize.is_selected(item.nodeid):
            item.add_marker(pytest.mark.sanitize)
        if item.get_closest_marker("real_model") and not asked:
            item.add_marker(pytest.mark.skip(reason="takes a model of 250 MB; needs make real"))
        if item.get_closest_marker("gpu") and GPU_REASON:
            item.add_marker(pytest.mark.skip(reason=GPU_REASON))


@pytest.fixture
def real(request):
    folder = request.config.getoption("--real")
    if folder is None:
        pytest.skip("needs --real DIR, a folder of real weights and activations")
    return Path(folder)


@pytest.fixture
def rng(request):
    """A generator seeded by the test's name, which the report shows."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture
def compiler():
    """Skip a test of kernels on the CPU where they cannot be compiled."""
    import host

    host.require()


LIBRARIES = [
    pytest.param(NumPyLibrary, id="numpy"),
    pytest.param(lambda: TorchLibrary("cpu"), id="torch-cpu"),
    pytest.param(CuPyLibrary, id="cupy", marks=pytest.mark.gpu),
    pytest.param(lambda: TorchLibrary("cuda"), id="torch-cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=LIBRARIES)
def library(request):
    """NumPy and torch on the host, CuPy and torch on the GPU."""
    return request.param()


@pytest.fixture(params=[*LIBRARIES, pytest.param(StrictLibrary, id="array-api-strict")])
def any_library(request):
    """`library`, and a producer that is known by nothing but DLPack."""
    return request.param()


@pytest.fixture(scope="session", autouse=True)
def _without_pools():
    """Give every array memory of its own under a memory checker: a pool hides overruns."""
    if os.environ.get("HEADNORM_NO_POOLS") and not GPU_REASON:
        import cupy

        cupy.cuda.set_allocator(None)


@pytest.fixture(params=dtypes.DTYPES, ids=lambda dtype: dtype.name)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """Keep torch to one thread: on such small tensors others would spin more than they work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return the tiny model of a family and dtype, made once."""
    import families

    folder = tmp_path_factory.mktemp("families")
    make = functools.cache(lambda name, dtype: families.tiny(name, dtype, folder))

    def made(name, dtype="bfloat16"):
        found = families.model_class(name)
        if isinstance(found, str):
            pytest.skip(found)
        return make(name, dtype)

    return made
