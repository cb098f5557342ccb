"""The merge as users call it: of directories, and of a live PeftModel."""
