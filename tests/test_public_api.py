"""The public names, and what their docstrings must say."""

import inspect
from importlib.metadata import version

import pytest

import cupy_headnorm

NAMES = [
    "CaptureError",
    "CheckpointError",
    "GPUUnavailableError",
    "HeadNorm",
    "LaunchConfig",
    "QKNorm",
    "Rope",
    "__version__",
    "environment",
    "head_norms",
    "layer_norm",
    "reference",
    "rms_norm",
]


def test_all_is_sorted_and_what_we_mean_to_promise():
    assert cupy_headnorm.__all__ == NAMES
    for name in NAMES:
        assert hasattr(cupy_headnorm, name)


def test_version_is_one():
    try:
        installed = version("cupy-headnorm")
    except Exception:
        pytest.skip("not installed: run from a bare checkout")
    assert cupy_headnorm.__version__ == installed


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("__version__", "reference")])
def test_public_names_are_documented(name):
    public = getattr(cupy_headnorm, name)
    assert inspect.getdoc(public)
    if inspect.isclass(public):
        for member, value in vars(public).items():
            if not member.startswith("_") and (callable(value) or isinstance(value, property)):
                assert inspect.getdoc(value), f"{name}.{member}"


@pytest.mark.parametrize("function", [cupy_headnorm.rms_norm, cupy_headnorm.HeadNorm])
def test_docstrings_name_every_parameter(function):
    documented = inspect.getdoc(function)
    parameters = inspect.signature(function).parameters
    section = documented.split("Parameters\n")[1].split("\nRaises")[0]
    for name in parameters:
        assert name in section
