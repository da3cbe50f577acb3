"""What reaches the disk is old or new, never a mixture; and what the disk refuses is said in words."""

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_hpc import files
from crystal_hpc.errors import CrystalError, DiskError, RunError

KILLS = 12
SIZE = 200_000

# Writes the digits 0..9, each SIZE times over, as one file after another, for ever.
WRITER = f"""
import itertools, sys
from pathlib import Path
from crystal_hpc.files import write_file
path = Path(sys.argv[1])
print("ready", flush=True)
for number in itertools.count():
    write_file(path, str(number % 10) * {SIZE})
"""

# Appends lines with a running number, for ever.
APPENDER = """
import itertools, sys
from pathlib import Path
from crystal_hpc.files import append_line
path = Path(sys.argv[1])
print("ready", flush=True)
for number in itertools.count(int(sys.argv[2])):
    append_line(path, {"number": number, "text": "x" * 5000})
"""


def start(program: str, *arguments: object) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_file(path, "0" * SIZE)
    chance = random.Random(1)
    seen = set()
    for _ in range(KILLS):
        process = start(WRITER, path)
        deadline = time.monotonic() + chance.uniform(0, 0.05)
        while time.monotonic() < deadline:
            seen.add(one_digit(path.read_text()))  # a reader beside the writer sees whole files too
        kill(process)
        seen.add(one_digit(path.read_text()))
    assert len(seen) > 1, "the writers never wrote"
    leftovers = [other.name for other in tmp_path.iterdir() if other != path]
    assert all(name.endswith(files.PENDING) for name in leftovers)


def one_digit(text: str) -> str:
    assert len(text) == SIZE
    (digit,) = set(text)
    return digit


def test_an_appender_killed_at_any_moment_costs_at_most_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    chance = random.Random(2)
    for turn in range(5):
        process = start(APPENDER, path, turn * 1_000_000)
        time.sleep(chance.uniform(0, 0.03))
        kill(process)
        # What a crash of the machine, unlike one of the process, may do to the last line.
        if path.exists() and turn % 2:
            os.truncate(path, max(0, path.stat().st_size - 2000))
    files.append_line(path, {"number": "last"})
    numbers = [line["number"] for line in files.read_lines(path)]
    assert numbers[-1] == "last"
    for before, after in zip(numbers, numbers[1:-1], strict=False):
        assert after == before + 1 or after % 1_000_000 == 0


@settings(deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=8), max_size=3), min_size=1, max_size=5),
    st.data(),
)
def test_a_line_torn_anywhere_is_skipped_and_never_run_into(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, str]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("torn") / "lines"
    for value in values:
        files.append_line(path, value)
    content = path.read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    path.write_bytes(content[: len(content) - data.draw(st.integers(0, last))])
    survivors = list(files.read_lines(path))
    assert survivors in (values, values[:-1])
    assert files.last_line(path) == (survivors[-1] if survivors else None)
    files.append_line(path, {"after": "the crash"})
    assert list(files.read_lines(path)) == [*survivors, {"after": "the crash"}]
    assert files.last_line(path) == {"after": "the crash"}


def test_lines_that_are_no_objects_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n\n[1]\n3\n{"b"\n\xff\xfe\n\0\0\0\0\n{"c": 2}\n{"d"')
    assert list(files.read_lines(path)) == [{"a": 1}, {"c": 2}]
    assert files.last_line(path) == {"c": 2}


def test_the_last_line_of_a_long_file_is_found_near_its_end(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for number in range(200):
        files.append_line(path, {"number": number})
    assert files.last_line(path, within=40) == {"number": 199}
    assert files.last_line(path, within=5) is None


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert list(files.read_lines(tmp_path / "none")) == []
    assert files.last_line(tmp_path / "none") is None


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    files.write_file(tmp_path / "bytes", b"\0\xff")
    assert (tmp_path / "bytes").read_bytes() == b"\0\xff"
    files.write_file(tmp_path / "text", "é\n")
    assert (tmp_path / "text").read_bytes() == "é\n".encode()
    files.write_json(tmp_path / "json", {"a": ["é", 1.5, None]})
    assert files.read_json(tmp_path / "json") == {"a": ["é", 1.5, None]}
    assert (tmp_path / "json").read_text().endswith("}\n")


def test_a_folder_is_committed_whole_under_its_final_name(tmp_path: Path) -> None:
    pending, final = tmp_path / "step.pending", tmp_path / "step"
    files.make_folder(pending / "inner" / "deep")
    (pending / "inner" / "deep" / "shard").write_bytes(b"123")
    files.write_json(pending / "manifest.json", {"files": 1})
    files.commit_folder(pending, final)
    assert not pending.exists()
    assert (final / "inner" / "deep" / "shard").read_bytes() == b"123"
    assert files.read_json(final / "manifest.json") == {"files": 1}


def test_a_committed_folder_is_never_replaced(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    with pytest.raises(OSError, match="not empty") as caught:
        files.commit_folder(tmp_path / "new", tmp_path / "old")
    assert caught.value.errno == errno.ENOTEMPTY
    assert (tmp_path / "old" / "content").read_text() == "old"
    assert (tmp_path / "new" / "content").read_text() == "new"


def test_a_folder_that_is_not_there_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    files.remove_folder(tmp_path / "a")
    files.remove_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.fixture(params=["", "ro"], ids=["full", "read-only"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB with a file of 20 kB on it, or the same mounted read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        (folder / "file").write_bytes(b"old" * 7000)
        (folder / "pending").mkdir()
        if request.param:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("small_disk", [""], ids=["full"], indirect=True)
def test_a_full_disk_is_named_and_the_old_file_stays(small_disk: Path) -> None:
    path = small_disk / "file"
    with pytest.raises(DiskError, match=f"{path}: the disk is full; free some space"):
        files.write_file(path, b"new" * 40_000)
    assert path.read_bytes() == b"old" * 7000
    assert {found.name for found in small_disk.iterdir()} == {"file", "pending"}, "the attempt still takes space"
    files.write_file(path, b"small enough")
    assert path.read_bytes() == b"small enough"


@pytest.mark.parametrize("small_disk", [""], ids=["full"], indirect=True)
def test_lines_on_a_full_disk_survive_what_did_not_fit(small_disk: Path) -> None:
    path = small_disk / "lines"
    with pytest.raises(DiskError, match=f"{path}: the disk is full"):
        for number in range(100):
            files.append_line(path, {"number": number, "text": "x" * 3000})
    numbers = [line["number"] for line in files.read_lines(path)]
    assert numbers == list(range(len(numbers))) and numbers
    (small_disk / "file").unlink()
    files.append_line(path, {"number": len(numbers)})
    assert [line["number"] for line in files.read_lines(path)] == list(range(len(numbers) + 1))


@pytest.mark.parametrize("small_disk", ["ro"], ids=["read-only"], indirect=True)
def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    with pytest.raises(DiskError, match="the file system is read-only; choose a folder that can be written"):
        files.write_file(small_disk / "file", "new")
    with pytest.raises(DiskError, match="the file system is read-only"):
        files.append_line(small_disk / "file", {})
    with pytest.raises(DiskError, match="the file system is read-only"):
        files.make_folder(small_disk / "folder")
    with pytest.raises(DiskError, match="the file system is read-only"):
        files.commit_folder(small_disk / "pending", small_disk / "final")
    assert (small_disk / "file").read_bytes() == b"old" * 7000


def test_a_folder_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="a part of the path is a file, not a folder"):
        files.make_folder(tmp_path / "file" / "folder")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG])
def test_a_refusal_is_recognised_by_its_number_or_wrapped_into_text(code: int) -> None:
    wrapped = f"[Errno {code}] Can't synchronously write data (file write failed: {os.strerror(code)})"
    for error in (OSError(code, os.strerror(code)), OSError(wrapped)):
        with pytest.raises(CrystalError, match="^some/path: ") as caught, files.disk_errors("some/path"):
            raise error
        assert caught.value.__cause__ is error


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(FileNotFoundError), files.disk_errors("some/path"):
        Path("/nowhere/at/all").read_bytes()
    with pytest.raises(KeyError), files.disk_errors("some/path"):
        raise KeyError


def test_a_digest_covers_every_byte(tmp_path: Path) -> None:
    content = random.Random(3).randbytes((1 << 22) + 5)
    path = tmp_path / "file"
    path.write_bytes(content)
    assert files.digest_file(path) == xxhash.xxh3_128_hexdigest(content)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert files.digest_file(path) != xxhash.xxh3_128_hexdigest(content)
    path.write_bytes(b"")
    assert files.digest_file(path) == xxhash.xxh3_128_hexdigest(b"")


def test_waiting_ends_when_the_file_shows_or_time_is_up(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    assert not files.wait_until_visible(path, 0.05)

    def appear() -> None:
        path.parent.mkdir()
        path.write_text(json.dumps("here"))

    timer = threading.Timer(0.2, appear)
    timer.start()
    begun = time.monotonic()
    assert files.wait_until_visible(path, 30)
    assert time.monotonic() - begun < 10
    timer.join()
    assert files.wait_until_visible(path, 0)


def test_a_lock_keeps_others_out_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with files.locked(path, "busy"):
        with pytest.raises(RunError, match="busy"), files.locked(path, "busy"):
            raise AssertionError("both are inside")
        assert path.exists()
    assert not path.exists()
    path.touch()  # of a holder that was killed
    with files.locked(path, "busy"):
        pass


def test_a_lock_that_its_holder_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flock = tmp_path / "lock", fcntl.flock

    def too_late(file: Any, how: int) -> None:
        path.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with pytest.raises(RunError, match="busy"), files.locked(path, "busy"):
        raise AssertionError("inside, with a lock that nobody else sees")


def test_where_a_file_system_has_no_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_file: Any, _how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.locked(tmp_path / "lock", "busy"):
        pass
