"""Healing a pruned model: LoRA adapters trained by peft and transformers' Trainer, then merged."""
