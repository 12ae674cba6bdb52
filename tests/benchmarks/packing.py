"""Measure packing: its speed against a thread that only decodes, and the start with many files.

    python tests/benchmarks/packing.py [FOLDER] [--images 400] [--size 64] [--repeats 5] [--files 100000]

FOLDER has the images that are packed; without it, JPEG files of 500 x 375 are made. Decoding in one thread and packing
take turns. Prints medians, with the least and the largest: the rate of packing as a part of one thread's rate times the
number of threads (of time on the clock, and of CPU time, which other programs disturb less).
"""

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from PIL import Image

from vae_dist.data import folder_index
from vae_dist.data.decoding import checked, thread_count
from vae_dist.data.packing import Packing, find, packed
from vae_dist.data.pixels import Rule, decode


def make_photographs(folder: Path, count: int) -> None:
    """Write JPEG files with noise of the amplitude 1 / frequency, as photographs have it."""
    draws = np.random.default_rng(0)
    rows, columns = np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / 500)
    for number in range(count):
        noise = draws.standard_normal((3, 375, 500))
        image = np.fft.irfft2(np.fft.rfft2(noise) * amplitude, (375, 500))
        image = (image - image.min()) / (image.max() - image.min()) * 255
        Image.fromarray(image.astype(np.uint8).transpose(1, 2, 0)).save(folder / f"{number:06}.jpg", quality=90)


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds and the CPU seconds that a call takes."""
    started, before = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - started, time.process_time() - before


def measure_rate(folder: Path, place: Path, size: int, repeats: int) -> None:
    found, rule, threads = folder_index.listed(folder), Rule(size), thread_count(None)

    def decode_all() -> None:
        for file in range(len(found)):
            decode(found.path(file), rule)

    def pack_all() -> None:
        shutil.rmtree(place, ignore_errors=True)
        packed(found, Packing(rule, place, is_main=False))

    decode_all()
    seconds, cpu, rates = [], [], []
    for _ in range(repeats):
        (one, one_cpu), (all_of_them, all_cpu) = timed(decode_all), timed(pack_all)
        seconds.append(one / threads / all_of_them)
        cpu.append(one_cpu / all_cpu)
        rates.append(len(found) / all_of_them)
    print(f"{len(found)} images at {size} x {size}, {threads} threads: {statistics.median(rates):.0f} images/s")
    for name, ratios in ("on the clock", seconds), ("of CPU time", cpu):
        print(f"  {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of decoding, {name}")


def measure_start(folder: Path, place: Path, count: int) -> None:
    """Time a folder of many small files: its headers, its packing, and what a later start looks at."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for number in range(count):
        if number % 1000 == 0:  # files of their own content would take longer to make than to measure
            (folder / f"{number // 1000:04}").mkdir()
        path = folder / f"{number // 1000:04}/{number:07}.png"
        if number % 1000 == 0:
            Image.fromarray(pixels).save(path)
            first = path
        else:
            shutil.copyfile(first, path)
    packing = Packing(Rule(8), place, is_main=False)
    for name, function in {
        "headers": lambda: checked(folder_index.listed(folder)),
        "packing": lambda: packed(folder_index.listed(folder), packing),
        "a later start": lambda: find(folder_index.listed(folder), packing),
    }.items():
        seconds, cpu = timed(function)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(f"{count} files, {name}: {seconds:.2f} s, {cpu:.2f} s of CPU; {memory:.0f} MiB at most so far")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, place = options.folder or Path(temporary) / "photographs", Path(temporary) / "packed"
        if options.folder is None:
            folder.mkdir()
            make_photographs(folder, options.images)
        measure_rate(folder, place, options.size, options.repeats)
        if options.files:
            measure_start(Path(temporary) / "many", place, options.files)
        print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
