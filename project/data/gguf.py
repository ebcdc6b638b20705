"""A GGUF file (llama.cpp's format of quantised weights) becomes a Hugging Face folder that anything can load.

Unusual: the weights stay exactly as dequantised, in float32. Loading a GGUF file takes 10 to 20 seconds and a
model loaded from one refuses `save_pretrained`, so its weights are copied into a fresh model once.
"""

import os
import tempfile
from pathlib import Path

from project.errors import SourceError


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write `folder` with config.json, model.safetensors (float32) and the tokenizer of a GGUF file.

    Needs no network. The folder appears under its name only when it is complete.

    Args:
        gguf: The file.
        folder: What to make; must not exist.

    Raises:
        SourceError: The file does not exist, or is not a causal language model that transformers can read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import, and seldom needed

    if not gguf.is_file():
        raise SourceError(f"GGUF file {gguf} does not exist.")
    origin = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype="float32", **origin)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **origin)
    except (ValueError, OSError, KeyError) as error:
        raise SourceError(
            f"GGUF file {gguf} cannot be read: {error}. Expected a language model of an architecture that "
            "transformers converts, such as llama."
        ) from error
    config = loaded.config
    del config.quantization_config  # the weights are no longer quantised
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        built = Path(scratch) / folder.name
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        os.replace(built, folder)
