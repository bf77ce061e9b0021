"""Who made an organ and whether that is believed: signatures, `trust.toml`, claims measured anew, provenance."""
