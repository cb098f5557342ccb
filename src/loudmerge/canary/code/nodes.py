"""Statements that Python's syntax has in more than one form."""

from __future__ import annotations

import ast

IMPORTS = (ast.Import, ast.ImportFrom)
FORS = (ast.For, ast.AsyncFor)
WITHS = (ast.With, ast.AsyncWith)
TRIES = (ast.Try, getattr(ast, "TryStar", ast.Try))
"""`try … except*` from Python 3.11 on."""
