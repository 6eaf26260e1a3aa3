"""Hugging Face's Trainer, with its defaults but for what the job fixes."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers as hf
from bench.peers import training
from datasets import Dataset


class Ticks(hf.TrainerCallback):
    """A step is done when the Trainer says so; its loss comes with the log of the step."""

    def __init__(self, clock: training.Clock):
        self._clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Behind everything that is prepared."""
        self._clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Weights are moved."""
        self._clock.tick()

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, Any], **__: Any) -> None:
        """Once per step, and once at the end without a loss."""
        if "loss" in logs:
            self._clock.losses.append(float(logs["loss"]))


def arguments(job: training.Job, num_steps: int, num_sequences: int, folder: str) -> dict[str, Any]:
    """What the Trainer, and those built on it, are told."""
    return {
        "output_dir": folder,
        "max_steps": num_steps,
        "per_device_train_batch_size": num_sequences,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": training.BETAS[0],
        "adam_beta2": training.BETAS[1],
        "max_grad_norm": training.CLIP,
        "bf16": job.precision == "bf16",
        "use_cpu": True,
        "gradient_checkpointing": False,  # which SFTTrainer would turn on
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def dataset(job: training.Job, *columns: str) -> tuple[Dataset, int, int]:
    """All sequences in their order, as each of the columns; how many steps there are, and how many sequences each has."""
    steps = job.steps()
    num_steps, num_sequences, _ = steps.shape
    rows = steps.flatten(0, 1).tolist()
    return Dataset.from_dict(dict.fromkeys(columns, rows)), num_steps, num_sequences


def train(job: training.Job, clock: training.Clock) -> dict[str, object]:
    """`Trainer.train`."""
    model = hf.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    data, num_steps, num_sequences = dataset(job, "input_ids", "labels")
    with tempfile.TemporaryDirectory() as folder:
        config = hf.TrainingArguments(**arguments(job, num_steps, num_sequences, folder))
        hf.Trainer(model, config, train_dataset=data, data_collator=hf.default_data_collator, callbacks=[Ticks(clock)]).train()
    return {"optimizer": str(config.optim), "gradient_checkpointing": config.gradient_checkpointing}


if __name__ == "__main__":
    training.main(train, "transformers", "accelerate")
