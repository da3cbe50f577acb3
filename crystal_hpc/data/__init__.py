"""From documents to batches: harvest, corpus, tokenizer, build, store, order, fim, rows, batches (with torch)."""
