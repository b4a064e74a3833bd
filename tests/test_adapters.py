"""--scope lora:R: what is trained, peft's file format, merged export, resume, replay, ranks."""

import json
import sys
import types
from pathlib import Path

import harness
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_init_from import flags, validation

import reproduce_zo_paper as zo

LORA = {"scope": "lora:2", "learning_rate": 1e-2, "optimizer": "adam"}
IDS = torch.arange(24).view(2, 12)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def loaded(folder) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_peft_reads_the_adapter_and_the_merged_model_is_the_same(runs, saved, architecture):
    """The logits of three: peft's, of the checkpoint; the exported model's; by hand, base and product in float64."""
    folder, out = saved(architecture), runs.folder / "exported"
    targets = {"lora_targets": "c_attn,c_proj"} if architecture == "GPT2" else {}
    given = flags(folder, **LORA, **targets, max_steps=6, export_dir=out)
    run = runs.train(**given)
    merged, base = loaded(out), loaded(folder)
    state, adapter = base.state_dict(), harness.weights(run, file="adapter_model")
    assert not {"adapter_model.safetensors", "adapter_config.json"} & {path.name for path in out.iterdir()}
    assert all("lora_" in name for name in adapter)
    for name in [name for name in adapter if name.endswith("lora_A.weight")]:
        a, b = adapter[name], adapter[name.replace("lora_A", "lora_B")]
        assert b.abs().max() > 0
        product = (b.double() @ a.double()).float()
        product = product.T if architecture == "GPT2" else product
        state[name.removeprefix("base_model.model.").replace("lora_A.", "")] += product
    base.load_state_dict(state)
    assert torch.allclose(logits(base), logits(merged), atol=1e-5)
    assert not torch.allclose(logits(loaded(folder)), logits(merged), atol=1e-3)
    peft = pytest.importorskip("peft")
    with_adapter = peft.PeftModel.from_pretrained(loaded(folder), harness.last_checkpoint(run))
    assert torch.allclose(logits(with_adapter), logits(merged), atol=1e-5)


def test_an_exported_adapter_is_what_peft_expects(runs, saved):
    out = runs.folder / "adapter"
    runs.train(**flags(saved(), **LORA, max_steps=3, export_dir=out, export_adapter=True, export_best=True))
    about = json.loads((out / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["peft_type"]) == (2, 2, "LORA")
    assert about["target_modules"] == [f"model.layers.{at}.self_attn.{x}_proj" for at in (0, 1) for x in "qv"]
    assert Path(about["base_model_name_or_path"]).is_absolute()
    assert "library_name: peft" in (out / "README.md").read_text()
    assert not (out / "model.safetensors").exists()
    named = {f"base_model.model.{layer}.lora_{x}.weight" for layer in about["target_modules"] for x in "AB"}
    assert set(load_file(out / "adapter_model.safetensors")) == named


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"parallel_q_computation": True, "direction": "lowrank"},
        {"direction": "rademacher", "optimizer": "sgd"},
        {"mode": "FO", "query_budget_q": None},
        {"direction": "feedback", "query_budget_q": None},
        {"direction": "aligned"},
        {"mode": "Instruct", "bp_interval": 2, "direction": "gaussian"},
    ],
    ids=lambda more: "-".join(map(str, more.values())) or "plain",
)
def test_only_adapters_move_and_resume_and_replay_are_bitwise(runs, saved, more):
    folder = saved()
    whole = runs.goes_on(5, **flags(folder, **LORA | {"query_budget_q": 3} | more))
    assert runs.resume(whole, export_dir=runs.folder / "merged") == 0
    base, merged = (load_file(at / "model.safetensors") for at in (folder, runs.folder / "merged"))
    assert harness.moved(base, merged) == {
        f"model.layers.{at}.self_attn.{x}_proj.weight" for at in (0, 1) for x in "qv"
    }


def test_batched_adapters_are_measured_as_in_place(saved, workers):
    config = zo.Config(init_from=str(saved()), scope="lora:2")
    model = loaded(config.init_from)
    zo.add_adapters(model, config)
    tensors = zo.choose_scope(model, config.scope)
    assert sum(tensor.parameter.numel() for tensor in tensors) == 2 * 2 * 2 * (32 + 32)
    with torch.no_grad():
        for tensor in tensors:
            tensor.parameter.add_(0.1)
    for family in (zo.Gaussian(), zo.LowRank(2)):
        queries = zo.Queries(family, 0, 0, 3, 1e-2)
        batch = zo.query_batch(IDS, IDS, 3, "shared")
        found = [zo.query_losses(zo.Objective(model, workers), tensors, batch, queries, group) for group in (0, 3)]
        assert abs(found[0] - found[1]).max() < 1e-5
        assert abs(found[0][:, 0] - found[0][:, 1]).min() > 1e-5


def test_two_ranks_are_one(runs, saved):
    given = flags(saved(), **LORA, max_steps=3, query_budget_q=3, num_threads=1)
    assert harness.differences(runs.train("one", **given), runs.train_ranks(2, "two", **given)) == []


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"parallel_q_computation": True, "direction": "lowrank", "dtype": "bfloat16"},
        {"mode": "FO", "query_budget_q": None},
        {"direction": "feedback", "query_budget_q": None},
    ],
    ids=lambda more: "-".join(map(str, more.values())) or "plain",
)
def test_int8_weights_stay_and_adapters_learn_on_them(runs, saved, torchao, more):
    """The model that is exported has the loss that the run measured; resume and replay are bitwise."""
    folder = saved()
    whole = runs.goes_on(5, **flags(folder, **LORA | {"query_budget_q": 3, "weights": "int8"} | more))
    assert runs.resume(whole, export_dir=runs.folder / "merged") == 0
    losses = harness.column(whole, "val_loss")
    assert losses[-1] != losses[0]
    assert validation(runs.folder / "merged", whole) == pytest.approx(losses[-1], abs=3e-3 if "dtype" in more else 1e-4)
    base, merged = (load_file(at / "model.safetensors") for at in (folder, runs.folder / "merged"))
    assert {value.dtype for value in merged.values()} == {torch.float32}
    for name, value in base.items():  # half a level of 127 in each row; what has an adapter moved
        error, row = (merged[name] - value).abs().reshape(len(value), -1), value.abs().reshape(len(value), -1).amax(1)
        inside = name.split(".")[-2].endswith("_proj")
        assert (error.amax(1) <= row / 127 * 0.51).all() or name.split(".")[-2] in ("q_proj", "v_proj")
        assert (error.max() > 0) == inside


def test_int8_weights_take_a_byte_each_and_a_difference_is_seen(saved, torchao):
    config = zo.Config(init_from=str(saved()), scope="lora:2", weights="int8", block_size=32)
    model = zo.build_model(config, zo.given_tokenizer(config))
    stored = [values for values in zo.plain_tensors(model) if values.dtype == torch.int8 and values.numel() > 48]
    assert {values.numel(): values.nbytes for values in stored} == {32 * 32: 32 * 32, 32 * 48: 32 * 48}
    assert config.dtype == "float32"
    before = zo.weights_digest(model), zo.weights_digest(model, (0, 0))
    stored[-1].add_(1)  # most are not at the top
    assert zo.weights_digest(model) != before[0]
    assert zo.weights_digest(model, (0, 0)) != before[1]


def test_int8_weights_are_refused_where_they_make_no_sense(runs, saved, failure, monkeypatch):
    given = LORA | {"weights": "int8", "lora_targets": "c_attn"}
    find, there = zo.importlib.util.find_spec, {"torchao": True}
    monkeypatch.setattr(zo.importlib.util, "find_spec", lambda name: there[name] if name in there else find(name))
    failure("such weights are not trained; take --scope lora:R", runs.code, weights="int8")
    there["torchao"] = None
    needed = "error: --weights int8: its package is not installed; run: pip install torchao==0.18.0"
    assert failure("", runs.code, **flags(saved(), **given)) == needed
    there["torchao"], module = True, types.ModuleType("torchao.quantization")
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    too_old = "has no attribute 'Int8WeightOnlyConfig'; pip install torchao==0.18.0"
    assert failure("", runs.code, **flags(saved(), **given)).endswith(too_old)
    module.Int8WeightOnlyConfig = lambda set_inductor_config: None
    failure("the blocks of GPT2LMHeadModel have no torch.nn.Linear", runs.code, **flags(saved("GPT2"), **given))


def test_what_has_no_sense_is_refused(runs, saved, failure):
    folder = saved("GPT2")
    layers = "no layer of a block is named 'q_proj'; the blocks' layers are c_attn, c_fc, c_proj"
    failure(layers, runs.code, **flags(folder, **LORA))
    failure("adapters are for a trained model", runs.code, **LORA)
    failure("--lora_targets: has no effect without --scope lora:R", runs.code, lora_targets="q_proj")
    failure("must be full, head", runs.code, **flags(folder, scope="lora:0"))
    run = runs.train(**flags(saved(), **LORA, max_steps=1))
    merged = "an adapter, not a model; name one that it is merged into"
    failure(merged, runs.code, "again", **flags(harness.last_checkpoint(run)))


@pytest.mark.parametrize(("weights", "target"), [("float32", "dt_proj"), ("int8", "in_proj")])
def test_a_layer_whose_weight_is_read_without_a_call_is_refused(request, weights, target):
    shape = {"vocab_size": 61, "hidden_size": 24, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 2}
    with torch.random.fork_rng(devices=[]):
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**shape))
    config = zo.Config(init_from=".", scope="lora:2", lora_targets=target, weights=weights)
    if weights == "int8":
        request.getfixturevalue("torchao")
        zo.quantize(model)
    asked = "--weights int8" if weights == "int8" else "--lora_targets dt_proj"
    with pytest.raises(zo.UsageError, match=f"{asked}: MambaForCausalLM reads a layer's weight without calling it"):
        zo.add_adapters(model, config)


def test_adapters_merged_into_bfloat16_weights_are_exported_in_float32(runs, saved):
    """With a rate so small that bfloat16 would lose what they add."""
    folder, out = saved(), runs.folder / "out"
    given = flags(folder, **LORA | {"learning_rate": 1e-4}, max_steps=3, weights="bfloat16", export_dir=out)
    run = runs.train(**given)
    adapter = harness.weights(run, file="adapter_model")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().state_dict()
    found = loaded(out).state_dict()
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    assert torch.allclose(found[f"{name}.weight"] - base[f"{name}.weight"], b @ a, rtol=1e-3, atol=1e-8)
    assert found[f"{name}.weight"].dtype == torch.float32
