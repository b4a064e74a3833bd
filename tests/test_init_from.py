"""--init_from: any causal language model of transformers as the start of a run."""

import harness
import pytest
import torch
import transformers
from safetensors.torch import load_file

import reproduce_zo_paper as zo

TOKENS = 300
COMMON = {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON["max_position_embeddings"] = 64
GPT2 = {"vocab_size": TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
ARCHITECTURES = {
    "Llama": (transformers.LlamaConfig, COMMON | {"intermediate_size": 48}),
    "Qwen2": (transformers.Qwen2Config, COMMON | {"intermediate_size": 48, "num_key_value_heads": 1}),
    "OPT": (transformers.OPTConfig, COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPT2": (transformers.GPT2Config, GPT2),
    "GPTNeoX": (transformers.GPTNeoXConfig, COMMON | {"intermediate_size": 48}),
    "unused": (transformers.GPT2Config, GPT2 | {"add_cross_attention": True}),  # crossattention has no part in the loss
}


@pytest.fixture
def saved(tmp_path):
    """Makes a model with its tokenizer in a folder, as transformers saves them."""

    def save(architecture: str = "Llama", **options):
        kind, values = ARCHITECTURES[architecture]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(kind(**values))
        model.save_pretrained(tmp_path / "model", **options)
        tokenizer = zo.trained_tokenizer(zo.embedded_passages()[:20], TOKENS)
        zo.save_tokenizer(zo.wrapped_tokenizer(tokenizer), tmp_path / "model")
        return tmp_path / "model"

    return save


def flags(folder, **more) -> dict:
    return {"init_from": folder, "model_size": None, "tokenizer": None} | more


def validation(folder, run) -> float:
    """The loss that transformers gives a folder's model on a run's validation sequences."""
    corpus = harness.corpus(zo.read_config(run))
    ids = corpus.sequences("validation", corpus.validation_rows)[0]
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
    assert "unigram" not in (run / "train.log").read_text()  # that its model knows more than that is no news


def test_what_carry_stream_cannot_move_in_a_gpt2_is_said(runs, saved):
    run = runs.train(**flags(saved("GPT2"), direction="feedback", optimizer="adam", carry="stream", save_interval=1))
    one, other = (load_file(run / "checkpoints" / f"step_0000000{step}" / "model.safetensors") for step in (1, 4))
    moved = sum(value.numel() for name, value in one.items() if not torch.equal(value, other[name]))
    assert moved < 37120
    assert f"trains {moved / 1000:.2f}k of 37.12k parameters" in (run / "train.log").read_text()
    assert "warning: --direction feedback can't move the rest" in (run / "train.log").read_text()


@pytest.mark.parametrize("mode", ["FO", "Instruct"])
def test_a_parameter_that_the_loss_does_not_use_stops_nothing(runs, saved, mode):
    more = {"mode": mode} | ({"bp_interval": 2, "direction": "feedback"} if mode == "Instruct" else {})
    run = runs.train(**flags(saved("unused"), **more, optimizer="adam", learning_rate=1e-3, max_steps=8))
    first, *_, last = harness.metrics(run)
    assert float(last["val_loss"]) < float(first["val_loss"]) - 1e-3
    assert any("crossattention" in name for name in load_file(harness.last_checkpoint(run) / "model.safetensors"))


def test_its_run_is_resumed_and_replayed_bit_for_bit_but_not_from_other_weights(runs, saved, capsys):
    """From several files, in half precision, and from the initial weights where no checkpoint is whole."""
    folder = saved(max_shard_size="20KB")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    whole, run = runs.train("whole", **flags(folder)), runs.train("logs", **flags(folder))
    for checkpoint in (run / "checkpoints").glob("*"):
        assert {v.dtype for v in load_file(checkpoint / "model.safetensors").values()} == {torch.float32}
        harness.damage(checkpoint / "model.safetensors", "flipped")
    (run / "finished.json").unlink()
    assert (runs.resume(run), runs.replay(whole)) == (0, 0)
    assert harness.differences(whole, run) == []
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    model.save_pretrained(folder, max_shard_size="10KB")
    assert runs.replay(run) == 2
    assert "corpus.json: not what the run began with" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["nothing", "no weights", "positions", "tokens"])
def test_what_does_not_fit_is_one_line(runs, saved, tmp_path, capsys, what):
    folder = saved()
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    folder = tmp_path / "elsewhere" / "not" / "there" if what == "nothing" else folder
    more = {"positions": {"block_size": 65}, "tokens": {"tokenizer": "bpe:400"}}.get(what, {})
    assert runs.code(**flags(folder, **more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line
