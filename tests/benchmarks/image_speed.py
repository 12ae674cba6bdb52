"""Measure the training speed on a folder of images against other loops of the same network.

    python tests/benchmarks/image_speed.py FOLDER [key=value ...] [--repeats 7] [--steps 8] [--output FILE.json]

FOLDER has a folder per class, as torchvision's ImageFolder needs it. The arguments are those of `vae_dist/train.py`.
The loops of `contestants.py` take turns, as in `speed.py`: this package from the packed folder; a loop over the folder
as people write it, with ImageFolder and a DataLoader of 2 workers; and a good loop with the images in memory. All train
`model.architecture=conv` with Gaussian pixels, horizontal flips and 64 images a step, in fp32 and in bf16; of
`model.architecture=autoencoder_kl` the other loops train diffusers' class. On a machine that has other work,
`train.threads=1` compares better: the threads of a step wait for one another.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.speed import QUIET, machine, markdown, median, ratio, take_turns
from vae_dist import config as configs

LOOPS = {
    "ours": "this package, from the packed folder",
    "image_loader": "ImageFolder and DataLoader, 2 workers",
    "image_memory": "in-memory loop",
}
PRECISIONS = "fp32", "bf16"
SETTINGS = [
    "data.name=folder", "data.flip=true", "model.architecture=conv", "objective.reconstruction=gaussian",
    "objective.sigma=0.1", "train.batch_size=64", "train.compile=false", "device=cpu",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--repeats", type=int, default=7, help="2 or more")
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--output", type=Path)
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as directory:
        shared = [
            *QUIET,
            *SETTINGS,
            *options.settings,
            f"data.path={options.folder.resolve()}",
            f"runs_dir={directory}",
        ]
        contestants = {
            f"{loop} {precision}": (loop, [*shared, f"train.precision={precision}", f"name={precision}"])
            for precision in PRECISIONS
            for loop in LOOPS
        }
        turns = take_turns(contestants, options.steps, options.repeats)
        images = options.steps * configs.load(shared).train.batch_size
    rows = [
        [title, *(f"{images / median(turns, f'{loop} {precision}'):.0f}" for precision in PRECISIONS)]
        for loop, title in LOOPS.items()
    ]
    for title, theirs in (
        ("times as fast as the DataLoader", ["image_loader fp32", "image_loader bf16"]),
        ("times as fast as the in-memory loop", ["image_memory fp32", "image_memory bf16"]),
        ("times as fast as the in-memory loop in fp32", ["image_memory fp32", "image_memory fp32"]),
    ):
        rows.append([title, *(ratio(turns, f"ours {a}", b) for a, b in zip(PRECISIONS, theirs, strict=True))])
    rows.append(["loss of the last turn, nats", *(
        " / ".join(f"{turns[f'{loop} {precision}'][-1]['loss']:.0f}" for loop in LOOPS) for precision in PRECISIONS
    )])  # fmt: skip
    rows.append(["peak memory, MiB", *(
        " / ".join(f"{turns[f'{loop} {precision}'][-1]['memory']:.0f}" for loop in LOOPS) for precision in PRECISIONS
    )])  # fmt: skip
    print(f"{machine()}; {options.repeats} repeats of {options.steps} steps, medians and quartiles")
    print("\n".join(markdown(["images per second", *PRECISIONS], rows)))
    if options.output is not None:
        options.output.write_text(json.dumps({"machine": machine(), "images": images, "turns": turns}, indent=2) + "\n")


if __name__ == "__main__":
    main()
