"""The Hugging Face model code that `weights.export` copies into a published folder; it stands on its own there."""
