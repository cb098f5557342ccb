"""The machine: threads, memory, the device, and files of tensors or JSON."""
