"""How organs learn: protocols, the loop, the cache of what enters an organ, recovery, and baselines."""
