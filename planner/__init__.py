"""Pure arithmetic from headers and node sizes to a plan. No IO but reading the files it is given."""
