"""What code does, by its syntax tree."""
