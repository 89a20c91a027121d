"""What both doctors look at: findings, the machine, a model's files, an output folder.  Nothing here asks for torch
before it is known that torch can be imported."""
