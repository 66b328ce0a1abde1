"""Model files: the `.taper` container (docs/format.md) and Hugging Face checkpoints."""
