"""What two artifacts make of the very same steps: errors of logits, speed and memory."""
