"""Statements that Python's syntax has in more than one form: for isinstance and for annotations."""

from __future__ import annotations

import ast
import sys

Import = ast.Import | ast.ImportFrom
For = ast.For | ast.AsyncFor
With = ast.With | ast.AsyncWith
if sys.version_info >= (3, 11):
    Try = ast.Try | ast.TryStar
else:
    Try = ast.Try
