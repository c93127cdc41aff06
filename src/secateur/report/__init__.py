"""What a pruned model says of itself: its record and its card."""
