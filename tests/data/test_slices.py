"""Slices: the same rows as from shared storage, bit for bit, or none; and a helper that is never in the way."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.data import scratch as disk
from crystal_hpc.data.batches import PhaseBatches
from crystal_hpc.data.build import Options, build_store
from crystal_hpc.data.preparing import Helper, PreparedRows
from crystal_hpc.data.rows import Rows, rows_digest
from crystal_hpc.data.slices import Cut, Reading, SliceFile, make_cut, open_reading, passed, write_slice
from crystal_hpc.data.sources import Sources, read_sources
from crystal_hpc.errors import DiskError, StoreError

SPAN, STEPS = 4, 10


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> Path:
    """A run of a phase without FIM, one with, and one of published rows with masks among other rows."""
    folder = tmp_path_factory.mktemp("run")
    build_store([corpus], folder / "a", tokenizer_folder, Options(seed=1))
    build_store([corpus], folder / "b", tokenizer_folder, Options(seed=2))
    (folder / "rows").mkdir()
    chance = np.random.default_rng(1)
    with h5py.File(folder / "rows" / "train.h5", "w") as file:
        data = chance.integers(0, 500, (50, 3, 16)).astype("<i4")
        data[:, 1] = chance.integers(0, 2, (50, 16))
        file.create_dataset("data", data=data, chunks=(1, 3, 16), compression="gzip")

    def phase(name: str, mixture: dict[str, float], **more: Any) -> dict[str, Any]:
        shape = {"sequence_length": 16, "batch_size": 12, "steps": STEPS}
        return {"name": name, **shape, "mixture": mixture, "learning_rate": {"peak": 0.1}, **more}

    fim = {"rate": 0.9, "spm_rate": 0.5}
    run = {
        "name": "r",
        "model": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 84, "vocab_size": 600},
        "parallel": {"micro_batch": 2},
        "data": {
            "tokenizer": str(tokenizer_folder),
            "sources": {name: str(folder / name) for name in ("a", "b", "rows")},
        },
        "phases": [
            phase("plain", {"a": 0.7, "b": 0.3}),
            phase("fim", {"a": 0.7, "b": 0.3}, fim={"b": fim}),
            phase("published", {"a": 0.5, "rows": 0.5}),
        ],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def run(run_file: Path) -> Run:
    return load_run(run_file)


@pytest.fixture(scope="module")
def sources(run: Run) -> Sources:
    return read_sources(run)


@pytest.fixture
def cut(run: Run, sources: Sources) -> Cut:
    return make_cut(run, sources, 0, data_rank=1, data_size=2, span=SPAN)


@pytest.fixture
def reading(run: Run, sources: Sources) -> Reading:
    return open_reading(run, sources, 0)


def equal(one: Rows, other: Rows) -> bool:
    assert one.inputs.dtype == other.inputs.dtype and one.labels.dtype == other.labels.dtype
    same_mask = (one.mask is None) == (other.mask is None) and (
        one.mask is None or other.mask is None or np.array_equal(one.mask, other.mask)
    )
    return np.array_equal(one.inputs, other.inputs) and np.array_equal(one.labels, other.labels) and same_mask


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("phase", [0, 1, 2])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 3)])
def test_a_slice_holds_what_shared_storage_holds_bit_for_bit(
    run: Run, sources: Sources, tmp_path: Path, phase: int, rank: int, size: int
) -> None:
    cut, reading = make_cut(run, sources, phase, rank, size, SPAN), open_reading(run, sources, phase)
    for number in range(3):
        assert write_slice(cut, tmp_path, *cut.bounds(number), reading)
        found = SliceFile(cut, tmp_path, *cut.bounds(number))
        for step in range(*cut.bounds(number)):
            positions = cut.share.positions(step)
            assert equal(found.read(step), reading.rows(positions))
            assert rows_digest(found.read(step), positions) == rows_digest(reading.rows(positions), positions)
        found.close()
    assert cut.bounds(2) == (8, 10), "the last one ends with the phase"
    assert reading.plain == (phase == 0)
    shares = [reading.rows(cut.share.positions(step)) for step in range(STEPS)]
    assert any(rows.mask is not None for rows in shares) == (phase == 2), "published masks"
    without = Reading(reading.order, reading.sources)
    changed = [not equal(rows, without.rows(cut.share.positions(step))) for step, rows in enumerate(shares)]
    assert any(changed) == (phase == 1), "FIM"


def test_a_slice_says_what_it_is_in_plain_h5py(cut: Cut, reading: Reading, tmp_path: Path) -> None:
    path = write_slice(cut, tmp_path, 4, 8, reading)
    assert path is not None
    with h5py.File(path) as file:
        assert dict(file.attrs)["phase"] == "plain" and file.attrs["data_rank"] == 1
        assert file["positions"][:6].tolist() == cut.share.positions(4).tolist()
        assert file["rows"].shape == (4 * 6, 17) and "labels" not in file
        assert file["rows"].chunks is None, "contiguous"


def test_what_decides_the_rows_decides_the_name(run: Run, sources: Sources, cut: Cut) -> None:
    others = [
        run.model_copy(update={"seed": 2}),
        run.model_copy(update={"phases": [run.phases[0].model_copy(update={"mixture": {"a": 0.6, "b": 0.4}})]}),
        run.model_copy(update={"phases": [run.phases[1]]}),
    ]
    assert len({cut.run, *(make_cut(other, sources, 0, 1, 2, SPAN).run for other in others)}) == 4
    longer = run.model_copy(update={"phases": [run.phases[0].model_copy(update={"steps": 99})]})
    assert make_cut(longer, sources, 0, 1, 2, SPAN).run == cut.run, "a longer phase moves nothing"


def test_a_slice_that_is_another_damaged_or_cut_short_is_refused(
    cut: Cut, reading: Reading, run: Run, sources: Sources, tmp_path: Path
) -> None:
    path = write_slice(cut, tmp_path, 0, 4, reading)
    assert path is not None
    whole = path.read_bytes()
    other = make_cut(run, sources, 0, 0, 2, SPAN)
    os.link(path, other.path(tmp_path, 0, 4))
    with pytest.raises(StoreError, match="not the slice of this run, phase, rank and steps"):
        SliceFile(other, tmp_path, 0, 4)
    with h5py.File(path) as file:
        at = file["rows"].id.get_offset()
    path.write_bytes(whole[: at + 20] + bytes([whole[at + 20] ^ 4]) + whole[at + 21 :])
    found = SliceFile(cut, tmp_path, 0, 4)
    with pytest.raises(StoreError, match="step 0 is damaged"):
        found.read(0)
    assert equal(found.read(1), reading.rows(cut.share.positions(1))), "the other steps are good"
    os.truncate(path, at + 100)
    with pytest.raises(StoreError, match="cut short|cannot be read"):
        SliceFile(cut, tmp_path, 0, 4).read(3)
    path.write_bytes(b"no HDF5")
    with pytest.raises(StoreError, match="cannot be read"):
        SliceFile(cut, tmp_path, 0, 4)


def test_a_slice_given_up_leaves_nothing(cut: Cut, reading: Reading, tmp_path: Path) -> None:
    assert write_slice(cut, tmp_path, 0, 4, reading, lambda step: step < 2) is None
    assert not [path for path in cut.folder(tmp_path).iterdir() if path.name != disk.LOCK]


def test_a_disk_without_room_is_a_line(cut: Cut, reading: Reading, small_disk: Path) -> None:
    (small_disk / "full").write_bytes(bytes(60_000))
    with pytest.raises(DiskError, match=r"a slice needs [\d,]+ bytes, [\d,]+ are free"):
        write_slice(cut, small_disk, 0, STEPS, reading)


# --- As batches use them.


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings so far."""
    monkeypatch.setattr(logging.getLogger("crystal_hpc"), "propagate", True)
    return lambda: [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def digests(run: Run, sources: Sources, phase: int, prepared: PreparedRows | None, steps: range) -> list[int]:
    reading = open_reading(run, sources, phase)
    stores = dict(zip(reading.order.sources, reading.sources, strict=True))
    batches = PhaseBatches(reading.order, stores, 12, 2, 1, 2, reading.fim, prepared)
    found = [batches.step(step).digest for step in steps]
    batches.close()
    return found


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_batches_are_the_same_with_all_some_or_no_slices(
    run: Run, sources: Sources, tmp_path: Path, phase: int, heard: Callable[[], list[str]]
) -> None:
    steps, cut, reading = range(9), make_cut(run, sources, phase, 1, 2, SPAN), open_reading(run, sources, phase)
    expected = digests(run, sources, phase, None, steps)
    for numbers, served in (([], {0}), ([1], {4}), ([0, 2], {5, 6})):  # the step read ahead may be called off
        for number in numbers:
            write_slice(cut, tmp_path, *cut.bounds(number), reading)
        prepared = PreparedRows(cut, tmp_path)
        assert digests(run, sources, phase, prepared, steps) == expected
        assert prepared.served in served
        for path in list(passed(cut, tmp_path, STEPS)):
            path.unlink()
    assert heard() == []


def test_a_scratch_that_fails_is_one_warning_and_training_goes_on(
    run: Run, sources: Sources, cut: Cut, reading: Reading, tmp_path: Path, heard: Callable[[], list[str]]
) -> None:
    expected = digests(run, sources, 0, None, range(9))
    path = write_slice(cut, tmp_path, 0, 4, reading)
    assert path is not None
    os.truncate(path, path.stat().st_size - 500)
    assert digests(run, sources, 0, PreparedRows(cut, tmp_path), range(9)) == expected
    assert len(heard()) == 1 and heard()[0].startswith("slices fail on this node")
    assert not path.exists(), "so that it is made anew"
    (tmp_path / "file").write_text("where a folder should be")
    assert digests(run, sources, 0, PreparedRows(cut, tmp_path / "file"), range(9)) == expected
    assert len(heard()) == 2


@pytest.fixture
def helpers(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Cut, int], Helper]]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    started: list[Helper] = []

    def start(cut: Cut, phase: int = 0) -> Helper:
        started.append(Helper(run_file, phase, cut, tmp_path))
        return started[-1]

    yield start
    for helper in started:
        helper.stop()


def test_a_helper_prepares_the_next_slice_and_passed_ones_go(
    run: Run, sources: Sources, tmp_path: Path, helpers: Callable[[Cut, int], Helper]
) -> None:
    cut, reading = make_cut(run, sources, 1, 1, 2, SPAN), open_reading(run, sources, 1)
    killed = cut.path(tmp_path, 4, 8).with_suffix(".h5.1.pending")
    killed.parent.mkdir(parents=True)
    killed.write_bytes(b"begun")
    prepared = PreparedRows(cut, tmp_path, helpers(cut, 1))
    assert not killed.exists()
    assert prepared.read(0) is None, "nobody waits for it"
    wait_for(cut.path(tmp_path, 4, 8).exists)
    rows = prepared.read(4)
    assert rows is not None and equal(rows, reading.rows(cut.share.positions(4)))
    wait_for(cut.path(tmp_path, 8, 10).exists)
    assert prepared.read(8) is not None
    assert sorted(passed(cut, tmp_path, STEPS)) == [cut.path(tmp_path, 4, 8), cut.path(tmp_path, 8, 10)]
    prepared.close()
    assert not list(passed(cut, tmp_path, STEPS)), "the phase is through"


def test_a_helper_ignores_signals_and_ends_with_its_parent(
    cut: Cut, tmp_path: Path, run_file: Path, helpers: Callable[[Cut], Helper]
) -> None:
    helper = helpers(cut)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        helper._process.send_signal(number)
    helper.ask(1)
    wait_for(cut.path(tmp_path, 4, 8).exists)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        helper._process.send_signal(number)
    helper.ask(2)
    wait_for(cut.path(tmp_path, 8, 10).exists)
    # A parent that is killed without a word:
    program = f"""
import json, os, signal
from pathlib import Path
from crystal_hpc.config.load import load_run
from crystal_hpc.data.preparing import Helper
from crystal_hpc.data.slices import make_cut
from crystal_hpc.data.sources import read_sources
run = load_run(Path({str(run_file)!r}))
helper = Helper(Path({str(run_file)!r}), 0, make_cut(run, read_sources(run), 0, 1, 2, {SPAN}), Path({str(tmp_path)!r}))
print(helper._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = Path("/proc") / json.loads(done.stdout).__str__()
    wait_for(lambda: not child.exists() or "Z" in (child / "stat").read_text().rpartition(")")[2].split()[0])


def test_a_helper_needs_no_torch(run_file: Path) -> None:
    program = "import sys; import crystal_hpc.data.preparing; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"
