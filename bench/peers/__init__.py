"""Other engines on the same work, each in an environment of its own, side by side with ours in one run.

    python bench/peers/run.py --peers gemel,transformers,vllm,llamacpp,openvino --model DIR --workload FILE

`run.py` starts one process per engine and round; the module named after an engine drives it; `protocol.py` is what they share, with nothing
but the standard library, because it runs in every engine's own environment.
"""
