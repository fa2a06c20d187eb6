"""
What users build on: names, signatures, the command line, held against ``public_api.txt``.

A change that is meant is written there by ``python tests/faces/test_public_api.py``, and reviewed
as what it is: a promise kept or broken.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import pickle
import re
import textwrap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

import cupy_headnorm
from cupy_headnorm import cli

SNAPSHOT = Path(__file__).parents[1] / "public_api.txt"
MODULES = {
    "cupy_headnorm": cupy_headnorm.__all__,
    "cupy_headnorm.ops": ("launch",),
    "cupy_headnorm.reference": ("layer_norm", "rms_norm"),
    "cupy_headnorm.checkpoint": ("read_norm",),
    "cupy_headnorm.pretrained": ("HeadNorms",),
    "cupy_headnorm.rope": ("apply",),
    "cupy_headnorm.integrations.transformers": ("SwappedNorms", "use_head_norms"),
    "cupy_headnorm._cuda.environment": ("Environment",),  # what `environment` returns
}
"""By module, each name once."""
SPECIAL = ("__call__", "__enter__", "__exit__", "__getitem__", "__iter__", "__len__")
COMMAND = "python -m cupy_headnorm"


class _Text:
    """An annotation that `inspect` prints without quotes, alike in all versions of Python."""

    def __init__(self, annotation: Any) -> None:
        text = getattr(annotation, "__forward_arg__", annotation)
        self.text = text if isinstance(text, str) else getattr(text, "__name__", repr(text))

    def __repr__(self) -> str:
        return self.text


def _signature(function: Any, *, returns: bool = True) -> str:
    found, empty = inspect.signature(function), inspect.Signature.empty
    parameters = [
        p if p.annotation is empty else p.replace(annotation=_Text(p.annotation))
        for p in found.parameters.values()
    ]
    result = _Text(found.return_annotation) if returns else empty
    return str(found.replace(parameters=parameters, return_annotation=result))


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "cupy_headnorm"


def _set_by_init(kind: type) -> set[str]:
    """Return the attributes that a class's constructor gives its instances."""
    own = vars(kind).get("__init__")
    if not inspect.isfunction(own) or own.__code__.co_filename == "<string>":  # a dataclass's
        return set()
    return {
        node.attr
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(own))))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and getattr(node.value, "id", "") == "self"
    }


def _described_class(name: str, kind: type) -> Iterator[str]:
    ours = [base for base in kind.__mro__ if _is_ours(base)]
    bases = ", ".join(base.__name__ for base in kind.__bases__ if _is_public(base))
    makes = any({"__init__", "__new__"} & vars(base).keys() for base in ours)
    yield f"class {name}{f'({bases})' if bases else ''}"
    if makes:
        yield f"    {name}{_signature(kind, returns=False)}"
    members = {member: value for base in reversed(ours) for member, value in vars(base).items()}
    fields = set().union(*(_set_by_init(base) for base in ours))
    for member in sorted(members | dict.fromkeys(fields)):
        if member.startswith("_") and member not in SPECIAL:
            continue
        value = members.get(member)
        if isinstance(value, property):
            yield f"    {member}: {_Text(inspect.signature(value.fget).return_annotation)}"
        elif isinstance(value, classmethod):
            yield f"    classmethod {member}{_signature(getattr(kind, member))}"
        elif callable(value):
            yield f"    {member}{_signature(value)}"
        else:
            yield f"    {member}"


def _is_public(base):
    """Tell whether users know a class's base; of another they see what it gives the class."""
    return base is not object and "._" not in base.__module__


def _described(module: str) -> Iterator[str]:
    yield f"# {module}"
    for name in MODULES[module]:
        value = getattr(importlib.import_module(module), name)
        if inspect.isclass(value):
            yield from _described_class(name, value)
        elif callable(value):
            yield f"{name}{_signature(value)}"
        else:
            yield f"{name}: {type(value).__name__}"


def _described_parser(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    yield f"# {name}"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                yield ""
                yield from _described_parser(below, f"{name} {command}")
            continue
        words = [", ".join(action.option_strings) or action.dest]
        words += [] if action.nargs is None else [f"nargs={action.nargs}"]
        words += [] if action.choices is None else [f"{{{','.join(map(str, action.choices))}}}"]
        words += [] if action.default in (None, argparse.SUPPRESS) else [f"= {action.default}"]
        words += ["required"] if action.required else []
        yield " ".join(words)


def described() -> dict[str, str]:
    """Return what there is today, by the heading of its part of the snapshot."""
    parts = ["\n".join(_described(module)) for module in MODULES]
    parts += "\n".join(_described_parser(cli._parser(), COMMAND)).split("\n\n")
    return {part.partition("\n")[0]: part for part in parts}


def test_nothing_public_has_changed():
    pytest.importorskip("torch")
    ours = described()
    promised = {part.partition("\n")[0]: part for part in SNAPSHOT.read_text().split("\n\n")}
    assert ours.keys() == promised.keys()
    for heading, part in ours.items():
        assert part.split("\n") == promised[heading].rstrip("\n").split("\n"), (
            f"{heading} has changed; if that is meant: python tests/faces/test_public_api.py"
        )


def test_all_is_sorted_and_all_there():
    assert cupy_headnorm.__all__ == sorted(cupy_headnorm.__all__)
    assert set(cupy_headnorm.__all__) <= set(dir(cupy_headnorm))
    for name in cupy_headnorm.__all__:
        assert hasattr(cupy_headnorm, name)
    assert not hasattr(cupy_headnorm, "rms_nrom")


def test_dir_lists_public_names_alone():
    others = {"__version__", *cupy_headnorm.__all__, "checkpoint"}
    assert set(dir(cupy_headnorm)) == others


@pytest.mark.parametrize("name", ["CaptureError", "CheckpointError", "GPUUnavailableError"])
def test_errors_carry_their_public_name(name):
    error = getattr(cupy_headnorm, name)
    assert (error.__module__, error.__qualname__) == ("cupy_headnorm", name)
    assert pickle.loads(pickle.dumps(error("why"))).args == ("why",)


def test_version_is_one():
    try:
        installed = version("cupy-headnorm")
    except PackageNotFoundError:
        pytest.skip("not installed: run from a bare checkout")
    assert cupy_headnorm.__version__ == installed


@pytest.mark.parametrize(
    "name", [n for n in cupy_headnorm.__all__ if n not in ("__version__", "reference")]
)
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
        assert re.search(rf"^(\w+, )*{name}(, \w+)* :", section, re.M), name


if __name__ == "__main__":
    SNAPSHOT.write_text("\n\n".join(described().values()) + "\n", encoding="utf-8")
    print(f"written: {SNAPSHOT}")
