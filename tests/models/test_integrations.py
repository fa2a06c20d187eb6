"""Our norms inside of transformers models: the same logits and tokens, and no trace once undone."""

import copy
import gc
import importlib
import io
import pickle
import warnings
import weakref

import numpy as np
import pytest
from tolerances import FLIPS_FEW, mismatch

from cupy_headnorm.checkpoint import survey
from cupy_headnorm.integrations import forward as forward_module
from cupy_headnorm.integrations import transformers as transformers_module
from cupy_headnorm.integrations.transformers import use_head_norms

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import families  # noqa: E402  these import torch
import swaps  # noqa: E402
from swaps import norms  # noqa: E402

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
HIDDEN, HEADS, KV_HEADS, DIM, VOCABULARY = 64, 4, 2, 16, 97
PROMPT, TOKENS = 12, 16
OF_X = "x requires grad and grad mode is on; needs torch.no_grad()"
OFTEN = f"most often {OF_X}"
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# name: (config class, model class, arguments, norms that are swapped)
FAMILIES = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": DIM}, 4),
    "gemma3": (
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        {"head_dim": DIM, "query_pre_attn_scalar": DIM, "sliding_window": 8}, 4,
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"use_qk_norm": True}, 4),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {"qk_layernorm": True}, 4),
    "chameleon": (
        "ChameleonConfig", "ChameleonForConditionalGeneration",
        {
            "vocabulary_map": {"<image>": 96},
            "vq_config": {
                "embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 8,
                "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1,
            },
        },
        4,
    ),
    # The second layer has no rotary embedding, and so no norm; q and k share the module.
    "llama4": (
        "Llama4TextConfig", "Llama4ForCausalLM",
        {
            "head_dim": DIM, "intermediate_size_mlp": 96, "num_local_experts": 2,
            "no_rope_layers": [1, 0],
        },
        1,
    ),
}  # fmt: skip


def model_of(family, device="cpu", dtype="float32", **more):
    config_name, model_name, arguments, _ = FAMILIES[family]
    for name in (config_name, model_name):
        if not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**SIZES | arguments | more)
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += torch.randn(parameter.shape) * 0.5
    return model.to(getattr(torch, dtype)).to(device)


def prompt(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY - 1, (2, PROMPT), generator=generator).to(device)


def logits(model):
    return swaps.logits(model, prompt(model.device))


def rounding_of(model):
    return swaps.rounding_of(model, prompt(model.device))


def greedy(model):
    return model.generate(
        input_ids=prompt(model.device), max_new_tokens=TOKENS, min_new_tokens=TOKENS,
        do_sample=False,
    )  # fmt: skip


def norm_of(model):
    return norms(model)[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("every", [False, True])
def test_norms_that_peft_wraps_are_named(every):
    import peft

    kinds = ["q_norm", "k_norm"] if every else ["q_norm"]
    config = peft.LoraConfig(target_modules=["v_proj"], modules_to_save=kinds)
    model = peft.get_peft_model(model_of("qwen3"), config).eval()
    if every:
        with pytest.raises(ValueError, match="q_norm: PEFT's modules_to_save wraps it and trains"):
            use_head_norms(model)
    else:
        with torch.no_grad(), use_head_norms(model) as swapped:
            logits(model)
        assert (swapped.calls, swapped.fallbacks) == (2, {})
        assert [name.rpartition(".")[2] for name in swapped.refused] == ["q_norm"] * 2
        assert all("merge_and_unload()" in reason for reason in swapped.refused.values())
    merged = model.merge_and_unload()
    with torch.no_grad(), use_head_norms(merged) as swapped:
        logits(merged)
    assert (swapped.calls, swapped.refused) == (4, {})


def assert_plain(model):
    for module in model.modules():
        assert not vars(module).keys() & {*forward_module._METHODS}


def unanswered(reason=""):
    """Expect a block to end with no call of ours."""
    return pytest.warns(UserWarning, match=f"use_head_norms answered none of .*{reason}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_to_rounding(family, dtype, device):
    model = model_of(family, device, dtype)
    expected = logits(model)
    bound = rounding_of(model)
    keys = list(model.state_dict())
    with use_head_norms(model) as swapped:
        actual = logits(model)
        assert list(model.state_dict()) == keys
        assert len(swapped.norms) == FAMILIES[family][3]
        assert swapped.calls == (2 if family == "llama4" else 4)
        assert not swapped.fallbacks
        assert not swapped.refused
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= bound
    calls = swapped.calls
    assert torch.equal(logits(model), expected)
    assert swapped.calls == calls
    assert_plain(model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_inside_of_a_model_rounds_alike(family, dtype, device):
    """Of the first norm, which is given the same bits; later ones are given its flips."""
    model = model_of(family, device, dtype)
    results = []
    hook = norm_of(model).register_forward_hook(lambda module, given, y: results.append(y))
    logits(model)
    with use_head_norms(model):
        logits(model)
    hook.remove()
    expected, actual = (y.cpu().view(torch.int16).numpy() for y in results[:: len(results) // 2])
    assert mismatch(actual, expected) < FLIPS_FEW


def altered(monkeypatch, **changes):
    """Let the registry say something wrong."""
    find = survey.find

    def wrong(*arguments):
        found = find(*arguments)
        return found._replace(
            norms=tuple(
                norm._replace(**{field: change(norm) for field, change in changes.items()})
                for norm in found.norms
            )
        )

    monkeypatch.setattr(survey, "find", wrong)


NOT_SWAPPED = {
    "diffllama": "takes the outputs of two heads as one",
    "xlstm": "its own forward ",
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(family, tmp_path):
    if isinstance(found := families.model_class(family), str):
        pytest.skip(found)
    model, _, real = families.tiny(family, "float32", tmp_path)
    if family in NOT_SWAPPED:
        with pytest.raises(ValueError, match=NOT_SWAPPED[family]):
            use_head_norms(model)
        return
    with use_head_norms(model) as swapped, torch.no_grad():
        assert all("forward" in norm.module.__dict__ for norm in real.values())
        families.FAMILIES[family].run(model)
    assert swapped.calls >= len({norm.module for norm in real.values()}) - swapped.fallbacks.total()
    for reason in swapped.fallbacks:
        # Inkling's keys come out of a convolution with the tokens innermost.
        assert family == "inkling"
        assert reason.startswith("x has a stride of 44 bytes on its last axis")


def other_kind(norm):
    return {"rms": "layer", "layer": "rms"}[norm.kind]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_tells_a_wrong_norm(family, monkeypatch):
    altered(monkeypatch, kind=other_kind)
    monkeypatch.setattr(transformers_module, "check_agrees", lambda *_: None)
    model = model_of(family)
    expected = logits(model)
    bound = rounding_of(model)
    with use_head_norms(model):
        assert (logits(model) - expected).abs().max() > 10 * bound


WRONG = {
    "kind": other_kind,
    "eps": lambda norm: 2 * norm.eps,
    "weight_offset": lambda norm: 1 - norm.weight_offset,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("field", WRONG)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama4"])
def test_a_wrong_norm_is_not_swapped(family, field, dtype, monkeypatch):
    altered(monkeypatch, **{field: WRONG[field]})
    with pytest.raises(ValueError, match="q_(layer)?norm: its own forward and what .* differ by "):
        use_head_norms(model_of(family, dtype=dtype))


def test_a_module_whose_forward_fails_is_not_swapped(monkeypatch):
    def broken(self, x):
        raise RuntimeError("out of order")

    model = model_of("qwen3")
    monkeypatch.setattr(type(norm_of(model)), "forward", broken)
    with pytest.raises(
        ValueError, match=r"its own forward fails on x of shape .* \(out of order\)"
    ):
        use_head_norms(model)


def test_a_module_is_found_without_its_prefix():
    modules = dict.fromkeys(("a.layers.0.q_norm", "a.layers.0.k_norm", "b.layers.0.k_norm"))
    assert transformers_module._path("a.layers.0.k_norm", modules) == "a.layers.0.k_norm"
    assert transformers_module._path("layers.0.q_norm", modules) == "a.layers.0.q_norm"
    for name, number in (("layers.0.k_norm", 2), ("layers.1.k_norm", 0)):
        with pytest.raises(ValueError, match=f"the model has {number} modules {name}; needs one"):
            transformers_module._path(name, modules)


def test_a_patched_module_is_not_swapped(monkeypatch):
    model = model_of("qwen3")
    patched = type(norm_of(model))
    forward = patched.forward
    monkeypatch.setattr(patched, "forward", lambda self, x: 1.01 * forward(self, x))
    with pytest.raises(ValueError, match="its own forward and what rms with eps=1e-06 gives diff"):
        use_head_norms(model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_greedy_tokens(family, device):
    model = model_of(family, device)
    expected = greedy(model)
    assert expected.shape[1] == PROMPT + TOKENS
    with use_head_norms(model) as swapped:
        assert torch.equal(greedy(model), expected)
    assert swapped.calls == TOKENS * (2 if family == "llama4" else 4)
    assert not swapped.fallbacks


def test_norms_hold_what_the_model_has():
    model = model_of("stablelm")
    with use_head_norms(model) as swapped:
        name, norm = next(iter(swapped.norms.items()))
    assert name == "model.layers.0.self_attn.q_layernorm"
    weights = [model.get_parameter(f"{name}.norms.{h}.weight") for h in range(HEADS)]
    np.testing.assert_array_equal(norm.weight, torch.stack(weights).detach().numpy())
    assert (norm.kind, norm.eps, norm.num_heads, norm.head_dim) == ("layer", 1e-5, HEADS, DIM)


def test_a_part_of_a_model():
    model = model_of("qwen3")
    with use_head_norms(model.model) as swapped:
        logits(model)
    assert swapped.calls == 4


def test_shown():
    model = model_of("qwen3")
    swapped = use_head_norms(model)
    logits(model)
    assert repr(swapped) == "<SwappedNorms: 4 norms of qwen3, 4 calls, 0 fallbacks>"
    swapped.restore()
    assert repr(swapped) == "<SwappedNorms: 4 norms of qwen3, 4 calls, 0 fallbacks, restored>"


# What needs gradients


@pytest.mark.parametrize("device", DEVICES)
def test_training_runs_the_modules_own_forward(device):
    def gradients(model):
        model.zero_grad()
        ids = prompt(device)
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    # Other attentions add gradients up in any order on a GPU.
    model = model_of("qwen3", device, attn_implementation="eager")
    expected = gradients(model)
    with use_head_norms(model) as swapped:
        actual = gradients(model)
        assert swapped.calls == 0
        assert swapped.fallbacks == {OF_X: 4}
        logits(model)
        assert swapped.calls == 4
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert all(module.weight.grad.abs().max() > 0 for module in norms(model))


def test_weights_that_require_grad():
    module = norm_of(model := model_of("qwen3"))
    model.requires_grad_(False)
    x = torch.randn(1, 3, HEADS, DIM)
    with use_head_norms(model) as swapped:
        module(x)
        assert (swapped.calls, swapped.fallbacks.total()) == (1, 0)
        module.weight.requires_grad_(True)
        module(x).sum().backward()
        assert swapped.fallbacks == {OF_X.replace("x", "weight", 1): 1}
        assert module.weight.grad is not None
        with torch.inference_mode():
            module(x)
        assert swapped.calls == 2


# A block in which nothing came of it


def test_a_block_without_a_call_of_ours_says_why():
    model = model_of("qwen3")
    swapped = use_head_norms(model)
    with unanswered() as warned, swapped, swapped:  # one word for both
        model(input_ids=prompt())
    with swapped:  # which is over
        pass
    (only,) = warned
    assert str(only.message) == f"use_head_norms answered none of 4 calls of qwen3's norms; {OFTEN}"
    assert only.filename == __file__


def test_the_reason_is_one_that_was_kept():
    module = norm_of(model := model_of("llama4"))
    x = torch.randn(1, 3, HEADS, DIM, requires_grad=True)
    with unanswered(OFTEN), use_head_norms(model) as swapped:
        module(x)
        for length in range(DIM + 1, DIM + 40):
            module(torch.randn(2, length))
        module(x)
    assert swapped.fallbacks.most_common(2) == [("other reasons", 8), (OF_X, 2)]


def test_what_a_block_says_may_be_an_error():
    model = model_of("qwen3")
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(UserWarning, match="answered none of 4 calls"),
        use_head_norms(model),
    ):
        model(input_ids=prompt())
    assert_plain(model)


def test_a_block_that_says_nothing():
    """A filter of the tests makes an error of each warning."""
    model = model_of("qwen3")
    with use_head_norms(model):
        pass  # nobody called
    with use_head_norms(model) as swapped:
        model(input_ids=prompt())
        logits(model)  # one of two is enough
    assert (swapped.calls, swapped.fallbacks.total()) == (4, 4)

    def fail():
        with use_head_norms(model):
            model(input_ids=prompt())
            raise KeyError("of the user's")

    with pytest.raises(KeyError):  # which says enough
        fail()
    swapped = use_head_norms(model)
    model(input_ids=prompt())
    swapped.restore()


# Weights that change after the swap


def in_place(model):
    with torch.no_grad():
        for module in norms(model):
            module.weight.mul_(1.5)


def behind_autograds_back(model):
    for module in norms(model):
        module.weight.data.mul_(1.5)


def loaded(model, **options):
    state = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, **options)


def optimized(model):
    optimizer = torch.optim.SGD([module.weight for module in norms(model)], lr=1.0)
    ids = prompt(model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


CHANGES = {
    "in place": in_place,
    "behind autograd's back": behind_autograds_back,
    "load_state_dict": loaded,
    "load_state_dict, assigned": lambda model: loaded(model, assign=True),
    "an optimizer's step": optimized,
    "another dtype and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_counts(change, device):
    model = model_of("qwen3", device)
    with use_head_norms(model) as swapped:
        before = logits(model)
        CHANGES[change](model)
        calls = swapped.calls
        after = logits(model)
        assert swapped.calls == calls + 4
    expected = logits(model)
    bound = rounding_of(model)
    assert (after - expected).abs().max() <= bound
    assert (after - before).abs().max() > 10 * bound


# What our call refuses


def test_the_models_own_result_dtype():
    module = norm_of(model := model_of("qwen3", dtype="bfloat16"))
    module.to(torch.float32)
    x = torch.randn(1, 3, HEADS, DIM).to(torch.bfloat16)
    with torch.no_grad():
        expected = module(x)
        with unanswered(), use_head_norms(model) as swapped:
            actual = module(x)
    assert expected.dtype == actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert swapped.calls == 0
    assert [reason[:40] for reason in swapped.fallbacks] == [
        "x has dtype bfloat16 and the weight floa"
    ]


def test_autocast():
    model = model_of("stablelm")
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model)
        with unanswered("autocast is on"), use_head_norms(model) as swapped:
            assert torch.equal(logits(model), expected)
    assert swapped.fallbacks == {"autocast is on; needs a call outside of it": 4}


def traced(module, x):
    return torch.jit.trace(module, x, check_trace=False)(2 * x)


def symbolic(module, x):
    return torch.fx.symbolic_trace(torch.nn.Sequential(module))(2 * x)


def made(module, x):
    return importlib.import_module("torch.fx.experimental.proxy_tensor").make_fx(module)(x)(2 * x)


def exported(module, x):
    return torch.export.export(module, (x,), strict=False).module()(2 * x)


def vectorized(module, x):
    return torch.func.vmap(module)(2 * x)


def subclassed(module, x):
    kind = type("Special", (torch.Tensor,), {})
    return module((2 * x).as_subclass(kind)).as_subclass(torch.Tensor)


def strided(module, x):
    return module((2 * x).repeat_interleave(2, -1)[..., ::2])


def by_keyword(module, x):
    return module(hidden_states=2 * x)


@pytest.mark.parametrize(
    "call",
    [traced, symbolic, made, exported, vectorized, subclassed, strided, by_keyword],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_calls_go_to_the_module(call):
    model = model_of("qwen3").requires_grad_(False)
    module = norm_of(model)
    x = torch.randn(1, 3, HEADS, DIM)
    expected = module(2 * x)
    with unanswered(), use_head_norms(model) as swapped:
        torch.testing.assert_close(call(module, x), expected)
    assert swapped.calls == 0
    assert swapped.fallbacks.total() >= 1


def test_reasons_do_not_grow_without_bound():
    module = norm_of(model := model_of("llama4"))
    with unanswered(), use_head_norms(model) as swapped, torch.no_grad():
        for length in range(1, 101):
            if length != DIM:
                module(torch.randn(2, length))
    assert swapped.fallbacks.total() == 99
    assert len(swapped.fallbacks) == 33
    assert swapped.fallbacks["other reasons"] == 99 - 32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile():
    model = model_of("qwen3")
    expected = logits(model)
    with use_head_norms(model) as swapped:
        actual = logits(compiled := torch.compile(model, backend="eager"))
        calls = swapped.calls
        logits(compiled)
        assert (calls, swapped.calls) == (4, 8)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="needs torch.compile without full"):
            logits(torch.compile(model, backend="eager", fullgraph=True))
    assert (actual - expected).abs().max() <= rounding_of(model)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [True, False])
def test_a_captured_graph(warm):
    module = norm_of(model := model_of("qwen3", "cuda", "bfloat16"))
    x = torch.randn(2, 5, HEADS, DIM, device="cuda").to(torch.bfloat16)
    with torch.no_grad(), use_head_norms(model) as swapped:
        module(x if warm else x[:, :1].contiguous())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = module(x)
        x.mul_(2)
        graph.replay()
        torch.cuda.synchronize()
    assert swapped.calls + swapped.fallbacks.total() == 2
    with torch.no_grad():
        torch.testing.assert_close(result, module(x))


# Swaps that cannot be, and their end


def test_nothing_to_swap():
    sizes = SIZES | {"num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with pytest.raises(ValueError, match="llama"):
        use_head_norms(model)
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes))
    with pytest.raises(ValueError, match="olmo2 .*q_norm: "):
        use_head_norms(model)
    with pytest.raises(TypeError, match="model is a Linear; needs a transformers model"):
        use_head_norms(torch.nn.Linear(2, 2))


def test_twice():
    model = model_of("qwen3")
    with use_head_norms(model) as swapped:
        for part in (model, model.model):
            with pytest.raises(ValueError, match="q_norm is swapped already; needs restore"):
                use_head_norms(part)
        logits(model)
        assert swapped.calls == 4  # the refused one left it as it was
    with use_head_norms(model) as again:
        swapped.restore()  # of a swap that is over: leaves the new one
        logits(model)
    assert (swapped.calls, again.calls) == (4, 4)


def test_restored_after_an_error():
    model = model_of("qwen3")

    def fail():
        with use_head_norms(model):
            raise KeyError("of the user's")

    with pytest.raises(KeyError):
        fail()
    assert_plain(model)


def test_the_swap_does_not_hang_on_the_handle():
    model = model_of("qwen3")
    use_head_norms(model)
    gc.collect()
    assert "forward" in norm_of(model).__dict__


def test_a_forward_that_somebody_put_there_before():
    model = model_of("qwen3")
    module = norm_of(model)
    module.forward = forward = lambda x: 2 * x
    with use_head_norms(model) as swapped:
        logits(model)
        assert (len(swapped.norms), swapped.calls) == (3, 3)
        assert swapped.refused == {
            "model.layers.0.self_attn.q_norm": (
                "its forward is a function put on the instance; needs that of its class"
            )
        }
    assert module.forward is forward


@pytest.mark.parametrize("name", ["__getstate__", "_replicate_for_data_parallel"])
def test_a_way_of_copying_that_somebody_put_there_before(name):
    model = model_of("qwen3")
    setattr(norm_of(model), name, dict)
    with use_head_norms(model) as swapped:
        (reason,) = swapped.refused.values()
    assert reason == f"its {name} is a type put on the instance; needs that of its class"
    assert vars(norm_of(model))[name] is dict


def test_a_forward_that_somebody_wrapped_and_gave_back():
    model = model_of("qwen3")
    module = norm_of(model)
    module.forward = module.forward
    with use_head_norms(model) as swapped:
        logits(model)
    assert swapped.calls == 4
    assert_plain(model)


def test_a_forward_that_somebody_wraps_after():
    model = model_of("qwen3")
    module = norm_of(model)
    expected = logits(model)
    with use_head_norms(model) as swapped:
        inner = module.forward
        module.forward = lambda x: inner(x)
        logits(model)
        assert swapped.calls == 4
    assert torch.equal(logits(model), expected)
    assert (swapped.calls, swapped.fallbacks.total()) == (4, 0)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved]
)
def test_a_copy_is_not_swapped(duplicate):
    model = model_of("stablelm")
    expected = logits(model)
    with use_head_norms(model) as swapped:
        other = duplicate(model)
        assert torch.equal(logits(other), expected)
        assert swapped.calls == 0
        with torch.no_grad():
            for module in norms(other):
                for part in module.norms:
                    part.weight.zero_()
        assert not torch.equal(logits(other), expected)  # its own weights are its own
        logits(model)
        assert swapped.calls == 4
        with use_head_norms(other) as others:
            logits(other)
        assert (swapped.calls, others.calls) == (4, 4)
    third = duplicate(duplicate(other))
    assert torch.equal(logits(third), logits(other))


def replica(module):
    """As nn.DataParallel does: the tensors of a replica are attributes."""
    other = module._replicate_for_data_parallel()
    other.weight = None
    return other


SHALLOW = {
    "copy.copy": copy.copy,
    "twice": lambda module: copy.copy(copy.copy(module)),
    "copied and pickled": lambda module: pickle.loads(pickle.dumps(copy.copy(module))),
    "nn.DataParallel": replica,
    "a copy of a replica": lambda module: copy.copy(replica(module)),
}


@pytest.mark.parametrize("duplicate", SHALLOW)
def test_a_shallow_copy_is_not_swapped(duplicate):
    module = norm_of(model := model_of("qwen3"))
    x = torch.randn(1, 3, HEADS, DIM)
    with torch.no_grad():
        expected = 2 * module(x)
        with use_head_norms(model) as swapped:
            other = SHALLOW[duplicate](module)
            other._parameters = dict(other._parameters)
            other.weight = torch.nn.Parameter(2 * module.weight)
            assert torch.equal(other(x), expected)
            assert swapped.calls == 0
            torch.testing.assert_close(module(x), expected / 2)
            assert swapped.calls == 1
        assert torch.equal(other(x), expected)
    assert_plain(other)
    assert_plain(model)


def test_replicas_are_counted():
    model = model_of("stablelm")
    with unanswered("nn.DataParallel runs copies"), use_head_norms(model) as swapped:
        for module in model.modules():
            module._replicate_for_data_parallel()
    reason = "nn.DataParallel runs copies of the module; needs the model itself"
    assert swapped.fallbacks == {reason: 4}


def test_a_copy_by_a_state_of_its_own(monkeypatch):
    """Of a class whose `__getstate__` hands out the attributes themselves, or no dict."""
    module = norm_of(model := model_of("qwen3"))
    for state in (vars, lambda self: None):
        monkeypatch.setattr(type(module), "__getstate__", state)
        with use_head_norms(model):
            found = module.__getstate__()
            assert found is None or "forward" not in found
            assert "forward" in vars(module)


def test_a_module_is_freed_when_it_is_let_go():
    """Not by a collector: a norm's device memory must not be freed in a graph capture."""
    model = model_of("qwen3")
    swapped = use_head_norms(model)
    logits(model)
    attention = model.model.layers[0].self_attn
    module, forward = weakref.ref(attention.q_norm), weakref.ref(attention.q_norm.forward)
    gc.disable()
    try:
        del attention.q_norm
        assert module() is None
        swapped.restore()
        del swapped
        assert forward() is None
    finally:
        gc.enable()


def test_the_norms_of_a_model_that_is_gone():
    model = model_of("qwen3")
    swapped = use_head_norms(model)
    forward = model.model.layers[0].self_attn.q_norm.forward
    del model
    gc.collect()
    for ask in (lambda: swapped.norms, lambda: forward(None), lambda: pickle.dumps(forward)):
        with pytest.raises(ValueError, match="q_norm is of a model that is gone; needs the model"):
            ask()
    swapped.restore()
