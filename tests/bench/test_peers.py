"""The peers' protocol, on an engine with known times, and what is made of its lines. No peer is installed for this."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench.peers import protocol, table

ROOT = Path(__file__).parents[2]
WORKLOAD = {
    "decode": {"prompt": [1, 2, 3, 4], "out": 5},
    "prefill8": {"prompt": list(range(8)), "out": 1},
    "prefill8_alt": [{"prompt": list(range(8, 16)), "out": 1}],
    "offline": [{"prompt": [5, 6], "out": 3}, {"prompt": [7], "out": 9}],
    "shared": [{"prompt": [1, 2], "out": 2}, {"prompt": [1, 3], "out": 2}],
}


class Steady:
    """Half a second to the first token of every job, a quarter of a second for each of the others."""

    precision, settings, versions = "exact", {}, {"steady": "1"}

    def __init__(self, short_by=0):
        self.short_by, self.calls = short_by, []

    def run(self, jobs):
        self.calls.append(list(jobs))
        return [protocol.Span(0.5, 0.5 + 0.25 * (job.num_output - 1), list(range(job.num_output - self.short_by))) for job in jobs]

    def close(self):
        pass


def test_measures_are_worked_out_from_spans():
    peer = Steady()
    assert protocol.decode(peer, WORKLOAD) == {"tokens_per_s": 4.0, "tokens": [0, 1, 2, 3, 4]}
    assert protocol.prefill(peer, WORKLOAD) == {"tokens_per_s_8": 16.0}
    assert protocol.throughput(peer, WORKLOAD) == {"output_tokens_per_s": 12 / 2.5, "total_s": 2.5}
    assert protocol.prefix(peer, WORKLOAD) == {"output_tokens_per_s": 4 / 0.75, "total_s": 0.75}


def test_prefill_prompts_are_given_one_at_a_time_and_each_once():
    peer = Steady()
    protocol.prefill(peer, WORKLOAD)
    assert [[job.prompt for job in jobs] for jobs in peer.calls] == [[list(range(8))], [list(range(8, 16))]]


def test_warming_up_uses_no_prompt_of_the_workload():
    peer, lines = Steady(), []
    workload = WORKLOAD | {"offline": [{"prompt": list(range(20, 60)), "out": 3}], "decode": {"prompt": list(range(60, 100)), "out": 5}}
    workload |= {"prefill8": {"prompt": list(range(100, 108)), "out": 1}}
    protocol._warm_up(peer, workload, lines.append, spawned=0.0)
    given = {tuple(entry["prompt"]) for key in ("offline", "shared", "prefill8_alt") for entry in workload[key]}
    given |= {tuple(workload[key]["prompt"]) for key in ("decode", "prefill8")}
    assert not given & {tuple(job.prompt) for jobs in peer.calls for job in jobs}
    assert lines[0]["measure"] == "start"


def test_work_that_was_not_done_is_not_timed():
    with pytest.raises(RuntimeError, match="2 tokens instead of 3"):
        protocol.throughput(Steady(short_by=1), WORKLOAD)


def test_the_protocol_needs_nothing_but_the_standard_library():
    code = (
        "import sys; from bench.peers import protocol; print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()) <= {"bench", "__main__"}


def lines():
    def line(variant, number, measure, **values):
        return {"variant": variant, "round": number, "measure": measure, **values}

    about = {"precision": "exact", "settings": {"slots": 2}, "versions": {"steady": "1"}, "threads": 2}
    for number, rate in enumerate((30.0, 10.0, 20.0)):
        yield line("a:x", number, "decode", tokens_per_s=rate, tokens=[1, 2])
        yield line("b:x", number, "decode", tokens_per_s=5 * rate, tokens=[1, 2])
    yield line("a:x", 0, "prefill", tokens_per_s_2048=1000.0, tokens_per_s_512=2000.0)
    yield line("a:x", 0, "about", **about)
    yield line("b:x", 0, "about", **about)
    plan = {"decode": {"decode_tokens_per_s": 40.0}, "prefill": {"prefill512_tokens_per_s": 2500.0, "prefill512_ttft_s": 0.2}}
    yield line("b:x", 0, "plan", figures=plan, read_bytes_per_s=30e9, flops_per_s=150e9)
    yield line("c:x", 0, "decode", tokens_per_s=1.0, tokens=[1, 3])
    yield line("a:x", 0, "others", cpu_share=0.01)
    yield line("b:x", 0, "others", cpu_share=0.034)
    yield line("c:x", 0, "error", message="no such instruction", stderr=[])


RESULT = {
    "machine": {"cpu": "Abacus", "cores": 2, "memory_bytes": 24e9, "isa": ["beads"], "system": "Wood 1"},
    "model": "m",
    "workload": "w",
    "rounds": 3,
    "variants": table.summarize(lines()),
}


def test_summary_takes_the_median_of_rounds():
    assert RESULT["variants"]["a:x"]["figures"]["decode.tokens_per_s"] == {"median": 20.0, "min": 10.0, "max": 30.0, "rounds": 3}
    assert json.loads(json.dumps(RESULT)) == RESULT


def test_another_answer_is_noticed():
    assert table.disagreements(RESULT["variants"]) == ["c:x"]


def test_the_table_says_what_was_measured_planned_and_refused():
    text = table.markdown(RESULT).splitlines()
    assert text[0].startswith("Abacus, 2 cores, 24 GB, beads; Wood 1.")
    assert text[0].endswith("3 rounds; at most 3% of the processors' time went to anything else.")
    assert text[2] == "| engine | decode, one stream, tokens/s | prefill 512, tokens/s | prefill 2048, tokens/s |"
    assert text[4] == "| a:x | 20.0 (10.0-30.0) | 2,000 | 1,000 |"
    assert text[5] == "| b:x | 100 (50.0-150) |  |  |"
    assert text[6] == "| plan for b:x | 40.0 | 2,500 |  |"
    assert "- c:x: did not run. no such instruction" in text
    assert text[-1] == "- The first greedy tokens of c:x differ from those of the others."


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--peers", "gmel"], "there is no peer 'gmel'"),
        (["--work", "sprint"], "there is no work 'sprint'"),
        (["--peers", "gemel", "--once", "vllm"], "--once vllm"),
        ([], "--model must be"),
    ],
)
def test_mistakes_are_refused_before_anything_is_installed(argv, says, tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "peers" / "run.py"), "--venvs", str(tmp_path / "venvs"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and says in done.stderr
    assert not (tmp_path / "venvs").exists()


def test_a_table_can_be_printed_again(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT))
    command = [sys.executable, str(ROOT / "bench" / "peers" / "run.py"), "--table", str(path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == table.markdown(RESULT)
