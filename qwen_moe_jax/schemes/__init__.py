"""What config.json says of quantisation: which matrices are stored in few bits, and how."""
