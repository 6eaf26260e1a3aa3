"""Fine-tuning data: messy files of many shapes to one form of conversation, and the steps that choose among them and add to them."""
