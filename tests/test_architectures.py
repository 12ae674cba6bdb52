"""An architecture decides which keys of the model there are."""

import math
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.test_config import refusal, resumed
from vae_dist import config
from vae_dist.config import ARCHITECTURES, Config, ConvConfig, MLPConfig, ModelConfig
from vae_dist.errors import UserError
from vae_dist.reports import facts

CONV = "model.architecture=conv"
NAMES = "mlp, conv, ladder, resnet, autoencoder_kl"


def test_an_entry_has_its_name_the_shared_options_and_no_key_of_another_type() -> None:
    types: dict[str, str] = {}
    for name, model in ARCHITECTURES.items():
        assert model().architecture == name
        own = config.options(Config(model=model()))
        assert {option.key for option in own} >= {f"model.{item.name}" for item in fields(ModelConfig)}
        for option in own:  # a value is parsed before its architecture is known
            assert types.setdefault(option.key, option.type) == option.type
    assert types.keys() == {option.key for option in config.options()}


def test_the_last_architecture_wins_wherever_its_options_are_given() -> None:
    Path("some.yaml").write_text("model: {blocks: 2, architecture: conv, prior: other}")
    expected = ConvConfig(prior="other", channels=[8, 16], blocks=2)
    assert config.load(["model.channels=[8,16]", "some.yaml"]).model == expected
    assert config.load([CONV, "model.latent_dim=3", "model.architecture=mlp"]).model == MLPConfig(latent_dim=3)
    assert config.load(["name=conv", "model.architecture=${name}", "model.blocks=3"]).model == ConvConfig(blocks=3)
    assert config.load([CONV, "name=c${model.latent_channels}"]).name == "c4"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [CONV, "model.latent_dim=3"],
            "model.latent_dim does not apply to model.architecture=conv, which has model.channels, model.patch, "
            "model.blocks, model.latent_channels",
        ),
        (["model.channels=[8]"], "model.channels does not apply to model.architecture=mlp, which has model.latent_dim"),
        (["name=a${model.blocks}"], "name: model.blocks does not apply to model.architecture=mlp"),
        (
            ["model.architecture=cnn"],
            "model.architecture must be one of mlp, conv, ladder, resnet, autoencoder_kl, not cnn",
        ),
        (
            ["model.architecture=null"],
            "model.architecture must be one of mlp, conv, ladder, resnet, autoencoder_kl, not null",
        ),
        (
            ["model.architecture=[conv]"],
            f"model.architecture must be one of {NAMES}, not ['conv']",
        ),
        (
            [CONV, "model.architecture=[]", CONV],
            f"model.architecture must be one of {NAMES}, not []",
        ),
        (["model.architecture=${model.architecture}"], "takes a key whose value has no ${...}"),
        (["model.chanels=[8]"], "did you mean model.channels"),
        ([CONV, "model.channels=[]"], "model.channels needs at least one number"),
        ([CONV, "model.channels=[32,0]"], "model.channels must be at least 1, not 0"),
        ([CONV, "model.channels=[10000000]"], "the model's weights (model.channels, model.patch, model.blocks"),
        ([CONV, f"model.blocks={10**18}"], "the model's weights"),
        ([CONV, f"model.latent_channels={10**18}"], "the model's weights"),
        ([CONV, "data.image_shape=[1,4096,4096]", f"sample.count={10**9}"], "the latents of sample.count images"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: list[str], expected: str) -> None:
    assert expected in refusal(*arguments)


def test_a_file_with_another_architectures_key_is_named() -> None:
    Path("some.yaml").write_text("model: {latent_dim: 3}")
    assert refusal("some.yaml", CONV).startswith("some.yaml: model.latent_dim does not apply to")


def test_a_config_built_in_python_must_fit_its_architecture() -> None:
    config.check(Config(model=ConvConfig()))
    for model in ConvConfig(architecture="mlp"), MLPConfig(architecture="conv"), ModelConfig():
        with pytest.raises(UserError, match=r"model.architecture=(mlp|conv) does not fit .*Config"):
            config.check(Config(model=model))


@pytest.mark.parametrize("model", [ConvConfig(channels=[8], prior="a"), MLPConfig(hidden_dims=[])])
def test_a_saved_config_keeps_its_architecture(model: ModelConfig) -> None:
    loaded = replace(config.load(["name=a"]), model=model)
    config.save(loaded, Path("config.yaml"))
    assert config.read(Path("config.yaml")) == loaded
    assert config.load_reader(loaded, ["sample.count=3"]).model == model


def test_a_config_that_was_saved_before_there_were_priors_is_read() -> None:
    Path("config.yaml").write_text("model: {architecture: mlp, latent_dim: 2, hidden_dims: [2]}")
    assert config.read(Path("config.yaml")).model == MLPConfig(prior="standard_normal", latent_dim=2, hidden_dims=[2])


def test_help_says_which_architecture_a_key_is_for() -> None:
    text = config.help_text("usage")
    assert f"model.architecture=mlp   [one of {NAMES}]" in text
    assert "  mlp: number of latents (at least 1)" in text and "  conv: residual blocks at each" in text
    assert text.index("model.prior=") < text.index("model.hidden_dims=") < text.index("model.channels=")


def test_a_run_of_another_architecture_is_not_resumed_and_the_message_names_it() -> None:
    with pytest.raises(UserError) as refused:
        resumed(["model.latent_dim=3"], [CONV])
    assert "with another model.architecture (was mlp, now conv); choose" in str(refused.value)
    with pytest.raises(UserError, match=r"another model.blocks"):
        resumed([CONV], [CONV, "model.blocks=2"])
    resumed([CONV], [CONV, "train.checkpointing=true"])


def test_runs_differ_in_the_keys_that_several_of_them_have() -> None:
    runs = [["model.latent_dim=3"], ["model.latent_dim=4"], [CONV]]
    assert config.differing([config.load(run) for run in runs]) == ["model.architecture", "model.latent_dim"]
    assert config.differing([config.load(run) for run in runs[1:]]) == ["model.architecture"]
    assert config.differing([config.load([CONV, *more]) for more in ([], ["model.blocks=2"], [])]) == ["model.blocks"]


def test_a_study_varies_architectures_or_the_options_of_one() -> None:
    planned = config.load_study(["name=s", "model.architecture=mlp,conv"])
    assert [run.model for run in planned.configs] == [MLPConfig(), ConvConfig()]
    planned = config.load_study(["name=s", CONV, "model.channels=[8],[8,16]"])
    assert [run.name for run in planned.configs] == ["s-channels-8", "s-channels-8-16"]
    with pytest.raises(UserError, match=r"a study of model.architecture=conv needs several values of a key"):
        config.load_study([CONV])


def test_a_report_has_the_keys_of_its_run_and_the_command_that_repeats_it() -> None:
    loaded = config.load([CONV, "model.channels=[8,16]", "name=a"])
    shown = {setting.name: setting for setting in facts.settings(loaded)["model"]}
    common = ["architecture", "prior", "prior_components", "conditional"]
    assert list(shown) == [*common, "channels", "patch", "blocks", "latent_channels"]
    assert [name for name in shown if shown[name].is_changed] == ["architecture", "channels"]
    words = shlex.split(config.training_command(loaded, ["python", "vae_dist/train.py"]))
    assert words[:2] == ["python", "vae_dist/train.py"]
    assert config.load(words[2:]).model == loaded.model


def test_sizes_are_those_of_plain_layers() -> None:
    assert MLPConfig(latent_dim=3, hidden_dims=[5, 7]).weights_at_least([2, 4, 4]) == 2 * (32 * 5 + 5 * 7 + 7 * 3)
    assert ConvConfig().latents([1, 28, 28]) == math.prod([4, 7, 7]) and ConvConfig().latents([3, 128, 128]) == 4096
    assert MLPConfig(latent_dim=3).latents([1, 28, 28]) == 3
    assert (MLPConfig(hidden_dims=[5, 7]).summary(), MLPConfig(hidden_dims=[]).summary()) == ("mlp 5-7", "mlp")
    assert ConvConfig().summary() == "conv 32-64-128"
