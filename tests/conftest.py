"""What the tests share: the script importable, one token cache, small runs. Nothing here reaches the network."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing listens there
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if sys.platform == "linux":  # ranks meet on the loopback interface, whatever the host's name resolves to
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import harness  # noqa: E402
import pytest  # noqa: E402

import reproduce_zo_paper as zo  # noqa: E402


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return one worker more than there are cores: tests of kills and of ranks wait much of their time."""
    return 1 + (os.cpu_count() or 1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """The token cache of the whole test run."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def miniature(monkeypatch) -> None:
    """`--model_size tiny` is a model of 30 thousand parameters."""
    harness.shrink(monkeypatch)


class Runs:
    """The script on small numbers, its run directories under one folder."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache, self.pictures = folder, cache, False

    def flags(self, name: str = "logs", **flags) -> dict:
        return harness.fitting({"log_dir": self.folder / name, "cache_dir": self.cache} | flags)

    def code(self, name: str = "logs", **flags) -> int:
        """The exit code of a run of the miniature in this process."""
        return self.main(harness.argv(**self.flags(name, **flags)))

    def main(self, words: list[str]) -> int:
        with pytest.MonkeyPatch.context() as patch:
            harness.shrink(patch, self.pictures)
            return zo.main(words)

    def train(self, name: str = "logs", **flags) -> Path:
        """A run in this process that must succeed, alone in folder/name; its directory."""
        assert self.code(name, **flags) == 0
        return harness.only_run(self.folder / name)

    def resume(self, run: Path, **flags) -> int:
        return self.main(harness.argv(resume=run, **flags))

    def goes_on(self, max_steps: int, **flags) -> Path:
        """A run: the same one, resumed from the checkpoint before its last, which is damaged, and its replay are it."""
        whole = self.train("whole", **flags, max_steps=max_steps)
        run = self.train("logs", **flags, max_steps=max_steps, save_interval=2)
        (weights,) = harness.last_checkpoint(run).glob("*model.safetensors")  # or adapter_model.safetensors
        harness.damage(weights, "flipped")
        (run / "finished.json").unlink()
        self.complete(run, whole)
        assert self.replay(whole) == 0
        return whole

    def complete(self, run: Path, whole: Path, **flags) -> None:
        """Resumes a run, which must then be the same as one that nothing disturbed."""
        assert self.resume(run, **flags) == 0
        assert harness.differences(whole, run) == []

    def replay(self, run: Path, **flags) -> int:
        return self.main(harness.argv(replay=run, **flags))

    def start(self, name: str = "logs", fault: tuple = (), **flags) -> harness.Child:
        """A run in a process of its own."""
        words = harness.argv(**self.flags(name, **flags))
        return harness.Child(words, self.folder / f"{name}.out", fault)

    def ranks(
        self, count: int, name: str = "logs", faults: dict[int, tuple] | None = None, **flags
    ) -> list[harness.Child]:
        """A run in `count` processes of one thread each."""
        words = harness.argv(**self.flags(name, **{"num_threads": 1} | flags))
        return harness.ranks(count, words, self.folder / f"{name}.out", faults or {})

    def train_ranks(self, count: int, name: str = "logs", **flags) -> Path:
        """A run in `count` processes that must succeed, alone in folder/name; its directory."""
        children = self.ranks(count, name, **flags)
        assert [child.wait() for child in children] == [0] * count, [child.output() for child in children]
        return harness.only_run(self.folder / name)

    def start_resume(self, run: Path, fault: tuple = (), **flags) -> harness.Child:
        return harness.Child(harness.argv(resume=run, **flags), self.folder / "resume.out", fault)


@pytest.fixture
def runs(tmp_path, cache) -> Runs:
    return Runs(tmp_path, cache)


@pytest.fixture(scope="module")
def module_runs(tmp_path_factory, cache) -> Runs:
    """Runs whose results several tests of a module look at, without changing them."""
    return Runs(tmp_path_factory.mktemp("runs"), cache)


@pytest.fixture(scope="session")
def session_runs(tmp_path_factory, cache) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), cache)


@pytest.fixture(scope="session")
def whole(session_runs) -> Path:
    """A run of 8 steps that nothing disturbed."""
    return session_runs.train("whole", optimizer="adam", **harness.STEPS)


@pytest.fixture(scope="session")
def first_six(session_runs) -> Path:
    """The same run, ended after 6 steps, with checkpoints of steps 3 and 6; tests work on copies."""
    return session_runs.train("first_six", optimizer="adam", **harness.STEPS | {"max_steps": 6})


@pytest.fixture
def stopped(first_six, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(first_six, tmp_path / "logs" / first_six.name))


@pytest.fixture
def errors(capsys):
    """Calls the script's main; (exit code, its lines on standard error)."""

    def call(words: list[str]) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = zo.main([str(word) for word in words])
        return code, capsys.readouterr().err.splitlines()

    return call


@pytest.fixture
def failure(capsys):
    """Calls what must end with an exit code and one line on standard error, which has these words; the line."""

    def failing(words, call, *args, code: int = 2, **flags) -> str:
        capsys.readouterr()
        found = call(*args, **flags)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert (found, line[:7], str(words) in line) == (code, "error: ", True), line
        return line

    return failing


# Models of many kinds, by their names in transformers, as small as they can be.
SHAPE = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"max_position_embeddings": 64, "intermediate_size": 48}
GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
OWN = {"Qwen2": {"num_key_value_heads": 1}, "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "GPT2": GPT2}


@pytest.fixture
def saved(tmp_path):
    """Makes a model with its tokenizer in a folder, as transformers saves them."""
    import torch
    import transformers

    def save(architecture: str = "Llama", options: dict | None = None, **changes) -> Path:
        shape = (OWN[architecture] if architecture == "GPT2" else SHAPE | OWN.get(architecture, {})) | changes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            about = getattr(transformers, f"{architecture}Config")(**shape)
            transformers.AutoModelForCausalLM.from_config(about).save_pretrained(tmp_path / "model", **options or {})
        tokenizer = zo.trained_tokenizer(zo.embedded_passages()[:20], shape["vocab_size"])
        zo.save_tokenizer(zo.wrapped_tokenizer(tokenizer), tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.fixture
def tiny_llama():
    """A Llama with tied embeddings, grouped heads and a vocabulary of 61, in float32, with small random weights."""
    return harness.llama()


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Directions in blocks of 256 elements, so that even small tensors have several."""
    monkeypatch.setitem(zo.BLOCK_ELEMENTS, "cpu", 256)


@pytest.fixture
def workers():
    """One worker: tasks run inline."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with zo.Workers(torch.device("cpu")) as inline:
        yield inline
    torch.set_num_threads(before)
