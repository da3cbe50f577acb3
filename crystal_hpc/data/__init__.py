"""From documents to batches: harvest, corpus, tokenizer, build, store, order, rows, batches (which needs torch)."""
