"""Steps of every kind on a device that is not there: shapes and devices are followed, nothing is computed.

A process of its own: `python tests/fake_device.py` prints a line of JSON, {case: [fetches a step, groups a step]}, and
fails where a tensor is made on the wrong device or a size depends on values (which would be fetched to know it).
"""

import itertools
import json
import os
import sys
import types
import warnings

import conftest  # noqa: F401
import harness
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration

import reproduce_zo_paper as zo

DEVICE = "elsewhere"
PRODUCTS = ("linear", "matmul", "scaled_dot_product_attention")
SCALARS = {"item": float, "tolist": None, "numpy": None, "__bool__": bool, "__float__": float, "__int__": int}


class Fetches(TorchFunctionMode):
    """Counts what is fetched from the device, and gives numbers in its place."""

    count = 0

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name == "tensor" and torch.device(kwargs.get("device") or "cpu").type == DEVICE:
            return function(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if name in ("allclose", "equal"):
            self.count += 1
            return True
        if name == "cpu" and first.device.type == DEVICE:
            self.count += 1
        if name in SCALARS and first is not None:
            self.count += first.device.type == DEVICE
            values = np.full(first.shape, 0.5 if first.is_floating_point() else 1)
            return values if name == "numpy" else values.tolist() if name == "tolist" else SCALARS[name](values.max())
        if name in PRODUCTS and torch.is_autocast_enabled(DEVICE):  # what a real device's autocast does
            args = [a.bfloat16() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return function(*args, **kwargs)


class Text:
    """A corpus of 8 sequences, on the device."""

    frequencies, most_options, blocks, about = np.ones(61), 2, 8, {}
    validation_rows = np.arange(2)

    def __init__(self, config: zo.Config, device: torch.device):
        self.config, self.device, self.longest = config, device, 10

    def rows(self, step: int) -> np.ndarray:
        return np.arange(4)

    def sequences(self, split: str, rows: np.ndarray) -> tuple:
        ids = torch.empty(len(rows), 10, dtype=torch.int64, device=self.device)
        return ids, ids

    def choices(self, split: str, rows: np.ndarray) -> tuple:
        return self.sequences(split, np.arange(2 * len(rows)))

    def batch(self, step: int) -> tuple:
        return self.sequences("train", self.rows(step))


def moved(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Makes a model's parameters fake ones on the device; what is shared stays so."""
    made = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                own = dtype if value.ndim > 1 else torch.float32
                if id(value) not in made:
                    made[id(value)] = torch.nn.Parameter(torch.empty(value.shape, dtype=own, device=device))
                module._parameters[name] = made[id(value)]
        for name, value in module._buffers.items():
            module._buffers[name] = (
                None if value is None else torch.empty(value.shape, dtype=value.dtype, device=device)
            )
    return model


def steps(config: zo.Config, device: torch.device, fetches: Fetches, layers: int, count: int = 2) -> list[int]:
    """Makes steps as a run does, with its state saved and loaded between; fetches a step, and groups of queries."""
    model = harness.llama(layers=layers) if config.weights == "float32" else zo.lowered(harness.llama(layers=layers))
    if config.adapter_rank:
        zo.add_adapters(model, config)
    with FakeTensorMode(), fetches, zo.Workers(device) as workers:
        model = moved(model, device, getattr(torch, config.weights))
        half = torch.bfloat16 if config.dtype == "bfloat16" else None
        objective, corpus = zo.Objective(model, workers, half), Text(config, device)
        job = types.SimpleNamespace(config=config, model=model, objective=objective, corpus=corpus, bp_corpus=corpus)
        job.measured = zo.scored(objective, corpus, config.objective)
        job.query_batch = lambda step: job.measured.sequences(corpus, "train", corpus.rows(step))
        job.ranks, job.total = zo.Ranks(), count
        job.group = 2 if config.parallel_q_computation else 0
        phase = zo.Phase(0, 0, count, config.scope, config.optimizer, config.learning_rate, not config.kind.queries)
        trainer = zo.Trainer(job, phase)
        trainer.settle(0)
        for step in range(count):
            fetches.count = 0
            record = trainer.measure(step)
            counted = fetches.count
            trainer.apply(record)
            state = {name: value.to("cpu") for name, value in trainer.state().items()}
            assert all(value.device.type == "cpu" for value in state.values())
            trainer.load(state)
        zo.validation_loss(objective, corpus)
        zo.validation_score(job.measured, corpus)
    q = config.query_budget_q if config.measures else 0
    return [counted, -(-q // 2) if config.parallel_q_computation else int(q > 0)]


def library(device: torch.device, fetches: Fetches) -> None:
    """Calls the functions that other programs call."""
    model = harness.llama()
    with FakeTensorMode(), fetches:
        model = moved(model, device, torch.float32)
        ids = torch.empty(4, 10, dtype=torch.int64, device=device)
        named = list(model.named_parameters())
        for batched in (False, True):
            zo.zo_gradient_estimator(model, named, None, ids, ids, 3, 1e-3, device, batched, 2)
        for optimizer in ("sgd", "adam"):
            zo.zo_step(named, lambda: model(input_ids=ids, labels=ids).loss.item(), 2, 1e-3, 1e-3, optimizer, {})


def cases() -> dict[str, dict]:
    """Flags by the name of a case."""
    found = {"FO": {"mode": "FO"}, "FO mudamw": {"mode": "FO", "optimizer": "mudamw"}}
    for name, batched in itertools.product(zo.DIRECTIONS, (False, True)):
        own = {"direction": name, "parallel_q_computation": batched, "query_budget_q": 3 if batched else 2}
        optimizer = {"optimizer": "adam"} if batched else {}
        found[f"{name} {'batched' if batched else 'in place'}"] = own | optimizer
    for carry, q in (("block", 0), ("branch", 2), ("stream", 2)):
        found[f"feedback {carry}"] = {"direction": "feedback", "carry": carry, "query_budget_q": q}
    found |= {f"half {name}": {**found[f"{name} batched"], "weights": "bfloat16"} for name in ("gaussian", "lowrank")}
    # FO with bfloat16 weights is left out: torch's engine ends the process when it meets this stand-in's autocast
    found["lora"] = {"scope": "lora:2", "init_from": ".", "query_budget_q": 3, "parallel_q_computation": True}
    found["closed form"] = {"head": "closed_form", "query_budget_q": 2}
    found["last block"] = {"scope": "blocks:1-1", "query_budget_q": 3, "parallel_q_computation": True}
    found["Instruct"] = {"mode": "Instruct", "bp_interval": 2, "direction": "gaussian", "query_budget_q": 2}
    found["Instruct feedback"] = {"mode": "Instruct", "bp_interval": 2}
    found["accuracy"] = {"objective": "accuracy", "eval_metric": "accuracy", "query_budget_q": 2}
    return found


def main() -> None:
    """Prints what every case fetched."""
    backend = types.SimpleNamespace(get_amp_supported_dtype=lambda: [torch.bfloat16], is_available=lambda: False)
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend)
    autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    autocast.fallback(torch.library.fallthrough_kernel)
    warnings.simplefilter("ignore")
    own, fetches = torch.Generator(), Fetches()
    torch.Tensor.as_subclass = lambda tensor, kind: tensor  # a fake one has its class already
    zo.check_ids = lambda *_: None  # it fetches what it finds, once a call
    zo.stream = lambda device, *coordinates: own  # the device has no generator
    device, wanted = torch.device(DEVICE, 0), sys.argv[1:]
    result = {}
    for name, flags in cases().items():
        if not wanted or name in wanted:
            many = "feedback" in name or name == "last block"  # steps in which blocks have parts of their own
            result[name] = steps(zo.Config(**flags), device, fetches, 2 if many else 1)
    library(device, fetches)
    print(json.dumps(result), flush=True)
    os._exit(0)  # the stand-in device's threads do not end


if __name__ == "__main__":
    main()
