"""Small runs of the script: in this process, or each in a process of its own that can be killed at any moment."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
for folder in (HERE, ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import reproduce_zo_paper as zo  # noqa: E402

# A model so small that a step takes milliseconds, and blocks so small that its largest matrix has several.
MINIATURE = zo.Size(32, 2, 2, 64, "bpe:300")
MINIATURE_BLOCK = 1 << 11

# ZO_TEST_DEVICE=cuda pytest: every run of the tests on a GPU.
DEVICE = os.environ.get("ZO_TEST_DEVICE", "cpu")

# Every default that matters is given, so that tests do not change with them; `fitting` leaves out those without effect.
FLAGS = {
    "mode": "ZO",
    "model_size": "tiny",
    "dataset": "embedded",
    "max_samples": 40,
    "batch_size": 2,
    "block_size": 16,
    "tokenizer": "bpe:300",
    "query_budget_q": 2,
    "epsilon": 1e-3,
    "direction": "gaussian",
    "query_data": "shared",
    "optimizer": "sgd",
    "learning_rate": 1e-4,
    "max_steps": 4,
    "log_interval": 1,
    "eval_interval": 4,
    "eval_samples": 4,
    "save_interval": 2,
    "keep_checkpoints": 100,
    "device": DEVICE,
    "num_threads": 2,
}
TIME_COLUMNS = ("seconds", "peak_memory_mib")

# Checkpoints after steps 3, 6 and 8; every second step is validated, so that a run of 6 steps is the start of one of 8.
STEPS = {"max_steps": 8, "save_interval": 3, "eval_interval": 2}


def argv(**flags) -> list[str]:
    """Flags as words; True is a bare flag, None and False leave it out."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return words


def fitting(given: dict) -> dict:
    """FLAGS with those given; a flag of FLAGS that has no effect beside them is left out."""
    flags = FLAGS | given
    if given.get("resume") or given.get("replay") or given.get("compare"):
        return given
    typed = {name: value for name, value in flags.items() if value is not None and name in zo.FIELDS}
    config = zo.Config(**{name: str(v) if isinstance(v, Path) else v for name, v in typed.items()})
    idle = {name for name in FLAGS if name not in given and zo.lacking(config, name)}
    return {name: value for name, value in flags.items() if name not in idle}


def shrink(patch: pytest.MonkeyPatch, pictures: bool = False) -> None:
    """Make `tiny` the miniature and blocks small; pictures are planned, but not rendered, and no disk is waited for."""
    from matplotlib.figure import Figure

    patch.setitem(zo.MODEL_SIZES, "tiny", MINIATURE)
    for device in ("cpu", "cuda"):
        patch.setitem(zo.BLOCK_ELEMENTS, device, MINIATURE_BLOCK)
    patch.setattr(os, "fsync", lambda descriptor: None)
    if not pictures:
        patch.setattr(Figure, "savefig", lambda self, file, **how: file.write(b"a picture"))


def llama(dtype: str = "float32", tied: bool = True, layers: int = 2):
    """A Llama of 7 thousand parameters with weights large enough that every one matters."""
    import torch
    import transformers

    about = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = transformers.LlamaForCausalLM(about)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.to(getattr(torch, dtype)).eval()


def corpus(config: zo.Config) -> zo.Corpus:
    """The tokens of a run."""
    import torch

    return zo.prepare_corpus(config, config.source, zo.given_tokenizer(config), torch.device("cpu"))


def only_run(log_dir: Path) -> Path:
    """The one run directory of a log directory."""
    runs = [path for path in log_dir.iterdir() if path.is_dir()]
    assert len(runs) == 1, f"expected one run in {log_dir}, found {runs}"
    return runs[0]


def metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def timeless(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the columns of time and memory."""
    return [{name: value for name, value in row.items() if name not in TIME_COLUMNS} for row in metrics(run)]


def column(run: Path, name: str) -> list[float]:
    """What metrics.csv has of it, from row to row."""
    return [float(row[name]) for row in metrics(run) if row[name]]


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def weights(run: Path, step: int | None = None, file: str = "model") -> dict:
    """The tensors of a run's checkpoint, of its last one unless a step is named."""
    from safetensors.torch import load_file

    folder = last_checkpoint(run) if step is None else run / "checkpoints" / f"step_{step:08d}"
    return load_file(folder / f"{file}.safetensors")


def moved(one: dict, other: dict) -> set[str]:
    """The names of the tensors that differ."""
    assert one.keys() == other.keys()
    return {name for name, value in one.items() if not value.equal(other[name])}


def differences(one: Path, other: Path) -> list[str]:
    """What differs, bit for bit, between two runs that should be the same."""
    found = []
    if timeless(one) != timeless(other):
        found.append("metrics.csv")
    if (one / "journal.jsonl").read_bytes() != (other / "journal.jsonl").read_bytes():
        found.append("journal.jsonl")
    ours, theirs = last_checkpoint(one), last_checkpoint(other)
    if ours.name != theirs.name:
        found.append(f"{ours.name} and {theirs.name}")
    names = sorted({path.name for folder in (ours, theirs) for path in folder.glob("*.safetensors")})
    return found + [name for name in names if (ours / name).read_bytes() != (theirs / name).read_bytes()]


def same_weights(one: Path, other: Path) -> bool:
    """Whether the last checkpoints of two runs have the same weights and optimizer state."""
    return not any(name.endswith(".safetensors") for name in differences(one, other))


def steps_of(run: Path) -> list[str]:
    return [row["step"] for row in metrics(run)]


def rewrite_config(run: Path, leave_out: tuple = (), **flags) -> None:
    """Changes flags in a run's config.json, or leaves some out, with a digest that fits."""
    about = json.loads((run / "config.json").read_text("utf-8"))
    about["flags"] = {name: value for name, value in (about["flags"] | flags).items() if name not in leave_out}
    about["flags_sha256"] = zo.flags_digest(about["flags"])
    (run / "config.json").write_text(json.dumps(about), "utf-8")


def at_storage_calls(patch, name: str, time_of_name: int, act) -> None:
    """Calls act() before each storage call of the n-th checkpoint of a name: a kill would leave what is there then."""
    active, times = [False], [0]

    def watched(function):
        def call(*args, **kwargs):
            if active[0]:
                active[0] = False
                act()
                active[0] = True
            return function(*args, **kwargs)

        return call

    save = zo.RunDirectory.save_checkpoint

    def saving(self, saved, *args):
        times[0] += saved == name
        active[0] = saved == name and times[0] == time_of_name
        try:
            return save(self, saved, *args)
        finally:
            active[0] = False

    patch.setattr(zo.RunDirectory, "save_checkpoint", saving)
    patch.setattr(zo, "flush", watched(zo.flush))
    for place, methods in ((os, ("unlink", "rmdir")), (Path, ("mkdir", "write_text", "rename", "replace"))):
        for method in methods:
            patch.setattr(place, method, watched(getattr(place, method)))


def damage(path: Path, how: str, everywhere: bool = False) -> None:
    """Truncates a file, empties it, or flips a bit in its middle (or in each of its bytes)."""
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "flipped":
        flipped = bytes(byte ^ 1 for byte in content) if everywhere else bytes([content[middle] ^ 4])
        path.write_bytes(flipped if everywhere else content[:middle] + flipped + content[middle + 1 :])
    else:
        path.write_bytes(content[:middle] if how == "truncated" else b"")


# ---- a process of its own ------------------------------------------------------------------------------------------


def limit_file_size(size: int) -> None:
    """Files that grow beyond `size` fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def full_disk_after(size: int, step: int) -> None:
    """The limit of `limit_file_size` from a step on."""
    measure = zo.Trainer.measure

    def limited(self, number):
        if number == step:
            limit_file_size(size)
        return measure(self, number)

    zo.Trainer.measure = limited


def full_disk_in_journal(step: int) -> None:
    """The record of a step is written in part, as on a full disk."""
    append, write = zo.Journal.append, os.write

    def torn(self, record) -> None:
        os.write = (lambda file, line: write(file, line[: len(line) // 2])) if record.step >= step else write
        try:
            append(self, record)
        finally:
            os.write = write

    zo.Journal.append = torn


def slow_steps(seconds: float, count: str = "") -> None:
    """Makes every pass of the model last, so that a signal arrives amid a step; a byte in `count` for each."""
    hidden = zo.Objective.hidden

    def slowly(self, *args, **kwargs):
        if count:
            with open(count, "ab") as file:
                file.write(b".")
        time.sleep(seconds)
        return hidden(self, *args, **kwargs)

    zo.Objective.hidden = slowly


def other_weights(step: int) -> None:
    """From the end of a step on, this process' weights are a little off."""
    settle = zo.Trainer.settle

    def drifted(self, number):
        if number == step:
            self.optimizer.tensors[0].matrix.add_(1e-3)
        return settle(self, number)

    zo.Trainer.settle = drifted


def nan_losses(step: int) -> None:
    """This process measures a loss that is not a number, in every query of a step."""
    own_losses = zo.QueryRule.own_losses

    def damaged(self, queries):
        return own_losses(self, queries) * (float("nan") if queries.step == step else 1.0)

    zo.QueryRule.own_losses = damaged


def in_folder(path: str) -> None:
    """The process is started in another folder."""
    os.chdir(path)


def _child(words: list[str], log: str, fault: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    # A forked process starts with the test runner's signal handling undone, like one from a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shrink(pytest.MonkeyPatch())
    if fault:
        globals()[fault[0]](*fault[1:])
    sys.exit(zo.main(words))


_context = None


def context():
    """Processes are forked from a server that has imported everything and computed nothing; CUDA can't be forked."""
    global _context
    if _context is None and DEVICE == "cuda":
        _context = multiprocessing.get_context("spawn")
    if _context is None:
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(["heavy_imports"])
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT), *([before] if before else [])])
        from multiprocessing import forkserver

        forkserver.ensure_running()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return _context


class Child:
    """The script in a process of its own; its output goes to a file."""

    def __init__(self, words: list[str], log: Path, fault: tuple = (), environment: dict[str, str] | None = None):
        self.log = log
        self.process = context().Process(target=_child, args=(words, str(log), fault, environment or {}))
        self.process.start()

    def wait(self, seconds: float = 120) -> int:
        """The exit code; a signal that ended it is negative."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.output()}"
        return self.process.exitcode

    def send(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def output(self) -> str:
        return self.log.read_text("utf-8") if self.log.exists() else ""

    def until(self, condition, seconds: float = 120) -> None:
        """Waits till the condition holds, or the process has ended."""
        end = time.monotonic() + seconds
        while self.process.is_alive() and not condition():
            assert time.monotonic() < end, f"waited {seconds} s in vain: {self.output()}"
            time.sleep(0.002)


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ranks(count: int, words: list, log: Path, faults: dict[int, tuple]) -> list[Child]:
    """The script in `count` processes, as torchrun would start them; `words` are theirs, or each one's own."""
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    if DEVICE == "cuda":  # as if each were on a machine of its own: one machine has a device for each of its processes
        common |= {"LOCAL_WORLD_SIZE": 1}
    here = range(count) if DEVICE == "cpu" else [0] * count
    own = [{key: str(v) for key, v in (common | {"RANK": n, "LOCAL_RANK": here[n]}).items()} for n in range(count)]
    words = words if isinstance(words[0], list) else [words] * count
    return [Child(words[n], log.with_suffix(f".{n}"), faults.get(n, ()), own[n]) for n in range(count)]


def errors_of(*children: Child) -> list[str]:
    """The errors that they said."""
    assert not any("Traceback" in child.output() for child in children)
    return [line for child in children for line in child.output().splitlines() if line.startswith("error: ")]


def journal(run: Path) -> list[dict]:
    """The lines of a run's journal, as they are."""
    path = run / "journal.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def records(log_dir: Path) -> int:
    """Whole lines in the journal of the only run, 0 before there is one."""
    return max((path.read_bytes().count(b"\n") for path in log_dir.glob("*/journal.jsonl")), default=0)
