"""What lies on disk: a PEFT adapter, a checkpoint of safetensors, and how model families store experts."""
