"""An adapter in another layout."""
