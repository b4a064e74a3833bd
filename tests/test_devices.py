"""Every kind of step on an accelerator that is not there: no tensor on the wrong device, few values fetched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def fetched() -> dict[str, list[int]]:
    """What each case of fake_device.py fetches from the device a step, and how many groups of queries it has."""
    paths = {"PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent)))}
    words = [sys.executable, str(HERE / "fake_device.py")]
    done = subprocess.run(words, env=os.environ | paths, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_queries_fetch_once_a_group(fetched):
    """Losses, once a group (in place: once a step); dense families also which rows of the embedding are wanted."""
    plain = {name: v for name, v in fetched.items() if name.split()[-1] in ("place", "batched")}
    assert len(plain) == 10
    for name, (count, groups) in (plain | {name: fetched[f"half {name}"] for name in ("gaussian", "lowrank")}).items():
        looks = "aligned" in name  # the scale of a bound of |z|
        dense = not looks and "lowrank" not in name and "place" not in name
        assert count <= groups * (2 if dense else 1) + looks, name
    assert fetched["lora"] == [2, 2]  # nothing in the embedding
    assert fetched["last block"] in ([2, 2], [3, 2])  # whether the batch is that of the last step


def test_no_step_fetches_much(fetched):
    """A loss, the norms of what is measured, and what goes over to the other ranks."""
    assert all(count <= 8 for name, (count, _) in fetched.items() if not name.endswith("batched"))
