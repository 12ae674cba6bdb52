"""Encoder and decoder as programs that need no vae_dist: ONNX files, and programs of torch.export.

A program takes any number of images or latents, of the shape that the model was trained on, and computes in float32.
Each is run as soon as it is made, and compared with the model. B batch, L latents, C, H, W image.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from importlib.metadata import version
from io import BytesIO
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vae_dist.errors import RunError, UserError
from vae_dist.models.vae import VAE
from vae_dist.plan import FIXED_SEED, Stream, standard_normal
from vae_dist.terminal.progress import progress

FORMATS = {"onnx": ".onnx", "program": ".pt2"}
LARGEST_ERROR = 1e-5
BATCHES = range(1, 8)  # of the comparison
ONNX_BYTES = 2**31 - 1  # a file of protobuf can't be longer

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # in messages of torch's exporter


class Encoder(nn.Module):
    """Images `(B, C, H, W)` in [0, 1], and labels `(B,)` int64 of a conditional model, to the posterior `(B, L)`."""

    name = "encoder"
    inputs: Sequence[str] = ("images",)
    outputs: Sequence[str] = ("mean", "log_variance")

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = _part(vae, without=None if vae.infers_with_decoder else "decoder")

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        posterior = self.vae.infer(images, labels)
        return posterior.mean, posterior.log_variance

    def example(self, rows: range) -> Tensor:
        """Images of noise, as many as `rows`."""
        shape = self.vae.image_shape
        noise = standard_normal(FIXED_SEED, Stream.PIXELS, 0, rows, math.prod(shape))
        return torch.special.ndtr(noise).float().unflatten(1, shape)


class Decoder(nn.Module):
    """Latents `(B, L)`, and labels `(B,)` int64 of a conditional model, to the means of p(x|z) `(B, C, H, W)`."""

    name = "decoder"
    inputs: Sequence[str] = ("latents",)
    outputs: Sequence[str] = ("images",)

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = _part(vae, without="encoder")
        self._prior, self._place = vae.prior, (vae.device, vae.dtype)  # of the whole model: it may need the encoder

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.vae.decode(latents, labels=labels).mean,)

    def example(self, rows: range) -> Tensor:
        """Draws from the prior, as many as `rows`."""
        noise = standard_normal(FIXED_SEED, Stream.PRIOR, 0, rows, self.vae.prior_numbers)
        return self._prior(noise.to(*self._place)).float().cpu()


class Programs(NamedTuple):
    """The files of programs, and how far each is from the model."""

    files: Mapping[str, bytes]
    errors: Mapping[str, Mapping[str, float]]  # by file and output: the largest of |a - b| over the largest of |b|


def check_formats(formats: Sequence[str], others: Sequence[str] = ()) -> None:
    """Raise UserError for a format that is neither known here nor in `others`, or lacks its libraries."""
    known = [*FORMATS, *others]
    if unknown := [name for name in formats if name not in known]:
        raise UserError(f"unknown format {unknown[0]!r} in export.formats; choose from {', '.join(known)}")
    if "onnx" in formats:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(
                "export.formats=[onnx] needs the libraries of the extra `export`: pip install onnx onnxruntime "
                "onnxscript; or use export.formats=[program]"
            ) from error


def versions(formats: Sequence[str]) -> dict[str, str]:
    """Return the versions of the libraries that make and run programs of these formats."""
    libraries = ["torch", *(["onnx", "onnxruntime", "onnxscript"] if "onnx" in formats else [])]
    libraries += [name for name in formats if name not in FORMATS]  # of a format that is a library's name
    return {library: version(library) for library in libraries}


@torch.no_grad()
def make_programs(vae: VAE, formats: Sequence[str]) -> Programs:
    """Make the programs of a model in each format of FORMATS, and compare them with the model.

    Raises UserError for a model that can't be exported, RunError if a program differs from the model by more than
    LARGEST_ERROR.
    """
    files: dict[str, bytes] = {}
    errors: dict[str, Mapping[str, float]] = {}
    modules = (Encoder(vae), Decoder(vae)) if formats else ()
    with (
        warnings.catch_warnings(),
        progress("making programs", len(modules) * (1 + 2 * len(formats)), is_main=True) as advance,
    ):
        # torch 2.10 and 2.11 warn of what they themselves do here.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        for module in modules:
            contents = _contents(module, formats, advance)
            for name, file in contents.items():
                errors[name] = _errors(module, _loaded(module, name, file), name)
                advance(1)
            files |= contents
    return Programs(files, errors)


def _contents(module: Encoder | Decoder, formats: Sequence[str], advance: Callable[[int], None]) -> dict[str, bytes]:
    """Make the files; `advance` counts the trace and each file. Raises UserError for a program that can't be made."""
    contents = {}
    try:
        traced = _traced(module)
        advance(1)
        for name in formats:
            contents[f"{module.name}{FORMATS[name]}"] = _MAKERS[name](module, traced)
            advance(1)
    except UserError:
        raise
    except Exception as error:  # a model of the user's own can fail in any way
        problem = _COLOURS.sub("", str(error)).strip().partition("\n")[0]
        raise UserError(
            f"the {module.name} can't be exported as a program ({type(error).__name__}: {problem[:200]}); "
            "export.formats=[] exports the weights alone"
        ) from error
    return contents


def _part(vae: VAE, without: str | None) -> VAE:
    """Copy a model to the CPU in float32, without one of its networks, if any."""
    part = deepcopy(vae).to("cpu", torch.float32)
    if without is not None:
        setattr(part, without, nn.Identity())
    return part


def _arguments(module: Encoder | Decoder, rows: range) -> tuple[Tensor, ...]:
    classes = module.vae.classes
    labels = (torch.arange(rows.start, rows.stop) % classes,) if classes else ()
    return (module.example(rows), *labels)


def _names(module: Encoder | Decoder) -> list[str]:
    return [*module.inputs, *(["labels"] if module.vae.classes else [])]


def _traced(module: Encoder | Decoder) -> torch.export.ExportedProgram:
    arguments = _arguments(module, range(2))
    batch = torch.export.Dim("batch", min=1)
    traced = torch.export.export(module, arguments, dynamic_shapes=(tuple({0: batch} for _ in arguments)))
    traced.example_inputs = None
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # it holds paths of this machine
    return traced


def _to_program(module: Encoder | Decoder, traced: torch.export.ExportedProgram) -> bytes:
    file = BytesIO()
    torch.export.save(traced, file)
    return file.getvalue()


def _to_onnx(module: Encoder | Decoder, traced: torch.export.ExportedProgram) -> bytes:
    names = _names(module)
    made = torch.onnx.export(
        traced, _arguments(module, range(2)), dynamo=True, verbose=False, external_data=False,
        input_names=names, output_names=list(module.outputs),
        dynamic_shapes=({0: "batch"}, *({} for _ in names[1:])),  # all share the first one's
    )  # fmt: skip
    assert made is not None
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # it holds paths of this machine
    content: bytes = made.model_proto.SerializeToString()
    if len(content) > ONNX_BYTES:
        raise UserError(
            f"the {module.name} takes {len(content)} bytes, more than an ONNX file can have: use "
            "export.formats=[program]"
        )
    return content


_MAKERS = {"onnx": _to_onnx, "program": _to_program}
_Run = Callable[[tuple[Tensor, ...]], Sequence[Any]]


def _loaded(module: Encoder | Decoder, name: str, content: bytes) -> _Run:
    """Return a function that runs a program's file, which this process has just made."""
    if name.endswith(FORMATS["program"]):
        program = torch.export.load(BytesIO(content)).module()
        return lambda arguments: program(*arguments)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = _names(module)
    return lambda arguments: session.run(
        list(module.outputs), {name: tensor.numpy() for name, tensor in zip(names, arguments, strict=True)}
    )


def _errors(module: Encoder | Decoder, run: _Run, name: str) -> dict[str, float]:
    errors = dict.fromkeys(module.outputs, 0.0)
    for count in BATCHES:
        start = count * (count - 1) // 2  # each batch has inputs of its own
        arguments = _arguments(module, range(start, start + count))
        for output, own, expected in zip(module.outputs, run(arguments), module(*arguments), strict=True):
            errors[output] = max(errors[output], relative_error(torch.as_tensor(own), expected))
    for output, error in errors.items():
        if not error <= LARGEST_ERROR:
            raise RunError(
                f"{name} differs from the model: its output {output} by {error:.2g} of the largest value, and "
                f"{LARGEST_ERROR:.0e} is the most; nothing is exported. Leave its format out of export.formats"
            )
    return errors


def relative_error(own: Tensor, expected: Tensor) -> float:
    """Return the largest of |own - expected| over the largest of |expected|; infinite for another shape, or for NaN."""
    if own.shape != expected.shape or own.isnan().any():
        return float("inf")
    difference = (own.double() - expected.double()).abs().amax().item()
    return difference / expected.abs().amax().item() if difference else 0.0
