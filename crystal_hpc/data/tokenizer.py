"""Text to token ids and back, and the training of a tokenizer that loses nothing.

The second step of a token's way: `data/build` encodes documents with it, evaluation decodes. Any Hugging Face
tokenizer.json can be loaded. Those trained here follow LLaMA and Crystal: 0..2 are `<unk> <s> </s>`, 3..258 the 256
bytes, then merges up to the size asked for, then Crystal's 22 special tokens. They round-trip every Unicode text:
a space is a space, nothing is put in front, nothing is normalized, unknown characters become bytes.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from crystal_hpc.data import engine
from crystal_hpc.data.catalog import TOKENIZER_FILE, read_tokenizer_json, tokenizer_identity
from crystal_hpc.data.corpus import Fields, Progress, text_of_all
from crystal_hpc.errors import StoreError
from crystal_hpc.files import make_folder, write_file, write_json

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))

# Right after the merges, in the order and spelling of Crystal's release (32000..32021 there).
EXTRA_TOKENS = (
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|filename|>",
    "<|gh_stars|>",
    "<|issue_start|>",
    "<|issue_comment|>",
    "<|issue_closed|>",
    "<|jupyter_start|>",
    "<|jupyter_text|>",
    "<|jupyter_code|>",
    "<|jupyter_output|>",
    "<|empty_output|>",
    "<|commit_before|>",
    "<|commit_msg|>",
    "<|commit_after|>",
    "<|reponame|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|sys_start|>",
    "<|sys_end|>",
)
SPECIAL_TOKENS = (UNK, BOS, EOS, *EXTRA_TOKENS)

# What may become one token: a word with the one character before it, a digit, a run of signs with the line ends after
# it, line ends with the blank before them, a run of spaces short of the last. Merges stay inside such a piece. In none
# is a letter or digit followed by a sign, so no merge can make "<s>" or "<0x0A>" and be taken for the real one.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

ASCII = [chr(code) for code in (9, 10, *range(32, 127))]
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
RARE = 200_000  # a character seen less than once in so many is left to the byte tokens
LONGEST_TOKEN = 16  # characters, as in LLaMA
SMALLEST_VOCABULARY = 512
_FIELDS = Fields()

_BOS_NAMES = (BOS, "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<|endoftext|>", "<|end_of_text|>")
_EOS_NAMES = (EOS, "<|end_of_text|>", "<|endoftext|>", "<eos>")


class Tokenizer:
    """A loaded tokenizer. Text is always plain text: "<s>" in a document becomes ordinary tokens, never id 1.

    `vocab_size`: ids lie in 0..vocab_size-1. `bos`, `eos`: the ids to put around a document; encode adds neither.
    `fingerprint`: 16 hex digits that change with anything that changes ids.
    """

    def __init__(self, value: dict[str, Any], where: str) -> None:
        """From the content of a tokenizer.json; `where` is named in errors. Raises StoreError."""
        try:
            self._reference = engine.Tokenizers(value)
        except Exception as error:  # the library raises the bare Exception
            raise StoreError(f"{where}: not a usable {TOKENIZER_FILE} ({error})") from error
        self._value = value
        self._engines: dict[bool, engine.Engine] = {}
        self.fingerprint, self.vocab_size = tokenizer_identity(value)
        self.bos = self._first_id(_BOS_NAMES, "begin", where)
        self.eos = self._first_id(_EOS_NAMES, "end", where)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Loads a Hugging Face tokenizer.json, or the one in a folder. Raises StoreError where that cannot be done."""
        return cls(read_tokenizer_json(path), str(path))

    def choose_engine(self, name: str | None = None, samples: Sequence[str] = ()) -> engine.Proof:
        """Encodes with the engine of that name from now on, or with the fastest that proves identical on the samples.

        Without this call, the fastest on the hostile strings of `data.engine`. Raises StoreError."""
        chosen, proof = engine.named(self._value, name, samples, self._reference)
        self._engines = {False: chosen}
        return proof

    def use_engine(self, recorded: str) -> None:
        """Encodes with the engine that a Proof names, from now on, or with the reference, which gives the same ids."""
        if recorded.startswith("tokenizers"):
            self.choose_engine("tokenizers")

    def _engine(self, inside: bool) -> engine.Engine:
        if inside not in self._engines:
            value = engine.for_inside(self._value) if inside else self._value
            reference = engine.Tokenizers(value) if inside else self._reference
            refused = inside and self._engine(False) is self._reference  # asked for, or the only one that is right
            self._engines[inside] = reference if refused else engine.fastest(value, reference=reference)[0]
        return self._engines[inside]

    def _first_id(self, names: Sequence[str], what: str, where: str) -> int:
        for name in names:
            token = self.id_of(name)
            if token is not None:
                return token
        raise StoreError(
            f"{where}: the tokenizer has no token to {what} a document; one of {', '.join(names)} is needed"
        )

    def id_of(self, token: str) -> int | None:
        """The id of a token given by its exact name, such as "<|fim_prefix|>"; None where there is none."""
        found: int | None = self._reference.library.token_to_id(token)
        return found

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens, by their names."""
        return {token["content"]: token["id"] for token in self._value["added_tokens"] if token["special"]}

    @property
    def unknown(self) -> int | None:
        """The id of what the vocabulary has no token for; None where that cannot happen."""
        name = self._value["model"].get("unk_token")
        return self.id_of(name) if name is not None else None

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, without BOS and EOS."""
        ids, offsets = self.encode_flat(texts)
        return [ids[start:stop].tolist() for start, stop in pairwise(offsets.tolist())]

    def encode_flat(self, texts: Sequence[str], inside: bool = False) -> tuple[engine.Ids, engine.Offsets]:
        """The ids of many texts one after another, uint32 (total,), and where each begins, int64 (len(texts) + 1,).

        With `inside`, the texts stand in the middle of documents: the blank that LLaMA's tokenizer puts in front of a
        document is left out, so the ids of two parts of a text, the second `inside`, decode to the text.
        """
        return self._engine(inside).encode(texts)

    @cached_property
    def token_bytes(self) -> list[bytes | None]:
        """What each id stands for in a text, in UTF-8; None for special tokens."""
        return engine.token_bytes(self._value, self.vocab_size)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens spelled out."""
        text: str = self._reference.library.decode(list(ids), skip_special_tokens=False)
        return text


def train_tokenizer(
    inputs: Sequence[Path],
    out_folder: Path,
    vocab_size: int,
    on_progress: Progress | None = None,
    *,
    fields: Fields = _FIELDS,
    format: str | None = None,
) -> Tokenizer:
    """Trains a byte-fallback BPE on the texts of a corpus and writes a folder that transformers can load.

    `inputs`, `fields` and `format` are as in `corpus`: files and folders of JSON Lines, Parquet or text.

    Ids 0..vocab_size-1 are the trio, the bytes and the merges; the 22 special tokens follow, so the result's
    `vocab_size` is larger by 22. All texts are read: give a sample of a large corpus (some hundred MB are plenty). The
    same documents give the same files, byte for byte, in whatever order they come: only counts are learned from. Raises
    StoreError for a bad corpus, for a size below SMALLEST_VOCABULARY, and when the texts are too few for so many
    tokens; DiskError when the folder cannot be written.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise StoreError(f"a vocabulary of {vocab_size} is too small: ask for {SMALLEST_VOCABULARY} tokens or more")

    def texts(what: str) -> Iterator[str]:
        return text_of_all(inputs, fields, on_progress, what=what, format=format)

    model = _train_model(texts, vocab_size)
    if len(model["vocab"]) != vocab_size:
        raise StoreError(
            f"{', '.join(map(str, inputs))}: the texts hold {len(model['vocab'])} different tokens, not {vocab_size}; "
            "train on more text, or ask for a smaller vocabulary"
        )
    value: dict[str, Any] = json.loads(_assemble(model).to_str())
    make_folder(out_folder)
    write_json(out_folder / "tokenizer_config.json", _transformers_config())
    write_file(out_folder / TOKENIZER_FILE, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    return Tokenizer.load(out_folder)


def _alphabet(texts: Iterable[str], most: int) -> list[str]:
    """The characters that get a token of their own: printable ASCII, and whatever else is common."""
    counts: Counter[str] = Counter()
    characters = 0
    for text in texts:
        characters += len(text)
        counts.update(_NOT_ASCII.findall(text))
    common = [char for char, count in counts.items() if count > max(1, characters // RARE)]
    return ASCII + sorted(common, key=lambda char: (-counts[char], char))[:most]


def _train_model(texts: Callable[[str], Iterator[str]], vocab_size: int) -> dict[str, Any]:
    """The `model` part of a tokenizer.json, with vocabulary and merges. `texts(what)` reads the corpus once."""
    alphabet = _alphabet(texts("counting characters"), vocab_size // 8)
    library = tokenizers.Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[UNK, BOS, EOS, *BYTE_TOKENS],
        # Chosen here, and exactly these: left to itself the trainer breaks ties in a different order every time.
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    library.train_from_iterator(texts("learning merges"), trainer)
    model: dict[str, Any] = json.loads(library.to_str())["model"]
    return model


def _assemble(model: dict[str, Any]) -> tokenizers.Tokenizer:
    """The finished tokenizer. The byte tokens are part of the model only: as added tokens they would match in text."""
    merges = [tuple(pair) for pair in model["merges"]]
    library = tokenizers.Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token=UNK, byte_fallback=True, fuse_unk=True)
    )
    library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    # As LLaMA's and Crystal's: transformers puts BOS in front, like every document in training. Encode above does not.
    library.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, library.token_to_id(BOS))]
    )
    return library


def _transformers_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
