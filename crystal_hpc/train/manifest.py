"""What a generation says of itself: `manifest.json`, written last, after which the folder counts.

`checkpoint` writes it with a training state, `convert` with weights that came from elsewhere; `generations` lists,
verifies and prunes by it. No torch here: `crystal checkpoints` and `tools/inspect_checkpoint.py` answer at once.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import xxhash
from pydantic import TypeAdapter, ValidationError

from crystal_hpc import files
from crystal_hpc.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 2
OWN_DIGEST = "xxh3"
"""The key of the manifest's digest of itself: it is the one file that no other vouches for."""

Kind = Literal["training", "weights"]
Why = Literal["periodic", "phase end", "preempted", "time limit", "asked for", "converted"]
WHYS: tuple[Why, ...] = get_args(Why)


@dataclass(frozen=True)
class FileEntry:
    """One file of a generation; `xxh3`: the xxh3-128 digest, in hex, of the bytes as they were handed to the disk."""

    bytes: int
    xxh3: str


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the model, under its Megatron name."""

    shape: tuple[int, ...]
    dtype: str
    """As torch names it: `float32`."""
    norm: float
    """Euclidean norm; sums are made in float64, but not always in one order."""


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a generation without opening its tensors."""

    kind: Kind
    """`training`: weights and optimizer; `weights`: weights alone, from a conversion."""
    run: str
    digest: str
    """Of the run's config (`derive.run_digest`)."""
    phase: str
    step: int
    """Steps of the phase that are done."""
    tokens: int
    """Tokens that the run has trained on."""
    why: Why
    layout: dict[str, Any]
    """Ranks and the config's `parallel` section."""
    precision: str
    ledger: dict[str, dict[str, dict[str, int]]]
    """Phase, source -> samples and tokens consumed."""
    optimizer: dict[str, Any] | None
    """`steps` that Adam has taken since its moments were last forgotten; None without an optimizer."""
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    commit: str | None
    """Of the code that wrote it, `+` where it was changed; None outside a checkout."""
    versions: dict[str, str]
    created: float
    """Unix time."""
    seconds: float
    """From the copy of the state, or the beginning of the conversion, to this file."""
    weights: str | None = None
    """Digest of the float32 weights in the boxes of this layout: steps change it (a guard against stale weights)."""

    @property
    def bytes(self) -> int:
        """Size of the generation on disk."""
        return sum(entry.bytes for entry in self.files.values())

    def write(self, folder: Path) -> None:
        """Puts the manifest into a folder whose other files are complete."""
        content = {"format": FORMAT, **asdict(self)}
        files.write_json(folder / MANIFEST, content | {OWN_DIGEST: own_digest(content)})


_ADAPTER = TypeAdapter(Manifest)


def own_digest(content: dict[str, Any]) -> str:
    """xxh3-128, in hex, of a manifest's content, however it is laid out in the file."""
    said = {key: value for key, value in content.items() if key != OWN_DIGEST}
    return xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a generation. Raises CheckpointError where the folder has none, or not such a one."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a table")
        form, digest = content.get("format"), own_digest(content)
        if form != FORMAT:
            raise CheckpointError(f"{path}: is of format {form}, and this version reads format {FORMAT}")
        if content.pop(OWN_DIGEST, None) != digest:
            raise ValueError(f"its content is not what was written: its digest is {digest}")
        del content["format"]
        manifest = _ADAPTER.validate_json(json.dumps(content), strict=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}, so it is no checkpoint, or its saving was cut short; name a complete one"
        ) from None
    except NotADirectoryError:
        raise CheckpointError(f"{folder}: is a file, not a checkpoint; name a folder like step_00001500") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: damaged ({where}: {first['msg']})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    _check(manifest, path)
    return manifest


def _check(manifest: Manifest, path: Path) -> None:
    """What no type can say: names stay inside the folder, and a state that is not finite was never saved."""
    for name in manifest.files:
        if Path(name).name != name or name == MANIFEST:
            raise CheckpointError(f"{path}: damaged (lists a file {name!r})")
    for name, tensor in manifest.tensors.items():
        if not math.isfinite(tensor.norm):
            raise CheckpointError(f"{path}: {name} has a norm of {tensor.norm}")
