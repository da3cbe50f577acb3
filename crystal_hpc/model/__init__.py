"""The model as Megatron-core runs it: backend, parallel layout, muP, the GPT itself, its loss."""
