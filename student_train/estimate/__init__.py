"""What a run needs, told before it fails: memory of a device, disk, operations and time.  No weights are loaded."""
