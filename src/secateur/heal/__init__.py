"""Healing a pruned model by training: LoRA adapters, merged at the end, or all weights."""
