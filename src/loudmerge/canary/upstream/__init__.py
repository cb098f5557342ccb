"""Where upstream's code comes from: files, packages, GitHub. Nothing of it is run."""
