"""How long `import vae_dist` and `vae_dist.load` take beyond torch's own import, each time in a new process.

    python tests/benchmarks/loading.py RUN [--repeats 7]

Prints medians and quartiles in seconds: torch's import, then vae_dist's import and the loading of RUN.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

CODE = """
import sys, time
started = time.perf_counter()
import torch
imported = time.perf_counter()
import vae_dist
run = vae_dist.load(sys.argv[1])
print(imported - started, time.perf_counter() - imported)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    measured = []
    for _ in range(options.repeats + 1):  # the first one fills the disk's cache
        output = subprocess.run(
            [sys.executable, "-c", CODE, str(Path(options.run).resolve())],
            cwd=Path(__file__).resolve().parents[2], check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        measured.append([float(number) for number in output.split()])
    for name, seconds in zip(
        ("import torch", "import vae_dist and load"), zip(*measured[1:], strict=True), strict=True
    ):
        low, middle, high = statistics.quantiles(seconds, n=4)
        print(f"{name}: {middle:.2f} s ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
