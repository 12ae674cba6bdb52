"""Hostile files and arguments: each is refused at once, in one short line that says what is wrong."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.test_config import refusal
from vae_dist import config
from vae_dist.errors import UserError

BILLION_LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60))


def beginning(value: str | bytes) -> str:
    return ascii(value[:30])


def refusal_of_file(content: str | bytes) -> str:
    Path("hostile.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.monotonic()
    message = refusal("hostile.yaml")
    assert time.monotonic() - started < 5
    assert "hostile.yaml" in message and message.isprintable() and len(message) < 1000
    return message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BILLION_LAUGHS, "make aliases"),
        ("tracking: {tags: &a [*a]}", "make aliases"),
        ("tracking: {tags: [" * 50_000, "nested too deeply"),
        ("[" * 2**20, "nested too deeply"),
        ("- " * 2**19, "nested too deeply"),
        ("tracking: {tags: [" + "a," * 30_000 + "]}", "more than 20000 values"),
        ("#" * (2**20 + 1), "Has more than 1048576 bytes"),
        ("name: " + "a" * 3000, "name has 3000 bytes; 2048 are the most"),
        (b"name: \xff\xfe", "byte 6 is not UTF-8 text"),
        ("name: a".encode("utf-16"), "is not UTF-8 text"),
        (b"name: a\x00b", "special characters are not allowed"),
        ('name: "a\\0b"', "'\\x00', which no path or name can have"),
        ('name: "\\e[2J"', "'\\x1b', which no path"),
        ('name: "\\ud800"', "'\\ud800', which no path"),
        ('model: "\\e[2J"', "'\\x1b', which no path"),
        ('name: "\\UFFFFFFFF"', "not valid YAML: a number in it is too large"),
        ("%YAML " + "1" * 5000 + ".1\n--- a", "not valid YAML"),
        ("name: !!python/object/apply:os.system [touch run]", "'!' makes a tag"),
        ("!!python/name:os.system\nname: a", "'!' makes a tag"),
        ("name: ! a", "'!' makes a tag"),
        ("seed: 1\nseed: 2", "line 2 can't be used: 'seed' is given twice"),
        ("model: {latent_dim: 1}\nmodel.latent_dim: 2", "model.latent_dim is given twice"),
        ("<<: {seed: 1}", "unknown key '<<'"),
        ("3: 4", "unknown key '3'"),
        ("[seed]: 4", "a key must be text"),
        ("null: 4", "a key must be text"),
        ("? {a: b}\n: 4", "a key must be text"),
        ("seed: 1\n---\nseed: 2", "line 2 can't be used: expected a single document in the stream, but found another"),
        ("model: mlp", "model must hold keys and values, not mlp"),
        ("seed: ???", "seed must be int, not ???"),
        ("tracking: {tags: ['???']}", "tracking.tags must be list of text"),
        ("tracking: {tags: [[a]]}", "tracking.tags must be list of text, not [['a']]"),
        ("tracking: {tags: [{a: b}]}", "tracking.tags must be list of text"),
        ("tracking: {tags: [null]}", "tracking.tags must be list of text"),
        ("sample: {codes: [[1], 2]}", "sample.codes must be list of lists of float"),
        ("seed: [1]", "seed must be int, not ['1']"),
        ("name: {a: b}", "name must be text or null, not {'a': 'b'}"),
        ("a" * 1000 + ": 1", "unknown key 'aaa"),
    ],
    ids=beginning,
)  # fmt: skip
def test_hostile_files_are_refused_at_once_in_a_short_line(content: str | bytes, expected: str) -> None:
    assert expected in refusal_of_file(content)
    assert sorted(path.name for path in Path().iterdir()) == ["hostile.yaml"]


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo("pipe.yaml")
    Path("zero.yaml").symlink_to("/dev/zero")
    Path("folder.yaml").mkdir()
    assert "pipe.yaml: Is not a regular file" in refusal("pipe.yaml")
    assert "zero.yaml: Is not a regular file" in refusal("zero.yaml")
    assert "folder.yaml: Is a directory" in refusal("folder.yaml")
    assert "File name too long" in refusal("a" * 300 + ".yaml")
    command = [sys.executable, str(REPOSITORY / "vae_dist/train.py"), "pipe.yaml"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert refused.stderr == "error: can't read the config file pipe.yaml: Is not a regular file\n"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("name=\udcff", "'\\udcff'"),
        ("data.root=a\0b", "'\\x00'"),
        ("data.root=a\nb", "'\\n'"),
        ("\x1b[2J=1", "'\\x1b'"),
        ("\x1b[2J.yaml", "'\\x1b'"),
        ("data.root=\u202egnp", "'\\u202e'"),
        ("data.root=" + "a" * 300, "data.root is no path: a name in it has more than 255 bytes"),
        ("runs_dir=" + "a/" * 2000, "runs_dir has 4000 bytes; 2048 are the most"),
        ("output=/" + "é" * 200, "output is no path"),
        ("x" * 100_000 + "=1", "unknown key 'xxx"),
        ("seed=" + "x" * 2000, "seed must be int, not xxx"),
        ("seed=" + "1" * 5000, "seed has 5000 bytes"),
        ("seed=9223372036854775808", "seed must be below 2^63"),
        ("seed=" + "1" * 2000, "seed must be below 2^63, not 111"),
        ("train.steps=9223372036854775808", "train.steps must be below 2^63"),
        ("optim.learning_rate=1e999", "must be a finite number"),
        ("optim.learning_rate=" + "1" * 400, "must be a finite number"),
        ("sample.codes=[[0,nan]]", "sample.codes must be a finite number"),
        ("data.image_shape=[0,28,28]", "data.image_shape must be at least 1"),
        ("data.image_shape=[28,28]", "data.image_shape must be channels, height and width"),
        ("train.threads=100000", "train.threads must be at most 1024"),
        ("runtime.timeout=1e300", "runtime.timeout must be at most"),
        ("data.synthetic_images=4294967297", "data.synthetic_images must be at most 4294967296"),
        ("model.latent_dim=1000000000000000000", "the model's weights (model.latent_dim, model.hidden_dims)"),
        ("model.hidden_dims=[1000000,1000000]", "would take 7.45e+03 GiB"),
        ("objective.samples=1000000000000000000", "the latents of objective.samples samples of an image would take"),
        ("sample.count=1000000000000000000", "the latents of sample.count images would take"),
        ("tracking.tags=[" + "a," * 30_000 + "]", "more than 20000 values"),
        ("tracking.tags=[" + ("a" * 100 + ",") * 6000 + "]", "characters are the most; shorten its lists"),
        ("tracking.tags=&a [b]", "tracking.tags must be list of text, not &a [b]"),
        ("tracking.tags=[&a b, *a]", "make aliases"),
    ],
    ids=beginning,
)  # fmt: skip
def test_hostile_arguments_are_refused_in_a_short_line(argument: str, expected: str) -> None:
    message = refusal(argument)
    assert expected in message
    assert message.isprintable() and len(message) < 1000


LARGE_PICTURES = {  # their kinds, with the images that they ask for
    "kind=neighbours rows=1000000 steps=100000": 10**11,
    "kind=traversal steps=100000000000 rows=100000000000": 40 * 10**11,
    "kind=manifold steps=1000000": 10**12,
    "kind=interpolation steps=100000000000": 10**11,
    "kind=interpolation steps=100000000000 images=[0,1,2,3]": 2 * 10**11,
    "kind=reconstruction steps=100000000000 images=[0,1,2]": 3 * 10**11,
}


@pytest.mark.parametrize("options", LARGE_PICTURES)
def test_pictures_that_exceed_memory_are_refused(options: str) -> None:
    size = LARGE_PICTURES[options] * 4 * 784 / 2**30
    given = ["data.image_shape=[1,28,28]", *(f"sample.{option}" for option in options.split())]
    with pytest.raises(UserError, match=re.escape(f"the images of sample.rows and sample.steps would take {size:.3g}")):
        config.load(given)
    config.load(["data.image_shape=[1,28,28]", *given[1:], "sample.kind=prior"])  # which has neither


def test_rows_beyond_the_latents_of_a_traversal_are_none() -> None:
    loaded = config.load(["data.image_shape=[1,28,28]", "sample.kind=traversal", "sample.rows=1000000000000"])
    assert loaded.sample.images_at_least(40) == 40


def test_a_stored_config_whose_model_exceeds_memory_is_refused() -> None:
    loaded = replace(config.load(["name=a"]), data=config.DataConfig(image_shape=[1, 2**40, 2**40]))
    config.save(loaded, Path("a.yaml"))
    with pytest.raises(UserError, match=r"the model's weights .* would take"):
        config.read(Path("a.yaml"))
