"""Adapter x checkpoint -> a plan: every output tensor, every adapter tensor used exactly once."""
