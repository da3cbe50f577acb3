"""From steps to documents and back: both ways agree, for every document and every step of a small run."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from crystal_hpc import files
from crystal_hpc.cli import main
from crystal_hpc.config import derive
from crystal_hpc.data.trace import History, about_document
from crystal_hpc.errors import RunError

Config = dict[str, Any]


@pytest.fixture
def history(tiny_config: Config, write_config: Callable[..., Path]) -> History:
    return History(write_config(tiny_config))


def test_documents_of_steps_and_steps_of_documents_agree(history: History) -> None:
    by_step: dict[tuple[str, int], set[Any]] = defaultdict(set)
    for phase in history.run.phases:
        for step in range(derive.phase_steps(phase)):
            for sample in history.samples(phase.name, step):
                for piece in history.pieces(phase.name, sample):
                    by_step[sample.source, piece.document].add((phase.name, step, sample, piece.start, piece.at))
    for source, store in history.stores.items():
        for document in range(store.info.documents):
            found = {
                (s.phase, s.step, s.sample, s.piece.start, s.piece.at) for s in history.sightings(source, document)
            }
            assert found == by_step.get((source, document), set())
    assert by_step


def test_the_pieces_of_a_sample_are_its_row(history: History) -> None:
    phase = history.run.phases[1]
    for number, sample in enumerate(history.samples(phase.name, 2)):
        rows, store = history.rows(phase.name, 2), history.stores[sample.source]
        row = [*rows.inputs[number].tolist(), int(rows.labels[number, -1])]
        pieces = history.pieces(phase.name, sample)
        joined = [t for p in pieces for t in store.document(p.document)[p.start : p.stop].tolist()]  # type: ignore[union-attr]
        assert joined == row and pieces[0].at == 0


def test_a_document_is_found_by_its_hash_and_by_its_number(history: History) -> None:
    store = history.stores["code"]
    _, digest = about_document(store, 3)  # type: ignore[arg-type]
    assert ("code", 3) in history.find(digest)
    assert history.find("code:3") == [("code", 3)]
    assert history.find("nothing of that name") == []
    with pytest.raises(RunError, match="source code has documents 0 to"):
        history.find("code:999999")


def crystal(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in words])
    return result.exit_code, result.output


def test_the_commands_tell_it_in_words(tiny_config: Config, write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(tiny_config)
    code, said = crystal("data", "trace", config, "--phase", "code", "--step", 1)
    assert code == 0 and said.startswith("phase code, step 1 (not done yet)\nsample 0: position ")
    (number,) = re.search(r"code row .*\n  at +0: document (\d+)", said).groups()  # type: ignore[union-attr]
    code, said = crystal("data", "trace", config, "--document", f"code:{number}")
    assert code == 0 and said.startswith(f"document {number} of code: read in ") and "phase code, step 1: " in said
    code, said = crystal("data", "show", config, "--phase", "code", "--step", 1, "--sample", 2)
    assert code == 0 and said.startswith("-- sample 2: position ")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.yaml").write_text(config.read_text())
    files.append_line(folder / "metrics.jsonl", {"phase": "code", "step": 1})
    code, said = crystal("data", "trace", folder, "--phase", "code", "--step", 1)
    assert code == 0 and said.startswith("phase code, step 1\n")


def test_the_commands_show_stores(tiny_config: Config) -> None:
    store, tokenizer = tiny_config["data"]["sources"]["code"], tiny_config["data"]["tokenizer"]
    code, said = crystal("data", "show", store, "--tokenizer", tokenizer, "--document", 1)
    assert code == 0 and said.startswith("document 1") and "<s>" in said and said.rstrip().endswith("</s>")
    code, said = crystal("data", "show", store, "--tokenizer", tokenizer, "--row", 2, "--length", 16)
    assert code == 0 and said.startswith("row 2, 16 tokens")
    code, said = crystal("data", "audit", store, "--tokenizer", tokenizer)
    assert code == 0 and said.rstrip().endswith("0 bad")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trace", "RUN"], "ask either for --phase and --step, or for --document"),
        (["trace", "RUN", "--phase", "no", "--step", "0"], "has no phase 'no'; choose from"),
        (["trace", "RUN", "--phase", "code", "--step", "99999"], "phase code has steps 0 to"),
        (["trace", "RUN", "--document", "unheard of"], "no document 'unheard of' in its sources"),
        (["trace", "STORE", "--document", "x"], "not a run folder"),
        (["show", "RUN", "--phase", "code"], "--phase and --step belong together"),
        (["show", "RUN", "--phase", "code", "--step", "0", "--sample", "-1"], "has samples 0 to"),
        (["show", "STORE"], "name --tokenizer, and either --document or --row"),
        (["show", "STORE", "--tokenizer", "TOKENIZER", "--document", "unheard"], "no document 'unheard'"),
        (["show", "STORE", "--tokenizer", "TOKENIZER", "--row", "10000000"], "has rows 0 to"),
        (["audit", "nowhere"], "no token store at nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tiny_config: Config, write_config: Callable[..., Path], words: list[str], said: str
) -> None:
    data = tiny_config["data"]
    places = {"RUN": write_config(tiny_config), "STORE": data["sources"]["code"], "TOKENIZER": data["tokenizer"]}
    code, output = crystal("data", *(places.get(word, word) for word in words))
    assert code == 2 and output.startswith("error: ") and said in output and len(output.splitlines()) == 1
