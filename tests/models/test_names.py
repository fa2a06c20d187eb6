"""A model is found by the name that people know it by, and the answer is the registry's."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from norms_in_source import norms_in

from cupy_headnorm import cli
from cupy_headnorm._commands import known_models, models, models_page
from cupy_headnorm.models import BY_MODEL_TYPE, FAMILIES
from cupy_headnorm.models.names import NAMES, SETS_FLAG, WITHOUT

EVERY_NAME = [(name, known) for known in known_models.every() for name in known.names]


def found(asked):
    return {match.known.model_type: match.state for match in known_models.find(asked)}


def run(capsys, *arguments):
    try:
        code = cli.main(["models", *arguments])
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# The names, as data


def test_names_are_of_types_that_are_known():
    assert NAMES.keys() <= BY_MODEL_TYPE.keys()
    assert not WITHOUT.keys() & BY_MODEL_TYPE.keys()
    names = [name for names in (*NAMES.values(), *WITHOUT.values()) for name in names]
    assert all(name == name.strip() and name.isprintable() and name.isascii() for name in names)
    assert all(len(set(each)) == len(each) for each in (*NAMES.values(), *WITHOUT.values()))


def test_every_family_that_is_no_tower_of_another_has_a_name():
    nameless = [family for family in FAMILIES if not NAMES.keys() & {*family.model_types}]
    assert {family.model_types[0] for family in nameless} == {
        "qwen3_omni_moe_talker_text",
        "qwen3_omni_moe_talker_code_predictor",
        "muse_glimmer_assistant",
        "gemma4_vision",
        "dots3_note_vision_encoder",
        "pe_video_encoder",
    }


def test_releases_that_set_a_flag_are_of_families_that_have_one():
    for name in SETS_FLAG:
        (family,) = [known.family for each, known in EVERY_NAME if each == name]
        assert family.flag


@pytest.mark.parametrize(("name", "known"), EVERY_NAME, ids=[name for name, _ in EVERY_NAME])
def test_every_name_finds_its_type(name, known):
    assert known.model_type in found(name)


def test_every_type_finds_itself():
    for model_type in (*BY_MODEL_TYPE, *WITHOUT):
        assert model_type in found(model_type)
        assert found(model_type) == found(model_type.upper().replace("_", "-"))


# The names, against transformers

OTHERS = {
    "minimax_m2": "of MiniMax-Text-01",
    "glm4_moe_lite": "of GLM-4.5",
    "granitemoehybrid": "a speech model's",
    "granitemoe": "a speech model's",
    "deepseek_v3": "a tiny one of a test",
    "cohere2": "of Command R",
    "glm4": "of GLM-OCR",
    "nemotron": "of a private repository",
    "qwen2_5_vl": "of Qwen2-VL",
    "t5gemma": "of no release",
    "gpt_bigcode": "of SantaCoder, not of StarCoder",
    "dory": "of Nemotron Labs",
}
"""Types whose config class names the checkpoint of another model."""


@functools.cache
def checkpoints():
    """Return for each type the hub's name that its config class gives for an example."""
    transformers = pytest.importorskip("transformers")
    pattern = re.compile(
        r'@auto_docstring\((?P<given>[^@]*?)\)\n(?:@.*\n)*class \w+\((?:(?!\nclass |\n@).)*?'
        r'\n    model_type(?:: \w+)? = "(?P<type>\w+)"',
        re.DOTALL,
    )  # fmt: skip
    hub = {}
    for path in sorted(Path(transformers.__path__[0]).glob("models/*/configuration_*.py")):
        for match in pattern.finditer(path.read_text(encoding="utf-8")):
            if named := re.search(r'checkpoint="([^"]+)"', match["given"]):
                hub[match["type"]] = named[1]
    return hub


def test_the_hubs_own_names_find_the_types_of_transformers():
    hub = checkpoints()
    known = (NAMES.keys() | WITHOUT.keys()) & hub.keys() - OTHERS.keys()
    missed = {name for name in known if name not in found(hub[name])}
    # What stands behind these names is no size: vit-base-patch16-224, nanochat-d32.
    assert len(missed) < 20 < 100 < len(known)
    near = {
        name: {match.known.model_type for match in known_models.near(hub[name])} for name in missed
    }
    assert {name: hub[name] for name in missed if name not in near[name]} == {}
    assert {name: found(hub[name]) for name in missed if found(hub[name])} == {}


@pytest.mark.parametrize("model_type", WITHOUT)
def test_types_without_norms_of_heads_have_none_in_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    package = Path(transformers.__path__[0]) / "models" / model_type
    files = sorted(package.glob("modeling_*.py"))
    if not files:
        pytest.skip(f"this transformers has no {model_type}")
    norms = {norm for path in files for norm in norms_in(path.read_text(encoding="utf-8"))}
    # A merger of patches normalizes their features, and calls that ln_q.
    assert {norm for norm in norms if "PatchMerger" not in norm.within} == set()


# The lookup


@pytest.mark.parametrize(
    ("asked", "model_type", "state"),
    [
        ("Qwen3-0.6B", "qwen3", "supported"),
        ("qwen3:0.6b", "qwen3", "supported"),
        ("Qwen/Qwen3-0.6B-GGUF", "qwen3", "supported"),
        ("Qwen3-4B-Q4_K_M.gguf", "qwen3", "supported"),
        ("Qwen3-30B-A3B-Instruct-2507", "qwen3_moe", "supported"),
        ("qwen3_14b_a2b", "qwen3_moe", "supported"),
        ("Qwen3-Next-80B-A3B-Instruct", "qwen3_next", "supported"),
        ("qwen 3 next", "qwen3_next", "supported"),
        ("Gemma 3", "gemma3", "supported"),
        ("google/gemma-3-1b-it", "gemma3", "supported"),
        ("gemma-3n-E4B-it", "gemma3n", "supported"),
        ("Command R+", "cohere", "supported"),
        ("CohereForAI/c4ai-command-r-plus-08-2024", "cohere", "supported"),
        ("c4ai-command-r-v01", "cohere", "no norms of heads"),
        ("GLM-4.5-FP8", "glm4_moe", "supported"),
        ("GLM-4.5-Air-FP8", "glm4_moe", "no norms of heads"),
        ("Chameleon-7b", "chameleon", "supported"),
        ("stablelm-2-12b-chat", "stablelm", "supported"),
        ("stablelm-2-1_6b", "stablelm", "no norms of heads"),
        ("Llama-4-Scout-17B-16E-Instruct", "llama4", "supported"),
        ("Meta-Llama-3.1-8B-Instruct", "llama", "no norms of heads"),
        ("Mistral-7B-Instruct-v0.3", "mistral", "no norms of heads"),
        ("Qwen2.5-7B-Instruct-AWQ", "qwen2", "no norms of heads"),
        ("phi-1_5", "phi", "no norms of heads"),
        ("SmolLM3-3B", "smollm3", "no norms of heads"),
        ("EXAONE-4.0-32B", "exaone4", "supported"),
        ("Hunyuan-A13B-Instruct", "hunyuan_v1_moe", "supported"),
        ("MiniMax-M2", "minimax_m2", "refused"),
        ("OLMo-2-1124-7B", "olmo2", "refused"),
        ("stable-diffusion-3.5-large-turbo", "SD3Transformer2DModel", "supported"),
        ("stable-diffusion-3-medium-diffusers", "SD3Transformer2DModel", "no norms of heads"),
        ("black-forest-labs/FLUX.1-dev", "FluxTransformer2DModel", "supported"),
        ("Wan2.2-T2V-A14B-Diffusers", "WanTransformer3DModel", "refused"),
        ("HunyuanVideo", "HunyuanVideoTransformer3DModel", "supported"),
        ("Lightricks/LTX-Video", "LTXVideoTransformer3DModel", "refused"),
        ("NVIDIA-Nemotron-Nano-9B-v2", "nemotron_h", "refused"),
    ],
)
def test_names_as_people_write_them(asked, model_type, state):
    assert found(asked) == {model_type: state}


@pytest.mark.parametrize(
    "asked",
    # What another architecture may be is not taken for a size: it is not known.
    ["Llama 5", "Phi-3-small", "Mistral-Small-3.1", "GLM-4.7-Air", "Qwen3-Max", "Flux 3", "", "/"],
)
def test_what_nobody_knows_is_not_guessed(asked):
    assert found(asked) == {}


def test_a_name_of_several_types_finds_all():
    assert found("Hunyuan") == dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe"), "supported")


def test_states_are_those_that_the_readme_counts():
    states = [known.state for known in known_models.every()]
    supported = sum(
        len(family.model_types)
        for family in FAMILIES
        if not family.refused and any(not r.refused and r.weight != "full" for r in family.roles)
    )
    assert states.count("supported") == supported
    assert states.count("refused") == len(BY_MODEL_TYPE) - supported
    assert states.count("no norms of heads") == len(WITHOUT)
    for known in known_models.every():
        assert bool(known.refusals) or known.state != "refused"


# The command


def test_one_model_that_is_supported(capsys):
    code, out, err = run(capsys, "Qwen3-Next")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "Qwen3-Next (model type qwen3_next): supported",
        "",
        "norm  kind  weight             offset  eps           rounding",
        "q, k  rms   one for all heads  1       rms_norm_eps  once",
        "",
        "offset    the model adds it to the weight",
        "eps       1e-06 where config.json has no rms_norm_eps",
        "rounding  once: the result is rounded once",
        "RoPE      after norm, half; rotates 0.25 of the dims, unless config.json says",
        "          otherwise",
        "refused   linear_out: a gate is part of the norm, multiplied in before the",
        "          result is rounded",
        "next      python -m cupy_headnorm inspect MODEL_DIR",
    ]


def test_models_that_have_none_or_are_refused_say_why(capsys):
    _, out, _ = run(capsys, "Llama-3.1-8B")
    assert out.startswith("Llama 3.1 (model type llama): no norms of heads\n")
    assert "no module of transformers' model of this type normalizes heads" in out
    _, out, _ = run(capsys, "OLMo 2")
    assert out.startswith("OLMo 2 (model type olmo2): refused\n")
    assert "num_heads=1" in " ".join(out.split())
    _, out, _ = run(capsys, "Zaya1")
    assert " ".join(BY_MODEL_TYPE["zaya"].refused.split()) in " ".join(out.split())
    _, out, _ = run(capsys, "GLM-4.5-Air")
    assert "GLM-4.5-Air's own config.json does not set use_qk_norm" in " ".join(out.split())
    _, out, _ = run(capsys, "GLM-4.6")
    assert "use_qk_norm says whether the norms are there, not there where it is" in out.replace(
        "\n" + 10 * " ", " "
    )


def test_folders_of_diffusers_are_read_below_their_root(capsys):
    assert run(capsys, "Flux")[1].count("inspect MODEL_DIR/transformer") == 1
    assert "the vision tower alone" in run(capsys, "InternVL3")[1]


def test_a_beginning_lists_what_goes_on(capsys):
    code, out, _ = run(capsys, "DeepSeek")
    assert code == 0
    rows = [re.split("  +", line) for line in out.splitlines()[2:]]
    assert rows[0] == ["name", "model type", "norms of heads"]
    assert ["DeepSeek-V3", "deepseek_v3", "refused"] in rows
    assert ["DeepSeek-V3.2", "deepseek_v32", "supported: index_k"] in rows
    _, out, _ = run(capsys, "Phi")
    assert out.splitlines()[-1].startswith("see also  Phi-1, Phi-1.5, Phi-2, Phi-3")
    _, out, _ = run(capsys, "StableLM 2 12B")
    assert "StableLM 2 12B" not in out.partition("see also")[2]


@pytest.mark.parametrize(
    ("asked", "near"),
    [("Qwn3-Nxt", "Qwen3-Next"), ("gema 3 270m", "Gemma 3"), ("comand r+", "Command R+")],
)
def test_what_nobody_knows_gets_near_names_and_status_1(asked, near):
    done = subprocess.run(
        [sys.executable, "-m", "cupy_headnorm", "models", asked], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"cupy_headnorm: no model {asked!r} is known; near names: ")
    assert near in done.stderr.partition(";")[2].partition(";")[0]


def test_an_unknown_name_without_near_ones_is_one_line_however_odd(capsys):
    for asked in ("zzzzzz", "", "a\nb\x1b[0m", "w" * 10_000):
        code, out, _ = run(capsys, asked)
        assert out == ""
        assert code.startswith("cupy_headnorm: no model ")
        assert code.isprintable()
        assert len(code) < 400


def test_the_list_has_every_type_and_name_whole_and_no_wide_line(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    told = re.split(r"[\s(),;]+", out)
    assert {*BY_MODEL_TYPE, *WITHOUT} <= set(told)
    assert [name for name, _ in EVERY_NAME if not re.search(f"{re.escape(name)}[,)\n]", out)] == []
    wide = [line for line in out.splitlines() if len(line) > 80]
    assert {line.split()[0] for line in wide} <= {"deepseek_v4", "dots3_note"}
    counts = map(int, re.findall(r": (\d+) model types$", out, re.MULTILINE))
    assert sum(counts) == len(BY_MODEL_TYPE) + len(WITHOUT)


def test_no_answer_is_wide_or_empty():
    for known in known_models.every():
        lines = list(models._answer(known_models.Match(known.model_type, known)))
        assert lines[0].endswith(f": {known.state}")
        assert len(lines) > 2
        assert max(map(len, lines)) <= 80


# The page


def test_the_page_is_whole_and_the_same_each_time(capsys):
    page = models_page.markdown()
    code, out, _ = run(capsys, "--markdown")
    assert (code, out) == (0, page)
    code = "from cupy_headnorm._commands import models_page; print(models_page.markdown(), end='')"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout == page
    assert page.startswith("# Models\n")
    assert page.endswith("|\n")
    assert "\n\n\n" not in page
    for model_type in (*BY_MODEL_TYPE, *WITHOUT):
        assert f"`{model_type}`" in page
    for name, known in EVERY_NAME:
        assert re.search(rf"^\| {re.escape(name)} \| `{known.model_type}` \| ", page, re.MULTILINE)


def test_the_pages_tables_have_one_number_of_columns_and_no_markup_by_accident():
    for table in re.findall(r"(?:^\|.*\n)+", models_page.markdown(), re.MULTILINE):
        header, rule, *rows = table.splitlines()
        assert rows
        assert re.fullmatch(r"\|(---\|)+", rule)
        assert {line.count("|") for line in (header, rule, *rows)} == {header.count("|")}
        for row in rows:
            plain = re.sub(r"`[^`]*`", "", row)
            assert not re.search(r"[<>\[\]$]|\*\w|\w\*|\b_\w|\w_\b", plain), row


def test_the_page_needs_nothing_but_the_registry():
    code = (
        "import sys; from cupy_headnorm._commands import models_page; models_page.markdown()\n"
        "print(sorted({'torch', 'transformers', 'cupy', 'rich', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
