"""From documents to batches: harvest, corpus, tokenizer, build, store, order, batches. Needs no torch but in batches."""
