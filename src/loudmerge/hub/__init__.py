"""Hub ids: download, and upload with a model card."""
