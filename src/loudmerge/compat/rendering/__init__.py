"""The table: as a value, as Markdown, as a page, in the README."""
