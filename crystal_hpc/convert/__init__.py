"""From a Megatron checkpoint to a Hugging Face folder, every weight accounted for."""
