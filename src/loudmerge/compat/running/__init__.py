"""Starts what runs in the environments, and reads what it left."""
