"""What an adapter is, told before it is merged."""
