"""Planning: size and cost of a bank before it is written."""
