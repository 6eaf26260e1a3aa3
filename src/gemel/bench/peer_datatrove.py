"""datatrove at the same work, by its own Python: `python peer_datatrove.py CORPUS FOLDER`. Imports nothing of gemel, which is not there.

MinHash in its four stages, one task and one process, with its defaults: word 5-grams, 14 bands of 8, texts simplified. What is kept goes to
FOLDER/kept; the last line of stdout is a JSON object with the processor seconds of each stage and the peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from time import process_time

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


def main(corpus: Path, folder: Path) -> None:
    """Run all stages."""
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    places = {name: str(folder / name) for name in ("signatures", "buckets", "removed", "kept")}
    reader = JsonlReader(str(corpus.parent), glob_pattern=corpus.name, compression=None)
    stages = {
        "signatures": [reader, MinhashDedupSignature(output_folder=places["signatures"], config=config)],
        "buckets": [MinhashDedupBuckets(input_folder=places["signatures"], output_folder=places["buckets"], config=config)],
        "cluster": [MinhashDedupCluster(input_folder=places["buckets"], output_folder=places["removed"], config=config)],
        "filter": [reader, MinhashDedupFilter(input_folder=places["removed"]), JsonlWriter(places["kept"], compression=None)],
    }
    cpu_s = {}
    for name, pipeline in stages.items():
        start_s = process_time()
        tasks = config.num_buckets if name == "buckets" else 1
        LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=str(folder / "logs" / name)).run()
        cpu_s[name] = process_time() - start_s
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"cpu_s": cpu_s, "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
