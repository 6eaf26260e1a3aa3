"""TRL's SFTTrainer on token ids that are sequences already, with its defaults but for what the job fixes."""

from __future__ import annotations

import tempfile

import torch
import transformers as hf
from bench.peers import training
from bench.peers.train_hf import Ticks, arguments, dataset
from tokenizers import Tokenizer, models
from trl import SFTConfig, SFTTrainer


def train(job: training.Job, clock: training.Clock) -> dict[str, object]:
    """`SFTTrainer.train`. It insists on a tokenizer, for padding that is not needed here."""
    model = hf.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    data, num_steps, num_sequences = dataset(job, "input_ids")
    plain = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>", eos_token="<pad>"
    )
    with tempfile.TemporaryDirectory() as folder:
        fixed = arguments(job, num_steps, num_sequences, folder)
        config = SFTConfig(**fixed, max_length=len(data[0]["input_ids"]), packing=True, packing_strategy="wrapped")
        SFTTrainer(model, config, train_dataset=data, processing_class=plain, callbacks=[Ticks(clock)]).train()
    chosen = {"optimizer": str(config.optim), "gradient_checkpointing": config.gradient_checkpointing}
    return chosen | {"loss": config.loss_type, "packing": config.packing_strategy}


if __name__ == "__main__":
    training.main(train, "trl", "transformers", "accelerate")
