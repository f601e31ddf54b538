"""Steps on a device, whatever drives it."""
