"""Files are compared with their digests beside other work: whatever goes wrong there is raised where the work is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crystal_hpc import files
from crystal_hpc.convert.digests import DigestCheck
from crystal_hpc.errors import CheckpointError
from crystal_hpc.train.manifest import FileEntry


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, FileEntry]:
    found = {}
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
        found[name] = FileEntry(3000, files.digest_file(tmp_path / name))
    return found


def test_whole_files_are_no_news_and_damage_is(entries: dict[str, FileEntry], tmp_path: Path) -> None:
    DigestCheck(tmp_path, entries).finish()
    (tmp_path / "two").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"two: damaged \(its digest"):
        DigestCheck(tmp_path, entries).finish()


def test_a_file_that_cannot_be_read_is_named(entries: dict[str, FileEntry], tmp_path: Path) -> None:
    (tmp_path / "two").unlink()
    with pytest.raises(CheckpointError, match=r"two: cannot be read \(No such file"):
        DigestCheck(tmp_path, entries).finish()
    (tmp_path / "two").symlink_to("/proc/self/mem")  # at address 0: a real EIO
    with pytest.raises(CheckpointError, match=r"two: cannot be read \(Input/output error\)"):
        DigestCheck(tmp_path, entries).finish()


def test_a_check_that_fails_in_any_other_way_was_not_passed(entries: dict[str, Any], tmp_path: Path) -> None:
    check = DigestCheck(tmp_path, entries | {"two": SimpleNamespace(bytes=3000)})
    with pytest.raises(AttributeError):
        check.finish()
    check.stop()
