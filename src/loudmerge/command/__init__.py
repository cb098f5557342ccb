"""What the commands share: the arguments that several take, results and exit codes."""
