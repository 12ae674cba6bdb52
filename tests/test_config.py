import bisect
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from vae_dist import config
from vae_dist.config import Config, yaml_text
from vae_dist.errors import UserError

CONFIGS = sorted(set((REPOSITORY / "configs").glob("*.yaml")) - set((REPOSITORY / "configs").glob("sweep_*.yaml")))


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as refused:
        config.load(arguments)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_no_arguments_give_the_tutorials_config() -> None:
    loaded = config.load([])
    assert (loaded.model.hidden_dims, loaded.model.latent_dim) == ([400], 40)
    assert (loaded.train.epochs, loaded.train.batch_size, loaded.optim.learning_rate) == (5, 100, 1e-3)
    assert config.load([str(REPOSITORY / "configs/tutorial.yaml")]) == loaded


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads_and_opens_with_its_command(path: Path) -> None:
    config.load([str(path)])
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("#") and "make train" in path.read_text()


def test_later_layers_win(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 1\nmodel: {latent_dim: 3}\ntrain: {epochs: 7}")
    second.write_text("seed: 2\nmodel: {latent_dim: 4}")
    loaded = config.load(["seed=3", str(first), str(second)])
    assert (loaded.seed, loaded.model.latent_dim, loaded.train.epochs) == (3, 4, 7)
    assert config.load(["tracking.tags=[a,b]", "tracking.tags=[c]"]).tracking.tags == ["c"]
    assert loaded.name == "second-{time}"
    odd = tmp_path / "my run (2).yaml"
    odd.write_text("")
    assert config.load([str(odd)]).name == "my_run__2_-{time}"


def test_arguments_may_begin_with_dashes() -> None:
    assert config.load(["--model.latent_dim=3"]) == config.load(["model.latent_dim=3"])


@pytest.mark.parametrize("text", ["007", "no", "1e5", "on", "0x10", "2026-11-22", "1_000"])
def test_text_stays_what_was_typed(text: str, tmp_path: Path) -> None:
    assert config.load([f"name={text}", f"tracking.tags=[{text}]"]).tracking.tags == [text]
    (tmp_path / "some.yaml").write_text(f"name: {text}")
    loaded = config.load([str(tmp_path / "some.yaml")])
    assert loaded.name == text
    config.save(loaded, tmp_path / "saved.yaml")
    assert config.read(tmp_path / "saved.yaml").name == text


def test_values_may_hold_equals_signs_and_colons() -> None:
    assert config.load(["data.root=/a=b: c#d"]).data.root == "/a=b: c#d"


def test_null_and_quoted_null_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("data: {mirror: null}\ntracking: {entity: 'null'}")
    loaded = config.load([str(tmp_path / "some.yaml")])
    assert (loaded.data.mirror, loaded.tracking.entity) == (None, "null")
    config.save(loaded, tmp_path / "saved.yaml")
    assert config.read(tmp_path / "saved.yaml") == loaded
    assert config.load(["train.steps=null"]).train.steps is None


def test_interpolations_reach_other_keys_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    assert config.load(["name=vae-z${model.latent_dim}", "model.latent_dim=8"]).name == "vae-z8"
    loaded = config.load(
        ["name=a", "tracking.tags=['beta ${objective.beta}',b]", "train.log_every=${train.batch_size}"]
    )
    assert (loaded.tracking.tags, loaded.train.log_every) == (["beta 1.0", "b"], 100)
    for inside in (
        "oc.env:SECRET", "oc.env:HOME,x", "oc.coerce:this.x,1", "oc.decode:1", "oc.create:{a: 1}", "oc.select:SECRET",
        "oc.dict.keys:model", "oc.dict.values:model", "", "name", ".seed", "..seed", "model[latent_dim]", "${seed}",
    ):  # fmt: skip
        for text in (f"${{{inside}}}", f"\\${{{inside}}}", f"a$${{{inside}}}b", f"${{{inside}"):
            assert "hunter2" not in refusal(f"data.root={text}") + refusal(f"tracking.tags=['{text}']")
    assert "did you mean model.latent_dim" in refusal("name=a${latent_dim}")
    assert "model is a group of keys" in refusal("name=a${model}")
    assert "model.hidden_dims is [400]" in refusal("name=a${model.hidden_dims}")


def test_interpolations_do_not_grow() -> None:
    keys = ["name", "runs_dir", "output", "data.root", "tracking.project", "tracking.entity", "tracking.id"]
    chain = [f"{key}={f'${{{other}}}' * 9}" for key, other in pairwise(keys)]
    assert "a key whose value has no ${...} itself" in refusal(*chain, "tracking.id=" + "a" * 100)
    assert "bytes; 2048 are the most" in refusal("runs_dir=" + "a" * 200, "name=" + "${runs_dir}" * 100)
    assert "has no ${...} itself" in refusal("name=${name}")
    assert "has no ${...} itself" in refusal("runs_dir=$", "name=${runs_dir}{seed}")


def test_a_saved_config_comes_back_and_is_never_interpolated(tmp_path: Path) -> None:
    loaded = config.load(["sample.codes=[[0,1],[2.5,-3]]", "name=a", "tracking.tags=[x,'1']", "train.precision=bf16"])
    config.save(loaded, tmp_path / "config.yaml")
    assert config.read(tmp_path / "config.yaml") == loaded
    for text in ("'${name}'", '"\\x24{name}"', '"$\\u007bname}"', "[['${name}']]"):
        (tmp_path / "config.yaml").write_text(f"data: {{root: {text}}}")
        with pytest.raises(UserError, match="interpolation"):
            config.read(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("mirror", "good"),
    [
        ("https://host/data", True),
        ("http://127.0.0.1:8000", True),
        ("https://user:hunter2@host/data", False),
        ("https://hunter2@host", False),
        ("https://host/@set/data", True),
        ("https://host/data?token=hunter2", False),
        ("https://host/data#hunter2", False),
        ("file:///data", False),
        ("ftp://host/data", False),
        ("host/data", False),
        ("https://", False),
        ("http://[", False),
        ("http://host:port", False),
        ("http://host/ü", False),
        ("http://host/a b", False),
    ],
)
def test_a_mirror_is_an_address_without_a_secret_in_it(mirror: str, good: bool) -> None:
    if good:
        assert config.load([f"data.mirror={mirror}"]).data.mirror == mirror
    else:
        message = refusal(f"data.mirror={mirror}")
        assert message.startswith("data.mirror must") and "hunter2" not in message


def test_paths_and_mirrors_of_a_stored_config_do_not_reach_its_readers() -> None:
    stored = config.load(["name=a", "output=/elsewhere", "runs_dir=/elsewhere", "data.mirror=http://elsewhere"])
    read = config.load_reader(stored, ["data.root=d"])
    assert (read.output, read.runs_dir, read.data.mirror, read.data.root) == (None, "runs", None, "d")
    read = config.load_reader(stored, ["output=here", "runs_dir=mine"])
    assert (read.output, read.runs_dir) == ("here", "mine")


def test_an_argument_that_is_taken_out_is_checked_too() -> None:
    assert config.take(["runs_dir=a", "seed=1", "runs_dir=b"], "runs_dir") == ("b", ["seed=1"])
    assert config.take([], "runs_dir") == ("runs", [])
    for value in ("null", "a" * 300, "a\0", "${oc.env:HOME}"):
        with pytest.raises(UserError, match=r"runs_dir|argument"):
            config.take([f"runs_dir={value}"], "runs_dir")


def test_a_runs_path_must_be_printable() -> None:
    for arguments in (["\x1b[2J"], ["a\0b"], ["-\x1b"], ["a" * 5000], ["a\n", "b"]):
        with pytest.raises(UserError) as refused:
            config.split_run(arguments)
        assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("latent_dim=3", "did you mean model.latent_dim?"),
        ("model.latentdim=3", "did you mean model.latent_dim"),
        ("optim.lr=3", "unknown key 'optim.lr'"),
        ("model=mlp", "model is a group of keys"),
        ("model.latent_dim=abc", "model.latent_dim must be int, not abc"),
        ("model.latent_dim=2.5", "model.latent_dim must be int, not 2.5"),
        ("model.latent_dim=-1", "model.latent_dim must be at least 1, not -1"),
        ("model.hidden_dims=400", "model.hidden_dims must be list of int, not 400"),
        ("model.hidden_dims=[400,0]", "model.hidden_dims must be at least 1, not 0"),
        ("optim.learning_rate=0", "optim.learning_rate must be above 0, not 0.0"),
        ("optim.learning_rate=inf", "optim.learning_rate must be a finite number"),
        ("data.binarize=maybe", "data.binarize must be one of none, threshold, dynamic, not maybe"),
        ("train.precision=no", "train.precision must be one of auto, fp32"),
        ("train.batch_size=0", "train.batch_size must be at least 1"),
        ("checkpoint.keep=1", "checkpoint.keep must be at least 2"),
        ("data.download=maybe", "data.download must be bool, not maybe"),
        ("name=../../x", "can't be a folder's name"),
        ("name=.hidden", "can't be a folder's name"),
        ("tracking.tags=[a", "not valid YAML"),
        ("sample.codes=[0,1]", "sample.codes"),
        ("nonsense", "give a YAML file, or key=value"),
        ("nowhere.yaml", "can't read the config file nowhere.yaml: No such file"),
    ],
)
def test_bad_arguments_get_one_line_that_says_what_to_do(argument: str, expected: str) -> None:
    assert expected in refusal(argument)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: {latnt_dim: 3}", "did you mean model.latent_dim"),
        ("model: 3", "model"),
        ("train:\n  epochs: many", "train.epochs must be int, not many"),
        ("a: [", "not valid YAML"),
        ("- 1", "must hold keys and values"),
    ],
)
def test_bad_files_are_named(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    message = refusal(str(path))
    assert expected in message and "bad.yaml" in message


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
        ("model.latent_dim=1000000000000000000", "the model's weights (model.hidden_dims, model.latent_dim)"),
        ("model.hidden_dims=[1000000,1000000]", "would take 7.45e+03 GiB"),
        ("sample.count=1000000000000000000", "the latents of sample.count images would take"),
        ("tracking.tags=[" + "a," * 30_000 + "]", "more than 20000 values"),
        ("tracking.tags=[" + ("a" * 100 + ",") * 6000 + "]", "the config is too large"),
        ("tracking.tags=&a [b]", "tracking.tags must be list of text, not &a [b]"),
        ("tracking.tags=[&a b, *a]", "make aliases"),
    ],
    ids=beginning,
)  # fmt: skip
def test_hostile_arguments_are_refused_in_a_short_line(argument: str, expected: str) -> None:
    message = refusal(argument)
    assert expected in message
    assert message.isprintable() and len(message) < 1000


def test_a_stored_config_whose_model_exceeds_memory_is_refused() -> None:
    loaded = replace(config.load(["name=a"]), data=config.DataConfig(image_shape=[1, 2**40, 2**40]))
    config.save(loaded, Path("a.yaml"))
    with pytest.raises(UserError, match=r"the model's weights .* would take"):
        config.read(Path("a.yaml"))


def test_keys_may_be_written_with_dots_in_a_file_and_groups_may_be_empty() -> None:
    Path("some.yaml").write_text("model.latent_dim: 3\ndata:\nmodel:\n  hidden_dims: [5]\n")
    loaded = config.load(["some.yaml"])
    assert (loaded.model.latent_dim, loaded.model.hidden_dims) == (3, [5])


@pytest.mark.parametrize(
    ("key", "item"),
    [("sample.codes", "[0.5]"), ("tracking.tags", "a"), ("tracking.tags", "'\u200b\U000e0001'")],  # escaped in YAML
)
def test_the_largest_valid_config_can_be_read_again(key: str, item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_text, "MAX_VALUES", 200)
    monkeypatch.setattr(yaml_text, "MAX_BYTES", 6000)

    def is_too_large(count: int) -> bool:
        try:
            config.load(["name=a", f"{key}=[{','.join([item] * count)}]"])
        except UserError as error:
            assert "too large" in str(error) or "more than 200 values" in str(error)
            return True
        return False

    largest = bisect.bisect_left(range(300), True, key=is_too_large) - 1
    assert 20 < largest < 200
    loaded = config.load(["name=a", f"{key}=[{','.join([item] * largest)}]"])
    config.save(loaded, Path("config.yaml"))
    assert config.read(Path("config.yaml")) == loaded


def test_help_shows_every_key_with_type_default_and_meaning() -> None:
    text = config.help_text("usage")
    for option in config.options():
        assert f"\n  {option.key}=" in text
        assert len(option.help) > 5
    assert "model.latent_dim=40   [int]" in text
    assert "number of latents (at least 1)" in text


def test_readers_may_not_change_the_model() -> None:
    stored = config.load(["name=a"])
    assert config.load_reader(stored, ["data.root=elsewhere", "sample.count=3"]).sample.count == 3
    with pytest.raises(UserError, match=r"model.latent_dim belongs to the training"):
        config.load_reader(stored, ["model.latent_dim=3"])
    with pytest.raises(UserError, match=r"did you mean sample.count"):
        config.load_reader(stored, ["sampel.count=3"])


def resumed(before: list[str], now: list[str]) -> Config:
    return config.resume(config.load(["name=a", *now]), config.load(["name=a", *before]))


def test_a_resumed_run_keeps_what_auto_was_resolved_to() -> None:
    before = ["data.name=synthetic_digits", "train.precision=bf16", "data.image_shape=[1,28,28]"]
    merged = resumed(before, [])
    assert (merged.data.name, merged.train.precision) == ("synthetic_digits", "bf16")
    assert resumed(before, ["train.precision=fp32"]).train.precision == "fp32"


@pytest.mark.parametrize("change", ["train.epochs=9", "train.log_every=7", "runs_dir=other", "train.accumulate=2"])
def test_options_that_do_not_change_learning_may_change_on_resume(change: str) -> None:
    resumed([], [change])


@pytest.mark.parametrize(
    "change", ["seed=1", "model.latent_dim=3", "objective.beta=2", "train.batch_size=50", "data.binarize=dynamic"]
)
def test_options_that_change_learning_may_not_change_on_resume(change: str) -> None:
    with pytest.raises(UserError, match=change.split("=")[0]):
        resumed([], [change])


def test_a_longer_run_is_refused_if_its_schedule_depends_on_its_length() -> None:
    with pytest.raises(UserError, match=r"train.epochs \(was 5, now 9\)"):
        resumed(["optim.schedule=cosine"], ["optim.schedule=cosine", "train.epochs=9"])
    fixed = ["optim.schedule=cosine", "optim.decay_steps=100"]
    resumed(fixed, [*fixed, "train.epochs=9"])
