"""What makes up for what a method removes: filters that compose with any of them."""
