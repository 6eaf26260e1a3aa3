"""The benchmark of data work: what a corpus holds, what recall is, and that gemel's own part runs."""

import json
import sys

import pytest

from gemel.bench import command, data
from gemel.config.errors import ConfigError
from tests.tokenizer import shapes

STORY = "The quick brown fox jumps over the lazy dog and then it runs away from the hunters into the dark wood, number {}. "


@pytest.fixture
def corpus(tmp_path):
    rows = [{"text": "".join(STORY.format(f"{i}{'abcdefghij'[j]}") for j in range(5)), "id": f"d{i}", "metadata": {}} for i in range(4)]
    rows = [{**row, "text": " ".join(word + "abcd"[i] for word in row["text"].split())} for i, row in enumerate(rows)]
    rows.append({"text": rows[1]["text"].upper(), "id": "copy", "metadata": {"copy_of": "d1", "edits": 0.01}})
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_recall_is_the_share_of_planted_pairs_that_are_not_both_kept(corpus):
    planted = [("a", "b", 0.01), ("c", "d", 0.01), ("e", "f", 0.05)]
    made = data.Corpus(corpus, 6, 1, planted)
    assert made.recall({"a", "c", "d", "e", "f"}) == {"0.01": 0.5, "0.05": 0.0}
    assert made.recall({"b"}) == {"0.01": 1.0, "0.05": 1.0}


def test_a_sample_holds_only_pairs_that_are_whole(corpus, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    whole = data.Corpus.sample(corpus, 10, folder)
    assert (whole.num_documents, whole.planted) == (5, [("copy", "d1", 0.01)])
    assert data.Corpus.sample(corpus, 4, folder).planted == []
    assert (folder / "corpus.jsonl").read_text().count("\n") == 4


def test_gemel_is_measured_in_a_process_of_its_own(corpus, tmp_path):
    shapes.tokenizer().save(tmp_path / "model")
    lines, result = data.compare("near-duplicates", corpus, 10, tmp_path / "model", None, None)
    [gemel] = result["results"]
    assert (gemel["tool"], gemel["kept"], gemel["recall"]) == ("gemel", 4, {"0.01": 1.0})
    assert set(gemel["cpu_s"]) == {"pass-0", "resolve-0", "conclude-0", "pass-1"}
    assert 10_000_000 < gemel["peak_bytes"] < 10_000_000_000
    assert "recall 0.01" in lines


def test_mistakes_name_their_way_out(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"bench/corpus\.py makes"):
        data.Corpus.sample(tmp_path / "absent.jsonl", 10, tmp_path)
    with pytest.raises(ConfigError, match="belong together"):
        data.compare("clean", corpus, 10, tmp_path, "datatrove", None)
    shapes.tokenizer().save(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"(?s)datatrove failed: .*No module named 'datatrove'"):
        sample = data.Corpus.sample(corpus, 10, tmp_path / "model")
        data.measure_datatrove("near-duplicates", sample, tmp_path / "model", tmp_path / "model", sys.executable)


def test_the_kinds_of_work_are_those_of_the_command_line():
    assert tuple(data.WORK) == command.WORK
    assert command.PEERS["data"] == data.PEERS
