"""From a plan to weights in memory: own layers only."""
