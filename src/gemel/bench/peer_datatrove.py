"""datatrove at the same work, by its own Python: `python peer_datatrove.py JOB.json`. Imports nothing of gemel, which is not there.

One task and one process, with datatrove's own defaults. The job: {"work": "near-duplicates", "clean" or "pages", "corpus": JSONL file,
"folder": for results, "tokenizer": tokenizer.json, "languages": fastText model}. What is kept goes to FOLDER/kept. The last line of stdout
is a JSON object with the processor seconds of each stage, without the time to start, and the peak memory.

datatrove's own language filter can only download its model, so a filter of five lines asks the same model from a file.
"""

from __future__ import annotations

import json
import sys
from functools import cache, partial
from pathlib import Path
from time import process_time
from typing import Any

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LambdaFilter,
)
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter


def is_english(document: Document, model: str) -> bool:
    """With a probability of 0.65, as datatrove's filter and FineWeb have it."""
    labels, scores = load(model).predict(document.text.replace("\n", " "))
    return bool(labels[0] == "__label__en" and scores[0] >= 0.65)


@cache
def load(model: str) -> Any:
    """The model, when it is first asked: datatrove copies its steps before they run, and a model cannot be copied."""
    import fasttext

    return fasttext.load_model(model)


def cleaning(job: dict[str, Any]) -> list[Any]:
    """The steps before near-duplicates are looked for."""
    if job["work"] == "near-duplicates":
        return []
    extract = [Trafilatura(favour_precision=True)] if job["work"] == "pages" else []
    quality = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter()]
    return [*extract, LambdaFilter(partial(is_english, model=job["languages"])), *quality]


def main(job: dict[str, Any]) -> None:
    """Run all stages."""
    corpus, folder = Path(job["corpus"]), Path(job["folder"])
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    places = {name: str(folder / name) for name in ("cleaned", "signatures", "buckets", "removed", "kept")}
    reader = JsonlReader(str(corpus.parent), glob_pattern=corpus.name, compression=None)
    stages: dict[str, list[Any]] = {}
    if steps := cleaning(job):
        stages["clean"] = [reader, *steps, JsonlWriter(places["cleaned"], compression=None)]
        reader = JsonlReader(places["cleaned"], compression=None)
    if job["work"] == "near-duplicates":
        rest: list[Any] = [JsonlWriter(places["kept"], compression=None)]
    else:
        end = {"eos_token": None, "shuffle_documents": False, "save_filename": "kept"}
        rest = [PIIFormatter(), DocumentTokenizer(places["kept"], tokenizer_name_or_path=job["tokenizer"], **end)]
    stages |= {
        "signatures": [reader, MinhashDedupSignature(output_folder=places["signatures"], config=config)],
        "buckets": [MinhashDedupBuckets(input_folder=places["signatures"], output_folder=places["buckets"], config=config)],
        "cluster": [MinhashDedupCluster(input_folder=places["buckets"], output_folder=places["removed"], config=config)],
        "filter": [reader, MinhashDedupFilter(input_folder=places["removed"]), *rest],
    }
    cpu_s = {}
    for name, pipeline in stages.items():
        start_s = process_time()
        tasks = config.num_buckets if name == "buckets" else 1
        LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=str(folder / "logs" / name)).run()
        cpu_s[name] = process_time() - start_s
    [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    print(json.dumps({"cpu_s": cpu_s, "peak_bytes": int(peak.split()[1]) * 1024}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
