"""One bank: manifest, records and the upkeep of its index."""
