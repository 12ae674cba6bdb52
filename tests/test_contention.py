"""A training says so when other work keeps its threads from the CPU cores."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vae_dist.distributed.contention import Contention

REPOSITORY = str(Path(__file__).parents[1])

# Two processes on one core: each gets half of the time that it could use.
SHARED_CORE = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from vae_dist.distributed.contention import Contention

def compute():
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        pass

if os.fork() == 0:
    compute()
    os._exit(0)
contention = Contention()
print(contention.warning(2))
compute()
os.wait()
print(contention.warning(2))
print(contention.warning(1))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs processes that can be bound to a core")
def test_threads_that_other_work_keeps_from_the_cores_are_reported_and_threads_that_wait_for_data_are_not() -> None:
    waiting = Contention()
    with subprocess.Popen(
        [sys.executable, "-c", SHARED_CORE, REPOSITORY], stdout=subprocess.PIPE, text=True
    ) as process:
        time.sleep(2.5)
        assert waiting.warning(2) is None
        early, shared, single = process.communicate(timeout=60)[0].splitlines()
    assert early == "None"  # too short to tell
    assert "train.threads=1 may be several times as fast" in shared
    assert single == "None"  # it does what the warning says
