"""What an organ gives away of the text that it was trained on: attacks on it, and ways to give away less."""
