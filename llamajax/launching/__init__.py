"""Start the worker processes of a node, restart them, and agree with the other nodes."""
