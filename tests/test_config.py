from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from vae_dist import config
from vae_dist.config import Config
from vae_dist.errors import UserError

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as refused:
        config.load(arguments)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_no_arguments_are_the_tutorials_run() -> None:
    asked = config.load([])
    assert (asked.model.hidden_dims, asked.model.latent_dim) == ([400], 40)
    assert (asked.train.epochs, asked.train.batch_size, asked.optim.learning_rate) == (5, 100, 1e-3)
    assert config.load([str(REPOSITORY / "configs/tutorial.yaml")]) == asked


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads_and_opens_with_its_command(path: Path) -> None:
    config.load([str(path)])
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("#") and "make train" in path.read_text()


def test_later_layers_win(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 1\nmodel: {latent_dim: 3}\ntrain: {epochs: 7}")
    second.write_text("seed: 2\nmodel: {latent_dim: 4}")
    asked = config.load(["seed=3", str(first), str(second)])
    assert (asked.seed, asked.model.latent_dim, asked.train.epochs) == (3, 4, 7)
    assert asked.name == "second-{time}"
    odd = tmp_path / "my run (2).yaml"
    odd.write_text("")
    assert config.load([str(odd)]).name == "my_run__2_-{time}"


def test_arguments_may_begin_with_dashes() -> None:
    assert config.load(["--model.latent_dim=3"]) == config.load(["model.latent_dim=3"])


@pytest.mark.parametrize("text", ["007", "no", "1e5", "on", "0x10", "2026-11-22", "1_000"])
def test_text_stays_what_was_typed(text: str, tmp_path: Path) -> None:
    assert config.load([f"name={text}", f"tracking.tags=[{text}]"]).tracking.tags == [text]
    (tmp_path / "some.yaml").write_text(f"name: {text}")
    asked = config.load([str(tmp_path / "some.yaml")])
    assert asked.name == text
    config.save(asked, tmp_path / "saved.yaml")
    assert config.read(tmp_path / "saved.yaml").name == text


def test_values_may_hold_equals_signs_and_colons() -> None:
    assert config.load(["data.root=/a=b: c#d"]).data.root == "/a=b: c#d"


def test_null_and_quoted_null_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("data: {mirror: null}\ntracking: {entity: 'null'}")
    asked = config.load([str(tmp_path / "some.yaml")])
    assert (asked.data.mirror, asked.tracking.entity) == (None, "null")
    config.save(asked, tmp_path / "saved.yaml")
    assert config.read(tmp_path / "saved.yaml") == asked
    assert config.load(["train.steps=null"]).train.steps is None


def test_interpolations_reach_other_keys_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    assert config.load(["name=vae-z${model.latent_dim}", "model.latent_dim=8"]).name == "vae-z8"
    for resolver in ("oc.env:SECRET", "oc.coerce:os,1", "oc.decode:1", "oc.create:1"):
        assert "hunter2" not in refusal(f"data.root=${{{resolver}}}")


def test_a_saved_config_comes_back_and_is_never_interpolated(tmp_path: Path) -> None:
    asked = config.load(["sample.codes=[[0,1],[2.5,-3]]", "name=a", "tracking.tags=[x,'1']", "train.precision=bf16"])
    config.save(asked, tmp_path / "config.yaml")
    assert config.read(tmp_path / "config.yaml") == asked
    (tmp_path / "config.yaml").write_text("data: {root: '${name}'}")
    with pytest.raises(UserError, match="interpolation"):
        config.read(tmp_path / "config.yaml")


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


def test_help_shows_every_key_with_type_default_and_meaning() -> None:
    text = config.help_text("usage")
    for knob in config.knobs():
        assert f"\n  {knob.key}=" in text
        assert len(knob.help) > 5
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


def test_a_resumed_run_keeps_what_was_settled_before() -> None:
    before = ["data.name=synthetic_digits", "train.precision=bf16", "data.image_shape=[1,28,28]"]
    merged = resumed(before, [])
    assert (merged.data.name, merged.train.precision) == ("synthetic_digits", "bf16")
    assert resumed(before, ["train.precision=fp32"]).train.precision == "fp32"


@pytest.mark.parametrize("change", ["train.epochs=9", "train.log_every=7", "runs_dir=other", "train.accumulate=2"])
def test_what_is_not_learned_from_may_change_in_a_resumed_run(change: str) -> None:
    resumed([], [change])


@pytest.mark.parametrize(
    "change", ["seed=1", "model.latent_dim=3", "objective.beta=2", "train.batch_size=50", "data.binarize=dynamic"]
)
def test_what_is_learned_may_not_change_in_a_resumed_run(change: str) -> None:
    with pytest.raises(UserError, match=change.split("=")[0]):
        resumed([], [change])


def test_a_longer_run_is_refused_where_the_schedule_depends_on_the_length() -> None:
    with pytest.raises(UserError, match=r"train.epochs \(was 5, now 9\)"):
        resumed(["optim.schedule=cosine"], ["optim.schedule=cosine", "train.epochs=9"])
    fixed = ["optim.schedule=cosine", "optim.decay_steps=100"]
    resumed(fixed, [*fixed, "train.epochs=9"])
