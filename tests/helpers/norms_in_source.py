"""
Norms of heads in a model's source: what its classes make beside queries, keys and values.

Nothing is imported or built, so that a model that no test can build is looked at too.
"""

import ast
import re
from typing import NamedTuple

_NORM = re.compile(r"norm(?!al_?$)|l2|clip$", re.I)
"""Classes that normalize: RMSNorm, LayerNormPerHead, L2Clip; no initial values."""
_NOT_OF_HEADS = re.compile(r"(group|batch)_?norm|pool", re.I)
"""Of an image's channels; AvgPool2d has l2 in its name."""
_FUNCTION = re.compile(r"(^|_)(l2_?norm|normalize|rms_?norm|layer_?norm|vector_norm|rsqrt)$")
_PART = re.compile(r"(^|_)(q|k|v|qk|kv|qkv|query|key|value)(_|$)")
_HEADS = re.compile(r"head|\bgroup_size|\bn_groups")


class SourceNorm(NamedTuple):
    """What may be a norm of heads."""

    within: str
    """Class or function."""
    name: str
    """Attribute, or the name of a function that is called."""
    configs: tuple[str, ...]
    """Config classes that the class is made of, as far as its signature says."""


def norms_in(source):
    """
    Yield what may be a norm of heads.

    A norm of a class is one by its attribute's name, ``q_norm``, by a width that speaks of heads,
    or because it has no width and its class has parts of an attention beside it. Of functions
    those count that are given such a part.
    """
    for definition in _definitions(ast.parse(source).body):
        if _NORM.search(definition.name):
            continue  # the norm itself
        nodes = list(ast.walk(definition))
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            if _FUNCTION.search(_called(call)) and not _of_self(call):
                words = re.findall(r"\w+", " ".join(map(ast.unparse, call.args[:1])))
                if any(map(_PART.search, words)):
                    yield SourceNorm(definition.name, f"{_called(call)}()", ())
        if isinstance(definition, ast.ClassDef):
            yield from _of_class(definition, nodes)


def _definitions(body):
    """Yield classes and functions, those of one branch too: xlstm's."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse])


def _of_class(definition, nodes):
    made = [
        (target.attr, node.value)
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute)
    ]
    attends = any(_PART.search(name) and not _NORM.search(name) for name, _ in made)
    configs = _configs(definition)
    for name, value in made:
        for call in (node for node in ast.walk(value) if isinstance(node, ast.Call)):
            called = _called(call)
            if not _NORM.search(called) or _NOT_OF_HEADS.search(called):
                continue
            widths = [ast.unparse(given) for given in call.args]
            widths += [
                f"{given.arg}={ast.unparse(given.value)}"
                for given in call.keywords
                if given.arg != "eps" and not isinstance(given.value, ast.Constant)
            ]
            widths = [width for width in widths if "eps" not in width]
            heads = any(map(_HEADS.search, widths)) or (attends and not widths)
            if _PART.search(name) or heads:
                yield SourceNorm(definition.name, name, configs)


def _configs(definition):
    for function in definition.body:
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            hints = [each.annotation for each in function.args.args if each.annotation]
            return tuple(re.findall(r"\w+Config\b", " ".join(map(ast.unparse, hints))))
    return ()


def _called(call):
    """Return the last name of what is called: ``LayerNorm`` of ``nn.LayerNorm``."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _of_self(call):
    return ast.unparse(call.func).startswith(("self.", "super()."))
