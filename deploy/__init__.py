"""Getting macrame onto machines: the command line, the demo and its model."""
