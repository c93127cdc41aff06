"""A method and a family that secateur finds by this package's entry points."""
