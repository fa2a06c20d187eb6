"""The registry: what is known of models, one row a family, as data."""

from __future__ import annotations

from collections.abc import Mapping

from cupy_headnorm.models.diffusion import DIFFUSION
from cupy_headnorm.models.full_width import FULL_WIDTH, LOW_RANK, OTHERS
from cupy_headnorm.models.heads import HEADS
from cupy_headnorm.models.records import Family
from cupy_headnorm.models.towers import VISION_AND_AUDIO

FAMILIES = (*HEADS, *FULL_WIDTH, *LOW_RANK, *OTHERS, *VISION_AND_AUDIO, *DIFFUSION)

BY_MODEL_TYPE: Mapping[str, Family] = {
    name: family for family in FAMILIES for name in family.model_types
}
