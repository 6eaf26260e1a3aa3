"""Tokenizers on disk: Hugging Face directories (read and write) and GGUF files (read).

What a directory says about its tokenizer is spread over up to five files, written by many versions of many tools.
Everything that is read from them is read here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import tokenizers
from tokenizers.processors import TemplateProcessing

from gemel.config.errors import CheckpointError
from gemel.tokenizer.tokenizer import NAMED, Tokenizer

Json = dict[str, object]


def load(path: Path) -> Tokenizer:
    """The tokenizer of the checkpoint at `path`."""
    if path.is_dir():
        return _from_directory(path)
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path)
    raise CheckpointError(f"{path} is neither a directory with a tokenizer.json nor a .gguf file; give one of these")


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write what `load` and transformers read back."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(_pipeline(tokenizer).to_str(pretty=True), encoding="utf-8")
    config: Json = {
        # a class of transformers for one family would rebuild the pipeline from the vocabulary; this one takes it as it is
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.add_bos,
        **tokenizer.named,
    }
    _write_json(directory / "tokenizer_config.json", config)
    if len(tokenizer.eos_ids) > 1:
        _write_json(directory / "generation_config.json", {"eos_token_id": list(tokenizer.eos_ids)})
    for name, source in tokenizer.templates.items():
        file = directory / "chat_template.jinja" if name == "default" else directory / "additional_chat_templates" / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(source, encoding="utf-8")


def _pipeline(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The library's tokenizer, with a post-processor that puts BOS where `tokenizer` does; transformers heeds nothing else."""
    library, bos = tokenizer.library, tokenizer.named.get("bos_token")
    if (library.encode("").ids[:1] == [tokenizer.bos_id]) == tokenizer.add_bos:
        return library
    library = tokenizers.Tokenizer.from_str(library.to_str())
    single = f"{bos} $A" if tokenizer.add_bos else "$A"
    library.post_processor = TemplateProcessing(single=single, special_tokens=[(bos, tokenizer.bos_id)])
    return library


def _write_json(file: Path, value: Json) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _from_directory(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no tokenizer.json; save it with transformers' AutoTokenizer(...).save_pretrained to get one")
    try:
        library = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file} is not a tokenizer: {error}") from None
    config, special = _read_json(path / "tokenizer_config.json"), _read_json(path / "special_tokens_map.json")
    named = {name: text for source in (special, config) for name in NAMED if (text := _text_of(source.get(name)))}
    eos = _read_json(path / "generation_config.json").get("eos_token_id")
    add_bos = config.get("add_bos_token")
    return Tokenizer(
        library,
        named,
        _templates(path, config),
        add_bos if isinstance(add_bos, bool) else None,
        [token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int)],
    )


def _read_json(file: Path) -> Json:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return value


def _text_of(token: object) -> str | None:
    """A token is written as its text or as an object with it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _templates(path: Path, config: Json) -> dict[str, str]:
    """Chat templates by name: files first, then what tokenizer_config.json holds (a text, or a list of named texts)."""
    templates: dict[str, str] = {}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        templates["default"] = inline
    elif isinstance(inline, list):
        templates |= {str(entry["name"]): str(entry["template"]) for entry in inline if isinstance(entry, dict)}
    file = path / "chat_template.jinja"
    if file.is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    for extra in sorted(path.glob("additional_chat_templates/*.jinja")):
        templates[extra.stem] = extra.read_text(encoding="utf-8")
    return templates


def _from_gguf(path: Path) -> Tokenizer:
    from gguf.constants import Keys

    from gemel.tokenizer import gguf

    metadata = gguf.read_metadata(path)
    library = gguf.build(metadata)
    tokens = cast("list[str]", metadata[Keys.Tokenizer.LIST])
    ids = {
        "bos_token": Keys.Tokenizer.BOS_ID,
        "eos_token": Keys.Tokenizer.EOS_ID,
        "unk_token": Keys.Tokenizer.UNK_ID,
        "pad_token": Keys.Tokenizer.PAD_ID,
    }
    named = {name: tokens[index] for name, key in ids.items() if isinstance(index := metadata.get(key), int) and 0 <= index < len(tokens)}
    ends = [index for key in (Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID) if isinstance(index := metadata.get(key), int)]
    names = metadata.get(Keys.Tokenizer.CHAT_TEMPLATES, [])
    keys = {"default": Keys.Tokenizer.CHAT_TEMPLATE} | {
        str(name): Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name) for name in (names if isinstance(names, list) else [])
    }
    templates = {name: source for name, key in keys.items() if isinstance(source := metadata.get(key), str)}
    # where the file is silent: SentencePiece models start with BOS, byte-level ones do not, except Llama 3
    add_bos = metadata.get(Keys.Tokenizer.ADD_BOS)
    if not isinstance(add_bos, bool):
        add_bos = metadata.get(Keys.Tokenizer.MODEL) == "llama" or metadata.get(Keys.Tokenizer.PRE) in gguf.LLAMA3_NAMES
    return Tokenizer(library, named, templates, add_bos, ends)
