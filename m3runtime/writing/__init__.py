"""Everything that changes a bank: writing, codec fitting, verification and repair."""
