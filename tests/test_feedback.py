"""--direction feedback against a reference in plain autograd, written from its description, and against theory."""

import collections
import math

import harness
import pytest
import torch
import transformers
from safetensors.torch import load_file

import reproduce_zo_paper as zo

SEED = 4
BATCHES = [torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(step)) for step in range(40)]


def rule_of(model, workers, group: int = 0, **flags) -> zo.Feedback:
    """The rule on BATCHES, with sgd, whose weight changes are -rate times the gradients."""
    config = zo.Config(**{"direction": "feedback", "optimizer": "sgd", "seed": SEED} | flags)
    tensors = zo.trainable_tensors(model.named_parameters())
    objective, optimizer = zo.Objective(model, workers), zo.Optimizer("sgd", tensors, workers)
    batch = BATCHES.__getitem__
    setting = zo.Setting(config, objective, tensors, None, optimizer, zo.Ranks(), batch, batch, lambda step: 1.0)
    return zo.Feedback(setting, group)


def step_of(rule: zo.Feedback, step: int, rate: float = 1e-3) -> tuple[zo.Record, dict[str, torch.Tensor]]:
    """Makes a step; its record, and the gradients that it applied."""
    named = [(tensor.name, tensor.parameter) for tensor in rule.setting.tensors]
    before = {name: parameter.detach().clone() for name, parameter in named}
    record = rule.measure(step, rate)
    assert all(torch.equal(parameter, before[name]) for name, parameter in named)  # measuring changes nothing
    rule.finish(record)
    return record, {name: (before[name] - parameter.detach()) / rate for name, parameter in named}


def true_gradient(model, step: int) -> dict[str, torch.Tensor]:
    loss = model(input_ids=BATCHES[step], labels=BATCHES[step]).loss
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found) if gradient is not None}


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0).item()


class Reference:
    """The rule on a Llama, in plain autograd and double precision; A and C live from step to step."""

    def __init__(self, model, carry: str, q: int, epsilon: float):
        self.model, self.carry, self.q, self.epsilon = model, carry, q, epsilon
        self.a = self.c = torch.zeros(24, 24, dtype=torch.float64)
        self.layers, self.rotary = (
            model.model.layers,
            model.model.rotary_emb(torch.ones(1).double(), torch.arange(17)[None]),
        )

    def body(self, h0: torch.Tensor) -> list[torch.Tensor]:
        """The inputs of the layers, and what leaves the last."""
        states = [h0]
        for layer in self.layers:
            states.append(layer(states[-1], attention_mask=None, position_embeddings=self.rotary).detach())
        return states

    def parts(self, layer, x: torch.Tensor) -> list[tuple[torch.Tensor, list]]:
        """What is trained of a layer: outputs whose product with e has the gradients, and parameters."""
        if self.carry == "block":
            return [(layer(x, attention_mask=None, position_embeddings=self.rotary), list(layer.parameters()))]
        normed, attention, mlp = layer.input_layernorm(x), layer.self_attn, layer.mlp
        first = attention(normed, position_embeddings=self.rotary, attention_mask=None)[0]
        second = mlp(layer.post_attention_layernorm((x + first).detach()))
        if self.carry == "stream":  # <W x, e> has the gradient e^T x
            return [(first, [attention.o_proj.weight]), (second, [mlp.down_proj.weight])]
        norms = [list(norm.parameters()) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        return [(first, norms[0] + list(attention.parameters())), (second, norms[1] + list(mlp.parameters()))]

    def learned(self, e: torch.Tensor, h0: torch.Tensor, top: torch.Tensor, step: int) -> torch.Tensor:
        """delta0, from the regression with this step's queries in it."""
        r = h0.square().mean(-1, keepdim=True).sqrt()
        self.a, self.c = 0.95 * self.a, 0.95 * self.c
        for query in range(self.q):
            generator = zo.stream(torch.device("cpu"), SEED, zo.PURPOSE_DIRECTION, step, query)
            xi = torch.empty(h0.shape).normal_(generator=generator).double()
            response = (self.body(h0 + self.epsilon * r * xi)[-1] - top) / self.epsilon
            xi = xi.flatten(0, 1)
            self.a, self.c = self.a + xi.T @ xi, self.c + xi.T @ response.flatten(0, 1)
        ridge = 1e-3 * self.a.diagonal().mean() * torch.eye(24)
        return e @ (torch.linalg.inv(self.a + ridge) @ self.c).T / r

    def gradients(self, step: int) -> tuple[float, dict[str, torch.Tensor]]:
        model, ids, found = self.model, BATCHES[step], collections.defaultdict(float)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        head, norm, embedding = model.lm_head.weight, model.model.norm.weight, model.model.embed_tokens.weight
        h0, *states = self.body(embedding.detach()[ids].requires_grad_())
        top = states[-1].requires_grad_()
        hidden = model.model.norm(top)
        p = torch.softmax((hidden @ head.T)[:, :-1], -1).detach()
        delta = (p - torch.nn.functional.one_hot(ids[:, 1:], 61)) / ids[:, 1:].numel()
        found[names[id(head)]] += torch.einsum("rtv,rtn->vn", delta, hidden.detach()[:, :-1])
        b = torch.nn.functional.pad(delta @ head.detach(), (0, 0, 0, 1))
        e, found["model.norm.weight"] = torch.autograd.grad(hidden, [top, norm], b)
        delta0 = e if not self.q else self.learned(e, h0.detach(), top.detach(), step)
        for number, (layer, x) in enumerate(zip(self.layers, [h0, *states])):
            for output, parameters in self.parts(layer, x):
                entry = [x] if self.carry == "block" and number == 0 else []
                gradients = torch.autograd.grad((output * e).sum(), [*parameters, *entry])
                found |= {names[id(parameter)]: gradient for parameter, gradient in zip(parameters, gradients)}
                delta0 = gradients[-1] if entry else delta0
        entry = torch.zeros_like(embedding.detach()).index_add(0, ids.flatten(), delta0.detach().flatten(0, 1))
        found[names[id(embedding)]] += entry
        return -p.gather(-1, ids[:, 1:, None]).log().mean().item(), found


HOW = [("stream", 0, 0), ("stream", 3, 2), ("block", 0, 0), ("branch", 0, 0), ("branch", 1, 0), ("branch", 3, 2)]


@pytest.mark.parametrize(("carry", "q", "group"), HOW)
@pytest.mark.parametrize("tied", [True, False])
def test_two_steps_are_those_of_the_reference(carry, tied, q, group, workers):
    model = harness.llama("float64", tied)
    rule = rule_of(model, workers, group, carry=carry, query_budget_q=q, epsilon=0.05)
    reference = Reference(model, carry, q, 0.05)
    for step in range(2):
        loss, wanted = reference.gradients(step)
        record, found = step_of(rule, step)
        assert record.loss == pytest.approx(loss, rel=1e-6)
        outside = math.hypot(*(gradient.norm().item() for name, gradient in wanted.items() if "layers" not in name))
        assert tied or carry == "block" or record.grad_norm == pytest.approx(outside, rel=1e-4)
        for name, gradient in found.items():
            own = wanted.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, own, rtol=0, atol=1e-4 * own.abs().max().item(), msg=f"{step} {name}")


# ---- where theory makes it exact, on many kinds of models ------------------------------------------------------------

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
SMALL |= {"ffn_dim": 40, "word_embed_proj_dim": 32, "num_key_value_heads": 4, "max_position_embeddings": 64}
SMALL |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "tie_word_embeddings": False}
# What nothing but the end of the stream lies behind, in the last block: the MLP; where they are parallel, attention too.
LAST = {kind: ("layers.1.mlp", "layers.1.post_") for kind in ("llama", "qwen2")}
LAST |= {"gpt2": ("h.1.mlp", "h.1.ln_2"), "opt": ("layers.1.fc", "layers.1.final_layer_norm")}
LAST |= {"gpt_neox": ("layers.1.",), "phi": ("layers.1.",), "falcon": ("h.1.",), "gptj": ("h.1.",)}
OUTSIDE = ("model.norm", "ln_f", "decoder.final_layer", "neox.final_layer", "model.final_layer", "lm_head")


def model_of(kind: str):
    """A small model of a kind, in float32, its weights large enough that every one matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        about = transformers.AutoConfig.for_model(kind, **SMALL | {"rotary_dim": 4})
        model = transformers.AutoModelForCausalLM.from_config(about).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


@pytest.mark.parametrize("kind", LAST)
def test_it_is_exact_where_it_should_be_and_trains_what_it_says(kind, workers):
    """The last block's MLP, or with carry block all of it, the final norm and the output layer have true gradients, as e
    is exact there; branch and block move all that a true gradient moves; stream, as branch does, what is outside and the
    matrices that write to the stream.
    """
    model = model_of(kind)
    weights, true, found = (
        {name: value.clone() for name, value in model.state_dict().items()},
        true_gradient(model, 0),
        {},
    )
    for carry, exact in (("branch", LAST[kind]), ("block", ("layers.1.", "h.1.")), ("stream", ())):
        gradients = step_of(rule_of(model, workers, carry=carry), 0, 1.0)[1]
        found[carry] = {name: gradient for name, gradient in gradients.items() if gradient.any()}
        model.load_state_dict(weights)
        names = [name for name in true if any(part in name for part in (*OUTSIDE, *exact))]
        assert len(names) > (4 if exact else 1)
        for name in names:
            assert (gradients[name] - true[name]).norm() < 1e-3 * true[name].norm(), name
        assert carry == "stream" or {name for name in true if true[name].abs().max() > 1e-7} <= set(found[carry])
    inside = {name for name in found["stream"] if ".1." in name or ".0." in name}
    assert len(inside) == 4  # two matrices a block: attention's and the MLP's
    assert found["stream"].keys() - inside == {
        name for name in found["branch"] if ".1." not in name and ".0." not in name
    }
    for name in inside:
        assert (found["stream"][name] - found["branch"][name]).norm() < 1e-3 * found["branch"][name].norm(), name


def test_blocks_that_norm_what_a_branch_gives_are_refused_by_branch_and_trained_by_block(workers):
    model = model_of("olmo2")
    _, found = step_of(rule_of(model, workers, carry="block"), 0)
    assert all(gradient.any() for gradient in found.values())
    with pytest.raises(zo.UsageError, match="block"):
        step_of(rule_of(model, workers), 0)


# ---- what queries learn ----------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """A block that is a known linear map of the stream."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.matrix = matrix

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return x @ self.matrix.T


def test_the_way_that_is_learned_is_r_times_the_jacobian(workers):
    """Of a linear body, however far queries move; delta0 is the true error then."""
    model, jacobian = harness.llama("float64", tied=False), torch.eye(24, dtype=torch.float64)
    generator, weight = torch.Generator().manual_seed(0), model.model.embed_tokens.weight.detach()
    for number in range(2):
        matrix = torch.eye(24) + torch.randn(24, 24, generator=generator, dtype=torch.float64)
        model.model.layers[number], jacobian = Linear(matrix), matrix @ jacobian
    weight.mul_(0.7 / weight.square().mean(-1, keepdim=True).sqrt())  # r is the same at every token
    rule, true = rule_of(model, workers, query_budget_q=20, epsilon=0.7), true_gradient(model, 0)
    _, found = step_of(rule, 0, 1e-9)
    a, c = (moment.double() for moment in rule.moments)
    torch.testing.assert_close(torch.linalg.solve(a, c), 0.7 * jacobian.T, rtol=0, atol=1e-3)
    assert cosine(found["model.embed_tokens.weight"], true["model.embed_tokens.weight"]) > 0.9999


def test_queries_find_the_way_to_the_embedding_where_the_error_carried_is_blind(workers):
    """By the cosine of the embedding's gradient to the true one, on a model whose blocks write much to the stream."""
    model, cosines = harness.llama("float64", tied=False), {}
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.2)
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(3)
    true = true_gradient(model, 19)["model.embed_tokens.weight"]
    for carry, q in (("branch", 0), ("branch", 1), ("branch", 8), ("block", 0)):
        rule = rule_of(model, workers, carry=carry, query_budget_q=q)
        found = [step_of(rule, step, 1e-9)[1]["model.embed_tokens.weight"] for step in range(20)]
        cosines[carry, q] = cosine(found[-1], true)
    assert abs(cosines["branch", 0]) + 0.1 < cosines["branch", 1] < cosines["branch", 8] < cosines["block", 0] < 0.9


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_moves_what_it_may_and_is_replayed_bit_for_bit(runs, capsys):
    run = runs.train(
        direction="feedback", carry="stream", query_budget_q=2, learning_rate=1e-2, max_steps=12, save_interval=1
    )
    assert runs.replay(run) == 0
    assert "bitwise equal to" in capsys.readouterr().out
    first, last = (load_file(run / "checkpoints" / f"step_{n:08d}" / "model.safetensors") for n in (1, 12))
    may = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "model.norm.weight")
    assert {name for name in first if not torch.equal(first[name], last[name])} == {n for n in first if n.endswith(may)}
    rows = harness.metrics(run)
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"]) - 0.3
