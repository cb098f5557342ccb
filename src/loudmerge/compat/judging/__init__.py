"""What a cell must show, what it showed, and what it falls short of."""
