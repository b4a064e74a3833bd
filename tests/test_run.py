"""Whole runs: what they write, that they learn, that they repeat, and the commands that users type."""

import json
import re
import shlex

import harness
import numpy as np
import pytest
import torch
import transformers

import reproduce_zo_paper as zo

# ---- the run directory -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(module_runs):
    """A finished run of ZO."""
    return module_runs.train("done", max_steps=5, log_interval=2, eval_interval=4, save_interval=3, weight_decay=0.01)


def test_a_run_writes_what_it_says(done):
    names = {path.name for path in done.iterdir() if not path.name.startswith(".")}
    assert names == {
        *("config.json", "metrics.csv", "journal.bin", "train.log"),
        *("loss.png", "checkpoints", "finished.json", "corpus.json"),
    }
    assert {path.name for path in (done / "checkpoints").iterdir()} == {"step_00000003", "step_00000005"}
    assert re.fullmatch(r"zo_tiny_q2_\d{8}_\d{6}", done.name)


def test_a_picture_of_the_loss(done):
    picture = (done / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_config_json_holds_every_flag_and_version(done):
    about = json.loads((done / "config.json").read_text("utf-8"))
    assert set(about["flags"]) == {field.name for field in zo.dataclasses.fields(zo.Config)}
    assert about["flags"]["learning_rate"] == harness.FLAGS["learning_rate"]
    assert about["flags"]["weight_decay"] == 0.01
    assert about["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "numpy"} <= set(about["versions"])
    assert "git_commit" in about


def test_metrics_have_a_row_per_logged_step(done):
    with open(done / "metrics.csv", encoding="utf-8") as file:
        assert file.readline().strip().split(",") == [
            *(
                "step",
                "epoch",
                "stage",
                "loss",
                "val_loss",
                "learning_rate",
                "grad_norm",
                "projected_grad_mean",
                "projected_grad_std",
            ),
            "guide_to_gradient",
            *("data_tokens", "forward_tokens", "seconds", "peak_memory_mib"),
        ]
    rows = harness.metrics(done)
    assert [row["step"] for row in rows] == ["0", "2", "4", "5"]
    assert [bool(row["val_loss"]) for row in rows] == [True, False, True, True]
    assert all(float(row["loss"]) > 0 for row in rows[1:])
    assert [int(row["data_tokens"]) for row in rows] == [0, 2 * 32, 4 * 32, 5 * 32]
    assert [int(row["forward_tokens"]) for row in rows] == [0, 2 * 128, 4 * 128, 5 * 128]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_the_journal_agrees_with_the_metrics(done):
    journal = zo.Journal(done / "journal.bin", 2, zo.read_config(done).identity)
    journal.close()
    assert sorted(journal.records) == [0, 1, 2, 3, 4]
    for row in harness.metrics(done)[1:]:
        record = journal.records[int(row["step"]) - 1]
        assert float(row["loss"]) == pytest.approx(record.loss, abs=1e-6)
        assert float(row["projected_grad_mean"]) == pytest.approx(record.projected_grads.mean(), rel=1e-5)
        assert float(row["projected_grad_std"]) == pytest.approx(record.projected_grads.std(), rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "data", "forward"),
    [
        ({"mode": "FO"}, 4 * 32, 4 * 3 * 32),
        ({"mode": "ZO", "query_budget_q": 3}, 4 * 32, 4 * 6 * 32),
        ({"mode": "ZO", "query_data": "distinct"}, 4 * 32, 4 * 2 * 32),
        ({"mode": "Instruct", "bp_interval": 2}, 4 * 32, (2 * 3 + 2 * 4) * 32),
        ({"mode": "Calibrate", "bp_interval": 3}, 4 * 32, (2 * 3 + 2 * 4) * 32),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_every_forward_token_is_counted(runs, monkeypatch, flags, data, forward):
    """The count in metrics.csv is that of the tokens that went through the model (backpropagation counts three)."""
    seen = {"losses": 0, "gradient": 0, "validation": False}
    losses, gradient, evaluate = zo.Objective.losses, zo.Objective.gradient, zo.validation_loss

    def counting_losses(self, input_ids, *args, **kwargs):
        seen["losses"] += 0 if seen["validation"] else input_ids.numel()
        return losses(self, input_ids, *args, **kwargs)

    def counting_gradient(self, input_ids, *args):
        seen["gradient"] += input_ids.numel()
        return gradient(self, input_ids, *args)

    def uncounted(*args):
        seen["validation"] = True
        try:
            return evaluate(*args)
        finally:
            seen["validation"] = False

    monkeypatch.setattr(zo.Objective, "losses", counting_losses)
    monkeypatch.setattr(zo.Objective, "gradient", counting_gradient)
    monkeypatch.setattr(zo, "validation_loss", uncounted)
    last = harness.metrics(runs.train(max_steps=4, **flags))[-1]
    assert int(last["data_tokens"]) == data
    assert int(last["forward_tokens"]) == forward == seen["losses"] + 3 * seen["gradient"]


def test_the_log_says_what_a_run_is(done):
    log = (done / "train.log").read_text("utf-8")
    for words in (
        "device: cpu",
        "float32",
        "30.24k parameters",
        "training tokens",
        "steps: 5",
        "theory:",
        "cosine",
        "stable step",
    ):
        assert words in log, words
    assert len(re.findall(r"^step \d/5 .*loss .*lr .*\|g\| .*forward tok/s .*ETA", log, re.MULTILINE)) == 3
    assert re.search(r"best \d+\.\d+ at step \d+ \(perplexity", log)
    for name in ("metrics.csv", "loss.png", "step_00000005"):
        assert str(done / name) in log or name in log.splitlines()[-1]


@pytest.mark.parametrize(("rate", "warned"), [(10.0, True), (1e-4, False)])
def test_a_learning_rate_far_above_theory_is_warned_of(runs, rate, warned):
    log = (runs.train(learning_rate=rate, max_steps=1) / "train.log").read_text("utf-8")
    assert ("warning: --learning_rate" in log) == warned


def test_a_checkpoint_opens_with_transformers(done):
    folder = harness.last_checkpoint(done)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert len(tokenizer) == model.config.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode("our people")) == "our people"
    ids = torch.tensor([tokenizer.encode("The state of the union is strong")])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(5.7, abs=0.3)
    text = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert text.shape == (1, ids.shape[1] + 5)


def test_a_checkpoints_validation_loss_is_the_one_in_the_metrics(done, cache, miniature):
    config = zo.read_config(done)
    model = transformers.AutoModelForCausalLM.from_pretrained(harness.last_checkpoint(done))
    corpus = harness.corpus(config)
    with zo.Workers(torch.device("cpu")) as workers:
        loss = zo.validation_loss(zo.Objective(model, workers), corpus)
    assert float(harness.metrics(done)[-1]["val_loss"]) == pytest.approx(loss, abs=2e-6)


def test_checkpoints_hold_no_pickle(done):
    names = {path.suffix for folder in (done / "checkpoints").iterdir() for path in folder.iterdir()}
    assert names <= {".safetensors", ".json", ".jinja"}


def test_only_the_newest_checkpoints_are_kept(runs):
    run = runs.train(max_steps=6, save_interval=1, keep_checkpoints=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000005", "step_00000006"]


def test_a_fresh_run_never_writes_into_an_existing_directory(runs, monkeypatch):
    monkeypatch.setattr(zo.time, "strftime", lambda form: "20300101_000000")
    first = runs.train(run_name="same", max_steps=1)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert runs.code(run_name="same", max_steps=2) == 0
    assert before == {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert sorted(path.name for path in first.parent.iterdir()) == ["same_20300101_000000", "same_20300101_000000_2"]


# ---- the same again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {"mode": "ZO", "optimizer": "sgd"},
        {"mode": "ZO", "optimizer": "mudamw", "parallel_q_computation": True},
        {"mode": "Instruct", "bp_interval": 2, "optimizer": "adam", "direction": "lowrank"},
        {"mode": "FO", "optimizer": "mudamw"},
    ],
    ids=lambda flags: "-".join(str(value) for value in flags.values()),
)
def test_the_same_run_twice_gives_the_same_bytes(runs, flags):
    one, other = (runs.train(name, **flags) for name in ("one", "other"))
    assert harness.differences(one, other) == []


def test_another_seed_gives_another_run(runs):
    """Which also shows that the comparison can tell runs apart."""
    one, other = runs.train("one", seed=0), runs.train("other", seed=1)
    assert set(harness.differences(one, other)) == {"metrics.csv", "journal.bin", "model.safetensors"}


def test_seed_0_is_a_seed_and_the_default(runs):
    assert harness.differences(runs.train("one", seed=0), runs.train("other")) == []


# ---- models ----------------------------------------------------------------------------------------------------------


class Vocabulary:
    """As much of a tokenizer as the model needs."""

    bos_token_id = eos_token_id = 0

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize(("name", "size"), [("20M", 20e6), ("200M", 200e6), ("500M", 500e6), ("1B", 1e9)])
def test_a_model_has_the_size_of_its_name(name, size, monkeypatch):
    """Within 2%, with the GPT-2 vocabulary and tied embeddings."""
    monkeypatch.setattr(zo, "stream", lambda *args: None)  # weights are not drawn on the meta device
    with torch.device("meta"):
        model = zo.build_model(zo.Config(model_size=name), Vocabulary(50257))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert abs(parameters / size - 1) < 0.02
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert zo.MODEL_SIZES[name].tokenizer == "gpt2"


def test_tiny_is_about_2_million():
    model = zo.build_model(zo.Config(model_size="tiny"), Vocabulary(4096))
    assert 1.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.5e6
    assert zo.MODEL_SIZES["tiny"].tokenizer == "bpe:4096"


def test_initial_weights_are_a_function_of_the_seed(miniature):
    def weights(seed: int) -> list[torch.Tensor]:
        return [p.detach() for p in zo.build_model(zo.Config(seed=seed), Vocabulary(300)).parameters()]

    one, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    for a, b in zip(one, other):
        assert a.dtype == torch.float32
        if a.ndim == 2:
            assert not torch.equal(a, b)
            assert a.std().item() == pytest.approx(0.02, rel=0.1)
        else:
            assert a.eq(1).all()


def test_reduced_scope_trains_the_last_mlp_its_norm_and_the_head(runs, miniature):
    import safetensors.torch

    full, reduced = runs.train("full", max_steps=3), runs.train("reduced", scope="reduced", max_steps=3)
    begin = zo.build_model(zo.Config(seed=0), Vocabulary(300)).state_dict()
    moved = {}
    for run in (full, reduced):
        weights = safetensors.torch.load_file(harness.last_checkpoint(run) / "model.safetensors")
        moved[run] = {name for name, value in weights.items() if (value - begin[name]).abs().max() > 1e-7}
    everything = {name for name in begin if name != "lm_head.weight"}
    assert moved[full] == everything
    parts = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    assert moved[reduced] == {
        *(f"model.layers.1.{part}.weight" for part in parts),
        *("model.norm.weight", "model.embed_tokens.weight"),
    }


# ---- learning --------------------------------------------------------------------------------------------------------


def gain(run) -> float:
    """How far the validation loss fell."""
    values = [float(row["val_loss"]) for row in harness.metrics(run) if row["val_loss"]]
    return values[0] - values[-1]


LEARNING = {
    "max_steps": 40,
    "eval_interval": 1000,
    "eval_samples": 32,
    "log_interval": 20,
    "save_interval": 1000,
    "block_size": 32,
}
MANY_QUERIES = {"query_budget_q": 16, "parallel_q_computation": True, "parallel_batch_size": 16, "batch_size": 4}


def test_backpropagation_learns(runs):
    """Far below a uniform guess, in seconds."""
    assert gain(runs.train(mode="FO", optimizer="adam", learning_rate=1e-2, batch_size=8, **LEARNING)) > 0.8


@pytest.mark.parametrize("direction", [pytest.param("gaussian", marks=pytest.mark.long), "lowrank"])
def test_zeroth_order_learns(runs, direction):
    """Many queries on a small model: a fall that the same steps with wrong scalars, below, don't come near."""
    flags = LEARNING | MANY_QUERIES
    assert gain(runs.train(mode="ZO", optimizer="adam", direction=direction, learning_rate=1e-2, **flags)) > 0.1


def test_wrong_scalars_do_not_learn(runs, monkeypatch):
    """The control: the same steps along directions whose scalars have a random sign."""
    honest = zo.Estimate.projected_grads.fget
    signs = np.random.default_rng(0)
    monkeypatch.setattr(
        zo.Estimate, "projected_grads", property(lambda self: honest(self) * signs.choice([-1, 1], len(self.losses)))
    )
    flags = LEARNING | MANY_QUERIES
    assert gain(runs.train(mode="ZO", optimizer="adam", direction="lowrank", learning_rate=1e-2, **flags)) < 0.05


@pytest.mark.long
def test_guidance_beats_calibration(runs):
    """The same backpropagations and queries: directions bent towards the last gradient go further."""
    flags = LEARNING | {"bp_interval": 5, "query_budget_q": 4, "learning_rate": 0.03, "optimizer": "sgd", "batch_size": 4}
    flags |= {"max_decrease": 0}
    instruct = gain(runs.train("instruct", mode="Instruct", **flags))
    calibrate = gain(runs.train("calibrate", mode="Calibrate", **flags))
    assert instruct > 1.5 * calibrate > 0


# ---- the commands that users type ------------------------------------------------------------------------------------

SMALL = "--max_steps 2 --max_samples 40 --block_size 32 --eval_samples 2"
COMMANDS = [
    "--mode ZO --query_budget_q 4 --model_size 20M --batch_size 4 --learning_rate 1e-3",
    "--mode ZO --query_budget_q 16 --parallel_q_computation --parallel_batch_size 4 --model_size 200M --batch_size 4 "
    "--learning_rate 1e-3",
    "--mode Instruct --query_budget_q 10 --bp_interval 5 --parallel_q_computation --parallel_batch_size 4 --model_size 200M",
    "--mode ZO --scope full --query_budget_q 4 --learning_rate 1e-3 --epochs 1 --batch_size 8 --model_size 20M "
    "--dataset cosmopedia-100k --max_samples 1000",
    "--mode Instruct --scope full --query_budget_q 16 --bp_interval 10 --learning_rate 1e-4 --epochs 1 --batch_size 4 "
    "--model_size 200M --dataset fineweb-edu --max_samples 10000 --parallel_q_computation --parallel_batch_size 4 "
    "--optimizer mudamw --use_lr_scheduler --warmup_steps 300",
    "--mode ZO --query_budget_q 2 --model_size 20M --max_samples 100 --log_interval 1",
]
SWEEP = [
    f"--run_name {name} --mode ZO --query_budget_q {q} --model_size 20M --max_samples 500 {more}"
    for name, q, more in [
        ("baseline", 8, ""),
        ("parallel", 8, "--parallel_q_computation --parallel_batch_size 4"),
        ("large", 32, "--parallel_q_computation --parallel_batch_size 8"),
    ]
]


@pytest.fixture
def a_local_hub(tmp_path, monkeypatch):
    """The hub's data sets, from a local folder."""
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"text": passage}) + "\n" for passage in zo.embedded_passages()[:60]]
    (tmp_path / "set" / "train.jsonl").write_text("".join(lines), "utf-8")
    for name in zo.HUB_DATASETS:
        monkeypatch.setitem(zo.HUB_DATASETS, name, zo.HubData(str(tmp_path / "set"), None, 60))
    monkeypatch.setattr(zo, "hub_is_reachable", lambda: True)


@pytest.mark.parametrize("command", COMMANDS + SWEEP)
def test_a_users_command_runs(command, runs, a_local_hub, cache):
    """With the model made small and two steps; every other flag as it is typed."""
    small = re.sub(r"--model_size \S+", "--model_size tiny --tokenizer bpe:300", command)
    words = [*shlex.split(f"{small} {SMALL}"), "--log_dir", str(runs.folder / "logs"), "--cache_dir", str(cache)]
    assert runs.main(words) == 0
    run = harness.only_run(runs.folder / "logs")
    assert harness.metrics(run)[-1]["step"] == "2"
    if "--run_name" in command:
        assert run.name.startswith(shlex.split(command)[1] + "_")


def test_the_first_command_at_its_own_size(tmp_path, cache):
    """20M with the GPT-2 tokenizer: one step."""
    words = ["--max_steps", "1", "--max_samples", "40", "--eval_samples", "1", "--block_size", "32"]
    folders = ["--log_dir", str(tmp_path), "--cache_dir", str(cache)]
    assert zo.main(shlex.split(COMMANDS[0]) + words + folders) == 0
    run = harness.only_run(tmp_path)
    assert float(harness.metrics(run)[0]["val_loss"]) == pytest.approx(np.log(50257), abs=0.3)


def test_no_flag_at_all_is_a_sensible_run(tmp_path, cache):
    assert zo.main(["--max_steps", "1", "--max_samples", "60", "--log_dir", str(tmp_path), "--cache_dir", str(cache)]) == 0
    flags = json.loads((harness.only_run(tmp_path) / "config.json").read_text("utf-8"))["flags"]
    assert (flags["mode"], flags["model_size"], flags["dataset"]) == ("ZO", "tiny", "embedded")


@pytest.mark.long
@pytest.mark.parametrize("command", [command for command in COMMANDS if "200M" in command])
def test_the_large_commands_at_their_own_size(command, tmp_path, cache, a_local_hub):
    words = ["--max_steps", "1", "--max_samples", "40", "--eval_samples", "1", "--block_size", "32"]
    assert zo.main(shlex.split(command) + words + ["--log_dir", str(tmp_path), "--cache_dir", str(cache)]) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("parallel", [False, True])
def test_a_run_on_cuda(runs, parallel):
    one, other = (runs.train(name, device="cuda", parallel_q_computation=parallel) for name in ("one", "other"))
    assert harness.metrics(one)[-1]["step"] == harness.metrics(other)[-1]["step"] == "4"


def test_bfloat16_computes_and_keeps_float32_weights(runs):
    import safetensors.torch

    run = runs.train(dtype="bfloat16", parallel_q_computation=True)
    weights = safetensors.torch.load_file(harness.last_checkpoint(run) / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def samples(run) -> list[str]:
    return [line for line in (run / "train.log").read_text().splitlines() if "sample after step" in line]


def test_samples_of_text_are_said_at_intervals_and_at_the_end(runs):
    run = runs.train(prompt="The state of\nthe union", sample_interval=2, max_steps=4)
    lines = samples(run)
    assert [int(re.search(r"step (\d+)", line)[1]) for line in lines] == [2, 4]
    assert all(r"The state of\nthe union" in line for line in lines)
    again = runs.train("again", prompt="The state of\nthe union", sample_interval=2, max_steps=4)
    assert [line.partition("sample")[2] for line in samples(again)] == [line.partition("sample")[2] for line in lines]


def test_a_prompt_changes_no_result(runs):
    plain, sampled = runs.train("plain"), runs.train("sampled", prompt="", sample_interval=1)
    assert harness.differences(plain, sampled) == []
    assert len(samples(sampled)) == 4


def test_samples_without_a_prompt_are_refused(errors):
    code, lines = errors(["--sample_interval", "3"])
    assert code == 2
    assert any("--sample_interval: has no effect without --prompt" in line for line in lines)
