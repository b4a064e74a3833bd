"""The command line: complete help, every fault at once in one line each, exit codes, nothing heavy imported in vain."""

import dataclasses
import os
import re
import signal
import subprocess
import sys

import harness
import numpy as np
import pytest
import torch

import reproduce_zo_paper as zo

FIELDS = dataclasses.fields(zo.Config)


def in_a_process(code: str, *words: str) -> str:
    """Standard output of a fresh Python that runs the code in the script's folder."""
    command = [sys.executable, "-c", code, *words]
    environment = os.environ | {"COLUMNS": "10000", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def help_sections() -> dict[str, str]:
    """The text of --help, group by group."""
    code = "import sys, reproduce_zo_paper as zo; zo.build_parser().print_help()"
    sections: dict[str, str] = {}
    title = ""
    for line in in_a_process(code).splitlines():
        if re.fullmatch(r"[A-Za-z][^\n]*:", line):
            title = line[:-1]
        sections[title] = sections.get(title, "") + line + "\n"
    return sections


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_help_has_every_flag_in_its_group_with_its_default(field, help_sections):
    section = help_sections[field.metadata["group"]]
    entries = re.split(r"\n(?=  --)", section)
    (entry,) = [entry for entry in entries if re.match(rf"\s*--{field.name}\b", entry)]
    assert " ".join(field.metadata["help"].split()) in " ".join(entry.split())
    if field.default not in (None, False):
        assert f"(default: {field.metadata.get('shown', field.default)})" in " ".join(entry.split())
    for choice in field.metadata.get("choices", ()):
        assert choice in entry


def test_help_says_what_exit_codes_mean(help_sections):
    text = " ".join(" ".join(help_sections.values()).split())
    assert re.search(r"0 done.*2 .*3 .*4 .*130", text)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--no_such_flag", "1"], ["--mode", "Magic", "--epsilon", "0"], ["--dataset", "nowhere"]],
    ids=lambda words: " ".join(words),
)
def test_help_and_wrong_flags_import_nothing_heavy(words):
    code = """
import sys, reproduce_zo_paper as zo
try:
    code = zo.main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code or 0
heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib", "tokenizers"} & {name.split(".")[0] for name in sys.modules}
print("\\n", code, sorted(heavy))
"""
    expected = 0 if words == ["--help"] else 2
    assert in_a_process(code, *words).splitlines()[-1].strip() == f"{expected} []"


# ---- faults in flags -------------------------------------------------------------------------------------------------


@pytest.fixture
def faults(errors, tmp_path):
    """Calls main with flags that must be refused: its lines, without 'error: '. Nothing may be left in the log folder."""

    def call(*words) -> list[str]:
        logs = tmp_path / "logs"
        code, lines = errors(["--log_dir", logs, "--cache_dir", tmp_path / "cache", *words])
        assert code == 2, lines
        assert not list(logs.glob("*"))
        assert all(line.startswith("error: ") for line in lines), lines
        return [line.removeprefix("error: ") for line in lines]

    return call


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--learnin_rate", "1"], r"--learnin_rate: no such flag.*--learning_rate"),
        (["--querry_budget_q=4"], r"--querry_budget_q: no such flag.*--query_budget_q"),
        (["--learning", "1"], r"--learning: no such flag.*--learning_rate"),
        (["--parallel_q"], r"--parallel_q: no such flag.*--parallel_q_computation"),
        (["stray"], r"stray: not expected"),
        (["--parallel_q_computation", "true"], r"true: not expected"),
        (["--mode", "zo"], r"--mode zo: .*FO, ZO, Instruct, Calibrate.*ZO"),
        (["--model_size", "20m"], r"--model_size 20m: .*did you mean 20M"),
        (["--optimizer", "adamw"], r"--optimizer adamw: .*did you mean"),
        (["--scope", "part"], r"--scope part: .*full, head"),
        (["--query_budget_q", "0", "--direction", "gaussian"], r"--query_budget_q 0: only for .*--head closed_form"),
        (["--query_budget_q", "-3"], r"--query_budget_q -3: must be at least 0"),
        (["--query_budget_q", "2.5"], r"--query_budget_q 2.5: not a whole number"),
        (["--epsilon", "0"], r"--epsilon 0: must be above 0"),
        (["--epsilon", "-1"], r"--epsilon -1: must be above 0"),
        (["--epsilon", "nan"], r"--epsilon nan: must be finite"),
        (["--epsilon", "tiny"], r"--epsilon tiny: not a number"),
        (["--learning_rate", "inf"], r"--learning_rate inf: must be finite"),
        (["--learning_rate", "0"], r"--learning_rate 0: must be above 0"),
        (["--block_size", "4096"], r"--block_size 4096: .*2048"),
        (["--block_size", "1"], r"--block_size 1: must be at least 2"),
        (["--parallel_batch_size", "0"], r"--parallel_batch_size 0: must be at least 1"),
        (["--parallel_batch_size", "some"], r"--parallel_batch_size some: not a whole number or auto"),
        (["--seed", "-1"], r"--seed -1: must be at least 0"),
        (["--seed", str(2**63)], r"--seed .*2\*\*63"),
        (["--batch_size", "0"], r"--batch_size 0: "),
        (["--max_samples", "0"], r"--max_samples 0: "),
        (["--epochs", "0"], r"--epochs 0: "),
        (["--max_steps", "0"], r"--max_steps 0: "),
        (["--num_threads", "0"], r"--num_threads 0: "),
        (["--log_interval", "0"], r"--log_interval 0: "),
        (["--weight_decay", "-1"], r"--weight_decay -1: "),
        (["--mode", "Instruct"], r"--bp_interval: --mode Instruct needs it"),
        (["--mode", "Calibrate"], r"--bp_interval: --mode Calibrate needs it"),
        (["--mode", "ZO", "--bp_interval", "5"], r"--bp_interval: .*ZO"),
        (["--mode", "Instruct", "--bp_interval", "0"], r"--bp_interval 0: "),
        (["--warmup_steps", "5"], r"--warmup_steps: .*--use_lr_scheduler"),
        (["--min_lr", "1", "--use_lr_scheduler", "--learning_rate", "0.1"], r"--min_lr 1: "),
        (
            ["--mode", "ZO", "--query_data", "distinct", "--batch_size", "4", "--query_budget_q", "3"],
            r"--batch_size 4.*--query_budget_q 3",
        ),
        (["--rank", "2", "--direction", "gaussian"], r"--rank: .*lowrank"),
        (["--head", "closed_form", "--mode", "FO"], r"--head closed_form: not for --mode FO"),
        (["--direction", "feedback", "--mode", "FO"], r"--direction feedback: only --mode ZO and Instruct"),
        (["--direction", "feedback", "--mode", "Calibrate", "--bp_interval", "2"], r"--direction feedback: only --mode ZO and"),
        (["--head", "closed_form", "--head_learning_rate", "0"], r"--head_learning_rate 0: must be above 0"),
        (["--head_learning_rate", "1e-3"], r"--head_learning_rate: .*--head closed_form"),
        (["--max_decrease", "0.1", "--optimizer", "adam"], r"--max_decrease: .*--optimizer sgd"),
        (["--max_decrease", "0.1", "--mode", "FO"], r"--max_decrease: .*queries"),
        (["--tokenizer", "bpe:10"], r"--tokenizer bpe:10: "),
        (["--tokenizer", "bpe:many"], r"--tokenizer bpe:many: "),
        (["--run_name", "a/b"], r"--run_name 'a/b': "),
        (["--run_name", ""], r"--run_name '': "),
        (["--dataset", "fineweb-edv"], r"--dataset fineweb-edv: .*did you mean fineweb-edu\?"),
        (["--dataset", "no/such/file.txt"], r"--dataset no/such/file.txt: neither a file"),
        (["--replay_step", "3"], r"--replay_step: .*--replay"),
        (["--resume", "no/run"], r"--resume no/run: not a run directory"),
        (["--replay", "no/run"], r"--replay no/run: not a run directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_fault_is_one_line(faults, words, pattern):
    lines = faults(*words)
    assert len(lines) == 1, lines
    assert re.search(pattern, lines[0]), lines[0]


def test_every_fault_is_reported_at_once(faults):
    lines = faults(
        *("--mode", "Instruct", "--query_budget_q", "-1", "--epsilon", "-1", "--block_size", "9999", "--optimizer", "rmsprop"),
        *("--dataset", "tinystorys", "--seed", "x", "--lerning_rate", "1", "--tokenizer", "bpe:1", "--warmup_steps", "3"),
    )
    for name in (
        *("bp_interval", "query_budget_q", "epsilon", "block_size", "optimizer"),
        *("dataset", "seed", "lerning_rate", "tokenizer", "warmup_steps"),
    ):
        assert sum(line.startswith(f"--{name}") for line in lines) == 1, name
    assert len(lines) == 10


@pytest.mark.parametrize("words", [["--epsilon"], ["--epsilon", "--use_lr_scheduler"], ["--epsilon", "-1e-3"]], ids=" ".join)
def test_a_missing_value_hides_no_other_fault(faults, words):
    lines = faults("--query_budget_q", "-1", *words)
    assert any("--query_budget_q -1" in line for line in lines), lines
    assert any("--epsilon" in line for line in lines), lines


@pytest.mark.parametrize("flag", ["--log_dir", "--cache_dir"])
def test_a_folder_that_cannot_be_written_is_named(errors, tmp_path, flag):
    blocked = tmp_path / "file"
    blocked.write_text("")
    other = "--cache_dir" if flag == "--log_dir" else "--log_dir"
    code, lines = errors([flag, blocked / "below", other, tmp_path / "fine"])
    assert code == 2
    assert len(lines) == 1
    assert str(blocked / "below") in lines[0]
    assert flag in lines[0]


# ---- faults in data --------------------------------------------------------------------------------------------------


def refused(runs, capsys, **flags) -> str:
    """The one line of a run that must be refused for its data."""
    capsys.readouterr()
    code = runs.code(**flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_too_small_a_corpus_says_its_numbers(runs, capsys):
    line = refused(runs, capsys, max_samples=2, block_size=2048, batch_size=64)
    assert "64" in line
    assert "2048" in line
    assert re.search(r"\d+ training tokens are \d+ sequences", line)


def test_a_corpus_without_validation_documents_says_so(runs, capsys, tmp_path):
    text = next(text for text in (f"word {i} " * 2000 for i in range(100)) if not zo.is_validation(text))
    (tmp_path / "one.jsonl").write_text(f'{{"text": "{text}"}}\n', "utf-8")
    assert "validation" in refused(runs, capsys, dataset=tmp_path / "one.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", b""),
        ("empty.jsonl", b""),
        ("blank.txt", b"\n\n  \n"),
        ("wrong.pdf", b"%PDF-1.4 text"),
        ("latin.txt", "déjà vu\n\n".encode("latin-1") * 500),
        ("binary.txt", bytes(range(256)) * 200),
        ("binary.jsonl", bytes(range(256)) * 200),
        ("binary.parquet", bytes(range(256)) * 200),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": \n' * 5),
        ("column.jsonl", b'{"words": "no text here"}\n' * 50),
        ("column.csv", b"words,more\na,b\n" * 10),
        ("numbers.jsonl", b'{"text": 17}\n' * 50),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_file_is_refused_by_name(runs, capsys, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    line = refused(runs, capsys, dataset=tmp_path / name)
    assert name in line
    if name.startswith("column"):
        assert "words" in line


def test_a_file_that_is_refused_leaves_nothing_to_resume(runs, capsys, tmp_path):
    (tmp_path / "column.jsonl").write_bytes(b'{"words": "no text here"}\n' * 50)
    refused(runs, capsys, dataset=tmp_path / "column.jsonl")
    assert runs.main(["--resume", "auto", "--log_dir", str(tmp_path / "logs")]) == 2
    assert "no unfinished run" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_one_line_with_alternatives(tmp_path):
    """No retries, no silent other data."""
    words = ["--dataset", "tinystories", "--log_dir", str(tmp_path / "logs"), "--cache_dir", str(tmp_path / "cache")]
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "reproduce_zo_paper.py", *words]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert "hub" in lines[-1]
    for alternative in ("--dataset embedded", "a local file", "HF_HOME"):
        assert alternative in lines[-1]
    assert len(lines) == 1, lines


def test_a_tokenizer_that_does_not_load_is_named(runs, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "--tokenizer" in refused(runs, capsys, tokenizer=tmp_path / "empty")


def test_a_device_that_is_not_there_is_named(runs, capsys):
    if torch.backends.mps.is_available():
        pytest.skip("this machine has an MPS device")
    assert "--device mps" in refused(runs, capsys, device="mps")


# ---- training that becomes non-finite --------------------------------------------------------------------------------


def weights_are_finite(run) -> bool:
    """Whether the run kept a checkpoint, and its weights are finite."""
    import safetensors.numpy

    if not list((run / "checkpoints").glob("step_*")):
        return False

    arrays = safetensors.numpy.load_file(harness.last_checkpoint(run) / "model.safetensors")
    return all(np.isfinite(array).all() for array in arrays.values())


@pytest.mark.parametrize(("optimizer", "weight_decay"), [("sgd", 0.0), ("adam", 1e6)])
def test_training_that_becomes_non_finite_ends_with_3(runs, capsys, optimizer, weight_decay):
    """One line that names the step; what was saved is finite."""
    code = runs.code(mode="FO", optimizer=optimizer, weight_decay=weight_decay, learning_rate=1e6, max_steps=6)
    lines = capsys.readouterr().err.splitlines()
    assert code == 3, lines
    assert len(lines) == 1, lines
    assert re.match(r"error: step \d+", lines[0])
    assert weights_are_finite(harness.only_run(runs.folder / "logs"))


@pytest.mark.parametrize(
    "flags",
    [
        {"learning_rate": 1e6},
        {"learning_rate": 1e6, "max_decrease": 0},
        {"learning_rate": 1e38},
        {"learning_rate": 1e6, "optimizer": "adam", "weight_decay": 1e6},
        {"learning_rate": 1e6, "optimizer": "mudamw", "mode": "FO"},
        {"epsilon": 1e6},
        {"epsilon": 1e38},
        {"epsilon": 1e6, "parallel_q_computation": True},
        {"epsilon": 1e-38},
    ],
    ids=lambda flags: "-".join(str(value) for value in flags.values()),
)
def test_absurd_numbers_never_leave_a_traceback_or_broken_weights(runs, capsys, flags):
    code = runs.code(**flags)
    lines = capsys.readouterr().err.splitlines()
    assert code in (0, 2, 3), lines
    assert len(lines) == (code != 0), lines
    if code != 2:
        assert weights_are_finite(harness.only_run(runs.folder / "logs"))


def test_out_of_memory_says_which_flags_to_lower(runs, capsys, monkeypatch):
    def greedy(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr(zo.Objective, "losses", greedy)
    assert runs.code() == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    for name in ("--batch_size", "--block_size", "--model_size", "--optimizer sgd"):
        assert name in error


def test_an_interrupt_before_training_ends_with_130(runs, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the interrupt came too late")

    monkeypatch.setattr(zo.RunDirectory, "create", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell that starts tests with & takes away
    try:
        assert runs.code() == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_errors_of_the_program_itself_are_not_hidden(runs, monkeypatch):
    def broken(*args):
        raise RuntimeError("a mistake in the script")

    monkeypatch.setattr(zo.Objective, "losses", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        runs.code()


def test_epsilon_follows_the_dtype_unless_it_is_given():
    for words, epsilon in (([], 1e-3), (["--dtype", "bfloat16"], 3e-3), (["--dtype", "bfloat16", "--epsilon", "1e-3"], 1e-3)):
        config, given = zo.parse_config(words)
        assert config.epsilon == epsilon
        assert ("epsilon" in given) == ("--epsilon" in words)
