"""What a guard can assert of code, and the fields that say it."""
