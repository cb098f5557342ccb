"""Recomputes OUT by a second path, which shares no arithmetic with the first."""
