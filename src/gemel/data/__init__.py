"""From raw pages and messy files to training shards: documents in, documents out, and a reason for each that is dropped."""
