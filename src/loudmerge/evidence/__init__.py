"""Which layout an adapter has: what shapes, versions, markers and trained weights say of it."""
