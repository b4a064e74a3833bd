"""--direction feedback against a reference in plain autograd, written from its description, and against theory."""

import math

import harness
import pytest
import torch
import transformers
from safetensors.torch import load_file

import reproduce_zo_paper as zo

CPU, SEED = torch.device("cpu"), 4
BETA, RIDGE = 0.95, 1e-3
BATCHES = [torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(step)) for step in range(40)]
WRITERS = ("o_proj.weight", "down_proj.weight")


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
        width = model.config.hidden_size
        self.a = self.c = torch.zeros(width, width, dtype=torch.float64)

    def body(self, h0: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The inputs of the layers, and what leaves the last."""
        rotary = self.model.model.rotary_emb(h0, torch.arange(h0.shape[1])[None])
        inputs = [h0]
        for layer in self.model.model.layers:
            inputs.append(layer(inputs[-1], attention_mask=None, position_embeddings=rotary))
        return inputs[:-1], inputs[-1]

    def gradients(self, step: int) -> tuple[float, dict[str, torch.Tensor]]:
        model, ids = self.model, BATCHES[step]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found: dict[str, torch.Tensor] = {}

        def add(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
            name = names[id(parameter)]
            found[name] = found.get(name, 0) + gradient

        h0 = model.model.embed_tokens(ids).detach()
        inputs, top = self.body(h0)
        inputs, top = [x.detach() for x in inputs], top.detach().requires_grad_()
        hidden = model.model.norm(top)
        p = torch.softmax((hidden @ model.lm_head.weight.T)[:, :-1], -1).detach()
        delta = p - torch.nn.functional.one_hot(ids[:, 1:], p.shape[-1])
        delta = delta / delta[..., 0].numel()
        loss = -p.gather(-1, ids[:, 1:, None]).log().mean().item()
        add(model.lm_head.weight, torch.einsum("rtv,rtn->vn", delta, hidden.detach()[:, :-1]))
        b = torch.zeros_like(hidden)
        b[:, :-1] = delta @ model.lm_head.weight.detach()
        e, norm = torch.autograd.grad(hidden, [top, model.model.norm.weight], b)
        add(model.model.norm.weight, norm)
        rotary, delta0 = model.model.rotary_emb(h0, torch.arange(ids.shape[1])[None]), e
        for layer, x in zip(model.model.layers, inputs):
            if self.carry == "block":
                parameters = list(layer.parameters())
                output = layer(x.requires_grad_(), attention_mask=None, position_embeddings=rotary)
                *found_here, delta = torch.autograd.grad((output * e).sum(), [*parameters, x])
                delta0 = delta if layer is model.model.layers[0] else delta0
                for parameter, gradient in zip(parameters, found_here):
                    add(parameter, gradient)
                continue
            attention = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]
            middle = (x + attention).detach()
            branches = [(attention, layer.input_layernorm, layer.self_attn, "o_proj")]
            mlp = layer.mlp(layer.post_attention_layernorm(middle))
            branches.append((mlp, layer.post_attention_layernorm, layer.mlp, "down_proj"))
            for output, before, module, writer in branches:
                parameters = [*before.parameters(), *module.parameters()]
                if self.carry == "stream":  # e^T x of what writes to the stream: its gradient of <output, e>
                    parameters = [getattr(module, writer).weight]
                for parameter, gradient in zip(parameters, torch.autograd.grad((output * e).sum(), parameters)):
                    add(parameter, gradient)
        if self.q:
            r = h0.square().mean(-1, keepdim=True).sqrt()
            self.a, self.c = BETA * self.a, BETA * self.c
            for query in range(self.q):
                generator = zo.stream(CPU, SEED, zo.PURPOSE_DIRECTION, step, query)
                xi = torch.empty(h0.shape).normal_(generator=generator).double()
                moved = self.body(h0 + self.epsilon * r * xi)[1].detach()
                response = ((moved - top.detach()) / self.epsilon).flatten(0, 1)
                self.a, self.c = self.a + xi.flatten(0, 1).T @ xi.flatten(0, 1), self.c + xi.flatten(0, 1).T @ response
            ridge = RIDGE * self.a.diagonal().mean() * torch.eye(len(self.a))
            delta0 = e @ (torch.linalg.inv(self.a + ridge) @ self.c).T / r
        embedding = torch.zeros_like(model.model.embed_tokens.weight)
        add(model.model.embed_tokens.weight, embedding.index_add(0, ids.flatten(), delta0.flatten(0, 1).detach()))
        return loss, {name: gradient.detach() for name, gradient in found.items()}


HOW = [("stream", 0, 0), ("stream", 3, 2), ("block", 0, 0)]
HOW += [("branch", 0, 0), ("branch", 1, 0), ("branch", 3, 0), ("branch", 3, 2)]


@pytest.mark.parametrize(("carry", "q", "group"), HOW)
@pytest.mark.parametrize("tied", [True, False])
def test_two_steps_are_those_of_the_reference(carry, tied, q, group, workers):
    model = harness.llama("float64", tied)
    rule = rule_of(model, workers, group, carry=carry, query_budget_q=q, epsilon=0.05)
    reference = Reference(model, carry, q, 0.05)
    for step in range(2):
        loss, wanted = reference.gradients(step)
        record, found = step_of(rule, step)
        assert record.loss == pytest.approx(loss, rel=1e-9)
        outside = [g.norm().item() for name, g in wanted.items() if "layers" not in name]
        assert tied or carry == "block" or record.grad_norm == pytest.approx(math.hypot(*outside), rel=1e-4)
        for name, gradient in found.items():
            gradient_wanted = wanted.get(name, torch.zeros_like(gradient))
            tolerance = 1e-4 * gradient_wanted.abs().max().item()
            torch.testing.assert_close(gradient, gradient_wanted, rtol=0, atol=tolerance, msg=f"{step} {name}")


# ---- where theory makes it exact, on many kinds of models ------------------------------------------------------------

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
SMALL |= {"ffn_dim": 40, "word_embed_proj_dim": 32, "num_key_value_heads": 4, "max_position_embeddings": 64}
SMALL |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "tie_word_embeddings": False}
# What lies, in the last block, before nothing but the end of the stream: its MLP, and where they are parallel its attention.
LAST = {
    "llama": ("layers.1.mlp", "layers.1.post_"),
    "qwen2": ("layers.1.mlp", "layers.1.post_"),
    "gpt2": ("h.1.mlp", "h.1.ln_2"),
    "opt": ("layers.1.fc", "layers.1.final_layer_norm"),
    "gpt_neox": ("layers.1.",),
    "phi": ("layers.1.",),
    "falcon": ("h.1.",),
    "gptj": ("h.1.",),
}
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
    """The last block's MLP, the final norm and the output layer have true gradients, as e is exact there; branch moves
    all that a true gradient moves; stream, as branch does, what is outside and the matrices that write to the stream.
    """
    model = model_of(kind)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    true, found = true_gradient(model, 0), {}
    for carry in ("branch", "stream"):
        found[carry] = step_of(rule_of(model, workers, carry=carry), 0, 1.0)[1]
        model.load_state_dict(weights)
    branch, stream = ({name: g for name, g in found[carry].items() if g.any()} for carry in ("branch", "stream"))
    exact = [name for name in true if any(part in name for part in (*OUTSIDE, *LAST[kind]))]
    assert len(exact) > 4
    for name in exact:
        assert (branch[name] - true[name]).norm() < 1e-3 * true[name].norm(), name
    assert {name for name in true if true[name].abs().max() > 1e-7} <= set(branch)
    inside = {name for name in stream if ".1." in name or ".0." in name}
    assert len(inside) == 4  # two matrices a block: attention's and the MLP's
    assert set(stream) - inside == {name for name in branch if ".1." not in name and ".0." not in name}
    for name in inside:
        assert (stream[name] - branch[name]).norm() < 1e-3 * branch[name].norm(), name


# ---- what queries learn ----------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """A block that is a known linear map of the stream."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.matrix = matrix

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return x @ self.matrix.T


def test_the_way_that_is_learned_is_r_times_the_jacobian(workers):
    """Of a linear body, whatever epsilon is: after a few steps with many queries delta0 is the true error."""
    model = harness.llama("float64", tied=False)
    generator, jacobian = torch.Generator().manual_seed(0), torch.eye(24, dtype=torch.float64)
    for number in range(2):
        matrix = torch.eye(24, dtype=torch.float64) + torch.randn(24, 24, generator=generator, dtype=torch.float64)
        model.model.layers[number], jacobian = Linear(matrix), matrix @ jacobian
    with torch.no_grad():  # r is the same at every token
        weight = model.model.embed_tokens.weight
        weight.mul_(0.7 / weight.square().mean(-1, keepdim=True).sqrt())
    rule = rule_of(model, workers, query_budget_q=20, epsilon=0.7)
    true = true_gradient(model, 0)["model.embed_tokens.weight"]
    _, found = step_of(rule, 0, 1e-9)
    a, c = (moment.double() for moment in rule.moments)
    torch.testing.assert_close(torch.linalg.solve(a, c), 0.7 * jacobian.T, rtol=0, atol=1e-3)
    assert cosine(found["model.embed_tokens.weight"], true) > 0.9999


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
    flags = {"direction": "feedback", "optimizer": "adam", "epsilon": 0.1, "query_budget_q": 2, "learning_rate": 1e-2}
    run = runs.train(**flags, max_steps=12, save_interval=1, carry="stream")
    assert runs.replay(run) == 0
    assert "bitwise equal to" in capsys.readouterr().out
    first, last = (load_file(run / "checkpoints" / f"step_{n:08d}" / "model.safetensors") for n in (1, 12))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved == {name for name in first if name.endswith((*WRITERS, "embed_tokens.weight", "model.norm.weight"))}
    rows = harness.metrics(run)
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"]) - 0.3
    config = zo.read_config(run)
    assert int(rows[-1]["forward_tokens"]) == 12 * (3 + 2) * config.batch_size * config.block_size
