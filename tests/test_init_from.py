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
ARCHITECTURES = {
    "Llama": (transformers.LlamaConfig, COMMON | {"intermediate_size": 48}),
    "Qwen2": (transformers.Qwen2Config, COMMON | {"intermediate_size": 48, "num_key_value_heads": 1}),
    "OPT": (transformers.OPTConfig, COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPT2": (transformers.GPT2Config, {"vocab_size": TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "GPTNeoX": (transformers.GPTNeoXConfig, COMMON | {"intermediate_size": 48}),
}


def saved(folder, architecture: str = "Llama", **options):
    """A model with its tokenizer in a folder, as transformers saves them."""
    kind, values = ARCHITECTURES[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(kind(**values))
    model.save_pretrained(folder, **options)
    texts = zo.embedded_passages()[:20]
    zo.save_tokenizer(zo.wrapped_tokenizer(zo.trained_tokenizer(texts, TOKENS)), folder)
    return folder


def flags(folder, **more) -> dict:
    return {"init_from": folder, "model_size": None, "tokenizer": None, "max_steps": 4} | more


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("direction", ["feedback", "gaussian"])
def test_a_run_begins_with_its_weights_and_learns(runs, tmp_path, architecture, direction):
    folder = saved(tmp_path / "model", architecture)
    ours = {"direction": direction, "optimizer": "adam", "learning_rate": 1e-3, "parallel_q_computation": True}
    run = runs.train(**flags(folder, **ours, max_steps=8, save_interval=1, keep_checkpoints=9))
    rows = harness.metrics(run)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with zo.Workers(torch.device("cpu")) as workers:
        corpus = harness.corpus(zo.read_config(run))
        assert float(rows[0]["val_loss"]) == pytest.approx(zo.validation_loss(zo.Objective(model, workers), corpus), abs=1e-5)
    if direction == "feedback":
        assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"]) - 1e-3
    last = transformers.AutoModelForCausalLM.from_pretrained(harness.last_checkpoint(run))
    assert type(last) is type(model)


def test_a_sharded_model(runs, tmp_path):
    folder = saved(tmp_path / "model", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    run = runs.train(**flags(folder))
    assert runs.replay(run) == 0


def test_its_run_is_resumed_and_replayed_bit_for_bit(runs, tmp_path):
    folder = saved(tmp_path / "model")
    whole = runs.train("whole", **flags(folder, max_steps=6))
    run = runs.train("logs", **flags(folder, max_steps=6, save_interval=2))
    for checkpoint in (run / "checkpoints").glob("step_*"):
        harness.damage(checkpoint / "model.safetensors", "flipped")
    (run / "finished.json").unlink()
    assert runs.resume(run) == 0
    assert set(harness.differences(whole, run)) == set()
    assert runs.replay(whole) == 0


def test_a_replay_from_other_weights_is_refused(runs, tmp_path, capsys):
    folder = saved(tmp_path / "model")
    run = runs.train(**flags(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    model.save_pretrained(folder)
    assert runs.replay(run) == 2
    assert "initial.json: not what the run began with" in capsys.readouterr().err


def test_weights_in_half_precision_become_float32(runs, tmp_path):
    folder = saved(tmp_path / "model")
    transformers.AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    run = runs.train(**flags(folder))
    assert {value.dtype for value in load_file(harness.last_checkpoint(run) / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("what", ["pickle", "nothing", "no weights", "positions", "tokens"])
def test_what_does_not_fit_is_one_line(runs, tmp_path, capsys, what):
    folder, more = saved(tmp_path / "model"), {}
    if what == "pickle":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif what == "nothing":
        folder = tmp_path / "elsewhere" / "not" / "there"
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "positions":
        more = {"block_size": 65}
    else:
        more = {"tokenizer": "bpe:400"}
    assert runs.code(**flags(folder, **more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line


def test_code_beside_a_model_is_never_executed(runs, tmp_path, capsys):
    folder = saved(tmp_path / "model")
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert runs.code(**flags(folder)) == 2
    assert not (tmp_path / "ran").exists()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_size_of_a_new_model_has_no_place_beside_it(errors, tmp_path):
    code, lines = errors(["--init_from", saved(tmp_path / "model"), "--model_size", "tiny"])
    assert code == 2
    assert any(line.startswith("error: --model_size: has no effect") or "--model_size: has no effect" in line for line in lines)
