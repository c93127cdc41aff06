"""The two engines, `walk` and `sweep`, and what they stand on: tokens and losses."""
