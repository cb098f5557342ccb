"""Virtual environments, and the commands that make and use them."""
