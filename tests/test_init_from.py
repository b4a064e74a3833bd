"""--init_from: any causal language model of transformers as the start of a run."""

import harness
import pytest
import torch
import transformers
from safetensors.torch import load_file

import reproduce_zo_paper as zo


def flags(folder, **more) -> dict:
    return {"init_from": folder, "model_size": None, "tokenizer": None} | more


def validation(folder, run) -> float:
    """The loss that transformers gives a folder's model on a run's validation sequences."""
    corpus = harness.corpus(zo.read_config(run))
    ids = corpus.sequences("validation", corpus.validation_rows)[0]
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids, labels=ids).loss.item()


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "OPT", "GPT2", "GPTNeoX"])
@pytest.mark.parametrize("direction", ["feedback", "gaussian"])
def test_a_run_begins_with_its_weights_and_learns(runs, saved, architecture, direction):
    folder = saved(architecture)
    ours = {"direction": direction, "optimizer": "adam", "learning_rate": 1e-3, "parallel_q_computation": True}
    run = runs.train(**flags(folder, **ours, max_steps=8))
    first, *_, last = harness.column(run, "val_loss")
    assert first == pytest.approx(validation(folder, run), abs=1e-5)
    assert last == pytest.approx(validation(harness.last_checkpoint(run), run), abs=1e-5)
    assert direction == "gaussian" or last < first - 1e-3
    assert "unigram" not in (run / "train.log").read_text()  # that its model knows more than that is no news


def test_what_carry_stream_cannot_move_in_a_gpt2_is_said(runs, saved):
    run = runs.train(**flags(saved("GPT2"), direction="feedback", optimizer="adam", carry="stream", save_interval=1))
    one, other = harness.weights(run, 1), harness.weights(run, 4)
    moved = sum(one[name].numel() for name in harness.moved(one, other))
    assert moved < 37120
    assert f"trains {moved / 1000:.2f}k of 37.12k parameters" in (run / "train.log").read_text()
    assert "warning: --direction feedback can't move the rest" in (run / "train.log").read_text()


@pytest.mark.parametrize("mode", ["FO", "Instruct"])
def test_a_parameter_that_the_loss_does_not_use_stops_nothing(runs, saved, mode):
    more = {"mode": mode} | ({"bp_interval": 2, "direction": "feedback"} if mode == "Instruct" else {})
    run = runs.train(
        **flags(saved("GPT2", add_cross_attention=True), **more, optimizer="adam", learning_rate=1e-3, max_steps=8)
    )
    first, *_, last = harness.column(run, "val_loss")
    assert last < first - 1e-3
    assert any("crossattention" in name for name in harness.weights(run))


def test_its_run_is_resumed_and_replayed_bit_for_bit_but_not_from_other_weights(runs, saved, capsys):
    """From several files, in half precision, and from the initial weights where no checkpoint is whole."""
    folder = saved(options={"max_shard_size": "20KB"})
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
