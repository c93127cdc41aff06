"""Other programs that run language models, each driven in a process of its own."""
