"""A small trained model, a ring of three nodes for it on one machine, and the command that shows them."""
