"""--direction feedback against a reference in plain autograd, written from its description, and against theory."""

import math

import harness
import pytest
import torch
import transformers

import reproduce_zo_paper as zo

SEED, EMBEDDING = 4, "model.embed_tokens.weight"
BATCHES = [torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(step)) for step in range(20)]


def rule_of(model, workers, group: int = 0, **flags) -> zo.Feedback:
    """The rule on BATCHES, with sgd, whose weight changes are -rate times the gradients."""
    config = zo.Config(direction="feedback", optimizer="sgd", seed=SEED, **flags)
    tensors, batch = zo.trainable_tensors(model.named_parameters()), lambda step: (BATCHES[step], BATCHES[step])
    objective, optimizer = zo.Objective(model, workers), zo.Optimizer("sgd", tensors, workers)
    made = (objective, objective, tensors, None, optimizer, zo.Ranks())
    setting = zo.Setting(config, *made, batch, batch, batch, lambda step: 1.0)
    return zo.Feedback(setting, group)


def step_of(rule: zo.Feedback, step: int, rate: float = 1e-3) -> tuple[zo.Record, dict[str, torch.Tensor]]:
    """Makes a step; its record, and the gradients that it applied."""
    named = {tensor.name: tensor.parameter for tensor in rule.setting.tensors}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    record = rule.measure(step, rate)
    assert all(torch.equal(parameter, before[name]) for name, parameter in named.items())  # measuring changes nothing
    rule.finish(record)
    return record, {name: (before[name] - parameter.detach()) / rate for name, parameter in named.items()}


def true_gradient(model, step: int) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters())
    loss = model(input_ids=BATCHES[step], labels=BATCHES[step]).loss
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)))


def reference(model, memory: dict, step: int, carry: str, q: int, epsilon: float) -> tuple[float, dict]:
    """A step's loss and gradients on a Llama, in double precision: those of a sum whose parts are cut from each other.
    `memory` holds A and C from step to step.
    """
    rotary, ids, parts = model.model.rotary_emb(torch.ones(1).double(), torch.arange(17)[None]), BATCHES[step], []

    def body(x: torch.Tensor) -> list[torch.Tensor]:
        """The inputs of the layers, and what leaves the last."""
        states = [x.detach()]
        for layer in model.model.layers:
            states.append(layer(states[-1], attention_mask=None, position_embeddings=rotary).detach())
        return states

    def loss_of(hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model.lm_head(hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    h0 = model.model.embed_tokens(ids)
    *inputs, top = body(h0)
    hidden = model.model.norm(top.requires_grad_())
    output = hidden.detach().requires_grad_()
    (b,) = torch.autograd.grad(loss_of(output), output)
    (e,) = torch.autograd.grad(hidden, top, b, retain_graph=True)
    parts += [loss_of(hidden.detach()), (hidden * b).sum()]
    for layer, x in zip(model.model.layers, inputs):
        if carry == "block":
            x = h0 if layer is model.model.layers[0] else x
            parts.append(((layer(x, attention_mask=None, position_embeddings=rotary)) * e).sum())
        else:
            attention, _ = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)
            mlp = layer.mlp(layer.post_attention_layernorm((x + attention).detach()))
            parts += [(attention * e).sum(), (mlp * e).sum()]
    delta0, r = e, h0.detach().square().mean(-1, keepdim=True).sqrt()
    if q:
        memory |= {name: 0.95 * value for name, value in memory.items()}
        for query in range(q):
            xi = zo.normals(torch.empty(h0.shape), SEED, zo.PURPOSE_DIRECTION, step, query).double()
            response = (body(h0 + epsilon * r * xi)[-1] - top.detach()) / epsilon
            memory["A"] = memory["A"] + torch.einsum("rti,rtj->ij", xi, xi)
            memory["C"] = memory["C"] + torch.einsum("rti,rtj->ij", xi, response)
        ridge = 1e-3 * memory["A"].diagonal().mean() * torch.eye(24)
        delta0 = e @ (torch.linalg.inv(memory["A"] + ridge) @ memory["C"]).T / r
    parts += [(h0 * delta0).sum()] * (carry != "block")
    names, parameters = zip(*model.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(sum(parts), parameters)))
    for name in names:
        if carry == "stream" and "layers" in name and not name.endswith(("o_proj.weight", "down_proj.weight")):
            gradients[name] = torch.zeros_like(gradients[name])
    return parts[0].item(), gradients


HOW = [("stream", 0, 0), ("stream", 3, 2), ("block", 0, 0), ("branch", 0, 0), ("branch", 1, 0), ("branch", 3, 2)]


@pytest.mark.parametrize(("carry", "q", "group"), HOW)
@pytest.mark.parametrize("tied", [True, False])
def test_two_steps_are_those_of_the_reference(carry, tied, q, group, workers):
    model, memory = harness.llama("float64", tied), dict.fromkeys("AC", 0.0)
    rule = rule_of(model, workers, group, carry=carry, query_budget_q=q, epsilon=0.05)
    for step in range(2):
        loss, wanted = reference(model, memory, step, carry, q, 0.05)
        record, found = step_of(rule, step)
        after = [gradient.norm().item() for name, gradient in wanted.items() if name.startswith(("model.norm", "lm_"))]
        assert record.loss == pytest.approx(loss, rel=1e-6)
        assert tied or record.grad_norm == pytest.approx(math.hypot(*after), rel=1e-4)  # of what follows the blocks
        for name, gradient in found.items():
            tolerance = 1e-4 * wanted[name].abs().max().item()
            torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=tolerance, msg=f"{step} {name}")


SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
SMALL |= {"ffn_dim": 40, "word_embed_proj_dim": 32, "num_key_value_heads": 4, "max_position_embeddings": 64}
SMALL |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "tie_word_embeddings": False, "rotary_dim": 4}
# What is in the last block and has nothing but the stream behind it: the MLP; where they are parallel, attention too.
LAST = dict.fromkeys(("llama", "qwen2"), ("layers.1.mlp", "layers.1.post_"))
LAST |= {"gpt2": ("h.1.mlp", "h.1.ln_2"), "opt": ("layers.1.fc", "layers.1.final_layer_norm")}
LAST |= {"gpt_neox": ("layers.1.",), "phi": ("layers.1.",), "falcon": ("h.1.",), "gptj": ("h.1.",)}
OUTSIDE = ("model.norm", "ln_f", "decoder.final_layer", "neox.final_layer", "model.final_layer", "lm_head")


def model_of(kind: str):
    """A small model of a kind, in float32, its weights large enough that every one matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **SMALL)).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return model


@pytest.mark.parametrize("kind", LAST)
def test_it_is_exact_where_it_should_be_and_trains_what_it_says(kind, workers):
    """The last block's MLP, or with carry block all of it, the final norm and the output layer have true gradients, as
    e is exact there; branch and block move all that a true gradient moves; stream, as branch does, what is outside and
    the matrices that write to the stream.
    """
    model, moved, gradients = model_of(kind), {}, {}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    true, _ = true_gradient(model, 0), model.train()  # dropout, where a kind has it, is off
    for carry, exact in (("branch", LAST[kind]), ("block", ("layers.1.", "h.1.")), ("stream", ())):
        gradients[carry] = step_of(rule_of(model, workers, carry=carry), 0, 1.0)[1]
        moved[carry] = {name for name, gradient in gradients[carry].items() if gradient.any()}
        model.load_state_dict(weights)
        names = [name for name in true if any(part in name for part in (*OUTSIDE, *exact))]
        assert len(names) > (4 if exact else 1)
        for name in names:
            assert (gradients[carry][name] - true[name]).norm() < 1e-3 * true[name].norm() + 1e-6, name
        assert carry == "stream" or {name for name in true if true[name].abs().max() > 1e-7} <= moved[carry]
    inside = {name for name in moved["stream"] if ".1." in name or ".0." in name}
    assert len(inside) == 4  # two matrices a block: attention's and the MLP's
    assert moved["stream"] == inside | {name for name in moved["branch"] if ".1." not in name and ".0." not in name}
    for name in inside:
        branch = gradients["branch"][name]
        assert (gradients["stream"][name] - branch).norm() < 1e-3 * branch.norm(), name


def test_blocks_that_norm_what_a_branch_gives_are_refused_by_branch_and_trained_by_block(workers):
    model = model_of("olmo2")
    assert all(gradient.any() for gradient in step_of(rule_of(model, workers, carry="block"), 0)[1].values())
    with pytest.raises(zo.UsageError, match="block"):
        step_of(rule_of(model, workers, carry="branch"), 0)


class Linear(torch.nn.Linear):
    """A block that is a linear map of the stream."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return super().forward(x)


def test_the_way_that_is_learned_is_r_times_the_jacobian(workers):
    """Of a linear body, however far queries move; delta0 is the true error then."""
    model, jacobian = harness.llama("float64", tied=False), torch.eye(24, dtype=torch.float64)
    for number in range(2):
        layer = model.model.layers[number] = Linear(24, 24, bias=False).double()
        layer.weight.data.normal_(generator=torch.Generator().manual_seed(number)).add_(torch.eye(24))
        jacobian = layer.weight.data @ jacobian
    weight = model.model.embed_tokens.weight.data
    weight.mul_(0.7 / weight.square().mean(-1, keepdim=True).sqrt())  # r is the same at every token
    rule, true = rule_of(model, workers, query_budget_q=20, epsilon=0.7), true_gradient(model, 0)
    _, found = step_of(rule, 0, 1e-9)
    a, c = (moment.double() for moment in rule.moments)
    torch.testing.assert_close(torch.linalg.solve(a, c), 0.7 * jacobian.T, rtol=0, atol=1e-3)
    assert (found[EMBEDDING] - true[EMBEDDING]).norm() < 0.01 * true[EMBEDDING].norm()


def test_queries_find_the_way_to_the_embedding_where_the_error_carried_is_blind(workers):
    """By the cosine of the embedding's gradient to the true one, on a model whose blocks write much to the stream."""
    model, cosines = harness.llama("float64", tied=False), {}
    model.model.embed_tokens.weight.data.mul_(0.2)
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.mul_(3)
    true = true_gradient(model, 19)[EMBEDDING]
    for carry, q in (("branch", 0), ("branch", 1), ("branch", 8), ("block", 0)):
        rule = rule_of(model, workers, carry=carry, query_budget_q=q)
        found = [step_of(rule, step, 1e-9)[1][EMBEDDING] for step in range(20)]
        cosines[carry, q] = torch.cosine_similarity(found[-1].flatten(), true.flatten(), dim=0).item()
    assert abs(cosines["branch", 0]) + 0.1 < cosines["branch", 1] < cosines["branch", 8] < cosines["block", 0] < 0.9
