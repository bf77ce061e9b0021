"""Where an organ goes: every mode and position tried on the same text, at the price of a few."""
