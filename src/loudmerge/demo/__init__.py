"""A tiny MoE, trained offline, through all of the rest."""
