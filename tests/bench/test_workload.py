"""Workload files are read whole or refused with a reason; the built-in one is the same every time and fits the model."""

import json

import pytest

from gemel.bench.workload import Job, dump, load, small
from gemel.config.errors import ConfigError

GOOD = {
    "comment": "three tokens",
    "decode": {"prompt": [1, 2], "out": 3},
    "prefill3": {"prompt": [1, 2, 3], "out": 1},
    "prefill3_alt": [{"prompt": [3, 2, 1], "out": 1}],
    "offline": [{"prompt": [4], "out": 2}, {"prompt": [5, 6], "out": 1}],
    "shared": [{"prompt": [7, 8], "out": 1}],
}


def write(tmp_path, data):
    path = tmp_path / "work.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_a_file_is_read_whole(tmp_path):
    work = load(write(tmp_path, GOOD))
    assert work.name == "work"
    assert work.decode == Job((1, 2), 3)
    assert work.prefill == {3: (Job((1, 2, 3), 1), Job((3, 2, 1), 1))}
    assert work.offline == (Job((4,), 2), Job((5, 6), 1))
    assert work.shared == (Job((7, 8), 1),)
    assert work.server == ()
    assert work.offline[1].num_total == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ofline": []}, "ofline"),
        ({"shared": []}, "shared"),
        ({"decode": {"prompt": [], "out": 1}}, "decode"),
        ({"decode": {"prompt": [1, -2], "out": 1}}, "decode"),
        ({"decode": {"prompt": [1], "out": 0}}, "out = 0"),
        ({"decode": {"prompt": [1], "out": 1, "seed": 2}}, "decode"),
        ({"prefill4": {"prompt": [1, 2, 3], "out": 1}}, "prefill4"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, says):
    with pytest.raises(ConfigError, match=says):
        load(write(tmp_path, GOOD | change))


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_not_a_workload(tmp_path, text):
    with pytest.raises(ConfigError, match=r"work\.json"):
        load(write(tmp_path, text))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="absent"):
        load(tmp_path / "absent.json")


def test_small_is_the_same_every_time_and_another_with_another_seed():
    assert small(49152, 8192) == small(49152, 8192)
    assert small(49152, 8192) != small(49152, 8192, seed=1)


def test_what_is_dumped_is_loaded(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(dump(small(1000, 256)))
    assert load(path) == small(1000, 256)


@pytest.mark.parametrize(("vocab_size", "max_context"), [(49152, 8192), (260, 64), (1000, 16)])
def test_small_fits_vocabulary_and_context(vocab_size, max_context):
    work = small(vocab_size, max_context)
    jobs = [work.decode, *work.offline, *work.shared, *work.server, *(job for jobs in work.prefill.values() for job in jobs)]
    assert all(job.prompt and job.num_output >= 1 and job.num_total <= max_context for job in jobs)
    assert all(0 <= token < vocab_size for job in jobs for token in job.prompt)


def test_small_shares_a_prefix_and_nothing_else_does():
    work = small(49152, 8192)
    assert len({job.prompt[:512] for job in work.shared}) == 1
    assert len({job.prompt for job in work.shared}) == len(work.shared)
    assert len({job.prompt[:16] for jobs in work.prefill.values() for job in jobs}) == sum(len(jobs) for jobs in work.prefill.values())
