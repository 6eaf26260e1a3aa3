"""The peers' protocol, on an engine with known times, and what is made of its lines. No peer is installed for this."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.peers import protocol, random_model, serving, table, w8a8
from safetensors.torch import load_file, save_file

from gemel.cli import main
from gemel.config.engine import EngineConfig
from gemel.model import build
from gemel.tokenizer.tokenizer import Tokenizer

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
    yield line("b:x", 0, "plan", figures=plan, read_bytes_per_s=30e9, flops_per_s={"float32": 150e9})
    yield line("c:x", 0, "decode", tokens_per_s=1.0, tokens=[1, 3])
    yield line("a:x", 0, "others", cpu_share=0.01)
    yield line("b:x", 0, "others", cpu_share=0.034)
    yield line("b:x", 0, "serve", ready_s=1.5, first_token_s=1.75, ready_mb=310.0, full_context_mb=420.0)
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
    served = "server ready, s | server's first token, s | server when ready, MB | server with 4,096 tokens, MB"
    assert text[2] == f"| engine | decode, one stream, tokens/s | prefill 512, tokens/s | prefill 2048, tokens/s | {served} |"
    assert text[4] == "| a:x | 20.0 (10.0-30.0) | 2,000 | 1,000 |  |  |  |  |"
    assert text[5] == "| b:x | 100 (50.0-150) |  |  | 1.50 | 1.75 | 310 | 420 |"
    assert text[6] == "| plan for b:x | 40.0 | 2,500 |  |  |  |  |  |"
    assert any("150 GFLOP/s in float32" in line for line in text)
    assert "- c:x: did not run. no such instruction" in text
    assert text[-1] == "- The first greedy tokens of c:x differ from those of the others."


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--peers", "gmel"], "there is no peer 'gmel'"),
        (["--peers", "llamacpp:int4"], "llamacpp is not measured in 'int4'; it is in f32, f16, bf16, q8_0, q4_0, q4_1"),
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


SERVER = """
import http.server, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; block = bytearray(50_000_000); time.sleep(60)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")
    do_GET = do_POST = answer
    def log_message(self, *args): pass
time.sleep(0.3)
try:
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
finally:
    child.kill()
"""


def test_a_server_is_timed_until_it_answers_and_weighed_with_its_children(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8}')
    script = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit())\n" + SERVER
    monkeypatch.setitem(serving.COMMANDS, "fake", lambda model, precision, threads, port: [sys.executable, "-c", script, str(port)])
    measured = serving.measure("fake", tmp_path, "exact", 1)
    assert 0.3 < measured["ready_s"] < measured["first_token_s"] < 30
    assert 55 < measured["ready_mb"] < 1000
    assert 55 < measured["full_context_mb"] < 1000


def test_a_server_that_ends_is_reported_at_once(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8}')
    monkeypatch.setitem(serving.COMMANDS, "fake", lambda model, precision, threads, port: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="ended with status 3"):
        serving.measure("fake", tmp_path, "exact", 1)


def test_every_precision_of_ours_is_a_setting_of_the_engine():
    for settings in serving.GEMEL.values():
        EngineConfig.parse(settings)


def test_gemel_is_served_with_the_flags_of_the_precision(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    command = serving.gemel(tmp_path, "int4", 2, 1234)
    args = main.parser("serve").parse_args(command[command.index("serve") + 1 :])
    assert (args.weights, args.max_context, args.port, args.threads) == ("int4", 512, 1234, 2)


def test_w8a8_rounds_rows_of_the_layers_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    names = {"model.layers.0.mlp.up_proj.weight": (6, 4), "model.embed_tokens.weight": (9, 4), "model.norm.weight": (4,)}
    given = {name: torch.randn(shape) for name, shape in names.items()}
    save_file(given, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    (tmp_path / "tokenizer.json").write_text("{}")
    w8a8.write(tmp_path, tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    (name, *untouched) = names
    assert made[name].dtype == torch.int8
    step_N1 = made[name + "_scale"]
    assert ((made[name] * step_N1 - given[name]).abs() <= step_N1 / 2 * (1 + 1e-6)).all()
    assert all(torch.equal(made[key], given[key]) for key in untouched)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"] and config["hidden_size"] == 4
    assert (tmp_path / "made" / "tokenizer.json").exists()


def test_the_random_model_is_one_that_loads(tmp_path, monkeypatch):
    for name, value in {"LAYERS": 1, "WIDTH": 64, "HEADS": 2, "KV_HEADS": 1, "FFN": 96, "VOCAB": 300}.items():
        monkeypatch.setattr(random_model, name, value)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(random_model, "CONFIG", random_model.CONFIG | small | {"head_dim": 32, "vocab_size": 300})
    random_model.write(tmp_path)
    loaded = build.load(tmp_path)
    assert loaded.config.vocab_size == 300 and not loaded.config.tied_head
    assert 0.5 < loaded.model.layers[0].mlp.down.weight.var() * 96 < 2
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("two bytes", add_bos=False)) == "two bytes"
