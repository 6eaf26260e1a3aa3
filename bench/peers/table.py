"""From the lines that runners print to a summary, and from the summary to a table in Markdown. No engine is imported here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import median

Line = Mapping[str, object]
Summary = dict[str, object]


def summarize(lines: Iterable[Line]) -> dict[str, Summary]:
    """By variant: every number of every measure as {median, min, max, rounds}, what the engine said about itself, and errors."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    made: dict[str, Summary] = {}
    for line in lines:
        variant = str(line["variant"])
        summary = made.setdefault(variant, {"figures": {}})
        measure = line["measure"]
        if measure == "about":
            summary |= {key: line[key] for key in ("precision", "settings", "versions", "threads")}
        elif measure in ("plan", "error"):
            summary[str(measure)] = {key: value for key, value in line.items() if key not in ("variant", "round", "measure")}
        else:
            for name, value in line.items():
                if name == "tokens":
                    summary["tokens"] = value
                elif name not in ("variant", "round", "measure") and isinstance(value, int | float):
                    values[variant][f"{measure}.{name}"].append(float(value))
    for variant, figures in values.items():
        made[variant]["figures"] = {name: _over_rounds(numbers) for name, numbers in figures.items()}
    return made


def _over_rounds(numbers: list[float]) -> dict[str, float]:
    return {"median": median(numbers), "min": min(numbers), "max": max(numbers), "rounds": len(numbers)}


def disagreements(summaries: Mapping[str, Summary]) -> list[str]:
    """Variants whose first greedy tokens are not those of most variants: other rounding, or another model."""
    said = {variant: tuple(summary["tokens"]) for variant, summary in summaries.items() if "tokens" in summary}  # type: ignore[arg-type]
    if not said:
        return []
    usual = max(said.values(), key=list(said.values()).count)
    return [variant for variant, tokens in said.items() if tokens != usual]


def markdown(result: Mapping[str, object]) -> str:
    """The machine, one row per variant with the median (and the range over rounds), one row per plan, and notes."""
    summaries: Mapping[str, Summary] = result["variants"]  # type: ignore[assignment]
    columns = _columns(summaries)
    lines = [_machine(result), "", "| engine | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for variant, summary in summaries.items():
        figures: Mapping[str, Mapping[str, float]] = summary["figures"]  # type: ignore[assignment]
        lines.append(f"| {variant} | " + " | ".join(_cell(figures.get(name)) for name in columns) + " |")
        if "plan" in summary:
            planned = _planned(summary["plan"]["figures"])  # type: ignore[index]
            lines.append(
                f"| plan for {variant} | " + " | ".join(_number(planned[name]) if name in planned else "" for name in columns) + " |"
            )
    lines += ["", *(_note(variant, summary) for variant, summary in summaries.items())]
    if different := disagreements(summaries):
        lines.append(f"- The first greedy tokens of {', '.join(different)} differ from those of the others.")
    return "\n".join(lines) + "\n"


_TITLES = {
    "decode.tokens_per_s": "decode, one stream, tokens/s",
    "throughput.output_tokens_per_s": "offline, output tokens/s",
    "prefix.total_s": "shared prefix, s",
    "start.seconds": "start to first token, s",
    "memory.peak_mb": "peak memory, MB",
    "serve.ready_s": "server ready, s",
    "serve.first_token_s": "server's first token, s",
    "serve.ready_mb": "server when ready, MB",
    "serve.full_context_mb": "server with 4,096 tokens, MB",
}


def _columns(summaries: Mapping[str, Summary]) -> dict[str, str]:
    present = dict.fromkeys(name for summary in summaries.values() for name in summary["figures"])  # type: ignore[attr-defined]
    prefill = sorted((name for name in present if name.startswith("prefill.")), key=lambda name: int(name.rpartition("_")[2]))
    titles = {name: f"prefill {name.rpartition('_')[2]}, tokens/s" for name in prefill}
    order = ["decode.tokens_per_s", *prefill, *list(_TITLES)[1:]]
    return {name: (_TITLES | titles)[name] for name in order if name in present}


def _planned(plan: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The plan's figures under the names that runners use."""
    named = {
        "decode.tokens_per_s": plan.get("decode", {}).get("decode_tokens_per_s"),
        "throughput.output_tokens_per_s": plan.get("throughput", {}).get("output_tokens_per_s"),
        "prefix.total_s": plan.get("prefix", {}).get("total_s"),
    }
    for name, value in plan.get("prefill", {}).items():
        if name.endswith("_tokens_per_s"):
            named["prefill.tokens_per_s_" + name.removeprefix("prefill").removesuffix("_tokens_per_s")] = value
    return {name: value for name, value in named.items() if value is not None}


def _machine(result: Mapping[str, object]) -> str:
    machine: Mapping[str, object] = result["machine"]  # type: ignore[assignment]
    memory_gb = float(str(machine["memory_bytes"])) / 1e9
    isa = " ".join(machine["isa"])  # type: ignore[arg-type]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {memory_gb:.0f} GB, {isa}; {machine['system']}. "
        f"Model {result['model']}, workload {result['workload']}, {result['rounds']} rounds; "
        f"at most {_others(result):.0%} of the processors' time went to anything else."
    )


def _others(result: Mapping[str, object]) -> float:
    summaries: Mapping[str, Summary] = result["variants"]  # type: ignore[assignment]
    shares = [summary["figures"]["others.cpu_share"]["max"] for summary in summaries.values() if "others.cpu_share" in summary["figures"]]  # type: ignore[index, operator]
    return max(shares, default=0.0)


def _note(variant: str, summary: Summary) -> str:
    if "error" in summary:
        return f"- {variant}: did not run. {summary['error']['message']}"  # type: ignore[index]
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())  # type: ignore[attr-defined]
    settings = ", ".join(f"{name} {value}" for name, value in summary["settings"].items())  # type: ignore[attr-defined]
    note = f"- {variant}: {versions}; {summary['precision']}; {settings}; {summary['threads']} threads."
    if "plan" in summary:
        plan: Mapping[str, float] = summary["plan"]  # type: ignore[assignment]
        peaks: Mapping[str, float] = plan["flops_per_s"]  # type: ignore[assignment]
        rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {arithmetic}" for arithmetic, rate in peaks.items())
        note += f" Plan from {plan['read_bytes_per_s'] / 1e9:.1f} GB/s read, {rates}."
    return note


def _cell(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return ""
    if figure["rounds"] == 1:
        return _number(figure["median"])
    return f"{_number(figure['median'])} ({_number(figure['min'])}-{_number(figure['max'])})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
