"""Every head norm of a model, each read when it is first asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from cupy_headnorm._described import Source
from cupy_headnorm._rules import options
from cupy_headnorm._sources import of_model
from cupy_headnorm.checkpoint import CheckpointError
from cupy_headnorm.checkpoint import survey as checkpoint_survey
from cupy_headnorm.checkpoint.norms import ModelNorm, Refused, supported
from cupy_headnorm.headnorm import HeadNorm, built
from cupy_headnorm.rope import Rope, config


class HeadNorms(Mapping[tuple[int, str], HeadNorm]):
    """
    A model's head norms by layer and role: ``norms[0, "q"]``; build one with `head_norms`.

    Getting a norm reads its tensors, once; nothing else does. Looking for one, counting and
    iterating over keys read nothing. A norm that is not supported is no key: getting it raises
    `CheckpointError` with the reason.
    """

    def __init__(self, folder: str, variant: str | None = None) -> None:
        survey = checkpoint_survey.survey(folder, variant=variant)
        self.config = survey.config
        """What config.json holds."""
        self._where, self._found = survey.where, survey.found
        self._folder = folder
        self._variant = variant
        self._keyed = self._found.keyed()
        self._served = {k: norm for k, norm in self._keyed.items() if isinstance(norm, ModelNorm)}
        self._loaded: dict[tuple[int, str], HeadNorm] = {}

    @property
    def model_type(self) -> str:
        """What config.json calls the model."""
        return self._found.model_type

    @property
    def described(self) -> Mapping[tuple[int, str], ModelNorm]:
        """What the model computes, and where its tensors lie, by layer and role."""
        return MappingProxyType(self._served)

    @property
    def refused(self) -> tuple[Refused, ...]:
        """Norms that are not supported, and tensors that look like norms, with the reasons."""
        return self._found.refused

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing: what config.json alone decides, or contradicts."""
        own = (note for norm in self._found.norms for note in norm.notes)
        return tuple(dict.fromkeys((*self._found.notes, *own)))

    def __getitem__(self, key: tuple[int, str]) -> HeadNorm:
        norm = self._loaded.get(key)
        if norm is None:
            if key not in self._keyed:
                raise KeyError(f"{key!r}; needs (layer, role), such as {self._examples()}")
            described = supported(self._keyed[key])
            weight, bias = checkpoint_survey.load(self._where, described)
            source = Source("from_pretrained", self._folder, described.name, {}, self._variant)
            made = built(of_model(described, weight, bias, source))
            # Another thread may have been faster: all shall hold one norm.
            norm = self._loaded.setdefault(key, made)
        return norm

    def _examples(self) -> str:
        return " or ".join(map(repr, list(self._keyed)[:2])) or "none: the model has no head norm"

    def __contains__(self, key: object) -> bool:
        return key in self._served

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    def __repr__(self) -> str:
        return f"<{len(self)} head norms of {self.model_type} in {self._folder!r}>"


def head_norms(model_dir: str | os.PathLike[str], *, variant: str | None = None) -> HeadNorms:
    """
    Find every head norm of a model, with the model's own arithmetic.

    Parameters
    ----------
    model_dir : path-like
        A folder with config.json and safetensors files, as `save_pretrained` writes it.
    variant : str, optional
        Part of the files' names, such as ``"fp16"``.

    Returns
    -------
    HeadNorms
        A mapping of ``(layer, role)`` to `HeadNorm`; roles are ``"q"``, ``"k"``, ``"v"``, ..., and
        ``"vision_q"`` and the like of other towers than the text's, where there are several.

    Raises
    ------
    CheckpointError
        The folder cannot be read, its tensors contradict its config.json, or nothing is known of
        the model and it has tensors that look like head norms; the message says what was found.
    """
    return HeadNorms(os.fspath(model_dir), variant)


def of_layer(
    model_dir: str | os.PathLike[str],
    layer: int,
    variant: str | None = None,
    max_position: int | None = None,
) -> tuple[list[HeadNorm], Rope | None]:
    """Return the norms of q, k and, if there is one, v of a layer, and its rotary embedding."""
    norms = head_norms(model_dir, variant=variant)
    layer = options.integer(layer, "layer")
    for name in "qk":
        try:
            norms[layer, name]
        except KeyError:
            raise CheckpointError(
                f"{model_dir} has no norm of {name} in layer {layer}; needs one of its keys, "
                f"{', '.join(map(str, list(norms)[:4])) or 'of which there are none'}"
            ) from None
    found = [norms[layer, name] for name in "qkv" if (layer, name) in norms]
    described = norms.described[layer, "q"]
    if described.rope.order == "none" or not config.rotates(norms.config, layer):
        return found, None
    rope = Rope.from_config(
        norms.config, layer, head_dim=described.head_dim, max_position=max_position
    )
    return found, rope
