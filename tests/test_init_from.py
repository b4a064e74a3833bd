"""--init_from: any causal language model of transformers as the start of a run."""

import json

import harness
import pytest
import torch
import transformers
from safetensors.torch import load_file

import reproduce_zo_paper as zo

TOKENS = 300
COMMON = {
    "vocab_size": TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
ARCHITECTURES = {
    "Llama": (transformers.LlamaConfig, COMMON | {"intermediate_size": 48}),
    "Qwen2": (transformers.Qwen2Config, COMMON | {"intermediate_size": 48, "num_key_value_heads": 1}),
    "OPT": (transformers.OPTConfig, COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPT2": (transformers.GPT2Config, GPT2),
    "GPTNeoX": (transformers.GPTNeoXConfig, COMMON | {"intermediate_size": 48}),
    "unused": (transformers.GPT2Config, GPT2 | {"add_cross_attention": True}),  # crossattention has no part in the loss
}


@pytest.fixture(scope="module")
def tokenizer():
    return zo.wrapped_tokenizer(zo.trained_tokenizer(zo.embedded_passages()[:20], TOKENS))


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Makes a model with its tokenizer in a folder, as transformers saves them."""

    def save(architecture: str = "Llama", **options):
        kind, values = ARCHITECTURES[architecture]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(kind(**values))
        model.save_pretrained(tmp_path / "model", **options)
        zo.save_tokenizer(tokenizer, tmp_path / "model")
        return tmp_path / "model"

    return save


def flags(folder, **more) -> dict:
    return {"init_from": folder, "model_size": None, "tokenizer": None, "max_steps": 4} | more


def validation(folder, run) -> float:
    """The loss that transformers gives a folder's model on a run's validation sequences."""
    corpus = harness.corpus(zo.read_config(run))
    ids = corpus.sequences(corpus.validation, corpus.validation_rows)
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids, labels=ids).loss.item()


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "unused"])
@pytest.mark.parametrize("direction", ["feedback", "gaussian"])
def test_a_run_begins_with_its_weights_and_learns(runs, saved, architecture, direction):
    folder = saved(architecture)
    ours = {"direction": direction, "optimizer": "adam", "learning_rate": 1e-3, "parallel_q_computation": True}
    run = runs.train(**flags(folder, **ours, max_steps=8))
    first, *_, last = harness.metrics(run)
    assert float(first["val_loss"]) == pytest.approx(validation(folder, run), abs=1e-5)
    assert float(last["val_loss"]) == pytest.approx(validation(harness.last_checkpoint(run), run), abs=1e-5)
    if direction == "feedback":
        assert float(last["val_loss"]) < float(first["val_loss"]) - 1e-3
    before, after = json.loads((folder / "config.json").read_text()), harness.last_checkpoint(run) / "config.json"
    assert json.loads(after.read_text())["architectures"] == before["architectures"]
    assert "unigram" not in (run / "train.log").read_text()  # that its model knows more than that is no news


def test_what_carry_stream_cannot_move_in_a_gpt2_is_said(runs, saved):
    run = runs.train(**flags(saved("GPT2"), direction="feedback", optimizer="adam", carry="stream", save_interval=1))
    one, other = (load_file(run / "checkpoints" / f"step_0000000{step}" / "model.safetensors") for step in (1, 4))
    moved = sum(value.numel() for name, value in one.items() if not torch.equal(value, other[name]))
    log = (run / "train.log").read_text()
    assert f"trains {moved / 1000:.2f}k of 37.12k parameters" in log
    assert moved < 37120
    assert "warning: --direction feedback can't move the rest" in log


@pytest.mark.parametrize(
    "mode", [{"mode": "FO"}, {"mode": "Instruct", "bp_interval": 2, "direction": "feedback"}], ids=str
)
def test_a_parameter_that_the_loss_does_not_use_stops_nothing(runs, saved, mode):
    run = runs.train(**flags(saved("unused"), **mode, optimizer="adam", learning_rate=1e-3, max_steps=8))
    first, *_, last = harness.metrics(run)
    assert float(last["val_loss"]) < float(first["val_loss"]) - 1e-3
    weights = load_file(harness.last_checkpoint(run) / "model.safetensors")
    assert any("crossattention" in name for name in weights)
    assert runs.replay(run) == 0


def test_its_run_is_resumed_and_replayed_bit_for_bit(runs, saved):
    """From several files, and from the initial weights where no checkpoint is whole."""
    folder = saved(max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    whole = runs.train("whole", **flags(folder, max_steps=6))
    run = runs.train("logs", **flags(folder, max_steps=6, save_interval=2))
    for checkpoint in (run / "checkpoints").glob("step_*"):
        harness.damage(checkpoint / "model.safetensors", "flipped")
    (run / "finished.json").unlink()
    assert runs.resume(run) == 0
    assert harness.differences(whole, run) == []
    assert runs.replay(whole) == 0


def test_a_replay_from_other_weights_is_refused(runs, saved, capsys):
    folder = saved()
    run = runs.train(**flags(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    model.save_pretrained(folder)
    assert runs.replay(run) == 2
    assert "corpus.json: not what the run began with" in capsys.readouterr().err


def test_weights_in_half_precision_become_float32(runs, saved):
    folder = saved()
    transformers.AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    run = runs.train(**flags(folder))
    assert {value.dtype for value in load_file(harness.last_checkpoint(run) / "model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.parametrize("what", ["pickle", "nothing", "no weights", "positions", "tokens", "code"])
def test_what_does_not_fit_is_one_line(runs, saved, tmp_path, capsys, what):
    """Code that lies beside a model is never executed."""
    folder, more = saved(), {}
    if what == "pickle":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    if what in ("pickle", "no weights"):
        (folder / "model.safetensors").unlink()
    elif what == "nothing":
        folder = tmp_path / "elsewhere" / "not" / "there"
    elif what == "code":
        about = json.loads((folder / "config.json").read_text())
        about |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
        (folder / "config.json").write_text(json.dumps(about))
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    else:
        more = {"positions": {"block_size": 65}, "tokens": {"tokenizer": "bpe:400"}}[what]
    assert runs.code(**flags(folder, **more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line
    assert not (tmp_path / "ran").exists()
