"""Numbers and names that parse but that a run can't use: the message names the key to change."""

from pathlib import Path

import pytest

from tests.conftest import MakeConfig
from vae_dist import config
from vae_dist.config import Config
from vae_dist.errors import RunError, UserError
from vae_dist.models.likelihoods import likelihood_kind
from vae_dist.reports.study import study
from vae_dist.training.loop import train
from vae_dist.training.milestones import _advice
from vae_dist.views.sampling import sample

GAUSSIAN = "objective.reconstruction=gaussian"
FP64 = "train.precision=fp64"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([GAUSSIAN, "objective.sigma=1e-10"], r"objective.sigma=1e-10 can't .* fp32: .* from 2.3e-10 to 9.2e\+18"),
        ([GAUSSIAN, "objective.sigma=1e30"], r"objective.sigma=1e\+30 can't"),
        ([GAUSSIAN, "objective.sigma=1e-100", FP64], "objective.sigma=1e-100 can't .* fp64: .* from 8.6e-78"),
        (["objective.beta=1e30"], r"objective.beta=1e\+30 can't .* use 0, or a value from 1.2e-38 to 1.8e\+19"),
        (["objective.beta=1e-40", "train.precision=bf16"], "objective.beta=1e-40 can't .* bf16"),
        (["optim.learning_rate=1e39"], r"optim.learning_rate=1e\+39 can't"),
        (["optim.learning_rate=1e39", FP64], r"optim.learning_rate=1e\+39 can't .* to 3.4e\+38"),
        (["optim.learning_rate=1e-40"], "optim.learning_rate=1e-40 can't"),
        (["optim.stages=[[0,0.1],[5,1e-40]]"], "optim.stages with the rate 1e-40 can't .* fp32"),
        (["optim.eps=1e-40"], "optim.eps=1e-40 can't .* fp32"),
        (["optim.weight_decay=1e39"], r"optim.weight_decay=1e\+39 can't .* use 0, or a value"),
        (["optim.max_grad_norm=1e-40"], "optim.max_grad_norm=1e-40 can't .* use a value at least 1.2e-38"),
    ],
)
def test_numbers_out_of_a_precisions_range_are_refused_first(
    arguments: list[str], message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(make_config("name=a", *arguments))
    assert not (tmp_path / "runs").exists()


def test_a_study_is_refused_before_the_first_of_its_runs(smoke_arguments: list[str], tmp_path: Path) -> None:
    arguments = [*smoke_arguments, f"runs_dir={tmp_path / 'runs'}", "name=s", "optim.learning_rate=1e-3,1e39"]
    with pytest.raises(UserError, match=r"optim.learning_rate=1e\+39 can't"):
        study(config.load_study(arguments))
    with pytest.raises(UserError, match=r"optim.eps=1e-40 can't be used in fp32"):  # what train.precision=auto allows
        study(config.load_study([*arguments[:-1], "optim.eps=1e-8,1e-40"]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["objective.sigma=1e-10"],  # a Bernoulli likelihood has none
        [GAUSSIAN, "objective.sigma=1e-20", FP64],
        ["objective.beta=0"],
        ["optim.learning_rate=1e39", "optim.stages=[[0,0.1]]"],  # stages replace it
        ["optim.eps=1e-40", FP64],
        ["objective.beta=1e30", FP64],
        ["optim.max_grad_norm=1e300"],
    ],
)
def test_numbers_within_a_precisions_range_are_accepted(arguments: list[str], make_config: MakeConfig) -> None:
    loaded = make_config(*arguments)
    config.check_numbers(loaded, has_scale=likelihood_kind(loaded.objective).has_scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([GAUSSIAN, "objective.sigma=1e-9"], r"in step 1 .* objective.sigma=1e-09 \(.*\)\. Try train.precision=fp64$"),
        (["optim.learning_rate=1e30"], r"in step 2 .* cause is optim.learning_rate=1e\+30 .* Try a lower optim"),
        (["train.nonfinite=skip", "optim.learning_rate=1e30"], r"were skipped .* cause is optim.learning_rate=1e\+30 "),
    ],
)
def test_a_diverged_run_names_the_most_unusual_setting(
    arguments: list[str], message: str, make_config: MakeConfig
) -> None:
    with pytest.raises(RunError, match=message):
        train(make_config("name=a", "train.log_every=1", *arguments))


def test_advice_omits_settings_in_use_or_without_effect(make_config: MakeConfig) -> None:
    def advice(*arguments: str, taken: int = 5) -> str:
        loaded: Config = make_config("train.precision=fp32", *arguments)
        return _advice(loaded, taken)

    assert advice().startswith("Try a lower optim.learning_rate, optim.max_grad_norm=100, optim.warmup_steps=500, or")
    done = advice("optim.max_grad_norm=10", "optim.warmup_steps=500", "train.nonfinite=skip")
    assert done == "Try a lower optim.learning_rate"
    assert "train.precision=fp32" in advice("train.precision=bf16") and "precision" not in advice()
    assert "optim" not in advice("optim.learning_rate=1e30", taken=0)
    assert "objective.beta=1e+18" in advice("objective.beta=1e18", taken=0)


def test_the_rate_of_a_stage_is_suspected_in_place_of_the_rate_that_it_replaces(make_config: MakeConfig) -> None:
    loaded = make_config("optim.learning_rate=9", "optim.stages=[[0,0.001],[5,5]]", "optim.weight_decay=3")
    assert config.suspects(loaded, has_scale=False) == [
        "optim.stages with the rate 5 (usual: 0.0001 to 0.003)",
        "optim.weight_decay=3 (usual: up to 0.1)",
    ]


def test_a_refused_branch_is_told_what_would_work(make_config: MakeConfig) -> None:
    run = train(make_config("name=a", "train.steps=2"))
    branch = ["name=b", f"checkpoint.resume={run}", "optim.learning_rate=0.01"]
    with pytest.raises(UserError) as refused:
        train(make_config(*branch))
    message = str(refused.value)
    assert "optim.learning_rate (was 0.001, now 0.01); leave optim.learning_rate as it was" in message
    assert f"or leave out checkpoint.resume={run}" in message
    with pytest.raises(UserError, match=r"is of step 2, and .*/b would end after step 2: nothing is left to train"):
        train(make_config(*branch[:2], "train.steps=2"))
    assert not run.with_name("b").exists()
    train(make_config(*branch[:2], "train.steps=3"))
    train(make_config("name=c", branch[2], "train.steps=1"))
    with pytest.raises(UserError, match="choose another name for a new run"):
        train(make_config("name=a", branch[2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tracking.project=team/digits"], "use tracking.entity=team tracking.project=digits"),
        (["tracking.project=a:b"], "W&B takes no tracking.project=a:b: use 1 to 128"),
        (["tracking.project=" + "a" * 129], "W&B takes no tracking.project=a*: use"),
        (["tracking.entity=a/b"], "W&B takes no tracking.entity=a/b: use"),
        (["tracking.tags=[good,'']"], "tracking.tags has '', which W&B does not take"),
        ([f"tracking.tags=[{'a' * 65}]"], "tracking.tags has 'a*', which"),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "online", "offline"])
def test_names_that_wandb_rejects_are_refused_with_the_arguments(arguments: list[str], message: str, mode: str) -> None:
    with pytest.raises(UserError, match=message):
        config.load([f"tracking.wandb={mode}", *arguments])
    stored = Config()
    stored.tracking.project = "of/old"  # a run that an earlier version trained without this check
    config.load_reader(stored, [])
    with pytest.raises(UserError, match=message):
        config.load_reader(stored, [*arguments, *(["tracking.project=a"] if "project" not in arguments[0] else [])])


def test_names_in_wandb_are_not_checked_if_it_is_disabled() -> None:
    config.load(["tracking.wandb=disabled", "tracking.project=a/b"])


def test_codes_that_can_not_be_decoded_are_refused(make_config: MakeConfig) -> None:
    run = train(make_config("name=a", "train.steps=1", "model.latent_dim=2"))
    for arguments, message in [
        (["sample.codes=[[1e39,0]]"], "sample.codes has a number that is too large for float32"),
        (["sample.kind=neighbours", "sample.radius=1e39"], "are not finite: give codes nearer to 0"),
    ]:
        with pytest.raises(UserError, match=message):
            sample(run, ["device=cpu", "tracking.wandb=disabled", *arguments])
