"""Imported once by the process that forks the test runs, so that each of them starts at once."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import harness  # noqa: F401
import matplotlib.figure  # noqa: F401
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch.optim  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401
