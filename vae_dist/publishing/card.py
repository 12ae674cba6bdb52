"""The model card of an export: README.md, as the Hugging Face Hub shows it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vae_dist.config import Config, training_command
from vae_dist.evaluation.metric_table import measurements, protocol_of
from vae_dist.models.vae import VAE
from vae_dist.publishing import autoencoder, markdown
from vae_dist.publishing.markdown import code, escape, number, table
from vae_dist.publishing.programs import BATCHES
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.reproduction import promise
from vae_dist.runs.run import RunDirectory
from vae_dist.terminal import invocation

SAMPLES, RECONSTRUCTIONS, EVALUATION = "samples.png", "reconstructions.png", "evaluation.json"

_SAFETY = """The weights are safetensors. `vae_dist.load` opens `model.safetensors`, `config.yaml`, `state.json` and
`manifest.json`, checks their sha256, and runs nothing that they hold. It never opens a `.pt2` file: such a file can run
code when it is loaded. Load one only if you trust where it comes from."""


class Subject(NamedTuple):
    """What a card is about."""

    checkpoint: Checkpoint
    config: Config  # without what belongs to the machine or its owner
    vae: VAE
    weights: str  # `ema`, the moving average, or `raw`
    evaluation: Mapping[str, Any] | None  # of this step and these weights; a file's, so of any content
    errors: Mapping[str, Mapping[str, float]]  # of the programs
    digests: Mapping[str, tuple[int, str]]  # bytes and sha256 of every other file, by name
    repository: str | None
    license: str | None


def model_card(subject: Subject) -> str:
    """Return the text of the card."""
    name = escape(subject.config.name)
    sections = {
        "Use": _use(subject),
        "Pictures": _pictures(subject, name),
        "Metrics": _metrics(subject),
        "Training": _training(subject),
        "Files": _files(subject),
        "Safety": _SAFETY,
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"---\n{_front_matter(subject)}\n---\n\n# {name}\n\n{_summary(subject)}\n\n{body}\n"


def _front_matter(subject: Subject) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    evaluation, config = subject.evaluation or {}, subject.config
    title = str(config.data.title)
    diffusers = [autoencoder.FORMAT] if autoencoder.FILES[0] in subject.digests else []
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=config.data.name,
            dataset_name=title,
            dataset_split=str(evaluation.get("split")),
            metric_type=metric.key,
            metric_name=f"{metric.title}, {unit}".rstrip(", "),
            metric_value=value,
        )
        for metric, value, _, unit in measurements(evaluation)
    ]
    data = ModelCardData(
        model_name=str(config.name),
        library_name="vae_dist",
        tags=["vae", "variational-autoencoder", config.model.architecture, *diffusers],
        license=subject.license,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _summary(subject: Subject) -> str:
    config, vae = subject.config, subject.vae
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    shapes = " and ".join(" x ".join(map(str, shape)) for shape in vae.latent_shapes(vae.image_shape))
    given = f", given one of {vae.classes} classes" if vae.classes else ""
    text = (
        f"A variational autoencoder of {escape(config.data.title)} (images of "
        f"{' x '.join(map(str, vae.image_shape))}: channels, height, width){given}. Its networks are "
        f"{escape(config.model.summary())} with {shapes} latents and {parameters:,} parameters; its likelihood is "
        f"{escape(vae.likelihood.description)}. The weights are "
        f"{'the moving average' if subject.weights == 'ema' else 'those'} after {subject.checkpoint.step:,} optimizer "
        "steps."
    )
    if vae.classes and config.data.classes:
        text += f" The classes are {', '.join(map(escape, config.data.classes))}, numbered from 0."
    return text


def _use(subject: Subject) -> str:
    labels = ", labels" if subject.vae.classes else ""
    place = f"hf://{subject.repository}" if subject.repository else "PATH/OF/THIS/FOLDER"
    comment = "  # or hf://USER/NAME, where it was uploaded" if subject.repository is None else ""
    shape, latents = ", ".join(map(str, subject.vae.image_shape)), subject.vae.latent_dim
    text = "With `vae_dist` installed:\n\n" + code(
        f'import vae_dist\n\nrun = vae_dist.load("{place}"){comment}\n'
        f"codes = run.encode(images{labels})  # images (N, {shape}) in [0, 1]; codes.mean (N, {latents})\n"
        f"pictures = run.decode(codes.mean{labels})",
        "python",
    )  # fmt: skip
    if autoencoder.FILES[0] in subject.digests:
        text += "\n\nWith diffusers:\n\n" + code(
            "from diffusers import AutoencoderKL\n\n"
            f'autoencoder = AutoencoderKL.from_pretrained("{subject.repository or place}")\n'
            f"latents = autoencoder.encode(2 * images - 1).latent_dist.mean  # images (N, {shape}) in [0, 1]\n"
            "pictures = (autoencoder.decode(latents).sample + 1) / 2",
            "python",
        )
    if "encoder.onnx" in subject.digests:
        feeds = ', "labels": labels' if labels else ""
        text += "\n\nWithout vae_dist, with ONNX:\n\n" + code(
            "import onnxruntime\n\n"
            'encoder = onnxruntime.InferenceSession("encoder.onnx", providers=["CPUExecutionProvider"])\n'
            'decoder = onnxruntime.InferenceSession("decoder.onnx", providers=["CPUExecutionProvider"])\n'
            f'mean, log_variance = encoder.run(None, {{"images": images{feeds}}})  '
            f"# float32 (N, {shape}) in [0, 1]{'; labels (N,) int64' if labels else ''}\n"
            f'(pictures,) = decoder.run(None, {{"latents": mean{feeds}}})',
            "python",
        )
    return text


def _pictures(subject: Subject, name: str) -> str:
    shown = {SAMPLES: "Samples from the prior", RECONSTRUCTIONS: "Held-out images over their reconstructions"}
    return "\n\n".join(
        f"{title}:\n\n![{title} of {name}]({file})" for file, title in shown.items() if file in subject.digests
    )


def _metrics(subject: Subject) -> str:
    evaluation, step = subject.evaluation, subject.checkpoint.step
    if evaluation is None:
        return (
            f"This checkpoint (step {step:,}) was not evaluated before the export. To do so:\n\n"
            + code("vae-dist eval PATH/OF/THIS/FOLDER")
        )  # fmt: skip
    rows = [
        [metric.title, number(value), number(error), unit] for metric, value, error, unit in measurements(evaluation)
    ]
    text = (
        f"Of {escape(evaluation.get('images'))} {escape(evaluation.get('split'))} images of "
        f"{escape(evaluation.get('dataset'))}: means over the images, and their standard errors.\n\n"
        + table(["metric", "mean", "standard error", "unit"], rows, right=1)
    )  # fmt: skip
    if evaluation.get("warning"):
        text += f"\n\n> **Not comparable with published likelihoods:** {escape(evaluation['warning'])}."
    protocol = protocol_of(evaluation).items()
    conditions = {escape(key).replace(r"\_", " "): value for key, value in protocol if key != "versions"}
    return f"{text}\n\nThe protocol of the evaluation:\n\n{markdown.facts(conditions)}"


def _training(subject: Subject) -> str:
    config, state = subject.config, subject.checkpoint.state
    length = f"{config.train.epochs} epochs" if config.train.steps is None else f"{config.train.steps:,} steps"
    versions = subject.checkpoint.manifest.versions
    values = {
        "step": f"{subject.checkpoint.step:,} of a training of {length}",
        "batch size": config.train.batch_size,
        "precision": config.train.precision,
        "processes": state.world_size,
        "threads per process": config.train.threads,
        "seed": config.seed,
        "skipped updates": state.skipped_updates,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    command = training_command(config, invocation.training(state.world_size, in_checkout=False))
    starts = RunDirectory(subject.checkpoint.run_dir).starts
    again = promise(starts, subject.checkpoint.step, "On the same machine and with the same versions")
    own = "`data.path` names only the last folder or file of where the images were. " if config.data.path else ""
    return f"{markdown.facts(values)}\n\n{own}{escape(again)}\n\n{code(command, 'sh')}"


def _files(subject: Subject) -> str:
    rows = [[f"`{name}`", f"{size:,}", f"`{sha256}`"] for name, (size, sha256) in subject.digests.items()]
    text = table(["file", "bytes", "sha256"], rows, right=1)
    if not subject.errors:
        return text
    compared = [
        [f"`{file}`", output, f"{error:.1e}"]
        for file, outputs in subject.errors.items()
        for output, error in outputs.items()
    ]
    return (
        f"{text}\n\nThe programs take any number of images or latents, and compute in float32. Each was compared with "
        f"the model in torch, in batches of {BATCHES.start} to {BATCHES.stop - 1}. The error is the largest "
        "difference over the largest value:\n\n"
        + table(["program", "output", "error"], compared, right=2)
    )  # fmt: skip
