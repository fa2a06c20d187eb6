"""
Untrusted folders: reading ends soon, stays within them, and fails with an error of ours.

Valid little checkpoints are changed at every level: the tree of config.json, of the index and of
the headers, their bytes, the length in front of a header, the offsets, the data, what lies in the
folder. HEADNORM_CASES=20000 runs as many of each kind and other ones each time.
"""

import os

import numpy as np
import pytest
import untrusted
from checkpoints import KEYS, SEEDS, SHARDS, encoded, file_of, header_of, seeded, write
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import BURDENS, CROWDS, NUMBERS, VALUES, crowd, crowded, mutated, spoiled

from cupy_headnorm import HeadNorm, QKNorm
from cupy_headnorm.checkpoint import files
from cupy_headnorm.pretrained import head_norms

# The fixtures of untrusted.py that these tests take.
place, tried = untrusted.place, untrusted.tried


CASES = int(os.environ.get("HEADNORM_CASES") or 0)

checked = settings(
    max_examples=CASES or 60,
    derandomize=not CASES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


# An example is of some 100 KB, and takes a second: too long for many, or to make one smaller.
crowds = settings(checked, max_examples=CASES or 3, phases=[Phase.generate])


TRACED = st.sampled_from((False, False, False, True))  # to trace memory takes thrice the time
SEEDED = st.builds(seeded, st.sampled_from(list(SEEDS)), st.booleans())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", SEEDS)
def test_the_seeds_are_read(tried, name, sharded):
    # Else all that follows would test one message.
    with tried() as folder:
        write(folder, *seeded(name, sharded))
        if name == "unknown":
            HeadNorm.from_safetensors(folder, KEYS[0])
        elif name != "olmo2":
            assert len(head_norms(folder)) > 0
            QKNorm.from_pretrained(folder, 0)


@checked
@given(data=st.data())
def test_config(tried, data):
    config, index, shards = data.draw(SEEDED)
    with tried(data.draw(TRACED)) as folder:
        write(folder, data.draw(mutated(config)), index, shards)


@pytest.mark.parametrize("what", BURDENS)
@pytest.mark.parametrize("how", CROWDS)
@crowds
@given(data=st.data())
def test_many_groups_and_long_values(tried, how, what, data):
    # Each alone is in proportion; what looks at one for each of the other is not.
    config = data.draw(crowded(data.draw(SEEDED)[0], what))
    shape = data.draw(st.sampled_from([(0,), (16,), (4, 16), (1,)]))
    header, size = header_of(dict.fromkeys(data.draw(crowd(how)), ("F16", shape)))
    with tried(data.draw(TRACED)) as folder:
        write(folder, config, None, {files.SINGLE: (header, size)})


@checked
@given(data=st.data())
def test_config_bytes(tried, data):
    config, index, shards = data.draw(SEEDED)
    with tried(data.draw(TRACED)) as folder:
        write(folder, data.draw(spoiled(encoded(config))), index, shards)


NAMES = st.sampled_from([
    "__metadata__", "", "\0", "\x1b[2J", "a" * 999, "a" * 1001, "." * 900, "model.layers.0",
    *(f"{KEYS[0]}.{part}" for part in ("weight", "bias", "norms.0.weight", "norms.7.weight")),
    f"{KEYS[1]}.weight", f"{KEYS[1]}.bias", "model.layers.99999.self_attn.q_norm.weight",
    "visual.blocks.0.attn.q_norm.weight", "model.layers.00.self_attn.q_norm.weight",
    "model.layers.100000.self_attn.q_norm.weight", "layers.0.self_attn.q_norm.weight",
    "model.layers.0.self_attn.q_proj.weight", "x.layers.1.self_attn.k_norm.weight",
])  # fmt: skip
LENGTHS = st.one_of(
    st.none(),
    st.sampled_from([0, 1, 7, 8, 100_000_000, 100_000_001, 2**31, 2**32, 2**63, 2**64 - 1]),
    st.integers(0, 10_000),
)


@checked
@given(data=st.data())
def test_headers(tried, data):
    config, index, shards = data.draw(SEEDED)
    name = data.draw(st.sampled_from(list(shards)))
    header, size = shards[name]
    with tried(data.draw(TRACED)) as folder:
        write(folder, config, index, shards)
        changed = encoded(data.draw(mutated(header, NAMES)))
        if data.draw(st.booleans()):
            changed = data.draw(spoiled(changed))
        size = max(0, size + data.draw(st.sampled_from((0, 0, 0, -1, 1, -size, 64))))
        written = file_of(changed, b"\x3c" * size, data.draw(LENGTHS))
        (folder / name).write_bytes(written)


TRICKS = ("shape", "zeros", "offsets", "overlap", "gap", "axes", "dtype", "empty")


@checked
@given(data=st.data())
def test_headers_that_contradict_themselves_only_a_little(tried, data):
    # Most changes of above end at safetensors' first look: these pass it, or nearly.
    config, index, shards = data.draw(SEEDED)
    with tried(data.draw(TRACED)) as folder:
        for header, _ in shards.values():
            own = [name for name in header if name != "__metadata__"]
            for name in own and data.draw(st.lists(st.sampled_from(own), max_size=2, unique=True)):
                tensor, trick = header[name], data.draw(st.sampled_from(TRICKS))
                count = int(np.prod(tensor["shape"]))
                if trick == "shape":
                    parts = [n for n in (1, 2, 4, 8, 16, 32, 64) if count % n == 0]
                    part = data.draw(st.sampled_from(parts))
                    tensor["shape"] = [part, count // part]
                elif trick == "axes":
                    tensor["shape"] = [1] * data.draw(st.integers(0, 80)) + [count]
                elif trick in ("zeros", "empty"):
                    tensor["shape"] = [0, *data.draw(st.lists(NUMBERS, max_size=3))]
                    if trick == "empty":
                        tensor["data_offsets"][1] = tensor["data_offsets"][0]
                elif trick == "dtype":
                    tensor["dtype"] = data.draw(st.sampled_from(("F16", "U16", "I16", "F8_E4M3")))
                else:
                    by = data.draw(st.sampled_from((-1, 1, 8, 2**63)))
                    places = {"overlap": (0,), "gap": (1,), "offsets": (0, 1)}[trick]
                    for at in places:
                        tensor["data_offsets"][at] += by
        for name in list(shards):
            header, _ = shards[name]
            size = max((t["data_offsets"][1] for t in header.values() if "dtype" in t), default=0)
            shards[name] = header, size if 0 <= size < 100_000 else 0
        write(folder, config, index, shards)


FILES = st.sampled_from([
    "../secret.safetensors", "..", ".", "", "/", "\0", "a" * 300, "a" * 5000, "sub/x", "\ud800",
    "./" + SHARDS[0], SHARDS[0], SHARDS[1], files.CONFIG, files.INDEX, "pipe", "loop",
    "link", "nothing", "up/secret.safetensors", "..\\secret.safetensors", "C:\\x", "C:x", "zero",
    "\\\\host\\x", "file:///etc/passwd", "~", "%2e%2e/secret.safetensors", "\x1b[2J", "/dev/zero",
    "//secret.safetensors", "x/../../secret.safetensors",
])  # fmt: skip


@checked
@given(data=st.data())
def test_index(tried, data):
    config, index, shards = data.draw(SEEDED.filter(lambda seed: seed[1] is not None))
    with tried(data.draw(TRACED)) as folder:
        secret = str(folder.parent / "secret.safetensors")
        names = st.one_of(FILES, st.just(secret), VALUES)
        changed = data.draw(mutated(index, NAMES, names))
        if data.draw(st.integers(0, 3)) == 0:
            changed = data.draw(spoiled(encoded(changed)))
        write(folder, config, changed, shards)
        os.mkfifo(folder / "pipe")
        (folder / "loop").symlink_to("loop")
        (folder / "link").symlink_to(SHARDS[0])
        (folder / "up").symlink_to("..")
        (folder / "nothing").symlink_to("missing")
        (folder / "zero").symlink_to("/dev/zero")


@checked
@given(data=st.data())
def test_files_of_any_bytes(tried, data):
    with tried(data.draw(TRACED)) as folder:
        for name in (files.CONFIG, files.INDEX, files.SINGLE, *SHARDS):
            if data.draw(st.booleans()):
                start = data.draw(st.sampled_from((b"", b"{", b"\x02" + bytes(7) + b"{}")))
                (folder / name).write_bytes(start + data.draw(st.binary(max_size=64)))
