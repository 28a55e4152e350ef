"""LoRA in a whole model: put in, trained, saved, merged."""
