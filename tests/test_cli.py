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
import safetensors.numpy
import torch

import reproduce_zo_paper as zo

FIELDS = dataclasses.fields(zo.Config)


def in_a_process(*words: str, **environment) -> subprocess.CompletedProcess:
    """A fresh Python, done, in the script's folder."""
    environment = os.environ | {"COLUMNS": "10000", "NO_COLOR": "1"} | environment
    return subprocess.run([sys.executable, *words], cwd=harness.ROOT, capture_output=True, text=True, timeout=300, env=environment)


# ---- help ------------------------------------------------------------------------------------------------------------


def test_help_has_a_heading_a_group_and_in_it_every_flag_with_its_default():
    text = in_a_process("reproduce_zo_paper.py", "--help").stdout
    parts = re.split(r"^(\w.*):$", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2]))
    assert parts[1::2] == ["options", *dict.fromkeys(field.metadata["group"] for field in FIELDS)]
    for field in FIELDS:
        entries = [" ".join(entry.split()) for entry in re.split(r"\n(?=  --)", sections[field.metadata["group"]])]
        (entry,) = [entry for entry in entries if re.match(rf"--{field.name}\b", entry)]
        assert " ".join(field.metadata["help"].split()) in entry
        shown = field.metadata.get("shown", field.default)
        assert shown in (None, False) or f"(default: {shown})" in entry
        assert all(choice in entry for choice in zo.choices_of(field))
    assert re.search(r"0 done.*2 .*3 .*4 .*130", " ".join(text.split()))


def test_help_and_wrong_flags_import_nothing_heavy(tmp_path):
    code = """
import sys, reproduce_zo_paper as zo
codes = []
for words in (["--help"], ["--no_such_flag", "1"], ["--mode", "Magic", "--epsilon", "0"], ["--dataset", "nowhere"]):
    try:
        codes.append(zo.main(words))
    except SystemExit as stop:
        codes.append(stop.code or 0)
heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib", "tokenizers", "filelock"} & {n.split(".")[0] for n in sys.modules}
print("\\n", codes, sorted(heavy))
"""
    assert in_a_process("-c", code).stdout.splitlines()[-1].strip() == "[0, 2, 2, 2] []"


# ---- what flags come to ----------------------------------------------------------------------------------------------

DEFAULTS = {
    "": {"mode": "ZO", "direction": "gaussian", "optimizer": "sgd", "query_budget_q": 8, "epsilon": 1e-3, "learning_rate": 1e-3},
    "--mode FO": {"optimizer": "adam", "learning_rate": 1e-3, "clip_grad_norm": 1.0},
    "--direction feedback": {"query_budget_q": 1, "optimizer": "adam", "epsilon": 0.1, "learning_rate": 1e-3},
    "--direction aligned": {"query_budget_q": 8, "optimizer": "sgd", "max_decrease": 0.05},
    "--mode Instruct --bp_interval 5": {"direction": "feedback", "query_budget_q": 1, "optimizer": "mudamw", "learning_rate": 3e-3},
    "--mode Instruct --bp_interval 5 --direction gaussian": {"query_budget_q": 8, "optimizer": "mudamw", "epsilon": 1e-3},
    "--mode Calibrate --bp_interval 5": {"direction": "gaussian", "optimizer": "mudamw", "guided_learning_rate": 3e-3},
    "--mode Calibrate --bp_interval 5 --learning_rate 0.5": {"guided_learning_rate": 0.5},
    "--dtype bfloat16": {"epsilon": 3e-3},
    "--dtype bfloat16 --epsilon 1e-3": {"epsilon": 1e-3},
    "--dtype bfloat16 --direction feedback": {"epsilon": 0.1},
    "--scope layerwise --stage_epochs 3,1": {"optimizer": "sgd", "embedding_optimizer": None, "stage_epochs": "3,1"},
}


@pytest.mark.parametrize("words", DEFAULTS)
def test_defaults_follow_mode_direction_and_dtype_on_the_command_line_and_in_code(words):
    config, given = zo.parse_config(words.split())
    assert {name: getattr(config, name) for name in DEFAULTS[words]} == DEFAULTS[words]
    pairs = zip(words.split()[::2], words.split()[1::2])
    kinds = {"bp_interval": int, "learning_rate": float, "epsilon": float}
    values = {name[2:]: kinds.get(name[2:], str)(value) for name, value in pairs}
    assert given == set(values)
    assert zo.Config(**values) == config


# ---- faults in flags -------------------------------------------------------------------------------------------------


@pytest.fixture
def faults(errors, tmp_path, monkeypatch):
    """Calls main with flags that must be refused: its lines, without 'error: '. No file or folder may be left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(zo, "run_one", lambda *args: pytest.fail("the flags were accepted"))

    def call(*words) -> list[str]:
        code, lines = errors(words)
        assert code == 2, lines
        assert not list(tmp_path.iterdir())
        assert all(line.startswith("error: ") for line in lines), lines
        return [line.removeprefix("error: ") for line in lines]

    return call


NUMBERS = [field for field in FIELDS if field.type.split()[0] in ("int", "float")]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_every_number_has_bounds(faults, field):
    """One line, whatever else the flag would need; a number just as absurd below zero; none that is no number."""
    whole = field.type.startswith("int")
    for value in ("99999999999999999999", "1000000000001", "-99999999999999999999", "x", *([] if whole else ["1e300", "inf", "nan"])):
        if value == "1000000000001" and field.name == "seed":
            continue
        lines = faults(f"--{field.name}={value}")
        assert len(lines) == 1, lines
        assert re.match(rf"--{field.name} {value}: (must be|not a )", lines[0]), lines


@pytest.mark.parametrize(
    "words",
    [
        *("--query_budget_q 1000000000000", "--num_threads 3000000000", f"--seed {2**63}", "--block_size 1", "--batch_size 0"),
        *("--query_budget_q 2.5", "--epsilon 0", "--learning_rate 0", "--max_steps 0", "--guide_cosine 1", "--min_lr -1"),
        *("--parallel_batch_size some", "--tokenizer bpe:10", "--tokenizer bpe:many", f"--tokenizer bpe:{'9' * 20}"),
        *("--scope part", "--scope blocks:1-0", "--scope blocks:1", "--scope blocks:a-b", f"--scope blocks:0-{'9' * 20}"),
        *("--stage_steps 2,x", "--stage_steps 2,0", f"--stage_steps {'9' * 20}", "--stage_learning_rates 1e-3,-1"),
        *("--stage_learning_rates 1e300", "--stage_epochs 0", "--stage_steps", "--rank_timeout 0"),
    ],
)
def test_a_value_that_none_can_be_is_one_line_that_names_it(faults, words):
    name, *value = words.split()
    (line,) = faults(*words.split(), *(["--scope", "layerwise"] if name.startswith("--stage") else []))
    assert line.startswith(f"{words}: " if value else f"{name}: expected one argument")


REFUSED = {
    "--learnin_rate 1": r"--learnin_rate: no such flag.*--learning_rate",
    "--querry_budget_q=4": r"--querry_budget_q: no such flag.*--query_budget_q",
    "--learning 1": r"--learning: no such flag.*--learning_rate",
    "--lr 1": r"--lr: no such flag.*did you mean --learning_rate\?",
    "--parallel_q": r"--parallel_q: no such flag.*--parallel_q_computation",
    "stray": r"stray: not expected",
    "--parallel_q_computation true": r"true: not expected",
    "--mode zo": r"--mode zo: .*FO, ZO, Instruct, Calibrate.*mean ZO",
    "--model_size 20m": r"--model_size 20m: .*did you mean 20M",
    "--optimizer adamw": r"--optimizer adamw: .*did you mean",
    "--query_budget_q 0": r"--query_budget_q 0: only for .*--head closed_form",
    "--block_size 4096": r"--block_size 4096: .*2048",
    "--mode Instruct": r"--bp_interval: --mode Instruct needs it",
    "--mode Calibrate": r"--bp_interval: --mode Calibrate needs it",
    "--bp_interval 5": r"--bp_interval: has no effect without --mode Instruct or Calibrate",
    "--bp_dataset embedded": r"--bp_dataset: has no effect without --mode Instruct or Calibrate",
    "--warmup_steps 5": r"--warmup_steps: has no effect without --use_lr_scheduler",
    "--use_lr_scheduler --warmup_steps 10 --max_steps 10": r"--warmup_steps 10: as long as the run of 10 steps",
    "--min_lr 1 --use_lr_scheduler --learning_rate 0.1": r"--min_lr 1: ",
    "--learning_rate -1": r"--learning_rate -1: must be above 0",
    "--learning_rate -1 --min_lr 1 --use_lr_scheduler": r"--learning_rate -1: must be above 0",
    "--query_data distinct --batch_size 4 --query_budget_q 3": r"--query_data distinct: --batch_size 4.*--query_budget_q 3",
    "--rank 2": r"--rank: .*lowrank",
    "--mode FO --query_budget_q 4": r"--query_budget_q: has no effect without a mode with queries",
    "--mode FO --epsilon 1e-3": r"--epsilon: has no effect without queries",
    "--mode FO --direction lowrank": r"--direction: has no effect without a mode with queries",
    "--mode FO --parallel_q_computation": r"--parallel_q_computation: has no effect without queries",
    "--mode FO --query_data distinct": r"--query_data: has no effect without queries",
    "--mode FO --head closed_form": r"--head: has no effect without",
    "--mode FO --max_decrease 0.1": r"--max_decrease: .*queries",
    "--parallel_batch_size 4": r"--parallel_batch_size: has no effect without --parallel_q_computation",
    "--direction feedback --query_budget_q 0 --epsilon 0.1": r"--epsilon: has no effect without queries",
    "--direction feedback --query_budget_q 0 --parallel_q_computation": r"--parallel_q_computation: has no effect without queries",
    "--head_learning_rate 1e-3": r"--head_learning_rate: .*--head closed_form",
    "--max_decrease 0.1 --optimizer adam": r"--max_decrease: .*--optimizer sgd",
    "--direction aligned --optimizer mudamw": r"--optimizer mudamw: not for --direction aligned",
    "--carry stream": r"--carry: has no effect without --direction feedback",
    "--clip_grad_norm 1": r"--clip_grad_norm: has no effect without backpropagations",
    "--export_best": r"--export_best: has no effect without --export_dir",
    "--sample_interval 3": r"--sample_interval: has no effect without --prompt",
    "--text_column body": r"--text_column: has no effect without --dataset",
    "--run_name a/b": r"--run_name 'a/b': ",
    "--dataset fineweb-edv": r"--dataset fineweb-edv: .*did you mean fineweb-edu\?",
    "--dataset no/such/file.txt": r"--dataset no/such/file.txt: neither a file",
    "--init_from gpt2": r"--init_from gpt2: .*did you mean openai-community/gpt2\?",
    "--init_from no/model --model_size tiny": r"--model_size: has no effect without a new model",
    "--replay_step 3": r"--replay_step: .*--replay",
    "--resume no/run": r"--resume no/run: not a run directory",
    "--replay no/run": r"--replay no/run: not a run directory",
    "--compare nowhere": r"--compare nowhere: neither a run directory",
    "--compare": r"--compare: expected at least one argument",
    "--epsilon --use_lr_scheduler": r"--epsilon: expected one argument",
    "--mode Instruct --bp_interval 2 --scope layerwise": r"--scope layerwise: only --mode FO and ZO",
    "--scope layerwise --head closed_form": r"--scope layerwise: the head is trained with the embedding",
    "--scope layerwise --init_from owner/name": r"--scope layerwise: gives every block new weights",
    "--scope layerwise --epochs 2": r"--epochs: has no effect without a --scope other than layerwise",
    "--scope layerwise --stage_epochs 2,1 --stage_steps 1": r"--stage_epochs: has no effect",
    "--stage_steps 2": r"--stage_steps: has no effect without --scope layerwise",
    "--embedding_optimizer sgd": r"--embedding_optimizer: has no effect without --scope layerwise",
}


@pytest.mark.parametrize("words", REFUSED)
def test_one_fault_is_one_line(faults, words):
    (line,) = faults(*words.split())
    assert re.match(REFUSED[words], line), line


@pytest.mark.parametrize("name", ["", "a\nb", "-x", ".x", "x" * 300, "a\0b"])
def test_a_run_name_that_no_folder_should_have_is_refused(faults, name):
    (line,) = faults(f"--run_name={name}")
    assert line.startswith("--run_name ")


@pytest.mark.parametrize("action", ["--replay", "--compare", "--resume"])
def test_flags_beside_an_action_that_would_do_nothing_are_refused(faults, action):
    idle = {"--replay": "--learning_rate 1 --log_dir x", "--compare": "--mode FO --epsilon 1", "--resume": "--log_dir x"}[action]
    lines = faults(action, "no/run", *idle.split())
    assert [line.split(":")[0] for line in lines[:-1]] == sorted(idle.split()[::2])
    assert all(f"has no effect beside {action}" in line for line in lines[:-1])


def test_every_fault_is_reported_at_once(faults):
    lines = faults(
        *("--mode", "Instruct", "--query_budget_q", "-1", "--epsilon", "-1", "--block_size", "9999", "--optimizer", "rmsprop"),
        *("--dataset", "tinystorys", "--seed", "x", "--lerning_rate", "1", "--tokenizer", "bpe:1"),
    )
    names = ("bp_interval", "query_budget_q", "epsilon", "block_size", "optimizer", "dataset", "seed", "lerning_rate", "tokenizer")
    assert sorted(line.split(":")[0].split()[0] for line in lines) == sorted(f"--{name}" for name in names)


def test_a_refused_command_leaves_no_folder_behind(faults):
    """The fixture looks."""
    faults("--log_dir", "a/b/c", "--cache_dir", "d/e", "--epsilon", "-1")
    faults("--log_dir", "a/b/c", "--cache_dir", "d/e", "--export_dir", "f/g", "--mode", "FO", "--query_budget_q", "2")


@pytest.mark.parametrize("flag", ["--log_dir", "--cache_dir"])
def test_a_folder_that_cannot_be_written_is_named(errors, tmp_path, flag):
    (tmp_path / "file").write_text("")
    other = "--cache_dir" if flag == "--log_dir" else "--log_dir"
    code, (line,) = errors([flag, tmp_path / "file" / "below", other, tmp_path / "fine"])
    assert code == 2
    assert line.startswith(f"error: {flag} {tmp_path / 'file' / 'below'}: can't be written to")
    assert not (tmp_path / "fine").exists()


def test_a_zero_byte_is_a_prompt_and_no_fault():
    config, given = zo.parse_config(["--prompt", "\0"])
    assert (config.prompt, given) == ("\0", {"prompt"})


# ---- faults in data --------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(runs, capsys):
    """The one line of a run that must be refused for its data. It leaves nothing that could be resumed."""

    def call(**flags) -> str:
        capsys.readouterr()
        assert runs.code(**flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert not [*(runs.folder / "logs").glob("*")]
        return line

    return call


def test_too_small_a_corpus_says_its_numbers(refused):
    line = refused(max_samples=2, block_size=2048, batch_size=64)
    assert re.search(r"\d+ training tokens are \d+ sequences", line)
    assert {"64", "2048"} <= set(re.findall(r"\d+", line))


def test_a_corpus_without_validation_documents_says_so(refused, tmp_path):
    text = next(text for text in (f"word {i} " * 2000 for i in range(100)) if not zo.is_validation(text))
    (tmp_path / "one.jsonl").write_text(f'{{"text": "{text}"}}\n', "utf-8")
    assert "validation" in refused(dataset=tmp_path / "one.jsonl")


BAD_FILES = {
    "empty.txt": b"",
    "blank.txt": b"\n\n  \n",
    "wrong.pdf": b"%PDF-1.4 text",
    "latin.txt": "déjà vu\n\n".encode("latin-1") * 500,
    "binary.jsonl": bytes(range(256)) * 200,
    "binary.parquet": bytes(range(256)) * 200,
    "broken.jsonl": b'{"text": "fine"}\n{"text": \n' * 5,
    "column.jsonl": b'{"words": "no text here"}\n' * 50,
    "column.csv": b"words,more\na,b\n" * 10,
    "numbers.jsonl": b'{"text": 17}\n' * 50,
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_by_name(refused, tmp_path, name):
    (tmp_path / name).write_bytes(BAD_FILES[name])
    line = refused(dataset=tmp_path / name)
    assert name in line
    assert not name.startswith("column") or "words" in line


def test_a_hub_that_cannot_be_reached_is_one_line_with_alternatives(tmp_path):
    """No retries, no silent other data."""
    words = ["--dataset", "tinystories", "--log_dir", str(tmp_path / "logs"), "--cache_dir", str(tmp_path / "cache")]
    done = in_a_process("reproduce_zo_paper.py", *words, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert all(words in line for words in ("hub", "--dataset embedded", "a local file", "HF_HOME"))


def test_a_tokenizer_or_device_that_is_not_there_is_named(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "--tokenizer" in refused(tokenizer=tmp_path / "empty")
    assert torch.backends.mps.is_available() or "--device mps" in refused(device="mps")


# ---- training that can't go on ---------------------------------------------------------------------------------------


def weights_are_finite(run) -> bool:
    """Whether the run kept a checkpoint, and the weights of each are finite."""
    files = list((run / "checkpoints").glob("*/model.safetensors"))
    arrays = [array for file in files for array in safetensors.numpy.load_file(file).values()]
    return bool(files) and all(np.isfinite(array).all() for array in arrays)


ABSURD = {
    "backpropagation": {"mode": "FO", "optimizer": "sgd", "clip_grad_norm": 0, "learning_rate": 1e6, "max_steps": 6},
    "weight decay": {"mode": "FO", "optimizer": "adam", "learning_rate": 1e6, "weight_decay": 1e6, "max_steps": 9},
    "queries": {"learning_rate": 1e6, "max_decrease": 0},
    "weight decay of queries": {"learning_rate": 1e6, "optimizer": "adam", "weight_decay": 1e6},
    "epsilon": {"epsilon": 1e6, "parallel_q_computation": True},
    "tiny epsilon": {"epsilon": 1e-38},
    "feedback": {"direction": "feedback", "optimizer": "adam", "learning_rate": 1e6, "epsilon": 1e6},
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_numbers_never_leave_a_traceback_or_broken_weights(runs, capsys, case):
    """Where training becomes non-finite: exit code 3 and a line that names the step; what was saved is finite."""
    code = runs.code(**ABSURD[case])
    lines = capsys.readouterr().err.splitlines()
    assert code in ((3,) if ABSURD[case].get("mode") == "FO" else (0, 3)), lines
    assert [bool(re.match(r"error: step \d+", line)) for line in lines] == [True] * (code == 3), lines
    assert weights_are_finite(harness.only_run(runs.folder / "logs"))


def greedy_numpy() -> None:
    np.empty(1 << 60, np.uint8)


def greedy_python() -> None:
    raise MemoryError


def greedy_torch() -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")


def greedy_library() -> None:
    raise RuntimeError("Unable to allocate 9.1 TiB for an array")


@pytest.mark.parametrize("greedy", [greedy_numpy, greedy_python, greedy_torch, greedy_library], ids=lambda f: f.__name__)
def test_out_of_memory_says_which_flags_to_lower(runs, capsys, monkeypatch, greedy):
    monkeypatch.setattr(zo.Objective, "losses", lambda *args: greedy())
    assert runs.code() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(name in line for name in ("memory", "--batch_size", "--block_size", "--model_size", "--optimizer sgd"))


def test_errors_of_the_program_itself_are_not_hidden(runs, monkeypatch):
    def broken(*args):
        raise RuntimeError("a mistake in the script")

    monkeypatch.setattr(zo.Objective, "losses", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        runs.code()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_run_is_prepared_ends_it_at_once_and_leaves_nothing(runs, monkeypatch, number, code):
    def interrupted(*args):
        os.kill(os.getpid(), number)
        zo.time.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell that starts tests with & takes away
    try:
        monkeypatch.setattr(zo, "prepare_corpus", interrupted)
        assert runs.code() == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list((runs.folder / "logs").iterdir())
