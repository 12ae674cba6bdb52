import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from vae_dist import config
from vae_dist.config import Config, fields, yaml_text
from vae_dist.errors import UserError
from vae_dist.training.first_stage import check_options

CONFIGS = sorted(set((REPOSITORY / "configs").glob("*.yaml")) - set((REPOSITORY / "configs").glob("sweep_*.yaml")))


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as refused:
        config.load(arguments)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_no_arguments_give_the_tutorials_config() -> None:
    loaded = config.load([])
    assert loaded.model == config.MLPConfig(latent_dim=40, hidden_dims=[400])
    assert (loaded.train.epochs, loaded.train.batch_size, loaded.optim.learning_rate) == (5, 100, 1e-3)
    assert config.load([str(REPOSITORY / "configs/tutorial.yaml")]) == loaded


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads_and_opens_with_its_command(path: Path) -> None:
    has_own = path.stem in ("resnet", "images", "first_stage", "fine_tune_decoder") or path.stem.startswith("kl_")
    own = ["data.path=pictures"] if has_own and path.stem != "kl_cifar10" else []
    if path.stem == "fine_tune_decoder":
        own.append("model.init_from=sd-vae")
    config.load([str(path), *own])
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("#") and "make train" in path.read_text()


def test_the_recipe_of_a_first_stage_goes_on_top_of_every_network() -> None:
    for name in "kl_f4", "kl_f8", "kl_f8_16ch", "kl_f16":
        alone = config.load([f"configs/{name}.yaml", "data.path=pictures"])
        loaded = config.load([f"configs/{name}.yaml", "configs/first_stage_recipe.yaml", "data.path=pictures"])
        assert (loaded.model, loaded.data, loaded.train.recipe) == (alone.model, alone.data, "autoencoder")
        check_options(loaded)


def test_the_packages_configs_are_found_by_name_from_any_folder() -> None:
    loaded = config.load(["configs/smoke.yaml", "seed=3"])
    assert loaded == config.load([str(REPOSITORY / "configs/smoke.yaml"), "seed=3"])
    assert (loaded.name, loaded.model) == ("smoke-{time}", config.MLPConfig(latent_dim=8, hidden_dims=[32]))
    study = config.load_study(["./configs/smoke.yaml", "model.latent_dim=2,5"])
    assert [run.name for run in study.configs] == ["smoke-latent_dim-2", "smoke-latent_dim-5"]


def test_a_users_own_config_of_that_name_wins() -> None:
    own = Path("configs/smoke.yaml")
    own.parent.mkdir()
    own.write_text("seed: 7")
    assert config.load(["configs/smoke.yaml"]) == replace(config.load(["seed=7"]), name="smoke-{time}")
    own.unlink()
    own.symlink_to("nothing")
    assert "can't read the config file configs/smoke.yaml" in refusal("configs/smoke.yaml")


@pytest.mark.parametrize("path", ["smoke.yaml", "configs/smok.yaml", "a/configs/smoke.yaml", "/configs/smoke.yaml"])
def test_a_missing_file_is_refused_with_the_names_of_the_packages_configs(path: str) -> None:
    names = ", ".join(f"configs/{path.name}" for path in CONFIGS)
    assert refusal(path) == f"can't read the config file {path}: No such file or directory; vae_dist has {names}"


def test_later_layers_win(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 1\nmodel: {latent_dim: 3}\ntrain: {epochs: 7}")
    second.write_text("seed: 2\nmodel: {latent_dim: 4}")
    loaded = config.load(["seed=3", str(first), str(second)])
    assert (loaded.seed, loaded.model, loaded.train.epochs) == (3, config.MLPConfig(latent_dim=4), 7)
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


def test_what_a_caller_does_with_a_config_reaches_no_other_one(tmp_path: Path) -> None:
    arguments = [str(REPOSITORY / "configs/smoke.yaml"), "model.hidden_dims=[7,8]", "optim.betas=[0.5,0.9]", "name=a"]
    config.save(config.load(arguments), tmp_path / "a.yaml")
    loaders: tuple[Callable[[], Config], ...] = (
        lambda: config.load(arguments),
        lambda: config.read(tmp_path / "a.yaml"),
        lambda: config.load_reader(config.load(arguments), ["tracking.tags=[one]"]),
    )
    for load in loaders:
        first, second = load(), load()
        text = config.to_yaml(second)
        assert first == second and config.to_yaml(first) == text
        assert isinstance(first.model, config.MLPConfig)
        first.model.hidden_dims.append(9)
        first.optim.betas[0] = 0.1
        first.tracking.tags.append("two")
        first.data.root = "elsewhere"
        assert first != second == load() and config.to_yaml(load()) == text != config.to_yaml(first)
    base = config.load(arguments)
    config.load_reader(base, []).optim.betas[0] = 0.1
    assert base == config.load(arguments)


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
        ("train.epoch=3", "did you mean train.epochs?"),
        ("optim.lr=3", "unknown key 'optim.lr'; did you mean optim.learning_rate?"),
        ("batch=3", "did you mean train.batch_size or evaluate.batch_size?"),
        ("--batch-size=3", "did you mean train.batch_size or evaluate.batch_size?"),
        ("model.z_dim=3", "did you mean model.latent_dim?"),
        ("dataset=mnist", "did you mean data.name?"),
        ("model=mlp", "model is a group of keys"),
        ("model.latent_dim=abc", "model.latent_dim must be int, not abc"),
        ("model.latent_dim=2.5", "model.latent_dim must be int, not 2.5"),
        ("model.latent_dim=-1", "model.latent_dim must be at least 1, not -1"),
        ("model.hidden_dims=400", "model.hidden_dims must be list of int, not 400"),
        ("model.hidden_dims=[400,0]", "model.hidden_dims must be at least 1, not 0"),
        ("optim.learning_rate=0", "optim.learning_rate must be above 0, not 0.0"),
        ("optim.learning_rate=inf", "optim.learning_rate must be a finite number"),
        ("objective.samples=0", "objective.samples must be at least 1, not 0"),
        ("optim.optimizer=sgd", "optim.optimizer must be one of adam, adamw, adamax, not sgd"),
        ("optim.betas=[0.9]", "optim.betas must be two numbers, such as [0.9,0.999], not [0.9]"),
        ("optim.betas=[0.9,1]", "optim.betas must be below 1, not 1.0"),
        ("optim.eps=0", "optim.eps must be above 0, not 0.0"),
        ("optim.weight_decay=-1", "optim.weight_decay must be at least 0, not -1.0"),
        ("optim.stages=[]", "optim.stages must be pairs [[step, rate], ...], such as"),
        ("optim.stages=[[0,1,2]]", "optim.stages must be pairs"),
        ("optim.stages=[0,1]", "optim.stages must be list of lists of float or null"),
        ("optim.stages=[[1,0.1]]", "the steps of optim.stages must be whole numbers that rise from 0, not [1.0]"),
        ("optim.stages=[[0,0.1],[2.5,0.2]]", "whole numbers that rise from 0, not [0.0, 2.5]"),
        ("optim.stages=[[0,0.1],[3,1],[3,2]]", "whole numbers that rise from 0, not [0.0, 3.0, 3.0]"),
        ("optim.stages=[[0,0]]", "the rates of optim.stages must be above 0, not 0.0"),
        ("ema.decay=1", "ema.decay must be below 1, not 1.0"),
        ("weights=both", "weights must be one of ema, raw, not both"),
        ("data.binarize=maybe", "data.binarize must be one of none, threshold, dynamic, not maybe"),
        ("train.precision=no", "train.precision must be one of auto, fp32"),
        ("train.batch_size=0", "train.batch_size must be at least 1"),
        ("checkpoint.keep=1", "checkpoint.keep must be at least 2"),
        ("data.download=maybe", "data.download must be bool, not maybe"),
        ("name=../../x", "can't be a folder's name"),
        ("name=.hidden", "0 to 9, '_', and after the first one '.' and '-', up to 128 of them"),
        ("name=zwölf", "can't be a folder's name: use A to Z, a to z, 0 to 9, '_'"),
        ("tracking.tags=[a", "not valid YAML"),
        ("sample.codes=[0,1]", "sample.codes"),
        ("nonsense", "give a YAML file, or key=value"),
        ("train.steps", "give a YAML file, or train.steps=VALUE"),
        ("--train.steps", "give a YAML file, or train.steps=VALUE"),
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


def test_files_may_have_dotted_keys_and_empty_groups() -> None:
    Path("some.yaml").write_text("model.latent_dim: 3\ndata:\nmodel:\n  hidden_dims: [5]\n")
    loaded = config.load(["some.yaml"])
    assert loaded.model == config.MLPConfig(latent_dim=3, hidden_dims=[5])


@pytest.mark.parametrize(
    ("key", "item"),
    [("sample.codes", "[0.5]"), ("tracking.tags", "a"), ("tracking.tags", "'\u200b\U000e0001'")],  # escaped in YAML
)
def test_the_largest_valid_config_can_be_read_again(key: str, item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_text, "MAX_VALUES", 300)
    monkeypatch.setattr(yaml_text, "MAX_BYTES", 8000)

    def is_too_large(count: int) -> bool:
        try:
            config.load(["name=a", f"{key}=[{','.join([item] * count)}]"])
        except UserError as error:
            assert "too large" in str(error) or "more than 300 values" in str(error)
            return True
        return False

    largest = bisect.bisect_left(range(400), True, key=is_too_large) - 1
    assert 20 < largest < 300
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
    assert "before the run stops (at least 0)" in " ".join(text.split())


def test_readers_may_not_change_the_model() -> None:
    stored = config.load(["name=a"])
    assert config.load_reader(stored, ["data.root=elsewhere", "sample.count=3"]).sample.count == 3
    with pytest.raises(UserError, match=r"model.latent_dim belongs to the training"):
        config.load_reader(stored, ["model.latent_dim=3"])
    with pytest.raises(UserError, match=r"did you mean sample.count"):
        config.load_reader(stored, ["sampel.count=3"])


@pytest.mark.parametrize(
    "argument",
    ["device=cpu", "output=there", "weights=raw", "data.root=there", "data.path=there", "data.pack=never",
     "data.pack_dir=there", "data.workers=2", "data.download=false", "data.mirror=https://a.org", "train.threads=2",
     "data.check=decode", "data.skip_damaged=true",
     "tracking.wandb=offline", "runtime.timeout=9", "evaluate.batch_size=9", "sample.seed=9", "encode.folder=there"],
)  # fmt: skip
def test_readers_choose_where_and_how_they_compute(argument: str) -> None:
    key, value = argument.split("=")
    stored = config.load(["name=a", "data.name=folder", "data.path=here", "data.image_shape=[1,8,8]"])
    assert config.as_text(config.flatten(config.load_reader(stored, [argument]))[key]) in (value, f"{value}.0")


def test_a_command_on_one_run_refuses_several() -> None:
    assert config.split_run(["a", "seed=1"]) == (Path("a"), ["seed=1"])
    with pytest.raises(UserError, match=r"give one run, not a, b"):
        config.split_run(["a", "seed=1", "b"])


def test_a_folder_whose_name_begins_with_a_dash_is_no_option() -> None:
    with pytest.raises(UserError, match="unknown option -a"):
        config.split_run(["-a"])
    Path("-a").mkdir()
    assert config.split_run(["-a"])[0] == Path("-a")


def resumed(before: list[str], now: list[str]) -> Config:
    return config.resume(config.load(["name=a", *now]), config.load(["name=a", *before]))


def test_a_resumed_run_keeps_what_auto_was_resolved_to() -> None:
    before = ["data.name=synthetic_digits", "train.precision=bf16", "data.image_shape=[1,28,28]"]
    merged = resumed(before, [])
    assert (merged.data.name, merged.train.precision) == ("synthetic_digits", "bf16")
    assert resumed(before, ["train.precision=fp32"]).train.precision == "fp32"
    gaussian = "objective.reconstruction=gaussian"
    assert resumed([gaussian, "objective.sigma=0.3"], [gaussian]).objective.sigma == 0.3
    with pytest.raises(UserError, match=r"objective\.sigma \(was 0\.3, now 0\.4\)"):
        resumed([gaussian, "objective.sigma=0.3"], [gaussian, "objective.sigma=0.4"])


@pytest.mark.parametrize(
    "change",
    ["train.epochs=9", "train.steps=9", "train.log_every=7", "runs_dir=other", "train.accumulate=2", "weights=raw",
     "train.compile=false", "train.nonfinite=skip", "train.max_skipped=3", "first_stage.perceptual=moved",
     "train.validate_every=3", "checkpoint.every=3", "data.check=decode", "train.precision=bf16"],
)  # fmt: skip
def test_options_that_do_not_change_learning_may_change_on_resume(change: str) -> None:
    resumed([], [change])


@pytest.mark.parametrize(
    "change",
    ["seed=1", "model.latent_dim=3", "objective.beta=2", "train.batch_size=50", "data.binarize=dynamic",
     "objective.bound=iwae", "objective.samples=2", "optim.optimizer=adamw", "optim.betas=[0.5,0.9]", "optim.eps=1e-4",
     "optim.weight_decay=0.1", "optim.schedule=linear", "optim.stages=[[0,0.1]]", "ema.decay=0.9",
     "train.precision=fp64"],
)  # fmt: skip
def test_options_that_change_learning_may_not_change_on_resume(change: str) -> None:
    with pytest.raises(UserError, match=change.split("=")[0]):
        resumed([], [change])


@pytest.mark.parametrize(("before", "now"), [(0.1, 0.2), (0.1, 0.0), (0.0, 0.1)])
def test_only_the_file_of_a_perceptual_loss_may_change_on_resume(before: float, now: float) -> None:
    recipe, name = ["train.recipe=autoencoder", "data.name=synthetic_digits"], "first_stage.perceptual"
    given, changed = ([*recipe, f"{name}={name}", f"{name}_weight={weight}"] for weight in (before, now))
    assert resumed(given, [*given, f"{name}=moved"]).first_stage.perceptual == "moved"
    with pytest.raises(UserError, match=rf"another {name}_weight \(was {before}, now {now}"):
        resumed(given, changed)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_weights_in_float64_stay_in_float64(precision: str) -> None:
    merged = ["train.precision=fp64"]
    if precision == "auto":
        assert resumed(merged, ["train.precision=auto"]).train.precision == "fp64"
        return
    with pytest.raises(UserError, match=rf"train\.precision \(was fp64, now {precision}\)"):
        resumed(merged, [f"train.precision={precision}"])


@pytest.mark.parametrize("schedule", ["optim.schedule=cosine", "optim.schedule=linear"])
def test_a_longer_run_is_refused_if_its_schedule_depends_on_its_length(schedule: str) -> None:
    with pytest.raises(UserError, match=rf"train.epochs \(was 5, now 9\), since {schedule} falls to 0 at the length"):
        resumed([schedule], [schedule, "train.epochs=9"])
    for fixed in "optim.decay_steps=100", "optim.stages=[[0,0.1]]":
        resumed([schedule, fixed], [schedule, fixed, "train.epochs=9"])


@pytest.mark.parametrize("bound", ["iwae", "iwae_dreg"])
@pytest.mark.parametrize("weight", ["objective.beta=0.5", "objective.beta_warmup_steps=3"])
def test_an_importance_weighted_bound_has_no_beta(weight: str, bound: str) -> None:
    assert f"objective.bound={bound} has no KL term to weigh" in refusal(f"objective.bound={bound}", weight)
    loaded = config.load([f"objective.bound={bound}", "objective.samples=50"])
    assert (loaded.objective.bound, loaded.objective.samples) == (bound, 50)


def test_the_doubly_reparameterised_gradient_is_for_one_level_of_latents() -> None:
    message = refusal("model.architecture=ladder", "objective.bound=iwae_dreg")
    assert message.endswith("model.architecture=ladder has several: use objective.bound=iwae")


def test_readers_choose_the_weights_and_runs_do_not_differ_by_them() -> None:
    stored = config.load(["name=a"])
    assert (stored.weights, config.load_reader(stored, ["weights=raw"]).weights) == ("ema", "raw")
    assert config.differing([stored, config.load(["weights=raw"])]) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.name=folder"], "data.name=folder needs data.path"),
        (["data.name=array"], "data.name=array needs data.path"),
        (["data.path=pictures"], "data.path is for data.name=folder or array, not for data.name=auto"),
        (["data.name=folder", "data.path=a", "data.channels=2"], "must be 1 .grey. or 3 .colour., not 2"),
        (["data.name=folder", "data.path=a", "data.binarize=dynamic"], "is for grey images: use data.channels=1"),
        (["data.background=#12"], "data.background=#12 is no colour"),
    ],
)
def test_own_images_need_a_path_and_options_that_fit(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        config.load(arguments)


def test_a_resumed_run_keeps_what_its_start_has_resolved() -> None:
    told = ["model.conditional=true", "data.classes=[a,b]"]
    stored = config.load(["data.validation_images=37", "data.test_images=12", "data.size=32", *told])
    resumed = config.resume(config.load(told[:1]), stored)
    assert (resumed.data.validation_images, resumed.data.test_images, resumed.data.size) == (37, 12, 32)
    assert resumed.data.classes == ["a", "b"]
    with pytest.raises(UserError, match=r"another data\.size"):
        config.resume(config.load([*told[:1], "data.size=64"]), stored)


@dataclass
class NarrowConfig(config.MLPConfig):
    architecture: str = "narrow"
    latent_dim: int = fields.option(3, "number of latents")
    width: int = fields.option(5, "of its own")


def test_an_architecture_of_ones_own_can_be_added_later_and_has_its_own_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert config.load([]).model == config.MLPConfig()  # a notebook has loaded a config before
    monkeypatch.setitem(config.ARCHITECTURES, "narrow", NarrowConfig)
    assert config.load(["model.architecture=narrow"]).model == NarrowConfig(latent_dim=3)
    assert config.load(["model.architecture=narrow", "model.width=7"]).model == NarrowConfig(width=7)
    assert "[int]\n        narrow: of its own" in config.help_text("")


def test_a_saved_config_of_an_architecture_that_the_process_lacks_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(config.ARCHITECTURES, "narrow", NarrowConfig)
        config.save(config.load(["model.architecture=narrow"]), tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"model\.architecture must be one of mlp, conv, .*, not narrow$"):
        config.read(tmp_path / "config.yaml")
