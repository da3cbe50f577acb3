"""Text from an exported folder, through Transformers: the first look at what a run has learned.

Loading is shared with `verify`. It asks Transformers for the model class in the very folder named: AutoModelForCausalLM
remembers the first class it saw for a configuration, and would run that one on the next export of the same process.
The copies of model code that Transformers imports go into a folder of this process: in the home folder, where they
would stay, tasks on other nodes may be writing the same ones, and some homes cannot be written.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from crystal_hpc import files
from crystal_hpc.convert.formats import FORMATS
from crystal_hpc.convert.hf_folder import MARKER
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.errors import CheckpointError


def load(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """The Transformers model in an exported folder, in `dtype` or as it was exported, ready to evaluate.

    Runs the model code inside the folder. Raises CheckpointError where the folder is no export, or is damaged.
    """
    if not (folder / MARKER).is_file():
        raise CheckpointError(f"{folder}: is no exported model (it has no {MARKER}); export a checkpoint first")
    os.environ.setdefault("HF_MODULES_CACHE", _modules().name)  # read when transformers is imported
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    with _loading(folder):
        config = files.read_json(folder / "config.json")
        if "auto_map" not in config:
            return load_as(folder, config["architectures"][0], dtype)
        name = config["auto_map"]["AutoModelForCausalLM"]
        kind: Any = get_class_from_dynamic_module(name, str(folder), local_files_only=True)
        return kind.from_pretrained(str(folder), local_files_only=True, dtype=dtype).eval()


def load_as(folder: Path, architecture: str, dtype: torch.dtype | str = torch.float32) -> Any:
    """The model in a Hugging Face folder from anywhere, as a class of ours or of Transformers; runs no code of its own.

    Raises CheckpointError where the folder is damaged, or the class is none of a format that is known.
    """
    import transformers

    if architecture not in {known.architecture for known in FORMATS.values()}:
        raise CheckpointError(f"{folder}: {architecture} is no kind of model that is known here")
    with _loading(folder):
        if hasattr(transformers, architecture):
            kind: Any = getattr(transformers, architecture)
        else:
            from crystal_hpc.convert.hf import modeling_crystalcoder

            kind = getattr(modeling_crystalcoder, architecture)
        return kind.from_pretrained(str(folder), local_files_only=True, dtype=dtype).eval()


@cache
def _modules() -> tempfile.TemporaryDirectory[str]:
    """Is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="crystal-modules-")


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Keeps Transformers quiet, and puts its complaints into one line."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({_first_line(error)}); export it again") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@torch.no_grad()
def generate(folder: Path, prompt: str, tokens: int, temperature: float = 0.8, seed: int = 0) -> str:
    """At most `tokens` tokens of text that follow `prompt`, as the model would begin a document with it.

    Temperature 0 takes the likeliest token each time. The same seed gives the same text on the same machine. Raises
    CheckpointError where the folder is no export, the text would be longer than what the model was trained on, or have
    no tokens; StoreError where it has no tokenizer.
    """
    model, tokenizer = load(folder), Tokenizer.load(folder)
    start = [tokenizer.bos, *tokenizer.encode(prompt)]
    longest = model.config.max_position_embeddings
    if tokens < 1:
        raise CheckpointError(f"{tokens} tokens of text make no text; ask for one at least")
    if len(start) + tokens > longest:
        raise CheckpointError(
            f"a prompt of {len(start)} tokens and {tokens} more are too long: the model was trained on {longest}"
        )
    chosen = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        row = torch.tensor([start])
        ids = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=tokens, **chosen)[0].tolist()
    end = len(ids) - 1 if ids[-1] == tokenizer.eos else len(ids)
    # Decoded with the prompt: some decoders treat the first token of a text differently.
    return tokenizer.decode(ids[1:end]).removeprefix(tokenizer.decode(start[1:]))
