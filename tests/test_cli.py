"""The command line: complete help, every fault at once in one line each, exit codes, nothing heavy imported in vain."""

import os
import re
import shlex
import signal
import subprocess
import sys

import harness
import numpy as np
import pytest
import safetensors.numpy

import reproduce_zo_paper as zo


def in_a_process(*words: str, **environment) -> subprocess.CompletedProcess:
    """A fresh Python, done, in the script's folder."""
    environment = os.environ | {"COLUMNS": "10000", "NO_COLOR": "1"} | environment
    how = {"cwd": harness.ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([sys.executable, *words], **how)


def test_help_has_a_heading_a_group_and_in_it_every_flag_with_its_default():
    text = in_a_process("reproduce_zo_paper.py", "--help").stdout
    parts = re.split(r"^(\w.*):$", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2]))
    assert parts[1::2] == ["options", *dict.fromkeys(field.metadata["group"] for field in zo.FIELDS.values())]
    for field in zo.FIELDS.values():
        entries = [" ".join(each.split()) for each in re.split(r"\n(?=  --)", sections[field.metadata["group"]])]
        (entry,) = [entry for entry in entries if re.match(rf"--{field.name}\b", entry)]
        assert " ".join(field.metadata["help"].split()) in entry
        shown = field.metadata.get("shown", field.default)
        assert shown is None or shown is False or f"(default: {shown})" in entry
        assert all(choice in entry for choice in zo.choices_of(field))
    assert re.search(r"0 done.*2 .*3 .*4 .*130", " ".join(text.split()))


def test_help_and_wrong_flags_import_nothing_heavy():
    code = """
import sys, reproduce_zo_paper as zo
def code(words):
    try:
        return zo.main(words.split())
    except SystemExit as stop:
        return stop.code or 0
codes = [code(words) for words in ("--help", "--no_such_flag 1", "--mode Magic --epsilon 0", "--dataset nowhere")]
heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib", "tokenizers", "filelock"}
print("\\n", codes, sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""
    assert in_a_process("-c", code).stdout.splitlines()[-1].strip() == "[0, 2, 2, 2] []"


DEFAULTS = """
    -> mode ZO, direction gaussian, optimizer sgd, query_budget_q 8, epsilon 0.001, learning_rate 0.001
    --mode FO -> optimizer adam, learning_rate 0.001, clip_grad_norm 1.0
    --direction feedback -> carry block, query_budget_q 0, optimizer adam, epsilon 0.1, learning_rate 0.001
    --direction feedback --carry branch -> query_budget_q 1, optimizer adam
    --direction feedback --query_budget_q 2 -> carry stream, optimizer adam
    --direction aligned -> query_budget_q 8, optimizer sgd, max_decrease 0.05
    --mode Instruct --bp_interval 5 -> direction feedback, query_budget_q 0, optimizer mudamw, learning_rate 0.003
    --mode Instruct --bp_interval 5 --direction gaussian -> query_budget_q 8, optimizer mudamw, epsilon 0.001
    --mode Calibrate --bp_interval 5 -> direction gaussian, optimizer mudamw, guided_learning_rate 0.003
    --dtype bfloat16 --epsilon 1e-3 -> epsilon 0.001
    --scope layerwise --stage_steps 3 -> optimizer sgd, stage_optimizers None, clip_grad_norm 0.0
    --mode FO --scope layerwise -> optimizer sgd, clip_grad_norm 0.0
    --scope layerwise --direction feedback -> optimizer adam, clip_grad_norm 0.0"""


@pytest.mark.parametrize("line", DEFAULTS.splitlines()[1:])
def test_defaults_follow_other_flags_on_the_command_line_and_in_code(line):
    words, expected = line.split("-> ")
    config, given = zo.parse_config(words.split())
    pairs = expected.split(", ")
    assert [f"{name} {getattr(config, name)}" for name in (pair.split()[0] for pair in pairs)] == pairs
    kinds = {"bp_interval": int, "query_budget_q": int, "learning_rate": float, "epsilon": float}
    pairs = zip(words.split()[::2], words.split()[1::2])
    values = {name[2:]: kinds.get(name[2:], str)(value) for name, value in pairs}
    assert given == set(values)
    assert zo.Config(**values) == config


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "reproduce_zo_paper.py"])
def test_every_command_that_is_documented_has_flags_that_fit(name):
    text = (harness.ROOT / name).read_text("utf-8")
    commands = re.findall(r"^ .*reproduce_zo_paper\.py (--[^#;&\n]*?)(?:  | [#;&（]|$)", text, re.MULTILINE)
    assert len(commands) > 3
    for words in commands:
        if not re.search("--(resume|replay|compare|init_from|dataset) ", words):  # which need something that is there
            zo.parse_config(shlex.split(words.replace("$rate", "1e-3")))


@pytest.fixture
def faults(errors, tmp_path, monkeypatch):
    """Calls main with flags that must be refused: its lines, without 'error: '. No file or folder may be left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(zo, "run_one", lambda *args: pytest.fail("the flags were accepted"))
    monkeypatch.setattr(zo.importlib.util, "find_spec", lambda name: None)  # no tracker is installed

    def call(*words) -> list[str]:
        code, lines = errors(words)
        assert code == 2, lines
        assert not list(tmp_path.iterdir())
        assert all(line.startswith("error: ") for line in lines), lines
        return [line.removeprefix("error: ") for line in lines]

    return call


NUMBERS = [field for field in zo.FIELDS.values() if field.type.split()[0] in ("int", "float")]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_every_number_has_bounds(faults, field):
    """One line, whatever else the flag would need."""
    values = ["99999999999999999999", "-99999999999999999999", "x"]
    values += ["2.5"] if field.type.startswith("int") else ["1e300", "inf", "nan"]
    for value in values if field.name == "seed" else ["1000000000001", *values]:
        (line,) = faults(f"--{field.name}={value}")
        assert re.match(rf"--{field.name} {value}: (must be|not a )", line), line


VALUES = f"""
    query_budget_q 1000000000000; num_threads 3000000000; seed {2**63}; block_size 1; epsilon 0; learning_rate 0;
    max_steps 0; guide_cosine 1; parallel_batch_size some; tokenizer bpe:10; tokenizer bpe:many; scope part;
    tokenizer bpe:{"9" * 20}; scope blocks:1-0; scope blocks:1; scope blocks:a-b; scope blocks:0-{"9" * 20};
    stage_epochs 0; stage_steps 2,x; stage_steps 2,0; stage_steps {"9" * 20}; stage_learning_rates 1e-3,-1;
    stage_learning_rates 1e300"""

USELESS = """
    bp_interval 5; bp_dataset embedded; warmup_steps 5; rank 2; query_budget_q 4 --mode FO; epsilon 1e-3 --mode FO;
    direction lowrank --mode FO; parallel_q_computation --mode FO; query_data distinct --mode FO;
    max_decrease 1 --mode FO; head closed_form --mode FO; parallel_batch_size 4; carry stream; export_best;
    epsilon 0.1 --direction feedback --query_budget_q 0;
    parallel_q_computation --direction feedback --query_budget_q 0; head_learning_rate 1e-3;
    max_decrease 0.1 --optimizer adam; clip_grad_norm 1; sample_interval 3; text_column body; stage_steps 2;
    model_size tiny --init_from no/model; epochs 2 --scope layerwise; stage_optimizers sgd; replay_step 3;
    stage_epochs 2,1 --scope layerwise --stage_steps 1"""


REFUSED = r"""
    --querry_budget_q=4 -> --querry_budget_q: no such flag.*mean --query_budget_q\?
    --lr 1 -> --lr: no such flag.*mean --learning_rate\?
    stray -> stray: not expected
    --mode zo -> --mode zo: .*FO, ZO, Instruct, Calibrate.*mean ZO
    --query_budget_q 0 -> --query_budget_q 0: only for .*--head closed_form
    --block_size 4096 -> --block_size 4096: .*2048
    --mode Instruct -> --bp_interval: --mode Instruct needs it
    --use_lr_scheduler --warmup_steps 10 --max_steps 10 -> --warmup_steps 10: as long as the run of 10 steps
    --learning_rate -1 --min_lr 1 --use_lr_scheduler -> --learning_rate -1: must be above 0
    --query_data distinct --batch_size 4 --query_budget_q 3 -> --query_data distinct: --batch_size 4.*--query_budget_q 3
    --direction aligned --optimizer mudamw -> --optimizer mudamw: not for --direction aligned
    --direction lowrank --optimizer mudamw -> --optimizer mudamw: not for --direction lowrank
    --dataset fineweb-edv -> --dataset fineweb-edv: .*mean fineweb-edu\?
    --tensorboard -> --tensorboard: its package is not installed; run: pip install tensorboard
    --track trackio -> --track trackio: its package is not installed; run: pip install trackio
    --init_from gpt2 -> --init_from gpt2: .*mean openai-community/gpt2\?
    --resume no/run -> --resume no/run: not a run directory
    --compare -> --compare: expected at least one argument
    --epsilon --use_lr_scheduler -> --epsilon: expected one argument
    --mode Instruct --bp_interval 2 --scope layerwise -> --scope layerwise: only --mode FO and ZO
    --scope layerwise --head closed_form -> --scope layerwise: the head is trained with the embedding
    --scope layerwise --init_from owner/name -> --scope layerwise: gives every block new weights"""


TABLE = [line.split(" -> ") for line in REFUSED.splitlines()[1:]]
TABLE += [
    (f"--{words}", rf"--{words.split()[0]}: has no effect without ") for words in " ".join(USELESS.split()).split("; ")
]
TABLE += [(f"--{words}", re.escape(f"--{words}: ")) for words in " ".join(VALUES.split()).split("; ")]


@pytest.mark.parametrize(("words", "pattern"), TABLE, ids=[words for words, _ in TABLE])
def test_one_fault_is_one_line(faults, words, pattern):
    """Of flags that no one has, that would do nothing, or whose value none can be."""
    own = "--scope layerwise" if words.startswith("--stage_") and "no effect" not in pattern else ""
    (said,) = faults(*f"{words} {own}".split())
    assert re.match(pattern, said), said


@pytest.mark.parametrize("name", ["", "a/b", "a\nb", "-x", ".x", "x" * 300, "a\0b"])
def test_a_run_name_that_no_folder_should_have_is_refused(faults, name):
    (line,) = faults(f"--run_name={name}")
    assert line.startswith("--run_name ")


@pytest.mark.parametrize("words", ["--replay --epsilon 1 --log_dir x", "--compare --mode FO", "--resume --log_dir x"])
def test_flags_beside_an_action_that_would_do_nothing_are_refused(faults, words):
    action, *idle = words.split()
    lines = faults(action, "no/run", *idle)
    assert sorted(line.split(":")[0] for line in lines[:-1]) == sorted(idle[::2])
    assert all(f"has no effect beside {action}" in line for line in lines[:-1])


FOLDERS = "--log_dir a/b/c --cache_dir d/e --export_dir f/g"  # which the fixture would find


def test_every_fault_is_reported_at_once_and_no_folder_made(faults):
    words = "--query_budget_q -1 --epsilon -1 --block_size 9999 --optimizer rmsprop --dataset tinystorys --seed x"
    lines = faults(*f"{words} --lerning_rate 1 --tokenizer bpe:1 --mode Instruct {FOLDERS}".split())
    expected = {"--lerning_rate", "--tokenizer", "--bp_interval", *words.split()[::2]}
    assert sorted(line.split(":")[0].split()[0] for line in lines) == sorted(expected)


def test_data_tokenizers_and_devices_that_do_not_do_say_why(runs, capsys, tmp_path):
    """In one line, and nothing is left that could be resumed."""
    text = next(text for text in (f"word {i} " * 2000 for i in range(100)) if not zo.is_validation(text))
    (tmp_path / "one.jsonl").write_text(f'{{"text": "{text}"}}\n', "utf-8")
    (tmp_path / "empty").mkdir()
    cases = [({"max_samples": 2, "block_size": 2048, "batch_size": 64}, r"\d+ training tokens are \d+ sequences")]
    cases += [({"dataset": tmp_path / "one.jsonl"}, "validation"), ({"tokenizer": tmp_path / "empty"}, "--tokenizer")]
    cases += [] if zo.torch.backends.mps.is_available() else [({"device": "mps"}, "--device mps")]
    for flags, words in cases:
        assert runs.code(**flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(words, line), line
        assert not [*(runs.folder / "logs").glob("*")]


def test_a_hub_that_cannot_be_reached_is_one_line_with_alternatives(tmp_path):
    """No retries, no silent other data."""
    words = ["--dataset", "tinystories", "--log_dir", str(tmp_path / "logs"), "--cache_dir", str(tmp_path / "cache")]
    done = in_a_process("reproduce_zo_paper.py", *words, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert all(words in line for words in ("hub", "--dataset embedded", "a local file", "HF_HOME"))


ABSURD = {
    "backpropagation": {"mode": "FO", "optimizer": "sgd", "clip_grad_norm": 0, "learning_rate": 1e6, "max_steps": 6},
    "decay": {"mode": "FO", "optimizer": "adam", "learning_rate": 1e6, "weight_decay": 1e6, "max_steps": 9},
    "queries and decay": {"learning_rate": 1e6, "optimizer": "adam", "weight_decay": 1e6},
    "epsilon": {"epsilon": 1e6, "parallel_q_computation": True},
    "feedback": {"direction": "feedback", "optimizer": "adam", "learning_rate": 1e6, "epsilon": 1e6},
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_numbers_never_leave_a_traceback_or_broken_weights(runs, capsys, case):
    """Where training becomes non-finite: exit code 3 and a line that names the step; what was saved is finite."""
    code = runs.code(**ABSURD[case])
    lines = capsys.readouterr().err.splitlines()
    assert code in ((3,) if ABSURD[case].get("mode") == "FO" else (0, 3)), lines
    assert [bool(re.match(r"error: step \d+", line)) for line in lines] == [True] * (code == 3), lines
    files = list((runs.folder / "logs").glob("*/checkpoints/*/model.safetensors"))
    assert files
    assert all(np.isfinite(array).all() for file in files for array in safetensors.numpy.load_file(file).values())


MEMORY = ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", "Unable to allocate 9 bytes")


@pytest.mark.parametrize("error", [None, MemoryError(), *map(RuntimeError, (*MEMORY, "a mistake"))], ids=repr)
def test_out_of_memory_says_which_flags_to_lower_and_a_mistake_is_not_hidden(runs, capsys, monkeypatch, error):
    def losses(*args):
        np.empty(0 if error else 1 << 60, np.uint8)
        raise error

    monkeypatch.setattr(zo.Objective, "losses", losses)
    if "mistake" in str(error):
        with pytest.raises(RuntimeError, match="a mistake"):
            runs.code()
        return
    assert runs.code() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(name in line for name in ("memory", "--batch_size", "--block_size", "--model_size", "--optimizer sgd"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_run_is_prepared_ends_it_at_once_and_leaves_nothing(runs, monkeypatch, number, code):
    def interrupted(*args):
        os.kill(os.getpid(), number)
        zo.time.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & takes away
    try:
        monkeypatch.setattr(zo, "prepare_corpus", interrupted)
        assert runs.code() == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list((runs.folder / "logs").iterdir())


def test_the_page_of_flags_is_the_help():
    """Letter for letter, whatever the width of the lines."""
    page = (harness.ROOT / "docs" / "flags.md").read_text("utf-8").partition("prints.")[2]
    shown = zo.build_parser().format_help().partition("Run:")[2]
    assert "".join(page.partition("Run:")[2].split()) == "".join(shown.split())
