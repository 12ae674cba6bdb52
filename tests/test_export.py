"""The export of a run: a folder that every command opens, programs that equal the model, and a card of its facts."""

import errno
import fcntl
import hashlib
import io
import json
import pickle
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import Mock

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from torch import Tensor, nn

import vae_dist
from tests.conftest import MakeConfig, opened
from tests.forked import ForkServer
from vae_dist import config, locks
from vae_dist.data import datasets
from vae_dist.errors import RunError, UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models import build_vae
from vae_dist.models.vae import VAE
from vae_dist.publishing import card, inference, programs
from vae_dist.publishing import export as exports
from vae_dist.publishing.export import _evaluation, export
from vae_dist.publishing.markdown import code, escape
from vae_dist.reports.report import report
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.terminal import progress
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

SHAPE = (1, 8, 8)
PARTS, CPU = ("encoder", "decoder"), ["CPUExecutionProvider"]
QUICK = ["evaluate.importance_samples=2"]
SECRETS = ["secret-entity", "secret-notes", "secret-tag", "secret-project"]
FILES = {
    "README.md", "config.yaml", "decoder.onnx", "decoder.pt2", "encoder.onnx", "encoder.pt2", "evaluation.json",
    "export.json", "manifest.json", "model.safetensors", "reconstructions.png", "samples.png", "state.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a moving average, evaluated."""
    arguments = [
        *smoke_arguments, f"runs_dir={tmp_path_factory.mktemp('runs')}", "name=a", "train.steps=10", "ema.decay=0.9",
        "tracking.entity=secret-entity", "tracking.notes=secret-notes", "tracking.tags=[secret-tag]",
        "tracking.project=secret-project",
    ]  # fmt: skip
    trained = train(config.load(arguments))
    evaluate(trained, QUICK)
    return trained


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    printed = io.StringIO()
    with redirect_stdout(printed):
        folder = export(run_dir, ["export.license=mit"])
    assert printed.getvalue() == ""
    return folder


def tensors(path: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- The programs


def shapes(entries: Sequence[Any]) -> dict[str, list[Any]]:
    return {entry.name: entry.shape for entry in entries}


def assert_programs_equal(vae: VAE, files: dict[str, bytes]) -> None:
    """Compare the programs with the model in float64, at other inputs than they were compared at when made."""
    exact = vae.double()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {part: onnxruntime.InferenceSession(files[f"{part}.onnx"], options, providers=CPU) for part in PARTS}
    images_shape, latents_shape = ["batch", *vae.image_shape], ["batch", vae.latent_dim]
    labels_shape = {"labels": ["batch"]} if vae.classes else {}
    assert shapes(sessions["encoder"].get_inputs()) == {"images": images_shape, **labels_shape}
    assert shapes(sessions["encoder"].get_outputs()) == {"mean": latents_shape, "log_variance": latents_shape}
    assert shapes(sessions["decoder"].get_inputs()) == {"latents": latents_shape, **labels_shape}
    assert shapes(sessions["decoder"].get_outputs()) == {"images": images_shape}
    loaded = {part: torch.export.load(io.BytesIO(files[f"{part}.pt2"])).module() for part in PARTS}
    for count in (*range(1, 8), 300):
        generator = torch.Generator().manual_seed(count)
        images = torch.rand(count, *vae.image_shape, generator=generator)
        latents = torch.randn(count, vae.latent_dim, generator=generator)
        labels = (torch.arange(count) % vae.classes,) if vae.classes else ()
        posterior = exact.infer(images.double(), *labels)
        expected: dict[str, list[Tensor]] = {
            "encoder": [posterior.mean, posterior.log_variance],
            "decoder": [exact.decode(latents.double(), labels=labels[0] if labels else None).mean],
        }
        for part, first in (("encoder", images), ("decoder", latents)):
            names = [entry.name for entry in sessions[part].get_inputs()]
            feeds = {name: tensor.numpy() for name, tensor in zip(names, (first, *labels), strict=True)}
            for outputs in (sessions[part].run(None, feeds), loaded[part](first, *labels)):
                for output, target in zip(outputs, expected[part], strict=True):
                    error = np.abs(np.asarray(output) - target.numpy()).max() / np.abs(target.numpy()).max()
                    assert error < 1e-5, (part, count)
                    assert np.asarray(output).dtype == np.float32


@pytest.mark.usefixtures("one_thread")
def test_the_programs_of_a_run_equal_its_model_at_any_batch(run_dir: Path, exported: Path) -> None:
    run = opened(run_dir)
    assert_programs_equal(run.checkpoint.load_vae(run.config, torch.device("cpu")), contents(exported))


MODELS = {
    "conv": ["model.architecture=conv", "model.channels=[4,8]", "model.blocks=1", "model.latent_channels=2"],
    "ladder": ["model.architecture=ladder", "model.channels=[4,8]", "model.levels=[1,2]", "model.patch=2"],
    "resnet": ["model.architecture=resnet", "model.channels=[4,8]", "model.blocks=1", "model.attention=[1,2]"],
    "conditional": ["model.conditional=true", "data.classes=[a,b,c]", "model.hidden_dims=[16]"],
    "conditional conv": ["model.architecture=conv", "model.patch=2", "model.conditional=true", "data.classes=[a,b]"],
    "fp64": ["train.precision=fp64", "objective.reconstruction=gaussian", "objective.sigma_kind=learned"],
    "autoencoder_kl": [
        "model.architecture=autoencoder_kl",
        "model.channels=[4,8]",
        "model.blocks=1",
        "model.norm_groups=2",
        "objective.reconstruction=laplace",
    ],
    "laplace": ["objective.reconstruction=laplace", "model.hidden_dims=[30,20]", "objective.sigma=0.1"],
    "discretized_logistic_mixture": ["objective.reconstruction=discretized_logistic_mixture", "model.hidden_dims=[16]"],
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_programs_of_each_kind_of_model_equal_it_at_any_batch(model: str) -> None:
    settings = config.load(MODELS[model])
    vae = build_vae(settings, SHAPE).eval().requires_grad_(False)
    if settings.train.precision == "fp64":
        vae = vae.double()
    made = programs.make_programs(vae, ["onnx", "program"])
    assert_programs_equal(vae, dict(made.files))


def test_a_long_export_shows_its_progress(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    export(run_dir, [f"output={tmp_path / 'out'}", "export.formats=[program]"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("making programs: ")]
    assert [line.split()[2] for line in lines] == ["16%,", "33%,", "50%,", "66%,", "83%,", "100%,"]


def test_a_program_that_differs_from_the_model_is_not_published(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "LARGEST_ERROR", 1e-12)
    with pytest.raises(RunError, match=r"encoder.pt2 differs from the model: its output mean by .*e-\d\d of the larg"):
        export(run_dir, [f"output={tmp_path / 'out'}", "export.formats=[program]"])
    assert not list((tmp_path / "out/export").iterdir())


class _FixedBatch(nn.Flatten):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).reshape(len(input), -1)


def test_a_model_that_can_not_be_exported_is_named() -> None:
    vae = build_vae(config.load(["model.hidden_dims=[4]"]), SHAPE)
    vae.encoder = nn.Sequential(_FixedBatch(), nn.Linear(64, 2 * vae.latent_dim))
    with pytest.raises(UserError, match=r"the encoder can't be exported as a program .*; export.formats=\[\] e"):
        programs.make_programs(vae, ["program"])


def test_the_error_is_relative_to_the_largest_value() -> None:
    assert programs.relative_error(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0])) == 0.125
    assert programs.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert programs.relative_error(torch.zeros(2, 1), torch.zeros(2)) == float("inf")
    assert programs.relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_a_program_that_gives_nan_for_one_batch_of_all_is_not_published() -> None:
    decoder = programs.Decoder(build_vae(config.load(["model.hidden_dims=[4]"]), SHAPE))

    def run(arguments: tuple[Tensor, ...]) -> list[Tensor]:
        images = decoder(*arguments)[0]
        return [images * torch.nan if len(images) == 3 else images]

    with pytest.raises(RunError, match=r"decoder.onnx differs from the model: its output images by inf"):
        programs._errors(decoder, run, "decoder.onnx")


def test_formats_are_checked_before_anything_is_written(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"'onx' in export.formats; choose from onnx, program, diffusers"):
        export(run_dir, [f"output={tmp_path / 'out'}", "export.formats=[onx]"])
    with pytest.raises(UserError, match=r"formats=\[diffusers\] is for model.architecture=autoencoder_kl.* is mlp"):
        export(run_dir, [f"output={tmp_path / 'out'}", "export.formats=[diffusers]"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="the extra `export`: pip install onnx onnxruntime onnxscript"):
        export(run_dir, [f"output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


# ---- The folder


def test_the_folder_holds_exactly_what_its_record_says(exported: Path) -> None:
    assert exported.name == "step_00000010" and exported.parent.name == "export"
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]
    files = contents(exported)
    assert files.keys() == FILES
    record = json.loads(files["export.json"])
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    listed = {name: entry["sha256"] for name, entry in record["files"].items()}
    assert listed == {name: digest for name, digest in digests.items() if name not in ("export.json", "README.md")}
    assert record["errors"].keys() == {"encoder.onnx", "encoder.pt2", "decoder.onnx", "decoder.pt2"}
    assert all(error < 1e-5 for outputs in record["errors"].values() for error in outputs.values())


def test_the_weights_are_the_moving_average_or_the_trained_ones(run_dir: Path, exported: Path, tmp_path: Path) -> None:
    newest = run_dir / "checkpoints/step_00000010"
    raw = export(run_dir, ["weights=raw", "export.formats=[]", f"output={tmp_path / 'out'}"])
    assert raw.name == "step_00000010_raw"
    assert tensors(exported / "model.safetensors") == tensors(newest / "ema.safetensors")
    assert tensors(raw / "model.safetensors") == tensors(newest / "model.safetensors")
    assert (Checkpoint(exported).manifest.weights, Checkpoint(raw).manifest.weights) == ("ema", "raw")
    with pytest.raises(UserError, match="holds the moving average of the weights alone: leave out weights=raw"):
        evaluate(exported, ["weights=raw", *QUICK, f"output={tmp_path / 'none'}"])


def test_commands_read_the_folder_as_they_read_the_run(run_dir: Path, exported: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(exported, tmp_path / "moved"))
    root = config.argument("data.root", Checkpoint(run_dir / "checkpoints/step_00000010").config.data.root)
    of_run = evaluate(run_dir, [*QUICK, f"output={tmp_path / 'run'}"])
    assert evaluate(moved, [*QUICK, root]) == of_run
    samples = [sample(path, [f"output={tmp_path / path.name}", "sample.count=9"]) for path in (run_dir, moved)]
    assert len({(folder / "samples.safetensors").read_bytes() for folder in samples}) == 1
    assert report(moved, [root]).exists()
    again = export(moved, ["export.formats=[]", root])
    kept = ("model.safetensors", "config.yaml", "state.json", "samples.png", "reconstructions.png")
    assert [(again / name).read_bytes() for name in kept] == [(exported / name).read_bytes() for name in kept]
    assert json.loads((again / "evaluation.json").read_text()) == of_run


def test_no_training_resumes_from_an_export(exported: Path, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="is an export: it holds no optimizer state, so no training can resume from it"):
        train(make_config("name=b", f"checkpoint.resume={exported}"))
    assert not Path("runs/b").exists()


def test_nothing_of_the_machine_or_its_owner_is_in_the_files(run_dir: Path, exported: Path) -> None:
    stored = Checkpoint(run_dir / "checkpoints/step_00000010").config
    owner = stored.tracking.owner
    assert owner is not None and stored.tracking.id is not None
    words = [*SECRETS, owner, stored.tracking.id, str(run_dir.parent), str(stored.data.root), sys.prefix]
    words += [str(Path(programs.__file__).parents[2])]
    for name, content in contents(exported).items():
        texts = [content]
        if name.endswith(".pt2"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                texts += [archive.read(entry) for entry in archive.namelist()]
        assert not [word for word in words for text in texts if word.encode() in text], name


def test_of_paths_to_own_images_the_last_name_stays() -> None:
    own = config.load(["data.name=folder", "data.path=/home/me/cats", "data.group=/home/me/groups.csv"])
    data = inference.scrubbed(own).data
    assert (data.path, data.group) == ("cats", "groups.csv")
    network = config.load(["evaluate.inception=/home/me/inception", "evaluate.perceptual=/b", "evaluate.fid_samples=9"])
    assert inference.scrubbed(network).evaluate == config.load([]).evaluate
    assert inference.scrubbed(config.load(["first_stage.perceptual=/home/me/vgg"])).first_stage.perceptual == "vgg"
    machine = config.load(
        ["data.mirror=https://inside/mnist", "data.root=/home/me/data", "data.pack_dir=/home/me/packs"]
    )
    assert inference.scrubbed(machine).data == config.load([]).data
    expression = replace(own, data=replace(own.data, group="^(.*)/", path="/"))
    assert inference.scrubbed(expression).data.group == "^(.*)/"
    config.check(inference.scrubbed(expression))


def test_an_export_replaces_an_older_one_whole_or_not_at_all(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"output={tmp_path / 'out'}", "export.formats=[]"]
    folder = export(run_dir, arguments)
    before = contents(folder)

    def full(*arguments: Any, **options: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    for name in ("write_together", "sync"):
        with monkeypatch.context() as patch:
            patch.setattr(exports, name, full)
            with pytest.raises(UserError, match="No space left on device"):
                export(run_dir, arguments)
        assert contents(folder) == before
    with monkeypatch.context() as patch:
        rename = Path.rename

        def denied(path: Path, target: Path) -> Path:
            return rename(path, target) if not path.name.startswith(".writing") else full()

        patch.setattr(Path, "rename", denied)
        with pytest.raises(UserError, match="No space left on device"):
            export(run_dir, arguments)
    assert contents(folder) == before
    (folder / "old.txt").touch()
    export(run_dir, arguments)
    assert contents(folder) == before  # bitwise, and without the other file
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    with pytest.raises(UserError, match="can't be replaced by its own export"):
        export(folder, arguments)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from vae_dist.publishing import export

target, moment = Path(sys.argv[1]), int(sys.argv[2])
rename, renamed = Path.rename, []

def until_killed(path, to):
    if path.is_dir():
        if len(renamed) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        renamed.append(to)
    return rename(path, to)

Path.rename = until_killed
export._publish(target, {"weights": b"new"})
"""


def test_an_export_removes_what_killed_ones_have_left(tmp_path: Path, fork_server: ForkServer) -> None:
    folder, program = tmp_path / "export", tmp_path / "killed.py"
    program.write_text(KILLED)
    repository = str(Path(__file__).parents[1])
    kept, lost, fresh = (folder / f"step_0000000{number}" for number in range(3))
    for target in kept, lost:
        target.mkdir(parents=True)
        (target / "weights").write_bytes(b"old")
    others = {".notes", ".writing-notes", ".writing-step_00000001"}  # none of ours
    for name in others:
        (folder / name).mkdir()
    for target, moment in (kept, 0), (lost, 1):
        assert fork_server.run(str(program), str(target), str(moment), repository).returncode == -signal.SIGKILL
        assert [path for path in folder.glob(f".writing-{target.name}-*") if (path / "weights").exists()]
    assert not lost.exists() and (kept / "weights").read_bytes() == b"old"
    exports._publish(fresh, {"weights": b"new"})
    assert {path.name for path in folder.iterdir()} == others | {kept.name, lost.name, fresh.name}
    assert [(target / "weights").read_bytes() for target in (kept, lost, fresh)] == [b"old", b"old", b"new"]


def test_an_export_leaves_alone_what_a_live_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "export/step_00000001"
    live = tmp_path / "export/.writing-step_00000001-0123abcd"
    live.mkdir(parents=True)
    with locks.locked(tmp_path / ".export.lock", 0, ""), monkeypatch.context() as patch:
        patch.setattr(exports, "LOCK_SECONDS", 0)
        with pytest.raises(UserError, match=r"another command writes an export to .*export \(.*; wait for its end"):
            exports._publish(target, {"weights": b"new"})
        assert live.exists() and not target.exists()
    with monkeypatch.context() as patch:  # a file system without locks
        patch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOTSUP, "Operation not supported")))
        exports._publish(target, {"weights": b"new"})
    assert live.exists() and target.exists()


def test_without_the_test_images_there_are_no_reconstructions(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(data: config.DataConfig) -> None:
        raise UserError("data.path=cats does not exist")

    monkeypatch.setattr(datasets, "load_test", missing)
    folder = export(run_dir, [f"output={tmp_path}", "export.formats=[]"])
    assert not (folder / "reconstructions.png").exists() and (folder / "samples.png").exists()
    assert "reconstructions.png" not in (folder / "README.md").read_text()


@pytest.fixture
def opened_files() -> Iterator[list[str]]:
    """The names of files that are opened during a test. A hook can't be removed, but it can be idle."""
    names: list[str] = []
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event == "open":
            names.append(str(arguments[0]))

    sys.addaudithook(hook)
    yield names
    active = False


class _Payload:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (Path("executed"),)


def test_a_program_in_the_folder_is_never_opened(exported: Path, tmp_path: Path, opened_files: list[str]) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "hostile"))
    for part in PARTS:
        (folder / f"{part}.pt2").write_bytes(pickle.dumps(_Payload()))
    opened_files.clear()
    run = opened(folder)
    run.checkpoint.load_vae(run.config, torch.device("cpu"))
    vae_dist.load(folder).sample(2)
    sample(folder, ["sample.count=4"])
    export(folder, ["export.formats=[]"])
    assert any(name.endswith("model.safetensors") for name in opened_files)
    assert not [name for name in opened_files if name.endswith((".pt2", ".onnx"))]
    assert not Path("executed").exists()


# ---- The card


def test_the_card_states_the_evaluation_and_the_files(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "vae_dist" and front["license"] == "mit"
    evaluation = json.loads((exported / "evaluation.json").read_text())
    stated = {entry["type"]: entry["value"] for entry in front["model-index"][0]["results"][0]["metrics"]}
    assert stated["negative_elbo"] == evaluation["negative_elbo"]
    error = evaluation["standard_errors"]["negative_elbo"]
    assert f"| negative ELBO | {evaluation['negative_elbo']:,.4f} | {error:,.4f} |" in text
    assert f"{escape(evaluation['warning'][-30:])}." in text  # it is long
    for name in FILES - {"README.md"}:
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() in text
    assert "never opens a `.pt2` file" in text


def test_the_snippet_of_the_card_runs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (exported / "README.md").read_text()
    snippet = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "onnxruntime" in block)
    monkeypatch.chdir(exported)
    values: dict[str, Any] = {"images": np.zeros((3, 1, 28, 28), np.float32)}
    exec(snippet, values)
    assert values["pictures"].shape == (3, 1, 28, 28)


def test_the_evaluation_is_of_the_step_and_of_test_images_rather_than_others(run_dir: Path, tmp_path: Path) -> None:
    of_run = json.loads((run_dir / "evaluation.json").read_text())
    found = opened(run_dir, [f"output={tmp_path}"])
    for other, expected in ({"step": 9}, 0.0), ({"split": "validation"}, 0.0), ({}, 1.0):
        newer = {**of_run, **other, "negative_elbo": of_run["negative_elbo"] + 1}
        (tmp_path / "evaluation.json").write_text(json.dumps(newer))
        chosen = _evaluation(found)
        assert chosen is not None and chosen["negative_elbo"] == of_run["negative_elbo"] + expected


def test_without_an_evaluation_of_this_step_and_weights_the_card_says_how_to_make_one(
    run_dir: Path, tmp_path: Path
) -> None:
    folder = export(run_dir, [f"output={tmp_path}", "export.formats=[]", "weights=raw"])
    text = (folder / "README.md").read_text()
    assert not (folder / "evaluation.json").exists()
    assert "was not evaluated before the export" in text and "vae-dist eval" in text


HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=y>", "[a](https://evil.example)", "![a](https://evil.example/p)",
    "https://evil.example", "www.evil.example", "a | b | c", "`code`", "```", "**bold** _it_ ~~x~~", "\\`", "&lt;b&gt;",
    "---\nlicense: x", "# title\n\n- item", "$x$", "@somebody", "a\u202eb\x1b[2J",
]  # fmt: skip


def rendered(text: str) -> str:
    return str(MarkdownIt("commonmark").enable("table").render(text))


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    shown = "".join(character if character.isprintable() else " " for character in text)
    expected = " ".join(shown.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert rendered(f"of {escape(text)}.") == f"<p>of {expected}.</p>\n"
    assert rendered(f"| a | b |\n| --- | --- |\n| {escape(text)} | 1 |").count("<td>") == 2
    html = rendered(f"before\n\n{code(text)}\n\nafter")
    assert html.startswith("<p>before</p>\n<pre><code>") and html.endswith("</code></pre>\n<p>after</p>\n")


def test_a_hostile_run_cannot_write_the_card(exported: Path) -> None:
    checkpoint = Checkpoint(exported)
    vae = checkpoint.load_vae(checkpoint.config, torch.device("cpu"))
    plain = dict.fromkeys(("split", "dataset", "images"), "word")
    for text in HOSTILE:
        settings = replace(checkpoint.config, data=replace(checkpoint.config.data, path=f"/x/{text}"))
        evaluation = {
            **dict.fromkeys(plain, text), "warning": text, "negative_elbo": text, "kl": 1.5, "standard_errors": text,
            "protocol": {text: [text], "versions": 3},
        }  # fmt: skip
        subject = card.Subject(checkpoint, settings, vae, "ema", evaluation, {}, {}, None, text)
        written = card.model_card(subject)
        front = yaml.safe_load(written.split("\n---\n")[0])
        assert front["license"] == text and front.keys() == {
            "library_name", "license", "tags", "model-index"
        }  # fmt: skip
        html = rendered(written.partition("\n---\n")[2])
        assert html.count("<h1>") == 1 and html.count("<h2>") == 5
        assert not re.search(r"<(?!/?(?:p|h1|h2|pre|code|table|thead|tbody|tr|th|td|strong|blockquote)\b)", html), html
