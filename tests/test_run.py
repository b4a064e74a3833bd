"""Whole runs: what they write, that they learn, that they repeat, and the commands that users type."""

import importlib.metadata
import json
import math
import re
import shlex
from unittest import mock

import harness
import numpy as np
import pytest
import torch
import transformers
from harness import column, weights

import reproduce_zo_paper as zo


def log_of(run) -> str:
    return (run / "train.log").read_text("utf-8")


def change(run, first: int, last: int) -> dict[str, torch.Tensor]:
    """What the steps between two checkpoints changed, by the tensor's name."""
    one, other = weights(run, first), weights(run, last)
    return {name: other[name].double() - one[name].double() for name in harness.moved(one, other)}


@pytest.fixture(scope="module")
def done(module_runs):
    """A finished run of ZO, its picture rendered."""
    module_runs.pictures = True
    return module_runs.train("done", max_steps=5, log_interval=2, eval_interval=4, save_interval=3, weight_decay=0.01)


def test_a_run_writes_what_it_says(done):
    names = {path.name for path in done.iterdir() if not path.name.startswith(".")}
    files = "config.json metrics.csv journal.jsonl train.log loss.png checkpoints finished.json corpus.json"
    assert names == set(files.split())
    kept = {path.relative_to(done / "checkpoints") for path in (done / "checkpoints").glob("*/*")}
    assert {str(path.parent) for path in kept} - {"best"} == {"step_00000003", "step_00000005"}
    assert {path.suffix for path in kept} <= {".safetensors", ".json", ".jinja"}  # no pickle
    assert re.fullmatch(r"zo_tiny_q2_\d{8}_\d{6}", done.name)
    assert (done / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (done / "loss.png").stat().st_size > 10_000
    about = json.loads((done / "config.json").read_text("utf-8"))
    assert set(about["flags"]) == set(zo.FIELDS)
    assert (about["flags"]["learning_rate"], about["flags"]["weight_decay"]) == (1e-4, 0.01)
    assert about["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"python", "transformers", "numpy", "git_commit"} <= about["versions"].keys() | about.keys()


def test_metrics_have_a_row_per_logged_step_and_agree_with_the_journal(done):
    names = "step epoch stage loss val_loss val_bits_per_byte val_score learning_rate grad_norm projected_grad_mean"
    names += " projected_grad_std guide_to_gradient data_tokens forward_tokens seconds peak_memory_mib"
    assert (done / "metrics.csv").read_text("utf-8").splitlines()[0].split(",") == names.split()
    rows, lines = harness.metrics(done), harness.journal(done)
    assert [row["step"] for row in rows] == ["0", "2", "4", "5"]
    assert [bool(row["val_loss"]) for row in rows] == [True, False, True, True]
    assert column(done, "data_tokens") == [0, 2 * 32, 4 * 32, 5 * 32]
    assert column(done, "forward_tokens") == [0, 2 * 128, 4 * 128, 5 * 128]
    assert column(done, "seconds") == sorted(column(done, "seconds"))
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    for row, line in zip(rows[1:], (lines[1], lines[3], lines[4])):
        c = np.array(line["projected_grads"])
        assert float(row["loss"]) == pytest.approx(line["loss"], abs=1e-6)
        assert float(row["projected_grad_mean"]) == pytest.approx(c.mean(), rel=1e-5)
        assert float(row["projected_grad_std"]) == pytest.approx(c.std(), rel=1e-5)
    finished = json.loads((done / "finished.json").read_text())
    assert finished == {name: float(value) for name, value in rows[-1].items() if value}
    assert {type(value) for value in finished.values()} == {int, float}


def test_bits_per_byte_are_of_the_validation_text(done):
    texts = [text for text in zo.embedded_passages()[:40] if zo.is_validation(text)]
    about = json.loads((done / "corpus.json").read_text())
    assert about["documents"]["validation"] == len(texts)
    assert about["bytes"]["validation"] == sum(len(text.encode()) for text in texts)
    scale = about["tokens"]["validation"] / about["bytes"]["validation"] / math.log(2)
    expected = [loss * scale for loss in column(done, "val_loss")]
    assert column(done, "val_bits_per_byte") == pytest.approx(expected, abs=2e-6)


INSTRUCT, STREAM = {"mode": "Instruct", "bp_interval": 2}, {"direction": "feedback", "carry": "stream"}
SCHEDULE = {"use_lr_scheduler": True, "warmup_steps": 1}


def test_weights_that_collapse_are_warned_of(runs, monkeypatch):
    """Where the rate is much too high, every token becomes as likely as any other, and the loss stays there."""
    monkeypatch.setattr(zo, "validation_loss", lambda *args: math.log(300))
    text = log_of(runs.train(max_steps=2, eval_interval=1))
    assert "step 1: every one of 300 tokens is expected alike; lower --learning_rate" in text
    assert "step 0: every" not in text


def test_every_forward_token_is_counted(runs, monkeypatch):
    """The count in metrics.csv is that of the tokens that went through the model (backpropagation counts three)."""
    seen = []
    for name, weight in (("losses", 1), ("gradient", 3)):
        own = getattr(zo.Objective, name)

        def counting(self, ids, *args, own=own, weight=weight, **kwargs):
            seen.append(weight * ids.numel())
            return own(self, ids, *args, **kwargs)

        monkeypatch.setattr(zo.Objective, name, counting)
    monkeypatch.setattr(zo, "validation_loss", lambda *args: 1.0)
    last = harness.metrics(runs.train(max_steps=4, **INSTRUCT))[-1]
    assert int(last["data_tokens"]) == 4 * 32
    assert int(last["forward_tokens"]) == (2 * 3 + 2 * 4) * 32 == sum(seen)


def test_the_log_says_what_a_run_is_and_what_came_of_it(done):
    words = f"device: {harness.DEVICE}|float32|30.24k parameters|training tokens|steps: 5|theory:|cosine|stable step"
    words += "|metrics.csv|loss.png"
    assert all(each in log_of(done) for each in words.split("|"))
    said = r"step (\d)/5 .*loss \S+ ( val)? .*lr .*\|g\| .*forward tok/s .*ETA"
    assert re.findall(said, log_of(done)) == [("2", ""), ("4", " val"), ("5", " val")]  # val where just measured
    assert re.search(r"best \d+\.\d+ at step \d+ \(perplexity", log_of(done))
    assert "warning" not in log_of(done)


SAYS = {  # whether all of the scope moves
    "mode ZO, directions gaussian; sgd at 10, constant rate": ({"learning_rate": 10.0}, True),
    "mode FO; adam at 0.0001, constant rate": ({"mode": "FO", "optimizer": "adam"}, True),
    "gaussian; sgd at 0.0001, warm-up 1, cosine to 5e-05": (SCHEDULE | {"min_lr": 5e-5}, True),
    "mode ZO, directions feedback; sgd at 0.01": (STREAM | {"carry": "branch", "learning_rate": 0.01}, True),
    "mode ZO, directions feedback; sgd at 0.0001": (STREAM, False),
    "mode Instruct, directions feedback; adam": (STREAM | INSTRUCT | {"optimizer": "adam"}, True),
}


@pytest.mark.parametrize("words", SAYS)
def test_the_first_lines_name_the_rule_and_warn_of_what_it_cannot_move(runs, words):
    """The parameters said to be trained are those that move."""
    flags, whole = SAYS[words]
    run = runs.train(max_steps=3, save_interval=1, **flags)
    log = log_of(run)
    assert words in "".join(log.splitlines()[:3])
    trained, scope = re.search(r"trains (\S+)k of (\S+)k parameters of scope full", log).groups()
    assert (trained == scope) == whole == ("warning: --direction feedback can't move the rest" not in log)
    assert ("warning: --learning_rate" in log) == (flags.get("learning_rate") == 10)  # far above theory
    assert f"{sum(each.numel() for each in change(run, 1, 3).values()) / 1000:.2f}" == trained


def test_a_checkpoint_opens_with_transformers_and_has_the_validation_loss_of_the_metrics(done):
    folder = harness.last_checkpoint(done)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert len(tokenizer) == model.config.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode("our people")) == "our people"
    corpus = harness.corpus(zo.read_config(done))
    ids = corpus.sequences("validation", corpus.validation_rows)[0]
    with torch.no_grad():
        assert column(done, "val_loss")[-1] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=5e-6)
    assert model.generate(ids[:1], max_new_tokens=5, do_sample=False).shape == (1, ids.shape[1] + 5)


def test_a_fresh_run_never_writes_into_an_existing_directory(runs, monkeypatch):
    monkeypatch.setattr(zo.time, "strftime", lambda form: "20300101_000000")
    first = runs.train(run_name="same", max_steps=1)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert runs.code(run_name="same", max_steps=2) == 0
    assert before == {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert sorted(path.name for path in first.parent.iterdir()) == ["same_20300101_000000", "same_20300101_000000_2"]


@pytest.mark.parametrize("mode", ["FO", "ZO", "cuda"])
def test_a_run_is_a_function_of_its_seed_which_is_0_by_default(runs, mode):
    """Weights are in float32, whatever is computed in."""
    if mode == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    flags = {"mode": "ZO", "parallel_q_computation": True} if mode != "FO" else {"mode": "FO"}
    flags |= {"optimizer": "mudamw", "dtype": "bfloat16", "device": "cuda" if mode == "cuda" else "cpu"}
    one, same, other = (runs.train(f"{seed}", **flags, seed=seed) for seed in (0, None, 1))
    assert harness.differences(one, same) == []
    assert {"metrics.csv", "journal.jsonl", "model.safetensors"} <= set(harness.differences(one, other))
    assert {value.dtype for value in weights(one).values()} == {torch.float32}


def test_models_have_the_size_of_their_name(monkeypatch):
    """Within 2%, with tied embeddings and the GPT-2 vocabulary or one of their own."""
    monkeypatch.setattr(zo, "stream", lambda *args: None)  # weights are not drawn on the meta device
    vocabulary = type("Vocabulary", (list,), {"bos_token_id": 0, "eos_token_id": 0})
    for name, size in {"20M": 20e6, "200M": 200e6, "500M": 500e6, "1B": 1e9, "tiny": 1.93e6, "20M-paper": 20e6}.items():
        tokens = {"tiny": 4096, "20M-paper": 32000}.get(name, 50257)
        tokenizer = "gpt2" if tokens == 50257 else f"bpe:{tokens}"
        with torch.device("meta"):
            model = zo.build_model(zo.Config(model_size=name), vocabulary(range(tokens)))
        assert abs(sum(parameter.numel() for parameter in model.parameters()) / size - 1) < 0.02
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert zo.Config(model_size=name).tokenizer_name == tokenizer


@pytest.mark.parametrize("flags", [{}, {"mode": "FO", "optimizer": "adam"}, {"direction": "feedback"}], ids=str)
def test_the_schedule_warms_up_and_ends_at_min_lr_exactly(runs, flags):
    rates = {"learning_rate": 1e-3, "min_lr": 3e-5, "use_lr_scheduler": True, "warmup_steps": 2}
    said = [line["learning_rate"] for line in harness.journal(runs.train(max_steps=6, **rates, **flags))]
    assert said[:2] + said[-1:] == pytest.approx([5e-4, 1e-3, 3e-5], rel=1e-12)
    assert said[2:] == sorted(said[2:], reverse=True)
    assert said[4] > 2e-4


@pytest.mark.parametrize("limit", [0.5, 0])
def test_a_backpropagations_gradient_is_clipped_to_its_norm(runs, limit):
    """sgd moves the weights by the rate times the limit; by the rate times the gradient's norm where there is none."""
    flags = {"mode": "FO", "optimizer": "sgd", "learning_rate": 0.1, "max_steps": 2, "save_interval": 1}
    run = runs.train(clip_grad_norm=limit, **flags)
    length = math.sqrt(sum(each.square().sum().item() for each in change(run, 1, 2).values()))
    norm = harness.journal(run)[1]["grad_norm"]
    assert norm > 1
    assert length == pytest.approx(0.1 * (limit or norm), rel=1e-4)


LEARNING = {"max_steps": 40, "eval_interval": 1000, "eval_samples": 32, "save_interval": 1000, "block_size": 32}
MANY = LEARNING | {"query_budget_q": 8, "parallel_q_computation": True, "parallel_batch_size": 8, "batch_size": 8}
MANY |= {"mode": "ZO", "optimizer": "adam", "direction": "lowrank", "learning_rate": 1e-2}


def test_backpropagation_and_zeroth_order_learn_and_wrong_scalars_do_not(runs, monkeypatch):
    """Many queries on a small model; the control: the same steps along directions whose scalars have a random sign."""
    gain = lambda run: column(run, "val_loss")[0] - column(run, "val_loss")[-1]  # noqa: E731
    assert gain(runs.train("FO", mode="FO", optimizer="adam", learning_rate=1e-2, batch_size=8, **LEARNING)) > 0.8
    assert gain(runs.train("right", **MANY)) > 0.1
    honest, signs = zo.projected_gradients, np.random.default_rng(0)
    wrong = lambda losses, e: honest(losses, e) * signs.choice([-1, 1], len(losses))  # noqa: E731
    monkeypatch.setattr(zo, "projected_gradients", wrong)
    assert gain(runs.train("wrong", **MANY)) < 0.05


FIRST = "--mode ZO --query_budget_q 4 --model_size 20M --batch_size 4 --learning_rate 1e-3"


@pytest.mark.parametrize(("command", "tokens"), [(FIRST, 50257), ("", 4096)])
def test_a_model_at_its_own_size_and_no_flag_at_all(command, tokens, tmp_path, cache):
    """One step of the first command, 20M with the GPT-2 tokenizer, and of none."""
    words = f"{command} --max_steps 1 --max_samples 60 --eval_samples 1 --block_size 32"
    assert zo.main([*shlex.split(words), "--log_dir", str(tmp_path), "--cache_dir", str(cache)]) == 0
    run = harness.only_run(tmp_path)
    assert column(run, "val_loss")[0] == pytest.approx(np.log(tokens), abs=0.3)
    flags = json.loads((run / "config.json").read_text("utf-8"))["flags"]
    assert (flags["mode"], flags["dataset"]) == ("ZO", "embedded")


def test_samples_are_said_at_intervals_and_at_the_end_and_change_no_result(runs):
    def samples(run) -> list[str]:
        return re.findall(r"sample (after step .*)", log_of(run))

    flags = {"prompt": "The state of\nthe union", "sample_interval": 2}
    plain, run, again = runs.train("plain"), runs.train("one", **flags), runs.train("again", **flags)
    assert [re.match(r"after step (\d+): \"The state of\\nthe union", line)[1] for line in samples(run)] == ["2", "4"]
    assert samples(run) == samples(again)
    assert harness.differences(plain, run) == []
    for name, prompt in (("empty", ""), ("zero", "\0")):
        assert len(samples(runs.train(name, prompt=prompt, max_steps=1))) == 1


@pytest.mark.parametrize(
    ("by", "left", "says"), [(4, 2, "2 queries in one forward pass"), (1, 0, "one query after the other")]
)
def test_out_of_memory_halves_the_group_as_if_it_had_been_so_from_the_start(by, left, says, runs):
    whole, flags, parallel = zo.query_losses, {"query_budget_q": 4}, {"parallel_q_computation": True}

    def short_of_memory(objective, tensors, batch, queries, group, *rest):
        if group == by:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory")
        return whole(objective, tensors, batch, queries, group, *rest)

    with mock.patch.object(zo, "query_losses", short_of_memory):
        halved = runs.train("halved", **flags, **parallel, parallel_batch_size=by)
    expected = runs.train("expected", **flags, **(parallel | {"parallel_batch_size": left} if left else {}))
    assert re.findall("out of memory.*: now (.*)", (halved / "train.log").read_text()) == [says]
    losses = [[(row["loss"], row["val_loss"]) for row in harness.metrics(run)] for run in (halved, expected)]
    assert losses[0] == losses[1]
