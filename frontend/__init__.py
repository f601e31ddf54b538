"""From a checkpoint directory to a Program."""
