"""Reads a checkpoint's configuration so that no key of it is ignored.

A family takes the keys it knows, each with a type; `finish` refuses whatever nobody took. A checkpoint that needs something we do not
compute then fails by name when it is loaded, not by nonsense when it generates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from gemel.config.errors import CheckpointError, UnsupportedError

# Keys that change no logit: training noise, bookkeeping, defaults of other tools. Those that start with _ are bookkeeping, too.
_NEUTRAL = """
    architectures attention_dropout attn_pdrop
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout id2label initializer_range
    is_llama_config label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id slow_but_exact suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
_REFUSED = {
    "auto_map": "code that comes with a checkpoint is never run; use a checkpoint of a built-in family",
    "quantization_config": "of quantized checkpoints, compressed-tensors and GGUF are read; use one of them or the unquantized one",
    "num_local_experts": "mixtures of experts are not built",
    "num_experts": "mixtures of experts are not built",
}


class Fields:
    """The keys of one JSON object, taken one by one. `what` names it in messages. A key that is null counts as absent."""

    def __init__(self, values: Mapping[str, object], what: str):
        self.what = what
        self._left = {key: value for key, value in values.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number; required without a default."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; required without a default."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(name, value, "a finite number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string; required without a default."""
        value = self._take(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        value = self._take(name, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "a list of strings")
        return value

    def names(self) -> list[str]:
        """The keys that nobody took yet."""
        return list(self._left)

    def section(self, name: str) -> Fields | None:
        """The object under `name`, to be taken and finished by itself; None if there is none."""
        if name not in self._left:
            return None
        value = self._left.pop(name)
        if not isinstance(value, Mapping):
            raise self._wrong(name, value, "an object")
        return Fields(value, f"{self.what}: {name}")

    def only(self, name: str, *allowed: object) -> None:
        """Refuse any value of `name` but these. Absent is fine."""
        if name in self._left:
            value = self._left.pop(name)
            if value not in allowed:
                raise UnsupportedError(f"{self.what}: {name} = {value!r} is not supported; {' or '.join(map(repr, allowed))} is")

    def drop(self, *names: str) -> None:
        """Keys that change no logit here."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Refuse the keys that nobody took."""
        self.drop(*_NEUTRAL.split(), *(name for name in self._left if name.startswith("_")))
        for name in ("is_decoder", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"):
            self.only(name, False)
        for name, reason in _REFUSED.items():
            if name in self._left:
                raise UnsupportedError(f"{self.what}: {name} = {str(self._left[name])[:80]}: {reason}")
        if self._left:
            raise UnsupportedError(
                f"{self.what} sets {', '.join(f'{key} = {value!r:.80}' for key, value in sorted(self._left.items()))}, which this model "
                "family does not know; remove what does not change the model's output from config.json"
            )

    def _take(self, name: str, default: object) -> object:
        if name not in self._left and default is None:
            raise CheckpointError(f"{self.what}: {name} is missing")
        return self._left.pop(name, default)

    def _wrong(self, name: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.what}: {name} = {value!r:.80} is not {wanted}")
