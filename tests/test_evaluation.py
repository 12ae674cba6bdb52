import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import MakeConfig, opened
from vae_dist import checkpoint, data, runtime
from vae_dist.errors import UserError
from vae_dist.evaluation import evaluate, score
from vae_dist.objective import elbo_terms
from vae_dist.plan import FIXED_SEED, Stream, standard_normal
from vae_dist.sampling import sample
from vae_dist.trainer import train


@pytest.fixture
def run_dir(make_config: MakeConfig) -> Path:
    return train(make_config("name=a", "train.steps=10"))


def test_every_test_image_counts_once_also_when_the_last_block_is_ragged(
    run_dir: Path, make_config: MakeConfig
) -> None:
    """The oracle: the test images one by one."""
    result = evaluate(run_dir, ["evaluate.batch_size=64"])  # 200 images: three blocks and a ragged one
    assert result["images"] == 200 and result["split"] == "test" and result["step"] == 10

    found = opened(run_dir)
    vae = checkpoint.load_vae(found.folder, found.config, torch.device("cpu"))
    test = data.load_test(found.config.data)
    expected = []
    for index in range(200):
        image = data.to_unit(test.pixels[index : index + 1])
        noise = standard_normal(FIXED_SEED, Stream.EVALUATION, 0, range(index, index + 1), vae.latent_dim)
        expected.append(elbo_terms(vae(image, noise), image).negative_elbo)
    assert result["negative_elbo"] == pytest.approx(torch.cat(expected).double().mean().item(), abs=1e-4)
    assert result["negative_elbo"] == pytest.approx(result["reconstruction"] + result["kl"])


def test_an_evaluation_repeats_itself_bitwise_whatever_the_training_seed(run_dir: Path) -> None:
    assert evaluate(run_dir) == evaluate(run_dir)


def test_figures_are_written_where_the_contract_says(run_dir: Path) -> None:
    result = evaluate(run_dir)
    assert json.loads((run_dir / "evaluation.json").read_text()) == result
    assert json.loads((run_dir / "evaluations/step_00000010_test.json").read_text()) == result
    names = {"dataset", "split", "images", "step", "negative_elbo", "reconstruction", "kl"}
    assert names <= result.keys()
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test/negative_elbo"] == result["negative_elbo"] and last["step"] == 10
    assert (run_dir / "images/test_step_00000010.png").exists()


def test_figures_can_go_elsewhere(run_dir: Path, tmp_path: Path) -> None:
    before = sorted(run_dir.rglob("*"))
    evaluate(run_dir, [f"output={tmp_path / 'out'}"])
    sample(run_dir, [f"output={tmp_path / 'out'}"])
    assert (tmp_path / "out/evaluation.json").exists()
    assert sorted(run_dir.rglob("*")) == before


def test_an_older_checkpoint_can_be_evaluated(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=a", "checkpoint.every=5", "train.steps=10"))
    older = evaluate(run_dir / "checkpoints/step_00000005")
    assert older["step"] == 5
    assert older["negative_elbo"] > evaluate(run_dir)["negative_elbo"]


def test_a_run_that_was_moved_is_still_enough(run_dir: Path, tmp_path: Path) -> None:
    first = evaluate(run_dir)
    assert evaluate(run_dir.rename(tmp_path / "moved")) == first


def test_binarised_test_images_are_scored_as_they_were_drawn_once(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=a", "train.steps=10", "data.binarize=dynamic"))
    assert evaluate(run_dir) == evaluate(run_dir)
    assert evaluate(run_dir)["binarize"] == "dynamic"


def test_scores_do_not_depend_on_the_order_of_the_blocks(run_dir: Path) -> None:
    found = opened(run_dir, ["evaluate.batch_size=50"])
    test = data.load_test(found.config.data)
    with runtime.join(found.config) as world:
        vae = checkpoint.load_vae(found.folder, found.config, world.device)
        whole = score(vae, test.pixels, world, found.config)
        first = score(vae, test.pixels[:100], world, found.config)
    assert torch.equal(whole.kl[:100], first.kl)
    assert torch.equal(whole.reconstruction[:100], first.reconstruction)


def test_other_blocks_and_threads_move_an_images_figure_by_less_than_a_ten_thousandth(run_dir: Path) -> None:
    scores = []
    for arguments in (
        ["evaluate.batch_size=200"],
        ["evaluate.batch_size=37"],
        ["train.threads=1"],
        ["train.threads=2"],
    ):
        found = opened(run_dir, arguments)
        test = data.load_test(found.config.data)
        with runtime.join(found.config) as world:
            vae = checkpoint.load_vae(found.folder, found.config, world.device)
            result = score(vae, test.pixels, world, found.config)
            scores.append(result.reconstruction + result.kl)
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=0, atol=1e-3)
        assert abs(other.mean() - scores[0].mean()) < 1e-4


def test_samples_come_from_the_seed_and_more_of_them_begin_alike(run_dir: Path) -> None:
    few = load_file(sample(run_dir, ["sample.count=5"]) / "samples.safetensors")
    many = load_file(sample(run_dir, ["sample.count=700"]) / "samples.safetensors")
    other = load_file(sample(run_dir, ["sample.count=5", "sample.seed=1"]) / "samples.safetensors")
    assert many["images"].shape == (700, 1, 28, 28) and many["latents"].shape == (700, 8)
    torch.testing.assert_close(many["images"][:5], few["images"])
    assert torch.equal(many["latents"][:5], few["latents"])
    assert not torch.equal(other["latents"], few["latents"])
    assert few["images"].min() >= 0 and few["images"].max() <= 1


def test_samples_are_the_means_of_the_likelihood(run_dir: Path) -> None:
    tensors = load_file(sample(run_dir, ["sample.count=5"]) / "samples.safetensors")
    found = opened(run_dir)
    vae = checkpoint.load_vae(found.folder, found.config, torch.device("cpu"))
    torch.testing.assert_close(vae.decode(tensors["latents"]).mean, tensors["images"])


def test_chosen_codes_are_decoded_and_each_can_be_a_file(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=flat", "model.latent_dim=2", "train.steps=10"))
    codes = "[[0,0],[0,1],[1,1],[-1,-1],[-0.9,-0.9],[-0.5,-0.5]]"
    folder = sample(run_dir, [f"sample.codes={codes}", "sample.files=true"])
    tensors = load_file(folder / "samples.safetensors")
    assert tensors["latents"].tolist()[1] == [0.0, 1.0]
    assert sorted(path.name for path in folder.glob("0*.png")) == [f"{index:06d}.png" for index in range(6)]
    assert (folder / "grid.png").exists()


def test_codes_of_the_wrong_size_are_refused(run_dir: Path) -> None:
    with pytest.raises(UserError, match="codes of 2 numbers, but this model has 8 latents"):
        sample(run_dir, ["sample.codes=[[0,0]]"])
    with pytest.raises(UserError, match="codes of 1 or 8 numbers"):
        sample(run_dir, ["sample.codes=[[0],[0,0,0,0,0,0,0,0]]"])
