"""The registry: sound data, and names, shapes, eps and defaults of transformers' own classes."""

import contextlib
import fnmatch
import functools
import importlib
import inspect
import itertools
import pkgutil
from pathlib import Path

import pytest
from norms_in_source import norms_in

from cupy_headnorm._rules import options
from cupy_headnorm.models import BY_MODEL_TYPE, FAMILIES
from cupy_headnorm.models.records import Role

ROLES = [(family, role) for family in FAMILIES for role in family.roles]


def test_every_model_type_is_in_one_row():
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(types) == len(set(types)) == len(BY_MODEL_TYPE)
    assert all(BY_MODEL_TYPE[name].model_types.count(name) == 1 for name in types)


def test_rows_hold_known_words():
    for family in FAMILIES:
        assert family.roles
        assert family.tower in ("text", "vision", "audio", "transformer")
        assert family.rope.order in ("after norm", "before norm", "none")
        assert family.rope.style in ("half", "interleaved", "half flipped")
        assert 0 < family.rope.partial <= 1
    for family, role in ROLES:
        assert role.stems
        assert all(stem and not stem.startswith(".") and stem[-1] != "." for stem in role.stems)
        assert len(set(role.stems)) == len(role.stems)
        assert role.rounding in options.ROUNDINGS
        assert role.kind in options.DEFAULT_EPS
        assert role.weight in ("shared", "per head", "list", "flat", "full", "none")
        assert role.result in ("x", "promoted", "weight")
        assert role.heads_axis in (-2, -3)
        assert role.projection_factor in (1, 2)
        # A result of another dtype is rounded before the weight, or not at all.
        assert (role.result == "x") == (role.rounding in ("once", "rstd"))
        if role.weight == "none":
            assert not role.bias
            assert role.weight_offset == 0
            assert role.head_dim or role.layers or family.refused
        else:
            assert role.rounding != "rstd"
            assert not role.layers
        if isinstance(role.eps, float):
            assert 0 < role.eps < 1e-3


def test_a_name_in_a_family_means_one_thing():
    """Roles of one name differ in what their tensors show: stems, bias or shape."""
    for family in FAMILIES:
        seen = set()
        for role in family.roles:
            signs = {(role.name, stem, role.weight, role.bias) for stem in role.stems}
            assert not signs & seen, family.model_types
            seen |= signs


def test_what_is_refused_says_why():
    for family, role in ROLES:
        for reason in (family.refused, role.refused):
            assert reason == reason.strip()
            assert not reason.endswith(".")
            assert reason == "" or len(reason) > 20


# transformers' own classes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

LAYERS = {"num_hidden_layers": 4}
BUILT_WITH = {
    # Where the config class' own values, or 4 layers of them, build nothing.
    "chameleon": LAYERS | {"vocabulary_map": {"<image>": 1}},
    "diffusion_gemma_text": LAYERS
    | {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8},
    "dots1": LAYERS | {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1},
    "dots3_note_vision_encoder": {},
    "falcon_h1": LAYERS | {"mamba_rms_norm": True},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "hunyuan_v1_dense": LAYERS | {"head_dim": 64},
    "hunyuan_v1_moe": LAYERS | {"head_dim": 64},
    "hunyuan_vl_text": LAYERS | {"head_dim": 64},
    "idefics": LAYERS
    | {"qk_layer_norms": True, "use_resampler": True}
    | {"perceiver_config": {"qk_layer_norms_perceiver": True}},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": LAYERS | {"layer_types": ["full_attention", *["minimax_m3_sparse"] * 3]},
    "qwen3_omni_moe_talker_text": LAYERS | {"shared_expert_intermediate_size": 8},
    "qwen4_exp_text": LAYERS
    | {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256}
    | {"indexer_budget": 8, "indexer_compress_ratio": 4},
    "t5gemma2_text": LAYERS | {"dropout_rate": 0.0},
    "t5gemma2_decoder": LAYERS | {"dropout_rate": 0.0},
    "zamba2": {},
}
ATTENTIONS = {
    # Their patch embeddings need the package timm.
    "pe_video_encoder": "PeVideoEncoderAttention",
    "pe_audio_video_encoder": "PeAudioVideoEncoderAttention",
}


@functools.cache
def config_classes():
    """Return every config class of transformers by its model_type."""
    found = {}
    for package in pkgutil.iter_modules(transformers.models.__path__):
        name = f"transformers.models.{package.name}.configuration_{package.name}"
        if package.ispkg and importlib.util.find_spec(name):
            for each in vars(importlib.import_module(name)).values():
                if inspect.isclass(each) and issubclass(each, transformers.PreTrainedConfig):
                    found.setdefault(each.model_type, each)
    return found


EPS = 0.125
"""A value for the config's eps that no module has by itself."""

TYPES = [n for f in FAMILIES for n in f.model_types if f.tower != "transformer"]


def nested(kind):
    """Tell whether a config class holds others instead of fields of its own."""
    return bool(kind.sub_configs) and not hasattr(kind, "num_attention_heads")


def owner(kind):
    """Return the config class whose models a type has: its own, or another type's."""
    own = importlib.util.find_spec(kind.__module__.replace("configuration_", "modeling_"))
    return kind if own else transformers.MODEL_MAPPING[kind].config_class


@functools.cache
def built(model_type):
    """Return a config and a model of that type, on the meta device."""
    kind = config_classes()[model_type]
    own = owner(kind)
    module = importlib.import_module(own.__module__.replace("configuration_", "modeling_"))
    family = BY_MODEL_TYPE[model_type]
    eps = {role.eps: EPS for role in family.roles if role.eps in vars(kind)}
    flag = {family.flag: True} if family.flag in vars(kind) else {}
    config = kind(**(BUILT_WITH.get(model_type, LAYERS) | eps | flag))
    if model_type in ATTENTIONS:
        with torch.device("meta"):
            attention = getattr(module, ATTENTIONS[model_type])(config, 0)
        layer = torch.nn.ModuleDict({"self_attn": attention})
        return config, torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
    models = [
        each
        for each in vars(module).values()
        if inspect.isclass(each)
        and issubclass(each, transformers.PreTrainedModel)
        and each.config_class is own
        and not each.__name__.endswith("PreTrainedModel")
    ]
    reasons = []
    for each in sorted(models, key=lambda each: len(each.__name__)):
        try:
            with torch.device("meta"):
                model = each(config)
        except Exception as error:
            reasons.append(f"{each.__name__}: {type(error).__name__}: {str(error)[:200]}")
            continue
        return config, model
    raise AssertionError(f"{models} {reasons}")


def test_model_types_are_transformers_own():
    assert set(TYPES) <= set(config_classes())


def types_within(config):
    """Yield the model types of a config's dictionary, nested ones too."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from types_within(value)
        elif name == "model_type":
            yield value


@pytest.mark.parametrize("model_type", [n for n in TYPES if nested(config_classes()[n])])
def test_a_type_that_nests_others_is_in_the_row_of_one(model_type):
    family = BY_MODEL_TYPE[model_type]
    within = set(types_within(config_classes()[model_type]().to_dict())) - {model_type}
    assert family.refused or within & set(family.model_types)


ALONE = [name for name in TYPES if not nested(config_classes()[name])]


def modules_of(model, role):
    """Return the modules of a role by layer."""
    found = {}
    for name, module in model.named_modules():
        for stem in role.stems:
            layer = name.removesuffix(f".{stem}").rpartition(".")[2]
            if name.endswith(f".{stem}") and layer.isdecimal():
                found[int(layer)] = module
    return found


def head_dims(role, config):
    found = {getattr(config, rule, None) for rule in role.head_dim if rule != "hidden"} - {None}
    if "hidden" in role.head_dim:
        found.add(config.hidden_size // config.num_attention_heads)
    return found


def misfit(role, module, config):
    """Return what a module's tensors and eps contradict of a role."""
    tensors = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    dims, heads = head_dims(role, config), getattr(config, role.heads, None)
    kinds = ("weight", "bias") if role.bias else ("weight",)
    if role.weight == "none":
        needed = [{}]
    elif role.weight == "list":
        needed = [{f"norms.{h}.{k}": (d,) for h in range(heads) for k in kinds} for d in dims]
    elif role.weight == "per head":
        needed = [dict.fromkeys(kinds, (heads, d)) for d in dims]
    elif role.weight == "full":
        needed = [dict.fromkeys(kinds, (heads * d,)) for d in dims]
    elif not role.head_dim:
        needed = [{k: tensors.get("weight") for k in kinds}]
    else:
        needed = [dict.fromkeys(kinds, (d,)) for d in dims]
    if tensors not in needed:
        return f"{tensors} is not of {needed}"
    if role.weight == "flat" and tensors["weight"][0] % heads:
        return f"{tensors} is not of {heads} heads"
    inner = module.norms[0] if role.weight == "list" else module
    eps = getattr(inner, "variance_epsilon", getattr(inner, "eps", None))
    if eps != (EPS if isinstance(role.eps, str) else role.eps):
        return f"eps is {eps}, and {role.eps} is said"
    return ""


def served(model_type):
    family = BY_MODEL_TYPE[model_type]
    return [role for role in family.roles if not family.refused and not role.refused]


def named(fits=lambda role: True):
    """Parametrize over the served roles that fit, by model type and name."""
    found = dict.fromkeys(
        (each, role.name) for each in ALONE for role in served(each) if fits(role)
    )
    return pytest.mark.parametrize(("model_type", "name"), found, ids=map("-".join, found))


@named()
def test_a_models_own_module_has_the_rows_tensors_and_eps(model_type, name):
    config, model = built(model_type)
    roles = [role for role in served(model_type) if role.name == name]
    found = {role: modules_of(model, role) for role in roles}
    assert any(found.values()), f"no {name} in {type(model).__name__}"
    for modules in found.values():
        for layer, module in modules.items():
            reasons = [misfit(each, module, config) for each in roles if layer in found[each]]
            assert "" in reasons, reasons


@named(lambda role: role.projection)
def test_a_projection_has_a_row_for_each_element_of_each_head(model_type, name):
    config, model = built(model_type)
    for role in (role for role in served(model_type) if role.name == name and role.projection):
        for layer, module in modules_of(model, role).items():
            projection = modules_of(model, Role("", (role.projection,))).get(layer)
            assert projection is not None, role.projection
            dims = {tuple(p.shape)[-1] for p in module.parameters()} or head_dims(role, config)
            (dim,) = dims if role.weight != "full" else {1}
            heads, rest = divmod(projection.weight.shape[0], dim * role.projection_factor)
            assert rest == 0
            if role.heads and role.weight != "full":
                assert heads == getattr(config, role.heads)


WANT_MORE = {
    # Tokens alone do not reach their norms.
    "dots3_note_vision_encoder", "gemma4_vision", "glm5_next_vision", "glm_ocr_vision", "idefics",
    "inkling_text", "internvl_vision", "janus_vision_model", "lfm3_vl_vision", "mllama_text_model",
    "muse_glimmer_assistant", "nemotron3_5_transcribe_asr_audio",
    "nemotron3_5_transcribe_word_timestamp", "pe_audio_encoder", "qianfan_ocr_vision", "sapiens2",
    "step3p5", "t5gemma2_decoder", "timesfm2_5", "hunyuan_vl_text", *ATTENTIONS,
}  # fmt: skip
RUN = sorted({name for name in ALONE if served(name)} - WANT_MORE)


@pytest.mark.parametrize("model_type", RUN)
def test_a_model_gives_its_norms_heads_on_the_said_axis(model_type):
    config, model = built(model_type)
    model = model.to(torch.bfloat16)
    model.config._attn_implementation = "eager"
    batch, tokens = 3, 7
    shapes, hooks = {}, []
    for role in served(model_type):
        for module in modules_of(model, role).values():
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, inputs, role=role: shapes.setdefault(role, set()).add(inputs[0].shape)
                )
            )
    ids = torch.ones(batch, tokens, dtype=torch.long, device="meta")
    # The meta device takes few models to their end; the norms of the first layers come first.
    embeds = torch.ones(batch, tokens, config.hidden_size, dtype=torch.bfloat16, device="meta")
    calls = ({"input_ids": ids}, {"input_ids": ids, "use_cache": False}, {"inputs_embeds": embeds})
    for inputs in itertools.takewhile(lambda _: len(shapes) < len(served(model_type)), calls):
        with (
            contextlib.suppress(RuntimeError, TypeError, ValueError, AttributeError),
            torch.no_grad(),
            torch.device("meta"),
        ):
            model(**inputs)
    for hook in hooks:
        hook.remove()
    assert shapes
    for role, found in shapes.items():
        if role.weight == "full" or (not role.heads and all(len(shape) == 3 for shape in found)):
            assert all(shape[0] == batch for shape in found)  # No axis of heads.
            continue
        for shape in found:
            assert shape[{-2: -3, -3: -2}[role.heads_axis]] in (tokens, batch * tokens)
        heads = {shape[role.heads_axis] for shape in found}
        assert not heads & {tokens, batch}
        # One module may serve q and k.
        assert getattr(config, role.heads, max(heads)) in heads


@named(lambda role: role.weight == "none")
def test_layers_without_a_tensor_are_said_by_the_config(model_type, name):
    config, model = built(model_type)
    for role in served(model_type):
        if role.name != name or role.weight != "none":
            continue
        layers = set(range(config.num_hidden_layers))
        if role.layers.startswith("role:"):
            other = role.layers.removeprefix("role:")
            (beside,) = (each for each in served(model_type) if each.name == other)
            layers = set(modules_of(model, beside))
        elif role.layers:
            layers = {i for i in layers if getattr(config, role.layers)[i]}
        assert set(modules_of(model, role)) == layers


def refused_names():
    for name in ALONE:
        for role in BY_MODEL_TYPE[name].roles:
            if role not in served(name):
                yield name, role.name


@pytest.mark.parametrize("model_type", sorted({name for name, _ in refused_names()}))
def test_what_is_refused_is_there(model_type):
    _, model = built(model_type)
    refused = [role for role in BY_MODEL_TYPE[model_type].roles if role not in served(model_type)]
    found = {role: modules_of(model, role) for role in refused}
    assert any(found.values())
    for role, modules in found.items():
        for module in modules.values():
            if role.weight != "none":
                assert role.tensor in dict(module.named_parameters())


@pytest.mark.parametrize("model_type", ALONE)
def test_defaults_are_the_config_class_own(model_type):
    family, kind = BY_MODEL_TYPE[model_type], config_classes()[model_type]
    fields = {family.flag} if family.flag else set()
    for role in served(model_type):
        fields |= {role.eps} if isinstance(role.eps, str) else set()
        fields |= {role.heads, *role.head_dim}
        if "hidden" in role.head_dim and not vars(kind).get("head_dim"):
            fields |= {"hidden_size", "num_attention_heads"}
    own = {name: vars(kind)[name] for name in fields if vars(kind).get(name) is not None}
    said = {name: value for name, value in family.defaults.items() if name in fields}
    assert said == own


# What transformers has, and the registry may lack

REVIEWED = {
    "of hidden states, before there are heads": (
        "aria.AriaCrossAttention.layer_norm_kv",
        "inkling2.Inkling2FullDecoderLayer.[qkv]_input_layernorm",
        "inkling2_loop.Inkling2LoopFull*DecoderLayer.[qkv]_input_layernorm",
        "mistral_large4.MistralLarge4TextIndexer.q_input_norm",
    ),
    "of a picture's patches, before they are merged": (
        "*.*PatchMerger.ln_q",
        "dots3_note.Dots3NoteVisionMerger.ln_q",
    ),
    "of residual streams and of embeddings a layer": (
        "qwen4_exp.Qwen4ExpTextGatedResidual.hc_norm",
        "qwen4_exp.Qwen4ExpTextPLELayer.norm_*",
    ),
    "by length instead of a mean square, without a tensor, inside of linear attention": (
        "*.*_gated_delta_rule.l2norm()",
        "*.*_kimi_delta_attention.l2norm()",
    ),
    "by length instead of a mean square, without a tensor": (
        "neomme.NeoMMEExclusiveSelfAttention.normalize()",
        "swiftformer.SwiftFormerEfficientAdditiveAttention.normalize()",
        "swin2sr.Swin2SRSelfAttention.normalize()",
        "swinv2.Swinv2SelfAttention.normalize()",
        "yoso.YosoSelfAttention.normalize()",
    ),
    "by length, without a tensor: the row refuses it where the scale of q is": (
        "dory.DoryAttention.[qk]_norm",
        "dory.DoryAttention.attn_sub_norm",
    ),
}
"""What looks like a norm of heads in transformers' source and needs no row, and why."""
NO_MODELS = ("configuration", "convert", "feature", "image", "modular", "processing", "tokeniz")


@functools.cache
def source_norms():
    """Return what may be a norm of heads, by the package of transformers.models."""
    found = {}
    for path in sorted(Path(transformers.models.__path__[0]).glob("*/*.py")):
        if not path.name.startswith(NO_MODELS):
            norms = found.setdefault(path.parent.name, {})
            norms.update(dict.fromkeys(norms_in(path.read_text(encoding="utf-8"))))
    return found


@functools.cache
def homes():
    """Return the package that has a type's models; of types without models none."""
    found = {}
    for name, kind in config_classes().items():
        with contextlib.suppress(KeyError):
            found[name] = owner(kind).__module__.split(".")[-2]
    return found


def reviewed(package, norm):
    """Return the patterns of what was looked at that fit."""
    name = f"{package}.{norm.within}.{norm.name}"
    patterns = [pattern for patterns in REVIEWED.values() for pattern in patterns]
    return [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]


def lacking(norms_of, home_of, registry):
    """Yield what may be a norm of heads and is in no row, and types without a row of theirs."""
    classes = {kind.__name__: name for name, kind in config_classes().items() if name}
    for package, norms in norms_of.items():
        types = {name for name, home in home_of.items() if home == package}
        roles = [role for name in types & registry.keys() for role in registry[name].roles]
        stems = {stem.rpartition(".")[2] for role in roles for stem in role.stems}
        unreviewed = [norm for norm in norms if not reviewed(package, norm)]
        for norm in unreviewed:
            if norm.name not in stems:
                yield f"{package}.{norm.within}.{norm.name}"
        made_of = {classes[each] for norm in unreviewed for each in norm.configs if each in classes}
        borrowing = {n for n in types if config_classes()[n].__module__.split(".")[-2] != package}
        if unreviewed:
            yield from (made_of | borrowing) - registry.keys()


def test_no_norm_of_heads_is_in_no_row():
    """
    A new release's models are told here: give them a row, or what needs none a place in REVIEWED.
    """
    missing = sorted(set(lacking(source_norms(), homes(), BY_MODEL_TYPE)))
    assert not missing, "\n".join(missing)


def test_what_was_reviewed_is_there():
    found = {
        pattern
        for package, norms in source_norms().items()
        for norm in norms
        for pattern in reviewed(package, norm)
    }
    assert found == {pattern for patterns in REVIEWED.values() for pattern in patterns}


TOLD_BY_OTHERS = {
    # Of several types of one package, whose classes' signatures name no config.
    "nemotron3_5_transcribe_word_timestamp", "pe_audio_encoder", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_omni_moe_talker_code_predictor", "qwen3_omni_moe_talker_text", "qwen3_omni_moe_text",
    "t5gemma2_decoder",
    # Over the width of hidden states, by names that say nothing of heads; dory is reviewed.
    "bitnet", "blt_local_decoder", "blt_local_encoder", "dory",
}  # fmt: skip


def test_a_type_without_its_row_is_seen():
    for name in set(ALONE) - TOLD_BY_OTHERS:
        rest = {other: family for other, family in BY_MODEL_TYPE.items() if other != name}
        home = homes()[name]
        assert list(lacking({home: source_norms()[home]}, homes(), rest)), name
