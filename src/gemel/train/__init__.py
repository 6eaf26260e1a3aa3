"""One trainer for every objective: batches of flat tokens in, a checkpoint out, and nothing lost if it is killed on the way."""
