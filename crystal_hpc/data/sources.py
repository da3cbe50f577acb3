"""The stores and the tokenizer that a run names, checked against the run and each other before anything starts.

Cheap enough for a login node: reads store.json and tokenizer.json, no tokens; only for rows as Crystal published them,
which have no store.json, are the files asked for their shapes. `crystal plan`, `crystal submit` and every job pass
through here, so a store that cannot serve the run is a line on the screen, not a failed job.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.data.catalog import (
    BUILD_FILE,
    STORE_FILE,
    StoreInfo,
    read_store_info,
    read_tokenizer_identity,
    rows,
)
from crystal_hpc.data.order import run_orders
from crystal_hpc.data.sentinels import read_sentinels
from crystal_hpc.errors import ConfigError, StoreError

if TYPE_CHECKING:  # numpy and h5py are not for login nodes
    from crystal_hpc.data.published import PublishedRows
    from crystal_hpc.data.store import TokenStore


@dataclass(frozen=True)
class Sources:
    """What is known of a run's stores without opening them, by source name."""

    training: dict[str, StoreInfo]
    held_out: dict[str, StoreInfo]
    tokenizer: str
    """Fingerprint of the tokenizer that made all of them."""

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens in each training store."""
        return {name: info.tokens for name, info in self.training.items()}


def read_source_info(folder: Path) -> StoreInfo:
    """What a folder says of itself: a token store, or rows as Crystal published them. Raises StoreError for neither."""
    marked = any((folder / name).exists() for name in (STORE_FILE, BUILD_FILE))
    if marked or next(folder.glob("*.h5"), None) is None:
        return read_store_info(folder)
    from crystal_hpc.data.published import read_published_info

    return read_published_info(folder)


def open_source(info: StoreInfo, vocab_size: int | None = None, check: bool = True) -> "TokenStore | PublishedRows":
    """The reader for what `read_source_info` found.

    `vocab_size` is the model's; published rows are held against it. `check`: see TokenStore.
    """
    if info.layout == "rows":
        from crystal_hpc.data.published import PublishedRows

        return PublishedRows(info, vocab_size)
    from crystal_hpc.data.store import TokenStore

    return TokenStore(info, check)


def read_sources(run: Run) -> Sources:
    """Reads what the run's stores say of themselves. Raises ConfigError with everything that does not fit."""
    found, problems = survey_sources(run)
    if problems:
        raise ConfigError(problems, f"run {run.name}")
    return found


def survey_sources(run: Run) -> tuple[Sources, list[str]]:
    """What of the run's stores is there, and everything that is missing or does not fit."""
    problems: list[str] = []
    fingerprint, vocab_size = "", 0
    try:
        fingerprint, vocab_size = read_tokenizer_identity(Path(run.data.tokenizer))
    except StoreError as error:
        problems.append(f"data.tokenizer: {error}")
    training = _read_stores(run.data.sources, "data.sources", fingerprint, problems)
    held_out = _read_stores(run.data.held_out, "data.held_out", fingerprint, problems)
    if vocab_size > run.model.vocab_size:
        problems.append(
            f"model.vocab_size: {run.model.vocab_size} is smaller than the tokenizer's {vocab_size} ids; "
            f"make it {vocab_size} or more"
        )
    problems.extend(_trained_on(training, held_out))
    problems.extend(_too_short(run, training) or _read_too_often(run, training))
    problems.extend(_other_lengths(run, training, held_out))
    problems.extend(_no_fim(run, training))
    return Sources(training, held_out, fingerprint), problems


def _read_stores(named: dict[str, str], key: str, fingerprint: str, problems: list[str]) -> dict[str, StoreInfo]:
    found = {}
    for name, folder in named.items():
        try:
            info = read_source_info(Path(folder))
        except StoreError as error:
            problems.append(f"{key}.{name}: {error}")
            continue
        if fingerprint and info.tokenizer and info.tokenizer != fingerprint:
            problems.append(
                f"{key}.{name}: {folder} was made with another tokenizer ({info.tokenizer}) than data.tokenizer "
                f"({fingerprint}); build it again with that one"
            )
        found[name] = info
    return found


def _trained_on(training: dict[str, StoreInfo], held_out: dict[str, StoreInfo]) -> Iterator[str]:
    """`config.check` compares paths; the same tokens may lie under two."""
    for name, info in held_out.items():
        for source, trained in training.items():
            if info.digest == trained.digest and info.tokens:
                yield (
                    f"data.held_out.{name}: {info.folder} holds the same tokens as the training source {source!r} "
                    f"({trained.folder}); held-out documents must not be trained on"
                )


def _too_short(run: Run, training: dict[str, StoreInfo]) -> list[str]:
    return [
        f"phases.{index}.sequence_length: {phase.sequence_length} is longer than the whole store "
        f"{name!r} ({training[name].tokens} tokens)"
        for index, phase in enumerate(run.phases)
        for name, weight in phase.mixture.items()
        if weight > 0 and name in training and rows(training[name].tokens, phase.sequence_length) < 1
    ]


def _read_too_often(run: Run, training: dict[str, StoreInfo]) -> Iterator[str]:
    """The sources that the run reads more often than data.most_epochs allows. No store may be too short."""
    if not run.data.most_epochs or training.keys() != run.data.sources.keys():
        return
    read = dict.fromkeys(training, Fraction(0))
    passed: dict[str, int] = {}  # in which phase
    orders = run_orders(run, {name: info.tokens for name, info in training.items()})
    for index, (phase, order) in enumerate(zip(run.phases, orders, strict=True)):
        counts = order.consumed(derive.phase_samples(phase)).values()
        for name, count, size in zip(order.sources, counts, order.rows, strict=True):
            read[name] += Fraction(count, size)  # exact: one row too many is one too many
            if name in run.data.most_epochs and read[name] > Fraction(str(run.data.most_epochs[name])):
                passed.setdefault(name, index)
    for name, index in passed.items():
        yield (
            f"data.most_epochs.{name}: the plan reads it {math.ceil(read[name] * 100) / 100:.2f} times, "
            f"more than the {run.data.most_epochs[name]:g} allowed; the limit is passed in phase "
            f"{run.phases[index].name!r} (phases.{index}); make that shorter, the weight smaller or the limit larger"
        )


def _other_lengths(run: Run, training: dict[str, StoreInfo], held_out: dict[str, StoreInfo]) -> Iterator[str]:
    """Published rows cannot be cut anew."""
    for index, phase in enumerate(run.phases):
        used = {f"source {name!r}": training.get(name) for name, weight in phase.mixture.items() if weight > 0}
        used |= {f"held-out {name!r}": info for name, info in held_out.items()}
        for name, info in used.items():
            if info and info.row_length not in (None, phase.sequence_length):
                yield (
                    f"phases.{index}.sequence_length: {phase.sequence_length}, but {name} was published in rows of "
                    f"{info.row_length} tokens; make it {info.row_length}"
                )


def _no_fim(run: Run, training: dict[str, StoreInfo]) -> Iterator[str]:
    wanted = [(index, name) for index, phase in enumerate(run.phases) for name in phase.fim if phase.fim[name].rate > 0]
    for index, name in wanted:
        if name in training and training[name].layout == "rows":
            yield (
                f"phases.{index}.fim.{name}: its rows were published as they are to be read, labels and masks "
                "included; take fim out, or build a store from the documents"
            )
    if wanted:
        try:
            read_sentinels(Path(run.data.tokenizer))
        except StoreError as error:
            yield f"phases.{wanted[0][0]}.fim.{wanted[0][1]}: {error}"
